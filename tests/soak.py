"""Kills and resumes one run for a given time, and compares each end with an unbroken run's.

  python tools/soak.py --config=configs/muon_qk.py:tiny --config.train.tokens=200000 \\
      --workdir=runs/soak --minutes=30

A cycle trains the run in DIR/broken, stopped at random moments by SIGKILL or SIGTERM and started
again until it is finished, then compares parameters, optimiser state, metrics (but perf/*) and
arrays with DIR/unbroken to the bit. --disk_noise writes and syncs files beside it all the while.
Every start is a fork of one process that has imported all and computed nothing: a start is soon
there, and does what the command does. Prints a table; exit code 1 where an end differed or a start
ended otherwise than it should, and DIR/wrong-<n> keeps what it left.
"""

import contextlib
import dataclasses
import os
import pathlib
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np
from absl import flags

from qkjax import errors, files
from qkjax.cli import command_line, config_flag
from qkjax.runs.directory import RunDirectory, make_workdir

FLAGS = flags.FlagValues()
_CONFIG = config_flag.define(FLAGS)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of both runs; what it holds of an earlier soak goes.", FLAGS
)
_MINUTES = flags.DEFINE_float("minutes", 30.0, "How long.", 0.0, flag_values=FLAGS)
_SEED = flags.DEFINE_integer("seed", 0, "Of moments and signals.", flag_values=FLAGS)
_DISK_NOISE = flags.DEFINE_bool(
    "disk_noise", False, "Write and sync other files all the while.", flag_values=FLAGS
)
_MOST_SECONDS = 0.3  # between a step that was waited for and the stop
# How a start may end: done, stopped behind a checkpoint, or by a signal; SIGTERM ends it as well
# before the run has asked to be told.
_ENDS = (0, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL)
_NOISE_BYTES = 4 << 20


@dataclasses.dataclass
class Figures:
    """What a soak has counted."""

    starts: int = 0
    kills: int = 0
    terminations: int = 0
    resumes: int = 0  # starts that found a checkpoint
    cycles: int = 0  # runs finished and compared
    mismatches: int = 0
    failures: int = 0  # processes that ended otherwise than they should

    @property
    def sound(self) -> bool:
        """Whether every end was the unbroken run's."""
        return self.cycles > 0 and not (self.mismatches or self.failures)


def main() -> None:
    """Reads the command line and does the work; ends the process."""
    command_line.run(_soak, FLAGS, __doc__, parse=config_flag.parse)


def _soak() -> int:
    config_flag.read(_CONFIG)  # refuses a wrong one before anything is trained
    if not _WORKDIR.value:
        raise errors.UsageError("--workdir: missing. Name a directory for both runs.")
    workdir = make_workdir(_WORKDIR.value)
    for path in (workdir / "unbroken", workdir / "broken"):
        shutil.rmtree(path, ignore_errors=True)
    started = time.monotonic()
    with _noise(workdir) if _DISK_NOISE.value else contextlib.nullcontext():
        soak = Soak(config_flag.as_flags(FLAGS), workdir, random.Random(_SEED.value))
        while soak.figures.cycles == 0 or time.monotonic() - started < 60 * _MINUTES.value:
            soak.cycle()
    minutes = (time.monotonic() - started) / 60
    print(f"{'minutes':<14} {minutes:,.1f}")
    for name, number in dataclasses.asdict(soak.figures).items():
        print(f"{name:<14} {number:,}")
    return 0 if soak.figures.sound else 1


class Soak:
    """An unbroken run, and the cycles that are compared with it."""

    def __init__(self, config: Sequence[str], workdir: pathlib.Path, chance: random.Random) -> None:
        """Trains the unbroken run.

        Args:
            config: --config=... and its overrides.
            chance: draws moments and signals.
        Raises:
            UsageError: the unbroken run did not finish.
        """
        self.figures = Figures()
        self._config, self._workdir, self._chance = config, workdir, chance
        self._unbroken, self._broken = workdir / "unbroken", workdir / "broken"
        code = _Start(config, self._unbroken).wait()
        if code:
            raise errors.UsageError(
                f"{_log(self._unbroken)}: the unbroken run ended with exit code {code}, expected "
                "0. Fix what it says first."
            )
        self._steps = _rows(self._unbroken) - 1

    def cycle(self) -> None:
        """One run, stopped at random until it is finished, then compared."""
        shutil.rmtree(self._broken, ignore_errors=True)
        while not RunDirectory(self._broken).summary.exists():
            if (code := self._one_start()) not in _ENDS:
                self.figures.failures += 1
                print(f"exit code {code}: see {self._keep()}", flush=True)
                return
        found = differences(self._unbroken, self._broken)
        self.figures.cycles += 1
        if found:
            self.figures.mismatches += 1
            print(f"{'; '.join(found)}: see {self._keep()}", flush=True)

    def _one_start(self) -> int:
        """The exit code of one start, stopped at a random moment unless it ends before."""
        self.figures.starts += 1
        self.figures.resumes += bool(_checkpoint_steps(self._broken))
        started = _Start(self._config, self._broken)
        if self._chance.random() < 0.8:  # else while it restores and compiles
            started.wait_for_steps(self._chance.randint(1, max(2, self._steps // 4)))
        code = started.wait(self._chance.uniform(0, _MOST_SECONDS))
        if code is not None:
            return code
        terminated = self._chance.random() < 0.25
        if terminated:
            self.figures.terminations += 1
            started.send(signal.SIGTERM)
            if self._chance.random() < 0.5:
                return started.wait()
            started.wait(self._chance.uniform(0, 0.2))  # and killed while it saves
        self.figures.kills += 1
        started.send(signal.SIGKILL)
        return started.wait()

    def _keep(self) -> pathlib.Path:
        """Moves a wrong run out of the way, with what it said."""
        kept = self._workdir / f"wrong-{self.figures.failures + self.figures.mismatches}"
        shutil.rmtree(kept, ignore_errors=True)
        files.move(self._broken, kept)
        shutil.copy(_log(self._broken), kept / "soak.log")
        return kept


class _Start:
    """`qkjax train` in a fork of this process, its output appended to a log."""

    def __init__(self, config: Sequence[str], workdir: pathlib.Path) -> None:
        from qkjax import main, train  # noqa: F401  imported here, once, for every fork

        self._code: int | None = None
        self._workdir, self._log = workdir, _log(workdir)
        self._before = self._trainings()
        sys.stdout.flush()
        self._pid = os.fork()
        if self._pid:
            return
        try:
            log = os.open(_log(workdir), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.argv = ["qkjax train", *config, f"--workdir={workdir}"]
            main.main()  # ends the process
        finally:
            os._exit(1)

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code, negative for a signal; None where it has not ended after `seconds`."""
        until = None if seconds is None else time.monotonic() + seconds
        while self._code is None:
            pid, status = os.waitpid(self._pid, 0 if until is None else os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
            elif until is not None and time.monotonic() >= until:
                return None
            else:
                time.sleep(0.002)
        return self._code

    def wait_for_steps(self, number: int) -> None:
        """Returns once its step is compiled and it has made so many, or it has ended."""
        while self.wait(0) is None and self._trainings() == self._before:
            time.sleep(0.01)
        rows = _rows(self._workdir)
        while self.wait(0) is None and _rows(self._workdir) < rows + number:
            time.sleep(0.005)

    def _trainings(self) -> int:
        return self._log.read_bytes().count(b"compiled   in") if self._log.exists() else 0

    def send(self, signum: int) -> None:
        """Sends a signal to it, unless it has ended."""
        if self._code is None:
            os.kill(self._pid, signum)


def _rows(run: pathlib.Path) -> int:
    path = RunDirectory(run).metrics
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _log(workdir: pathlib.Path) -> pathlib.Path:
    return workdir.with_name(f"{workdir.name}.log")


def differences(expected: pathlib.Path, found: pathlib.Path) -> list[str]:
    """In what two finished runs differ to the bit, for people; [] where in nothing.

    perf/* and times do not count.
    """
    said = []
    one, other = RunDirectory(expected), RunDirectory(found)
    if (theirs := _digests(found)) != (ours := _digests(expected)):
        said.append(f"digests of the last checkpoint {theirs}, expected {ours}")
    summaries = [_steady(each.read_summary() or {}) for each in (one, other)]
    said += [f"summary.json: {name}" for name in _unlike(*summaries)]
    rows = [[_steady(row) for row in each.read_metrics()] for each in (one, other)]
    if len(rows[0]) != len(rows[1]):
        said.append(f"metrics.jsonl: {len(rows[1])} rows, expected {len(rows[0])}")
    said += [
        f"metrics.jsonl, step {mine['step']}: {', '.join(_unlike(mine, its))}"
        for mine, its in zip(*rows, strict=False)
        if mine != its
    ]
    for place in ("spectra", "validation"):
        names = [{path.name for path in (run / place).glob("*.npz")} for run in (expected, found)]
        said += [f"{place}/{name}: in one run alone" for name in sorted(names[0] ^ names[1])]
        for name in sorted(names[0] & names[1]):
            arrays = [
                {key: (x.dtype.str, x.shape, x.tobytes()) for key, x in _arrays(run, place, name)}
                for run in (expected, found)
            ]
            said += [f"{place}/{name}: {key}" for key in _unlike(*arrays)]
    return said


def _arrays(run: pathlib.Path, place: str, name: str) -> Iterator[tuple[str, np.ndarray]]:
    yield from files.read_arrays(run / place / name, "").items()


def _steady(values: dict[str, Any]) -> dict[str, Any]:
    """Without what depends on time."""
    return {
        name: value
        for name, value in values.items()
        if not name.startswith("perf/") and name != "wall_seconds"
    }


def _unlike(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]


def _checkpoint_steps(run: pathlib.Path) -> list[int]:
    folder = RunDirectory(run).checkpoints
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def _digests(run: pathlib.Path) -> tuple[int, str, str]:
    """Step, params_sha256 and opt_state_sha256 of the last checkpoint, from its meta."""
    step = _checkpoint_steps(run)[-1]
    path = RunDirectory(run).checkpoints / str(step) / "meta" / "metadata"
    meta = files.read_object(path, "Train again.") or {}
    return step, meta["params_sha256"], meta["opt_state_sha256"]


@contextlib.contextmanager
def _noise(workdir: pathlib.Path) -> Iterator[None]:
    """Another process writes, syncs and removes files while entered."""
    pid = os.fork()
    if not pid:
        path, data = workdir / "noise", os.urandom(_NOISE_BYTES)
        while True:
            with open(path, "wb") as file:
                file.write(data)
                files.sync(file)
            path.unlink()
            time.sleep(0.05)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
