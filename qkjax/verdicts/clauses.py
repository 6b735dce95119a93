"""From runs to a clause: which seeds count, the contrast between their arms, and its status.

The rules are those of SCIENCE.md section 8 and the same for every hypothesis.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qkjax import presets
from qkjax.runs.results import RunResult
from qkjax.verdicts import statistics
from qkjax.verdicts.judgement import (
    INCONCLUSIVE,
    NON_INFERIORITY,
    REFUTED,
    RULE,
    SUPERIORITY,
    SUPPORTED,
    Clause,
    Interval,
)
from qkjax.verdicts.results import Study

Measure = Callable[[RunResult], float]
_LISTED = 4  # runs named in one line; more are counted


@dataclasses.dataclass(frozen=True)
class Panel:
    """The runs that contrasts use: seeds that have every arm of the plan."""

    study: Study
    arms: tuple[str, ...]  # of the plan, controls included: C of the block layout
    seeds: tuple[int, ...]  # used
    left_out: tuple[int, ...]  # seeds of the plan that lack an arm
    head_dim: int

    @classmethod
    def of(cls, study: Study) -> "Panel":
        """Sorts the seeds of the plan into used and left out."""
        arms = tuple(study.arms)
        complete = [all((arm, seed) in study.runs for arm in arms) for seed in study.seeds]
        pairs = list(zip(study.seeds, complete, strict=True))
        first = next(iter(study.runs.values()), None)
        return cls(
            study=study,
            arms=arms,
            seeds=tuple(seed for seed, whole in pairs if whole),
            left_out=tuple(seed for seed, whole in pairs if not whole),
            head_dim=(
                first.config.model.head_dim
                if first
                else presets.SHAPES[study.plan["scale"]]["head_dim"]
            ),
        )

    def values(self, measure: Measure) -> np.ndarray:
        """[seeds, arms] float64."""
        rows = [[measure(self.study.runs[arm, seed]) for arm in self.arms] for seed in self.seeds]
        return np.array(rows, np.float64).reshape(len(self.seeds), len(self.arms))

    def missing(self, arms: Sequence[str]) -> str:
        """What the plan or the directory lacks of these arms, or of every arm; "" if nothing."""
        unplanned = [arm for arm in arms if arm not in self.arms]
        if unplanned:
            return f"the plan has no arm {' and no arm '.join(unplanned)}"
        if self.seeds:
            return ""
        lacking = [f"{run.arm} seed {run.seed} ({run.why})" for run in self.study.missing]
        return f"no seed has every arm of the plan; missing: {listed(lacking)}"


def listed(names: Sequence[str]) -> str:
    """The first few of them and how many more there are."""
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def by_contrast(
    panel: Panel,
    name: str,
    text: str,
    measure: Measure,
    weights: Mapping[str, float],
    *,
    sesoi: float,
    unit: str,
    offset: float = 0.0,
    kind: str = SUPERIORITY,
    unavailable: str = "",
) -> Clause:
    """A clause decided by the interval of sum weights x measure - offset.

    Args:
        measure: one number of a run; NaN where it has none.
        weights: by arm, with sum 0; the other arms of the plan have weight 0.
        sesoi: smallest effect of interest; of kind NON_INFERIORITY the margin.
        unavailable: why the quantity cannot be had of these runs, if so.
    """
    clause = Clause(
        name,
        text,
        INCONCLUSIVE,
        "",
        None,
        None,
        None,
        None,
        sesoi,
        unit,
        None,
        per_seed=_per_seed(panel.study, measure, weights, offset),
        kind=kind,
    )
    unavailable = unavailable or panel.missing(list(weights))
    if unavailable:
        return dataclasses.replace(clause, reason=unavailable)
    values = panel.values(measure)
    found = statistics.contrast(values, [weights.get(arm, 0.0) for arm in panel.arms], offset)
    clause = dataclasses.replace(
        clause, estimate=found.estimate if math.isfinite(found.estimate) else None
    )
    if found.pooled is None or found.paired is None:
        return dataclasses.replace(clause, reason=_unusable(panel, values, found))
    status, words = decide(found.estimate, found.pooled, sesoi, kind)
    notes = _notes(found, status, words, sesoi, kind)
    needed = None
    if status == INCONCLUSIVE:
        distance, outcome = _were_it_true(found.estimate, sesoi, kind)
        needed = found.needed_seeds(distance)
        seeds = f"more than {statistics.MOST_SEEDS:,}" if needed is None else needed
        words += f"; {seeds} seeds would decide it, as {outcome}, were this estimate the truth"
    return dataclasses.replace(
        clause,
        status=status,
        reason=f"{words}: {figures(found.estimate, found.pooled, unit)}",
        pooled=found.pooled,
        paired=found.paired,
        p=found.p_below(sesoi) if kind == NON_INFERIORITY else found.p_above(0.0),
        seeds_needed=needed,
        notes=notes,
    )


def decide(estimate: float, interval: Interval, sesoi: float, kind: str) -> tuple[str, str]:
    """(status, words) of an estimate with its 95% interval; the order of the rules is fixed.

    Superiority: supported where the interval lies above 0 and the estimate reaches the SESOI;
    refuted where it lies below 0, inside (0, SESOI), or below the SESOI. Non-inferiority, of a
    margin: supported below it, refuted above it; the words also tell on which side of 0.
    """
    low, high = interval
    if kind == NON_INFERIORITY:
        if high < 0:
            return SUPPORTED, "better, and so not worse by the margin"
        if high < sesoi:
            words = "worse, by less than the margin" if low > 0 else "not worse by the margin"
            return SUPPORTED, f"{words} of {sesoi:g}"
        if low > sesoi:
            return REFUTED, f"worse by more than the margin of {sesoi:g}"
        return INCONCLUSIVE, f"the interval holds the margin of {sesoi:g}"
    if low > 0 and estimate >= sesoi:
        return SUPPORTED, "as predicted"
    if high < 0:
        return REFUTED, "reversed"
    if low > 0 and high < sesoi:
        return REFUTED, "real but negligible"
    if high < sesoi:
        return REFUTED, "no effect as large as claimed"
    if low > 0:
        return INCONCLUSIVE, "above 0, but the estimate is below the smallest effect of interest"
    return INCONCLUSIVE, "the interval holds 0 and effects of interest"


def _were_it_true(estimate: float, sesoi: float, kind: str) -> tuple[float, str]:
    """Half-width of the interval that would decide, were the estimate the truth, and how."""
    if kind == NON_INFERIORITY:
        return abs(sesoi - estimate), SUPPORTED if estimate < sesoi else REFUTED
    return (sesoi - estimate, REFUTED) if estimate < sesoi else (estimate, SUPPORTED)


def figures(estimate: float, interval: Interval, unit: str) -> str:
    """ "+3.21 [+1.02, +5.40] PR"."""
    return f"{estimate:+.4g} [{interval[0]:+.4g}, {interval[1]:+.4g}] {unit}".rstrip()


def _notes(
    found: statistics.Contrast, status: str, words: str, sesoi: float, kind: str
) -> tuple[str, ...]:
    notes = []
    assert found.paired is not None
    other, other_words = decide(found.estimate, found.paired, sesoi, kind)
    alike = other_words == words or kind == NON_INFERIORITY  # whose words only describe
    if other != status or not alike:
        notes.append(
            f"the paired interval [{found.paired[0]:+.4g}, {found.paired[1]:+.4g}] alone would "
            f"say {other} ({other_words})"
        )
    if kind != NON_INFERIORITY and min(found.per_seed) < 0 < max(found.per_seed):
        notes.append("the seeds disagree in sign")
    return tuple(notes)


def _unusable(panel: Panel, values: np.ndarray, found: statistics.Contrast) -> str:
    if found.unusable != "a value is not finite":
        return found.unusable
    bad = [
        f"{panel.arms[column]} seed {panel.seeds[row]}"
        for row, column in np.argwhere(~np.isfinite(values))
    ]
    return f"no finite value of {listed(bad)}"


def _per_seed(
    study: Study, measure: Measure, weights: Mapping[str, float], offset: float
) -> dict[int, float | None]:
    """Of every seed of the plan that has these arms, also of seeds that are left out."""
    found: dict[int, float | None] = {}
    for seed in study.seeds:
        if all((arm, seed) in study.runs for arm in weights):
            terms = [weight * measure(study.runs[arm, seed]) for arm, weight in weights.items()]
            value = math.fsum(terms) - offset if np.isfinite(terms).all() else math.nan
            found[seed] = value if math.isfinite(value) else None
    return found


def by_rule(
    study: Study,
    arm: str,
    name: str,
    text: str,
    measure: Callable[[RunResult], float | None],
    *,
    limit: float,
    unit: str,
    reaches: bool = False,
    too_short: str = "",
) -> Clause:
    """A clause that every run of an arm has to satisfy: measure < limit.

    Args:
        reaches: whether the limit itself is still allowed.
        measure: None where the run is too short to be measured; infinite where it broke the rule
            without a number.
    """
    per_seed = {run.seed: measure(run) for run in study.of_arm(arm)}
    known = {seed: value for seed, value in per_seed.items() if value is not None}
    broken = [
        seed for seed, value in known.items() if not (value < limit or (reaches and value == limit))
    ]
    worst = max(known.values(), default=math.nan)
    clause = Clause(
        name,
        text,
        INCONCLUSIVE,
        "",
        worst if math.isfinite(worst) else None,
        None,
        None,
        None,
        limit,
        unit,
        None,
        kind=RULE,
        per_seed={
            seed: value if value is not None and math.isfinite(value) else None
            for seed, value in per_seed.items()
        },
    )
    if broken:
        seeds = " and ".join(f"seed {seed}" for seed in broken)
        alone = " (by rule, one seed)" if len(per_seed) == 1 else ""
        reason = f"broken by {seeds}{alone}"
        return dataclasses.replace(clause, status=REFUTED, reason=reason, p=1.0)
    lacking = [f"{run.arm} seed {run.seed} ({run.why})" for run in study.missing if run.arm == arm]
    if lacking or not per_seed:
        words = f"missing: {listed(lacking)}" if lacking else f"no run of {arm}"
        return dataclasses.replace(clause, reason=words)
    if len(known) < len(per_seed):
        return dataclasses.replace(clause, reason=too_short)
    reason = f"holds for every seed, at most {worst:.4g} {unit}".rstrip()
    return dataclasses.replace(clause, status=SUPPORTED, reason=reason, p=0.0)
