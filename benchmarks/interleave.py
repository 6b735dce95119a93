"""Runs the variants of a subject in interleaved blocks: A B C C B A, round after round.

Load from elsewhere, and the clock speed, drift within seconds: only ratios of neighbouring blocks
mean something. The first variant runs in two processes, and the ratio of the two says how much of
any other ratio is noise.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import subjects
from qkjax import errors
from qkjax.config import Config

# Relative, of every number that `Work.first` returns.
AGREEMENT = {"float32": 1e-4, "bfloat16": 2e-2}
AGAIN = " again"
_ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure, and how long."""

    subject: str
    variants: tuple[str, ...]
    config: Config
    platform: str  # "cpu" (one core, CPU time) | "gpu" (wall time)
    rounds: int
    block_seconds: float  # of the reference, at least


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One variant's figures."""

    seconds: float  # of one repetition: median over the rounds
    ratio: float  # to the reference: median of the rounds' ratios
    peak_bytes: int
    first_seconds: float  # from the start of the process to the end of the first repetition
    rounds: tuple[float, ...]  # seconds of one repetition, each round


@dataclasses.dataclass(frozen=True)
class Measurement:
    """All variants of one run; ratios within `noise` of 1 are equal."""

    request: Request
    parameters: int
    device: str | None  # of the first variant; None on CPU
    repetitions: int  # in a block
    agreed: dict[str, float]  # what every variant computed in its first repetition
    noise: float
    outcomes: dict[str, Outcome]

    @property
    def net_ratio(self) -> float | None:
        """Of the subject's net variant less its start, to the reference; None where it has none."""
        net = subjects.subject(self.request.subject).net
        if net is None or not {*net} <= self.outcomes.keys():
            return None
        whole, start, reference = (self.outcomes[name].rounds for name in (*net, self.reference))
        return statistics.median(
            (a - b) / c for a, b, c in zip(whole, start, reference, strict=True)
        )

    @property
    def reference(self) -> str:
        """The variant that ratios refer to: the subject's, or the first where it was left out."""
        wanted = subjects.subject(self.request.subject).reference
        return wanted if wanted in self.outcomes else next(iter(self.outcomes))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for a JSON file."""
        values = dataclasses.asdict(self) | {"net_ratio": self.net_ratio}
        values["request"]["config"] = subjects.describe(self.request.config)
        return values


class _Worker:
    """A variant's process; `with` ends it."""

    def __init__(self, request: Request, name: str, folder: pathlib.Path) -> None:
        module, cls = subjects.work_class(request.subject, name.removesuffix(AGAIN))
        on_cpu = request.platform == "cpu"
        spec = {
            "module": module,
            "class": cls,
            "platform": request.platform,
            "config": request.config.to_dict(),
            "inputs": str(folder / "inputs.npz"),
        }
        self._name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(folder / f"{name}.log", "w"),
            text=True,
            env=_environment(folder, on_cpu),
        )
        self._log = folder / f"{name}.log"
        started = self._read()
        self.agree: dict[str, float] = started["agree"]
        self.first_seconds: float = started["first_seconds"]
        self.device: str | None = started["device"]

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def seconds(self, repetitions: int) -> float:
        """Seconds of one repetition, measured over a block of them."""
        return self._ask(repeat=repetitions)["seconds"] / repetitions

    def peak_bytes(self) -> int:
        return self._ask(finish=True)["peak_bytes"]

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a dead process has left its last message
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": _last_line(self._log)}
        if "error" in answer:
            raise errors.UsageError(
                f"benchmark: the variant {self._name} failed: {answer['error']}. Leave it out "
                "with --variants, or install what it needs (pip install -e '.[bench]')."
            )
        return answer


def measure(
    request: Request, folder: pathlib.Path, report: Callable[[str], None] = print
) -> Measurement:
    """Starts every variant, compares their first repetition, and only then takes times.

    Args:
        folder: for weights and tokens, logs and compilation caches, empty at the start.
        report: called with a line of progress now and then.
    Raises:
        UsageError: a variant failed, or does not compute what the others do.
    """
    parameters = write_inputs(request.config, folder)
    names = [*request.variants, request.variants[0] + AGAIN]
    subject = subjects.subject(request.subject)
    reference = subject.reference if subject.reference in names else names[0]
    with contextlib.ExitStack() as stack:
        workers = {}
        for name in names:
            workers[name] = stack.enter_context(_Worker(request, name, folder))
            report(f"{name}: first after {workers[name].first_seconds:.1f} s")
        agreed = check_agreement(
            {name: worker.agree for name, worker in workers.items()},
            AGREEMENT[request.config.model.dtype],
        )
        repetitions = 1
        if subject.warm_up:
            for worker in workers.values():  # caches and allocators settle
                worker.seconds(1)
            one = workers[reference].seconds(1)
            repetitions = max(1, math.ceil(request.block_seconds / one))
        rounds: dict[str, list[float]] = {name: [] for name in names}
        for number in range(request.rounds):
            there = {name: workers[name].seconds(repetitions) for name in names}
            back = {name: workers[name].seconds(repetitions) for name in reversed(names)}
            for name in names:
                rounds[name].append((there[name] + back[name]) / 2)
            report(
                f"round {number + 1} of {request.rounds}: "
                + ", ".join(f"{name} {rounds[name][-1]:.4g} s" for name in names)
            )
        outcomes = {
            name: Outcome(
                seconds=statistics.median(rounds[name]),
                ratio=statistics.median(ratios(rounds[name], rounds[reference])),
                peak_bytes=workers[name].peak_bytes(),
                first_seconds=workers[name].first_seconds,
                rounds=tuple(rounds[name]),
            )
            for name in names
        }
    noise = noise_floor(ratios(rounds[names[-1]], rounds[names[0]]))
    device = workers[names[0]].device
    return Measurement(request, parameters, device, repetitions, agreed, noise, outcomes)


def check_agreement(found: dict[str, dict[str, float]], tolerance: float) -> dict[str, float]:
    """The first variant's numbers, which all others must equal within `tolerance`, relative.

    Raises:
        UsageError: names the variant and the number that differ.
    """
    first, *others = found
    for name in others:
        for key, wanted in found[first].items():
            difference = abs(found[name][key] - wanted)
            if not difference <= tolerance * abs(wanted):  # NaN differs too
                raise errors.UsageError(
                    f"benchmark: {key} of the first repetition is {found[name][key]:.7g} in "
                    f"{name} and {wanted:.7g} in {first}, expected equal within {tolerance:g}. "
                    "They do not do the same work: no times were taken."
                )
    return found[first]


def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def noise_floor(same: list[float]) -> float:
    """How far a median ratio of two processes that do the same may lie from 1.

    The observed median's distance from 1, and two standard errors of a median over the rounds,
    from the median absolute deviation (x 1.4826 and x 1.2533, as for normal numbers).

    Args:
        same: per-round ratios of one variant against itself.
    """
    median = statistics.median(same)
    deviation = 1.4826 * statistics.median([abs(ratio - median) for ratio in same])
    return abs(median - 1) + 2 * 1.2533 * deviation / math.sqrt(len(same))


def write_inputs(config: Config, folder: pathlib.Path) -> int:
    """Initial weights and one batch of tokens as inputs.npz, the same for every variant.

    Made by a process of its own: this one stays free of jax.

    Returns:
        The number of parameters.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.inputs", str(folder / "inputs.npz")],
        input=json.dumps(config.to_dict()),
        capture_output=True,
        text=True,
        env=_with_root({"JAX_PLATFORMS": "cpu"}),
    )
    if done.returncode:
        raise errors.UsageError(f"benchmark: the inputs failed: {done.stderr.strip()[-500:]}")
    return int(done.stdout)


def _with_root(changes: dict[str, str]) -> dict[str, str]:
    """This process's environment; children find this folder, which is no part of the package."""
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, "PYTHONPATH": path, **changes}


def _environment(folder: pathlib.Path, on_cpu: bool) -> dict[str, str]:
    """One thread where CPU time is counted; caches of compiled code that start out empty."""
    environment = {
        **_with_root({}),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        # The processes share the device.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    if on_cpu:
        threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        environment |= dict.fromkeys(threads, "1")
    return environment


def _last_line(log: pathlib.Path) -> str:
    lines = log.read_text().strip().splitlines()
    return lines[-1] if lines else "it ended without a message"
