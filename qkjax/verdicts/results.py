"""A study read from its directory: every run's numbers, what is missing, what was chosen.

The one place that turns run directories into what statistics, verdicts and the report use. Reads
files alone. What cannot be compared is refused; what is missing is named and left out.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from qkjax import errors, files, presets
from qkjax.runs.directory import RunDirectory
from qkjax.runs.results import RunResult, load_run
from qkjax.study import study_files
from qkjax.trained import rank_curves
from qkjax.verdicts import scores

# Of study.json and learning_rates.json, what is read here.
_PLAN_FIELDS = {"scale": str, "recipe": str, "arms": list, "controls": list, "seeds": list}
_RATE_FIELDS: dict[str, files.Types] = {
    "chosen": (float, type(None)),
    "edge": (str, type(None)),
    "extended": bool,
    "loss_at_init": (float, type(None)),
    "runs": list,
    "sensitivity": (float, type(None)),
}


Value = TypeVar("Value")


class Missing(NamedTuple):
    """A run of the plan that has no result yet."""

    arm: str
    seed: int
    why: str  # for people


@dataclasses.dataclass(frozen=True)
class Study:
    """What a study directory holds, against its plan."""

    workdir: pathlib.Path
    plan: dict[str, Any]  # study.json
    runs: dict[tuple[str, int], RunResult]  # by arm and seed
    missing: tuple[Missing, ...]
    learning_rates: dict[str, Any] | None  # sweep/learning_rates.json
    downstream: dict[tuple[str, int], dict[str, Any]]  # downstream/<arm>/seed_<n>.json
    items: dict[tuple[str, int], list[dict[str, Any]]]  # their items, where both files are there
    notes: tuple[str, ...]  # what was left out, for people

    @property
    def arms(self) -> list[str]:
        """The arms of the plan, with controls after the four."""
        return [*self.plan["arms"], *self.plan["controls"]]

    @property
    def seeds(self) -> list[int]:
        """The seeds of the plan; extra seeds of some arms come after those of all arms."""
        extra = (seed for arm in self.arms for seed in self._extra_seeds.get(arm, ()))
        return list(dict.fromkeys((*self.plan["seeds"], *extra)))

    @property
    def _extra_seeds(self) -> dict[str, list[int]]:
        return self.plan.get("extra_seeds") or {}

    def seeds_of(self, arm: str) -> list[int]:
        """The seeds that the plan has for one arm."""
        return [*self.plan["seeds"], *self._extra_seeds.get(arm, ())]

    def seeds_of_all(self, arms: Iterable[str]) -> list[int]:
        """The seeds that the plan has for every one of these arms."""
        return [s for s in self.seeds if all(s in self.seeds_of(arm) for arm in arms)]

    @property
    def num_planned(self) -> int:
        """Runs of the plan, those of the sweep aside."""
        return sum(len(self.seeds_of(arm)) for arm in self.arms)

    def of_arm(self, arm: str) -> list[RunResult]:
        """The arm's finished runs, in the order of the seeds."""
        return [self.runs[arm, seed] for seed in self.seeds if (arm, seed) in self.runs]

    def values(self, metric: str) -> dict[str, dict[int, float]]:
        """arm -> seed -> `RunResult.value`, of the finished runs."""
        return {arm: {run.seed: run.value(metric) for run in self.of_arm(arm)} for arm in self.arms}


def load_study(workdir: str | pathlib.Path) -> Study:
    """Reads study.json and every run, sweep choice and downstream result that is there.

    Raises:
        UsageError: no study directory; a damaged file; runs that cannot be compared (another
            dataset, other validation sequences, an arm or seed that its directory does not name).
        StorageError: the disk failed.
    """
    path = pathlib.Path(workdir)
    plan = study_files.read_object(path / "study.json")
    if plan is None:
        raise errors.UsageError(
            f"{path / 'study.json'}: no such file, expected a study. Give the --workdir of a study."
        )
    study_files.need(path / "study.json", "", plan, _PLAN_FIELDS)
    plan = presets.with_present_recipe(plan)
    extra_seeds = plan.get("extra_seeds") or {}  # of studies planned before there were any: none
    study_files.need(path / "study.json", "", {"extra_seeds": extra_seeds}, {"extra_seeds": dict})
    study_files.need(
        path / "study.json", "extra_seeds", extra_seeds, dict.fromkeys(extra_seeds, list)
    )
    runs: dict[tuple[str, int], RunResult] = {}
    missing = []
    names: dict[str, str] = {}  # of the arms of the plan, as they are shown
    for arm in (*plan["arms"], *plan["controls"]):
        for seed in (*plan["seeds"], *extra_seeds.get(arm, ())):
            directory = path / "runs" / arm / f"seed_{seed}"
            result = load_run(directory)
            if isinstance(result, str):
                missing.append(Missing(arm, seed, result))
                continue
            shown = names.setdefault(arm, result.arm if result.arm == _earlier(arm) else arm)
            if (result.arm, result.seed) != (shown, seed):
                raise errors.UsageError(
                    f"{RunDirectory(directory).config}: is {result.arm} with seed {result.seed}, "
                    f"expected {shown} with seed {seed}. Move the run to where it belongs."
                )
            surgery = path / "surgery" / arm / f"seed_{seed}.csv"
            rank = _functional_rank(surgery, str(result.summary["params_sha256"]))
            runs[arm, seed] = dataclasses.replace(result, functional_rank=rank)
    _check_comparable(list(runs.values()))
    rates = study_files.read_object(path / "sweep" / "learning_rates.json")
    if rates is not None and not rates:
        raise study_files.damaged(path / "sweep" / "learning_rates.json", "it names no arm")
    for arm, entry in (rates or {}).items():
        study_files.need(path / "sweep" / "learning_rates.json", arm, entry, _RATE_FIELDS)
    notes = [
        f"the plan was changed after the study started: {old.name} has {other}; error rates hold "
        "only for a plan that was fixed in advance"
        for old in sorted(path.glob("study.*.json"))
        if (other := _other_plan(old, plan))
    ]
    trained = {place: str(run.summary["params_sha256"]) for place, run in runs.items()}
    scored = scores.read(path / "downstream", trained)
    return Study(
        workdir=path,
        plan=_renamed_plan(plan, names),
        runs=_renamed(runs, names),
        missing=tuple(run._replace(arm=names.get(run.arm, run.arm)) for run in missing),
        learning_rates=rates,
        downstream=_renamed(scored.results, names),
        items=_renamed(scored.items, names),
        notes=(*notes, *scored.notes),
    )


def _functional_rank(surgery: pathlib.Path, parameters: str) -> int | None:
    """Fewest directions of the centred pre-RoPE keys within 0.01 nat, of these parameters."""
    rows = [
        row
        for row in rank_curves.read_csv(surgery)
        if row.params_sha256 == parameters and (row.stage, row.centring) == ("pre_rope", "centred")
    ]
    return rank_curves.dimensions_used(rows)


def _earlier(arm: str) -> str:
    """The name of a control `decayed` that was trained before gamma had a rate of its own."""
    return f"{arm}_1" if arm.endswith("_decayed") else arm


def _renamed(
    by_run: Mapping[tuple[str, int], Value], names: Mapping[str, str]
) -> dict[tuple[str, int], Value]:
    return {(names.get(arm, arm), seed): value for (arm, seed), value in by_run.items()}


def _renamed_plan(plan: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The plan with the arms' present names: controls of the same word are never pooled."""
    controls = [names.get(arm, arm) for arm in plan["controls"]]
    parents = {names.get(arm, arm): parent for arm, parent in (plan.get("parents") or {}).items()}
    extra = {names.get(arm, arm): s for arm, s in (plan.get("extra_seeds") or {}).items()}
    return {**plan, "controls": controls, "parents": parents, "extra_seeds": extra}


def _other_plan(path: pathlib.Path, plan: Mapping[str, Any]) -> str:
    """In what an earlier plan differs that matters for verdicts, in words; "" if in nothing."""
    earlier = study_files.read_object(path) or {}
    said = []
    earlier.setdefault("extra_seeds", {})  # of plans from before the field
    for field in ("arms", "controls", "seeds", "extra_seeds", "tokens", "sweep", "overrides"):
        value = earlier.get(field)
        if value != plan.get(field):
            listed = ", ".join(map(str, value)) if isinstance(value, list) else ""
            said.append(f"{field} {listed}" if listed else f"other {field}")
    return "; ".join(said)


def _check_comparable(runs: list[RunResult]) -> None:
    """Refuses runs on different data or budgets: no difference of theirs would mean anything.

    A diverged run has no final pass, so its validation sequences may be fewer.
    """
    counts: dict[int, RunResult] = {}
    for run in runs:
        for what, ours, first in (
            ("dataset", run.dataset_fingerprint, runs[0].dataset_fingerprint),
            ("scale", run.config.scale, runs[0].config.scale),
            ("recipe", run.config.recipe, runs[0].config.recipe),
            ("steps", run.config.train.num_steps, runs[0].config.train.num_steps),
            (
                "tokens a step",
                run.config.train.tokens_per_step,
                runs[0].config.train.tokens_per_step,
            ),
        ):
            if ours != first:
                raise _incomparable(run, what, ours, runs[0], first)
        if not run.diverged:
            counts.setdefault(len(run.sequence_losses), run)
    if len(counts) > 1:
        (first_count, first_run), (count, other) = list(counts.items())[:2]
        raise _incomparable(other, "validation sequences", count, first_run, first_count)


def _incomparable(
    run: RunResult, what: str, ours: object, other: RunResult, theirs: object
) -> errors.UsageError:
    return errors.UsageError(
        f"{run.workdir}: {what} {ours}, but {other.workdir} has {theirs}. Runs of a study are "
        "compared on one dataset and one budget: train this one again."
    )
