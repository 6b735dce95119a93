"""The learning rate of every arm: read off its sweep runs, recorded in learning_rates.json."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from qkjax import errors, files
from qkjax.runs.directory import RunDirectory
from qkjax.runs.results import load_run
from qkjax.study import study_files
from qkjax.study.plan import Plan, extended_rate

# An arm's entry of learning_rates.json.
_ENTRY: dict[str, files.Types] = {
    "chosen": (float, type(None)),
    "edge": (str, type(None)),
    "extended": bool,
    "fingerprint": str,
    "loss_at_init": (float, type(None)),
    "runs": list,
    "sensitivity": (float, type(None)),
}


@dataclasses.dataclass(frozen=True)
class ShortRun:
    """A finished run of a sweep."""

    learning_rate: float
    directory: str  # from the study directory
    loss: float | None  # first half of the validation split, nat; None: diverged
    loss_whole: float | None
    loss_at_init: float  # first half

    @property
    def diverged(self) -> bool:
        """Whether it has no loss."""
        return self.loss is None


def directory_of(arm: str, learning_rate: float) -> str:
    """The directory of a sweep run, from the study directory."""
    return f"sweep/{arm}/lr_{learning_rate:.6g}"


def read(workdir: pathlib.Path, arm: str, rates: Sequence[float]) -> list[ShortRun]:
    """The finished runs among these rates, ascending.

    Raises:
        UsageError: a damaged run.
    """
    found = []
    for rate in sorted(rates):
        name = directory_of(arm, rate)
        run = load_run(workdir / name)
        if isinstance(run, str):
            continue
        half, whole = run.half_losses()[0], float(run.sequence_losses.mean())
        lost = run.diverged or not math.isfinite(half)
        initial = _first_half(RunDirectory(workdir / name).read_validation(0).per_token)
        found.append(ShortRun(rate, name, None if lost else half, None if lost else whole, initial))
    return found


def _first_half(losses: np.ndarray) -> float:
    """Mean of the first half of the sequences' losses."""
    return float(losses[: max(1, len(losses) // 2)].mean())


def best(runs: Sequence[ShortRun]) -> ShortRun | None:
    """The run of the lowest loss, of equal ones the lower rate; None where all diverged."""
    sound = [run for run in runs if run.loss is not None]
    return min(sound, key=lambda run: (run.loss, run.learning_rate), default=None)


def extension(plan: Plan, workdir: pathlib.Path, arm: str) -> float | None:
    """The one rate to add to the arm's grid: none where its best lies inside, or all diverged."""
    grid = plan.grid(arm)
    winner = best(read(workdir, arm, grid))
    return None if winner is None else extended_rate(grid, winner.learning_rate)


def choose(plan: Plan, workdir: pathlib.Path, arm: str) -> dict[str, Any]:
    """The arm's entry of learning_rates.json, which this writes.

    Sensitivity (Wortsman et al. 2023): mean over the original grid of
    min(loss(rate), loss at initialisation) - best loss; a diverged run counts as the latter.

    Raises:
        UsageError: every rate diverged. The entry is written all the same, without a choice.
    """
    grid = plan.grid(arm)
    added = extension(plan, workdir, arm) if plan.study.sweep.extend else None
    rates = sorted({*grid, *([] if added is None else [added])})
    runs = read(workdir, arm, rates)
    winner = best(runs)
    initial = float(np.mean([run.loss_at_init for run in runs]))
    edge = sensitivity = None
    if winner is not None:
        assert winner.loss is not None
        edge = {rates[0]: "low", rates[-1]: "high"}.get(winner.learning_rate)
        edge = edge if len(rates) > 1 else None
        reached = [
            initial if run.loss is None else min(run.loss, initial)
            for run in runs
            if run.learning_rate in grid
        ]
        sensitivity = float(np.mean(reached)) - winner.loss
    entry = {
        "grid": list(grid),
        "runs": [
            {
                "learning_rate": run.learning_rate,
                "loss": run.loss,
                "loss_whole": run.loss_whole,
                "diverged": run.diverged,
                "directory": run.directory,
            }
            for run in runs
        ],
        "chosen": None if winner is None else winner.learning_rate,
        "edge": edge,
        "extended": added is not None,
        "sensitivity": sensitivity,
        "loss_at_init": initial,
        "fingerprint": plan.step(f"sweep/{arm}/choice").fingerprint,
    }
    with study_files.locked(workdir):
        files.write_sealed(_path(workdir), {**recorded(workdir), arm: entry})
    if winner is None:
        raise errors.UsageError(
            f"sweep/{arm}: every learning rate diverged ({', '.join(f'{r:g}' for r in rates)}). "
            "Lower sweep.factors in the study's config, in another --workdir."
        )
    return entry


def recorded(workdir: pathlib.Path) -> dict[str, Any]:
    """sweep/learning_rates.json; empty where there is none yet."""
    found = study_files.read_object(_path(workdir))
    if found is None:
        return {}
    if not found:
        raise study_files.damaged(_path(workdir), "it names no arm")
    for arm, entry in found.items():
        study_files.need(_path(workdir), arm, entry, _ENTRY)
    return found


def _path(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / "sweep" / "learning_rates.json"
