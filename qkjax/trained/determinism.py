"""Is a run the same to the bit when it is repeated, and when it is resumed?

Three runs, each a process of its own as users start them: `first`; `again`, the same command; and
`resumed`, which resumes from a checkpoint of the first: the middle one of those that a finished run
keeps between its start and its end (the latest alone, unless checkpoint.keep_all is set). They are
compared by the sha256 of every leaf of the last checkpoint, which `qkjax.runs.checkpoint` records.
"""

import contextlib
import dataclasses
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from qkjax import errors, files
from qkjax.cli import children
from qkjax.config import Config
from qkjax.runs import signals
from qkjax.runs.directory import RunDirectory

FIRST, AGAIN, RESUMED = "first", "again", "resumed"
_LEFT_OUT = ("summary*.json", "*.lock", "events.out.*", "final.npz")  # by the copy that resumes


@dataclasses.dataclass(frozen=True)
class Difference:
    """Where a run first differs from the first run."""

    run: str  # AGAIN or RESUMED
    leaves: tuple[str, ...]  # of params and opt_state at the last step, by name
    step: int | None  # the first whose training loss differs; None: none does

    def __str__(self) -> str:
        shown = ", ".join(self.leaves[:3]) + (", ..." if len(self.leaves) > 3 else "")
        since = f"the loss from step {self.step} on" if self.step is not None else "no loss"
        return f"{self.run}: {len(self.leaves)} leaves differ ({shown}) and {since}"


def check(
    config: Config,
    config_arguments: Sequence[str],
    workdir: pathlib.Path,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains three times below `workdir` and compares; `determinism.json` there holds the outcome.

    Runs that are there already, finished, are not trained again.

    Args:
        config: what `config_arguments` resolve to.
        config_arguments: --config=... and its overrides, passed on as they are.
    Returns:
        What determinism.json holds: "equal", by run its differing leaves, environment.
    Raises:
        UsageError: no checkpoint between the first and the last step; a run failed.
        StorageError: the disk failed.
        Stopped: SIGTERM or SIGINT; the run under way has saved a checkpoint.
    """
    last = config.train.num_steps
    between = [step for step in config.checkpoint.steps if 0 < step < last]
    if not between:
        raise errors.UsageError(
            f"checkpoint.every_tokens: the run saves at {list(config.checkpoint.steps)} only, "
            "expected a step in between to resume from. Lower it."
        )
    for name in (FIRST, AGAIN):
        _train([*config_arguments, f"--workdir={workdir / name}"], report)
    kept = sorted(step for step in _checkpoint_steps(workdir / FIRST) if 0 < step < last)
    middle = kept[len(kept) // 2]
    _copy_up_to(workdir / FIRST, workdir / RESUMED, middle)
    _train([*config_arguments, f"--workdir={workdir / RESUMED}"], report)
    found = [_difference(workdir, name, last) for name in (AGAIN, RESUMED)]
    environment = RunDirectory(workdir / FIRST).need_environment()
    outcome = {
        "arm": config.arm,
        "steps": last,
        "resumed_from": middle,
        "equal": not any(found),
        **{
            name: None if difference is None else dataclasses.asdict(difference)
            for name, difference in zip((AGAIN, RESUMED), found, strict=True)
        },
        "environment": environment,
    }
    files.write_json(workdir / "determinism.json", outcome)
    for name, difference in zip((AGAIN, RESUMED), found, strict=True):
        report(str(difference) if difference else f"{name}: equal to the bit")
    return outcome


def _train(arguments: Sequence[str], report: Callable[[str], None]) -> None:
    """Trains in a process of its own, which shows what it does and dies with this one."""
    report(f"qkjax train {' '.join(arguments)}")
    sys.stdout.flush()  # the child writes to the same place
    command, environment = children.command("train", *arguments), children.environment()
    with signals.StopRequest() as stop, subprocess.Popen(command, env=environment) as process:
        while process.poll() is None:
            if stop.signum is not None:
                process.terminate()
            time.sleep(0.1)
    if stop.signum is not None:
        raise signals.Stopped(
            stop.signum, f"{arguments[-1]}: stopped. Run the same command again to resume."
        )
    if process.returncode:
        raise errors.UsageError(
            f"{arguments[-1]}: the run ended with exit code {process.returncode}, its message "
            "is above. Fix that, then run the same command again."
        )


def _copy_up_to(source: pathlib.Path, target: pathlib.Path, step: int) -> None:
    """A copy of a finished run as a kill after the checkpoint of `step` would have left it."""
    if target.exists():
        return
    later = [str(other) for other in _checkpoint_steps(source) if other > step]
    part = target.with_name(f".{target.name}.part")  # what a killed check leaves is no run
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part, ignore=shutil.ignore_patterns(*_LEFT_OUT, *later))
    files.move(part, target)


def _checkpoint_steps(run: pathlib.Path) -> list[int]:
    return [
        int(path.name) for path in RunDirectory(run).checkpoints.iterdir() if path.name.isdigit()
    ]


def _difference(workdir: pathlib.Path, name: str, last: int) -> Difference | None:
    from qkjax.runs import checkpoint

    metas = []
    for run in (FIRST, name):
        directory = RunDirectory(workdir / run).checkpoints
        with contextlib.closing(checkpoint.Checkpoints(directory, read_only=True)) as checkpoints:
            metas.append(checkpoints.meta(last))
    leaves = tuple(
        f"{item}/{leaf}"
        for item in ("params", "opt_state")
        for leaf, record in metas[0][item].items()
        if metas[1][item].get(leaf) != record
    )
    if not leaves:
        return None
    rows = [RunDirectory(workdir / run).read_metrics() for run in (FIRST, name)]
    unlike = (
        first["step"]
        for first, other in zip(*rows, strict=False)
        if first.get("train/loss") != other.get("train/loss")
    )
    return Difference(name, leaves, next(unlike, None))
