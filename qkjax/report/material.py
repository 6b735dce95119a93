"""Everything that a report shows, gathered once: results, verdicts, spectra, warnings."""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from qkjax import config as config_lib
from qkjax import presets
from qkjax.report import arms, run_spectra
from qkjax.report.blocks import mean, number
from qkjax.report.charts import Curve
from qkjax.report.run_spectra import RunSpectra
from qkjax.runs.directory import FINAL, RunDirectory
from qkjax.runs.results import PR, RunResult
from qkjax.study import study_files, sweep
from qkjax.trained import rank_curves
from qkjax.trained.rank_curves import Row
from qkjax.verdicts import judge, results
from qkjax.verdicts.judgement import Judgement
from qkjax.verdicts.results import Study

_STRETCHES = 60  # points of a curve over all steps
SKIPPED = "skipped"  # status of a step that `qkjax study` had no data or no use for


@dataclasses.dataclass(frozen=True)
class Material:
    """A study, its verdicts, and the arrays from which they follow."""

    study: Study
    judgement: Judgement
    spectra: dict[tuple[str, int], RunSpectra]  # of the runs that saved any
    ends: dict[str, list[dict[str, np.ndarray]]]  # by arm, of the pass that is reported
    surgery: dict[tuple[str, int], list[Row]]  # of the runs whose rank surgery is whole
    sweep_prs: dict[str, dict[float, float | None]]  # by arm and rate; None: it diverged
    warnings: tuple[str, ...]  # what a reader has to know first

    @property
    def head_dim(self) -> int:
        """Directions that a head's keys can use."""
        for run in self.study.runs.values():
            return run.config.model.head_dim
        return int(presets.SHAPES[self.study.plan["scale"]]["head_dim"])

    @property
    def looks(self) -> dict[str, arms.Look]:
        """How each arm of the plan is drawn, the same in every chart."""
        return arms.looks(self.study.arms)

    def curves(self, metric: str, names: list[str] | None = None) -> dict[str, list[Curve]]:
        """The metric over training of every finished run that measured it, by arm."""
        found = {}
        for arm in self.study.arms if names is None else names:
            curves = [
                curve
                for run in self.study.of_arm(arm)
                if len((curve := _curve(run, metric)).tokens)
            ]
            if curves:
                found[arm] = curves
        return found

    def training(self, metric: str) -> dict[str, list[Curve]]:
        """A metric of every step by arm: the largest value in each of at most `_STRETCHES` ranges.

        Only runs that have it count; a range without a finite value gives no point.
        """
        found: dict[str, list[Curve]] = {}
        for arm in self.study.arms:
            for run in self.study.of_arm(arm):
                points = [(r["tokens"], r[metric]) for r in run.rows if r.get(metric) is not None]
                if points:
                    parts = np.array_split(np.array(points), min(len(points), _STRETCHES))
                    tokens, values = zip(*((p[-1, 0], p[:, 1].max()) for p in parts), strict=True)
                    curve = Curve(np.array(tokens), np.array(values), run.diverged)
                    found.setdefault(arm, []).append(curve)
        return found

    def end(self, metric: str, arm: str) -> float:
        """Mean over the arm's finished runs of what is reported."""
        return mean([run.value(metric) for run in self.study.of_arm(arm)])

    def said(self, metric: str, names: Iterable[str], digits: int = 2) -> str:
        """`end` of some arms in words."""
        ends = ((arms.label(arm), number(self.end(metric, arm), digits)) for arm in names)
        return "; ".join(f"{arm} {value}" for arm, value in ends)

    @property
    def passes(self) -> str:
        """Which validation tokens tables and curves are of, where that is not the same; else ""."""
        for run in self.study.runs.values():
            ends, during = run.config.eval.final_tokens, run.config.eval.tokens
            if run.has_final_pass and ends != during:
                return (
                    f"Tables give the pass over {_tokens(ends)} of the validation split after the "
                    f"last step, curves the evaluations of {_tokens(during)}: their ends differ."
                )
        return ""

    def noted(self, step: str) -> tuple[str, str]:
        """(status, why) that `qkjax study` noted of a step without a result; else ("", "")."""
        return study_files.read_note(self.study.workdir / "logs" / f"{step}.json") or ("", "")

    def groups(self, curves: Mapping[str, object]) -> Iterator[tuple[list[str], str, str]]:
        """(arms, stem of file names, words) of each chart: the arms, then controls by optimiser.

        Controls are shown beside the arms that they change.
        """
        plan = self.study.plan
        main = [arm for arm in plan["arms"] if arm in curves]
        if main:
            yield main, "arms", "the arms"
        parents = plan.get("parents") or {}
        controls = [arm for arm in plan["controls"] if arm in curves]
        for optimizer in dict.fromkeys(arms.optimizer(arm) for arm in controls):
            own = [arm for arm in controls if arms.optimizer(arm) == optimizer]
            above = [arm for arm in main if arm in {parents.get(name) for name in own}]
            yield [*above, *own], f"controls_{optimizer}", f"{arms.family(optimizer)}'s controls"


def _tokens(number: int) -> str:
    return f"the first {number:,} tokens" if number else "all"


def _curve(run: RunResult, metric: str) -> Curve:
    points = run.series(metric)
    tokens, values = ([point[i] for point in points] for i in (0, 1))
    return Curve(np.array(tokens), np.array(values, np.float64), run.diverged)


def gather(study: Study) -> Material:
    """Judges the study and reads the spectra of its runs.

    Raises:
        UsageError: a damaged file.
        StorageError: the disk failed.
    """
    judgement = judge.judge(study)
    spectra: dict[tuple[str, int], RunSpectra] = {}
    ends: dict[str, list[dict[str, np.ndarray]]] = {}
    for (arm, seed), run in study.runs.items():
        directory = RunDirectory(run.workdir)
        if not directory.spectra_steps():
            continue
        found = run_spectra.load_run(run.workdir, label=f"{arm}/seed_{seed}")
        spectra[arm, seed] = found
        reported = run.has_final_pass and directory.spectra(FINAL).exists()
        arrays = directory.read_spectra(FINAL) if reported else found.evaluations[-1].arrays
        ends.setdefault(arm, []).append(arrays)
    ordered = {arm: ends[arm] for arm in study.arms if arm in ends}
    return Material(
        study=study,
        judgement=judgement,
        spectra=spectra,
        ends=ordered,
        surgery=_surgery(study),
        sweep_prs=dict(_sweep_prs(study)),
        warnings=(*judgement.warnings, *_more_warnings(study)),
    )


def _surgery(study: Study) -> dict[tuple[str, int], list[Row]]:
    found = {}
    for (arm, seed), run in study.runs.items():
        rows = rank_curves.read_csv(_surgery_path(study, arm, seed))
        if rows and {row.params_sha256 for row in rows} == {run.summary["params_sha256"]}:
            found[arm, seed] = rows
    return found


def _surgery_path(study: Study, arm: str, seed: int) -> pathlib.Path:
    return study.workdir / "surgery" / arm / f"seed_{seed}.csv"


def _sweep_prs(study: Study) -> Iterator[tuple[str, dict[float, float | None]]]:
    """The PR of the sweep runs that still exist, by ascending rate."""
    for arm, entry in (study.learning_rates or {}).items():
        found: dict[float, float | None] = {}
        for rate in sorted(run["learning_rate"] for run in entry["runs"]):
            directory = RunDirectory(study.workdir / sweep.directory_of(arm, rate))
            summary = directory.read_summary()
            directory.check_files()
            if summary is not None and (summary["diverged"] or PR in summary):
                found[rate] = None if summary["diverged"] else summary[PR]
        if found:
            yield arm, found


def _more_warnings(study: Study) -> Iterator[str]:
    """What the verdicts do not consider: rates, the model's settings, how tasks were scored."""
    for arm, entry in (study.learning_rates or {}).items():
        if entry.get("edge"):
            yield (
                f"EDGE: the best learning rate of {arms.label(arm)}, {entry['chosen']:g}, is the "
                f"{'lowest' if entry['edge'] == 'low' else 'highest'} of its grid"
                f"{_extended(entry)}; a better one may lie outside. Next values to try: "
                f"{next_values(entry)}"
            )
        if entry.get("chosen") is None:
            yield f"{arms.label(arm)}: every learning rate of the sweep diverged, none is chosen"
    for arm in study.arms:
        chosen = chosen_rate(study, arm)
        used = sorted({run.config.optimizer.learning_rate for run in study.of_arm(arm)})
        if chosen is not None and any(not math.isclose(chosen, x, rel_tol=1e-5) for x in used):
            yield (
                f"{arms.label(arm)} ran at the learning rate "
                f"{', '.join(f'{rate:g}' for rate in used)}, but the sweep chose {chosen:g}"
            )
    limits = {found["limit"] for found in study.downstream.values() if found.get("limit")}
    if limits:
        yield (
            f"downstream scores are of the first {', '.join(f'{n:,}' for n in sorted(limits))} "
            "items of a task only"
        )
    backends = {place: found.get("backend") for place, found in study.downstream.items()}
    yield from _mixed(backends, "scored downstream tasks by different backends")
    measured = _surgery(study)
    for arm, seed in study.runs:
        if (arm, seed) not in measured and _surgery_path(study, arm, seed).exists():
            yield (
                f"{_surgery_path(study, arm, seed)}: left out, it measured other parameters than "
                "the run's last"
            )
    for field in dataclasses.fields(config_lib.ModelConfig):
        if field.name not in ("qk_norm", "unroll"):
            values = {
                place: getattr(run.config.model, field.name) for place, run in study.runs.items()
            }
            yield from _mixed(values, f"have different values of model.{field.name}")
    muon = {place: run.config.muon.dtype for place, run in study.runs.items()}
    yield from _mixed(muon, "have different values of muon.dtype")


def _extended(entry: Mapping[str, object]) -> str:
    return ", extended once already" if entry.get("extended") else ""


def next_values(entry: Mapping[str, object]) -> str:
    """The two rates beyond the edge, in the grid's own ratio."""
    rates = sorted(run["learning_rate"] for run in entry["runs"])  # type: ignore[attr-defined]
    if len(rates) < 2:
        return "a wider grid"
    low = entry["edge"] == "low"
    edge, neighbour = (rates[0], rates[1]) if low else (rates[-1], rates[-2])
    ratio = edge / neighbour
    return ", ".join(f"{edge * ratio**power:.3g}" for power in (1, 2))


def _mixed(values: Mapping[tuple[str, int], object], words: str) -> Iterator[str]:
    """What runs do not share; by arm and seed its value."""
    by_value: dict[str, list[str]] = {}
    for (arm, seed), value in values.items():
        if value is not None:
            by_value.setdefault(str(value), []).append(f"{arm} seed {seed}")
    if len(by_value) > 1:
        sides = "; ".join(f"{value}: {', '.join(runs)}" for value, runs in by_value.items())
        yield f"runs of one comparison {words} ({sides})"


def chosen_rate(study: Study, arm: str) -> float | None:
    """What the sweep chose for the arm or, of a control, for its parent."""
    parent = (study.plan.get("parents") or {}).get(arm, arm)
    entry = (study.learning_rates or {}).get(parent)
    return entry["chosen"] if entry else None


def load(workdir: str) -> Material:
    """`gather` of a study directory."""
    return gather(results.load_study(workdir))
