"""One variant in a process of its own: builds its work, then runs as many repetitions as asked.

The parent starts `python -m benchmarks.worker SPEC`, SPEC a JSON object, and speaks JSON lines
with it: the first line back holds the numbers that must agree between variants; then every line
{"repeat": n} is answered by {"seconds": s}, and {"finish": true} by the peak memory.
"""

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import qkjax
from qkjax.cli import startup


class Work(Protocol):
    """What every variant can do; constructed with the spec."""

    def first(self) -> dict[str, float]:
        """The first repetition, and the numbers that other variants must agree with."""

    def repeat(self, times: int) -> None:
        """Does the work so often; returns when the device has finished."""

    def device(self) -> str | None:
        """Kind of the accelerator; None on CPU."""

    def peak_bytes(self) -> int | None:
        """Peak memory of the accelerator; None: the process's own is meant."""


def main(spec: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    started = time.time() - time.process_time()  # close to the start of the process
    try:
        if spec["platform"] == "cpu":
            startup.stay_on_one_cpu()
        qkjax.prepare_process()
        clock = time.process_time if spec["platform"] == "cpu" else time.perf_counter
        work: Work = getattr(importlib.import_module(spec["module"]), spec["class"])(spec)
        agree = work.first()
        answer(agree=agree, first_seconds=time.time() - started, device=work.device())
        for line in sys.stdin:
            request = json.loads(line)
            if "repeat" not in request:
                answer(peak_bytes=work.peak_bytes() or _peak_resident_bytes())
                return
            answer(seconds=_measure(work, request["repeat"], clock))
    except Exception as error:
        answer(error=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
        raise


def _measure(work: Work, times: int, clock: Callable[[], float]) -> float:
    started = clock()
    work.repeat(times)
    return clock() - started


def _peak_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
