"""What a run shows while it trains: the rows that it has appended, and whether it is alive."""

import contextlib
import os
import pathlib
import socket
from typing import Any, NamedTuple

from qkjax import errors, files
from qkjax.runs import directory as run_directory
from qkjax.runs.directory import RunDirectory
from qkjax.runs.results import LOSS, PR


class Glance(NamedTuple):
    """A run at one moment; None where it has not measured that yet."""

    step: int  # updates done
    num_steps: int
    train_loss: float | None
    validation_loss: float | None
    pr: float | None  # post-RoPE raw PR of the keys
    tokens_per_second: float | None
    seconds_left: float | None  # at that rate, evaluations left out


class Watch:
    """Follows metrics.jsonl of a run directory, reading only what has been appended."""

    def __init__(self, directory: pathlib.Path) -> None:
        self._directory = directory
        self._offset = 0
        self._latest: dict[str, Any] = {}  # the last value of every metric
        self._budget: tuple[int, int] | None = None  # steps, tokens a step

    def look(self) -> Glance | None:
        """The run as it is now; None before its first row."""
        self._read()
        if self._budget is None:
            config = RunDirectory(self._directory).read_config()
            if config is not None:
                self._budget = config.train.num_steps, config.train.tokens_per_step
        if not self._latest or self._budget is None:
            return None
        num_steps, tokens_per_step = self._budget
        step, rate = self._latest["step"], self._latest.get("perf/tokens_per_second")
        return Glance(
            step,
            num_steps,
            self._latest.get("train/loss"),
            self._latest.get(LOSS),
            self._latest.get(PR),
            rate,
            (num_steps - step) * tokens_per_step / rate if rate else None,
        )

    def _read(self) -> None:
        try:
            with open(RunDirectory(self._directory).metrics, "rb") as file:
                if file.seek(0, os.SEEK_END) < self._offset:  # a resumed run has cut its rows
                    self._offset, self._latest = 0, {}
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        self._offset += len(whole) + len(newline)
        for line in whole.splitlines():
            with contextlib.suppress(errors.UsageError):  # the run itself will say so
                self._latest.update(run_directory.parse_row("metrics.jsonl", line))


def other_host(directory: pathlib.Path) -> str | None:
    """The other host that has last locked the run directory; it may be at work still."""
    holder = files.holder_of(RunDirectory(directory).run_lock)
    return None if holder is None or holder["host"] == socket.gethostname() else holder["host"]


def is_running(directory: pathlib.Path) -> bool:
    """Whether a process of this host that has locked the run directory is alive.

    Read off run.lock without taking the lock, which would keep a starting run out.
    """
    holder = files.holder_of(RunDirectory(directory).run_lock)
    if holder is None or holder["host"] != socket.gethostname():
        return False
    try:
        os.kill(holder["pid"], 0)
    except PermissionError:  # it is another user's
        return True
    except (OSError, OverflowError):
        return False
    stat = pathlib.Path("/proc", str(holder["pid"]), "stat")
    return not (stat.exists() and ") Z " in stat.read_text())  # killed, its parent too
