"""A study read from its directory: every run's numbers, what is missing, what was chosen.

The one place that turns run directories into what statistics, verdicts and the report use. Reads
files alone. What cannot be compared is refused; what is missing is named and left out.
"""

import dataclasses
import math
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from qkjax import config as config_lib
from qkjax import errors
from qkjax.runs import directory as run_directory
from qkjax.study import study_files
from qkjax.verdicts import scores

LOSS, PR = "val/loss", "pr/key/post_rope/raw"
_PLAN_FIELDS = ("scale", "recipe", "arms", "controls", "seeds")  # of study.json, read here
_RATE_FIELDS = ("chosen", "edge", "extended", "loss_at_init", "runs", "sensitivity")


class Probe(NamedTuple):
    """One evaluation of a run."""

    step: int  # updates done
    tokens: int  # trained on
    metrics: dict[str, float | None]  # names of DESIGN.md section 4; None: not finite


@dataclasses.dataclass(frozen=True)
class RunResult:
    """One finished run. A diverged one is finished: divergence is an outcome."""

    arm: str
    seed: int
    workdir: pathlib.Path
    config: config_lib.Config
    dataset_fingerprint: str
    environment: dict[str, Any]  # environment.json
    summary: dict[str, Any]  # summary.json
    rows: tuple[dict[str, Any], ...]  # metrics.jsonl, ascending steps
    probes: tuple[Probe, ...]  # its evaluations, ascending; at least one
    sequence_losses: np.ndarray  # float64 [sequences], nat per token, of the reported pass

    @property
    def diverged(self) -> bool:
        """Whether a step was not finite."""
        return bool(self.summary["diverged"])

    @property
    def has_final_pass(self) -> bool:
        """Whether the numbers reported are those of the pass after the last step."""
        return f"{_final_name(LOSS)}" in self.summary

    def value(self, metric: str) -> float:
        """The number that the study reports: of the final pass where there is one, else the last.

        A diverged run has its initial validation loss, and the last finite value of every other
        metric (SCIENCE.md section 8).

        Returns:
            NaN where the run never measured it.
        """
        if self.diverged:
            values = [value for _, value in self.series(metric)]
            if not values:
                return math.nan
            return values[0] if metric in (LOSS, "val/perplexity") else values[-1]
        for name in (_final_name(metric), metric):
            if name in self.summary:
                found = self.summary[name]
                return math.nan if found is None else float(found)
        return math.nan

    def at_step(self, metric: str, step: int) -> float:
        """The metric as the evaluation after `step` updates found it; NaN where there is none.

        Of a diverged run: as `value`, for the steps that it did not reach.
        """
        for probe in self.probes:
            if probe.step == step:
                found = probe.metrics.get(metric)
                return math.nan if found is None else found
        beyond = self.diverged and step > self.probes[-1].step
        return self.value(metric) if beyond else math.nan

    def series(self, metric: str) -> list[tuple[int, float]]:
        """(tokens, value) of every evaluation that measured the metric and found it finite."""
        found = [(probe.tokens, probe.metrics.get(metric)) for probe in self.probes]
        return [(tokens, value) for tokens, value in found if value is not None]

    def half_losses(self) -> tuple[float, float]:
        """Validation loss on the first and on the second half of the sequences, nat per token.

        Learning rates are chosen on the first half, so the second one is untouched by the choice.
        """
        middle = len(self.sequence_losses) // 2
        return (
            float(self.sequence_losses[:middle].mean()),
            float(self.sequence_losses[middle:].mean()),
        )


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
        """The arms of the plan, controls behind the four."""
        return [*self.plan["arms"], *self.plan["controls"]]

    @property
    def seeds(self) -> list[int]:
        """The seeds of the plan."""
        return list(self.plan["seeds"])

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
            f"{path / 'study.json'}: no such file, expected a study of tools/run_study.py. "
            "Give the --workdir of a study."
        )
    study_files.need(path / "study.json", "", plan, _PLAN_FIELDS)
    runs: dict[tuple[str, int], RunResult] = {}
    missing = []
    for arm in (*plan["arms"], *plan["controls"]):
        for seed in plan["seeds"]:
            directory = path / "runs" / arm / f"seed_{seed}"
            result = load_run(directory)
            if isinstance(result, str):
                missing.append(Missing(arm, seed, result))
                continue
            if (result.arm, result.seed) != (arm, seed):
                raise errors.UsageError(
                    f"{directory / 'config.json'}: is {result.arm} with seed {result.seed}, "
                    f"expected {arm} with seed {seed}. Move the run to where it belongs."
                )
            runs[arm, seed] = result
    _check_comparable(list(runs.values()))
    rates = study_files.read_object(path / "sweep" / "learning_rates.json")
    for arm, entry in (rates or {}).items():
        study_files.need(path / "sweep" / "learning_rates.json", arm, entry, _RATE_FIELDS)
    notes = [
        f"the plan was changed after the study began: {old.name} has {other}; error rates hold "
        "only for a plan that was fixed in advance"
        for old in sorted(path.glob("study.*.json"))
        if (other := _other_plan(old, plan))
    ]
    trained = {place: str(run.summary["params_sha256"]) for place, run in runs.items()}
    scored = scores.read(path / "downstream", trained)
    return Study(
        workdir=path,
        plan=plan,
        runs=runs,
        missing=tuple(missing),
        learning_rates=rates,
        downstream=scored.results,
        items=scored.items,
        notes=(*notes, *scored.notes),
    )


def _other_plan(path: pathlib.Path, plan: Mapping[str, Any]) -> str:
    """In what an earlier plan differs that matters for verdicts, in words; "" if in nothing."""
    earlier = study_files.read_object(path) or {}
    said = []
    for field in ("arms", "controls", "seeds", "tokens", "sweep", "overrides"):
        value = earlier.get(field)
        if value != plan.get(field):
            listed = ", ".join(map(str, value)) if isinstance(value, list) else ""
            said.append(f"{field} {listed}" if listed else f"other {field}")
    return "; ".join(said)


def load_run(workdir: pathlib.Path) -> RunResult | str:
    """One run directory; why it has no result yet, as text, where it is not finished.

    Raises:
        UsageError: a damaged file.
        StorageError: the disk failed.
    """
    config = run_directory.read_config(workdir) if workdir.is_dir() else None
    if config is None:
        return "not started"
    summary = run_directory.read_summary(workdir)
    metrics = workdir / "metrics.jsonl"
    if summary is None:
        return _progress(metrics, config.train.num_steps)
    rows = run_directory.read_metrics(metrics)
    if not rows or rows[-1]["step"] < summary["step"]:
        raise errors.UsageError(
            f"{metrics}: ends at step {rows[-1]['step'] if rows else None}, but summary.json "
            f"says {summary['step']}. Restore it from a copy, or run this run again elsewhere."
        )
    if rows[-1]["step"] - rows[0]["step"] != len(rows) - 1 or rows[0]["step"] != 0:
        raise errors.UsageError(
            f"{metrics}: holds {len(rows):,} rows up to step {rows[-1]['step']:,}, expected one of "
            "every step from 0. Restore it from a copy, or run this run again elsewhere."
        )
    probes = tuple(_probe(row) for row in rows if LOSS in row)
    if not probes:
        raise errors.UsageError(
            f"{metrics}: no evaluation in it, expected {LOSS}. Restore it from a copy."
        )
    environment = study_files.read_object(workdir / "environment.json") or {}
    if not environment.get("dataset_fingerprint"):
        raise errors.UsageError(
            f"{workdir / 'environment.json'}: names no dataset_fingerprint, so nobody can tell "
            "what the run was trained on. Restore it from a copy, or train this run again."
        )
    return RunResult(
        arm=config.arm,
        seed=config.seed,
        workdir=workdir,
        config=config,
        dataset_fingerprint=str(environment["dataset_fingerprint"]),
        environment=environment,
        summary=summary,
        rows=tuple(rows),
        probes=probes,
        sequence_losses=_sequence_losses(workdir, summary, probes[-1].step),
    )


def _progress(metrics: pathlib.Path, num_steps: int) -> str:
    """How far an unfinished run has come, and whether a kill has torn its last line."""
    rows = run_directory.read_metrics(metrics) if metrics.exists() else []
    done = f"at step {rows[-1]['step']:,}" if rows else "before step 1"
    lines = sum(map(bool, metrics.read_bytes().split(b"\n"))) if rows else 0
    torn = "; the torn last line of metrics.jsonl is skipped" if lines > len(rows) else ""
    return f"unfinished, {done} of {num_steps:,}{torn}"


def _probe(row: Mapping[str, Any]) -> Probe:
    names = (name for name in row if name not in ("step", "tokens"))
    metrics = {name: row[name] for name in names if not name.startswith(("train/", "perf/"))}
    return Probe(row["step"], row["tokens"], metrics)


def _sequence_losses(workdir: pathlib.Path, summary: Mapping[str, Any], step: int) -> np.ndarray:
    folder = workdir / "validation"
    final = folder / "final.npz"
    path = final if final.exists() and _final_name(LOSS) in summary else _of_step(folder, step)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["loss_sum"].astype(np.float64) / arrays["count"]
    except (ValueError, EOFError, KeyError, FileNotFoundError, zipfile.BadZipFile) as error:
        raise errors.UsageError(
            f"{path}: damaged ({error}), expected loss_sum and count of every validation "
            "sequence. Restore it from a copy."
        ) from error
    except OSError as error:
        raise run_directory.storage_error(path, error) from error


def _of_step(folder: pathlib.Path, step: int) -> pathlib.Path:
    return folder / f"step_{step:08d}.npz"


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


def _final_name(metric: str) -> str:
    """val/loss -> val_final/loss."""
    family, _, rest = metric.partition("/")
    return f"{family}_final/{rest}"
