"""From runs to a clause: which seeds and arms count, the contrast between them, and its word.

The rules are those of docs/statistics.md and the same for every hypothesis.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qkjax import presets
from qkjax.runs.results import RunResult
from qkjax.study import questions
from qkjax.verdicts import rules, statistics
from qkjax.verdicts.judgement import (
    BY_RULE,
    INCONCLUSIVE,
    NEGLIGIBLE,
    NON_INFERIORITY,
    NOT_TWICE,
    OPPOSITE,
    RATIO,
    RULE,
    SUPERIORITY,
    SUPPORTED,
    TOO_SMALL,
    WORDS,
    WORSE,
    Clause,
    Interval,
)
from qkjax.verdicts.predictions import QUANTITIES, Prediction, Quantity
from qkjax.verdicts.results import Study

ONE_SEED = "one seed: nothing is decided"
FEWEST_DIVERGED = 4  # number of seeds from which a side that diverged decides a clause
_LISTED = 4  # runs named in one line; more are counted
LEVEL = "two-sided 95%, one-sided .025"
_BY_RULE = "by rule, no p"


@dataclasses.dataclass(frozen=True)
class Panel:
    """The runs that contrasts of a family use: seeds that have every arm of it."""

    study: Study
    family: tuple[str, ...]  # planned arms: those of the pooled error
    seeds: tuple[int, ...]  # used
    left_out: tuple[int, ...]  # planned for the whole family, but a run of it is missing
    head_dim: int

    @classmethod
    def of(cls, study: Study, family: Sequence[str] = questions.ARMS) -> "Panel":
        """Sorts the seeds of the plan into used and left out."""
        arms = tuple(arm for arm in study.arms if arm in family)
        planned = study.seeds_of_all(arms)
        complete = [all((arm, seed) in study.runs for arm in arms) for seed in planned]
        pairs = list(zip(planned, complete, strict=True))
        first = next(iter(study.runs.values()), None)
        return cls(
            study=study,
            family=arms,
            seeds=tuple(seed for seed, whole in pairs if whole),
            left_out=tuple(seed for seed, whole in pairs if not whole),
            head_dim=(
                first.config.model.head_dim
                if first
                else presets.SHAPES[study.plan["scale"]]["head_dim"]
            ),
        )

    def runs(self, arm: str) -> list[RunResult]:
        """The arm's runs of the seeds used."""
        return [self.study.runs[arm, seed] for seed in self.seeds]

    def missing(self, arms: Sequence[str]) -> str:
        """What the plan or the directory lacks of these arms, or of the family; "" if nothing."""
        unplanned = [arm for arm in arms if arm not in self.family]
        if unplanned:
            return f"the plan has no arm {' and no arm '.join(unplanned)}"
        if self.seeds:
            return ""
        planned = self.left_out  # of the whole family; an arm's extra seeds complete nothing
        made = [
            f"{arm} {sum((arm, seed) in self.study.runs for seed in planned)}"
            for arm in self.family
        ]
        return f"no seed has every arm; runs of {len(planned)} seeds: {', '.join(made)}"


def listed(names: Sequence[str]) -> str:
    """The first few of them and how many more there are."""
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def spoken(estimate: float, interval: Interval | None, unit: str) -> str:
    """ "+3.2 PR, 95% +1.0 to +5.4"; of logarithms "1.95 times, 95% 1.93 to 1.97"."""
    if unit.startswith("ln "):
        said = f"{math.exp(estimate):.3g} times"
        ends = [f"{math.exp(end):.3g}" for end in interval or ()]
    else:
        form = "+.4f" if unit == "nat" else "+.3g"
        number = f"{estimate:{form}}"
        said = f"{number} {unit.removesuffix('s') if number in ('+1', '-1') else unit}".rstrip()
        ends = [f"{end:{form}}" for end in interval or ()]
    return f"{said}, 95% {ends[0]} to {ends[1]}" if ends else said


# --------------------------------------------------------------------------------------------
# By contrast.


def by_contrast(
    panel: Panel, prediction: Prediction, quantities: Mapping[str, Quantity] = QUANTITIES
) -> Clause:
    """A clause decided by the interval of sum weights x quantity over the panel's seeds.

    Args:
        quantities: by the name that the prediction uses; of H1 to H4 unless given.
    """
    quantity = quantities[prediction.quantity]
    limit = quantity.limit(panel.head_dim) if prediction.limit is None else prediction.limit
    per_seed = _per_seed(panel.study, prediction, quantity)
    clause = Clause(
        name=prediction.name,
        text=prediction.text,
        kind=prediction.kind,
        unit=quantity.unit,
        sesoi=limit,
        level=LEVEL,
        per_seed=per_seed,
        seeds=panel.seeds,
    )
    unavailable = panel.missing(list(prediction.weights)) or _too_short(panel, quantity)
    if unavailable:
        return dataclasses.replace(clause, reason=unavailable)
    diverged = {arm: sum(quantity.diverged(run) for run in panel.runs(arm)) for arm in panel.family}
    if any(diverged[arm] for arm in prediction.weights):
        return _by_divergence(clause, panel, prediction, quantity.worse, diverged)
    values = {arm: [quantity.measure(run) for run in panel.runs(arm)] for arm in panel.family}
    bad = [
        f"{arm} seed {seed}"
        for arm in prediction.weights
        for seed, value in zip(panel.seeds, values[arm], strict=True)
        if not math.isfinite(value)
    ]
    if bad:
        return dataclasses.replace(clause, reason=f"no finite value of {listed(bad)}")
    estimate = math.fsum(
        weight * float(np.mean(values[arm])) for arm, weight in prediction.weights.items()
    )
    clause = dataclasses.replace(
        clause, estimate=estimate, said=spoken(estimate, None, quantity.unit)
    )
    if len(panel.seeds) == 1:
        return dataclasses.replace(clause, reason=f"{clause.said}; {ONE_SEED}")
    # Arms of weight 0 that diverged, at any time, or have no value add no error to others.
    family = tuple(
        arm
        for arm in panel.family
        if arm in prediction.weights
        or not (any(run.diverged for run in panel.runs(arm)) or not np.isfinite(values[arm]).all())
    )
    found = statistics.contrast(
        np.array([values[arm] for arm in family]).T,
        [prediction.weights.get(arm, 0.0) for arm in family],
    )
    clause = dataclasses.replace(clause, family=family)
    if found.mse == 0:
        return dataclasses.replace(clause, reason="the seeds do not differ (MSE = 0)")
    return decided(clause, found, limit)


def decided(clause: Clause, found: statistics.Contrast, limit: float) -> Clause:
    """The clause with its intervals, word and reason."""
    judged = rules.judge_clause(clause.kind, found, limit)
    pooled, paired, deciding = (
        (float(low), float(high))
        for low, high in (found.pooled(), found.paired(), found.deciding())
    )
    assert clause.estimate is not None
    word = WORDS[int(judged.code)]
    said = spoken(clause.estimate, deciding, clause.unit)
    reason = f"{said}: {_why(word, clause.kind, clause.estimate, deciding, limit)}"
    needed = None
    if word == INCONCLUSIVE:
        spread = float(max(found.pooled_error, found.paired_error)) * math.sqrt(len(clause.seeds))
        arms = len(clause.family)
        needed = rules.seeds_for_power(clause.kind, clause.estimate, spread, arms, limit)
        seeds = f"more than {rules.MOST_SEEDS}" if needed is None else needed
        reason += f"; {seeds} seeds for 80% power if this estimate were the truth"
    signs = {value > 0 for value in found.per_seed.tolist() if value}
    disagree = clause.kind == SUPERIORITY and len(signs) == 2
    return dataclasses.replace(
        clause,
        word=word,
        word_at_975=WORDS[int(judged.strict)],
        reason=reason,
        said=said,
        deciding=deciding,
        pooled=pooled,
        paired=paired,
        p=float(judged.p),
        seeds_needed=needed,
        notes=(*clause.notes, *(["the seeds disagree in sign"] if disagree else [])),
    )


def _why(word: str, kind: str, estimate: float, interval: Interval, limit: float) -> str:
    """A few words after the numbers of a clause."""
    low, high = interval
    if kind == NON_INFERIORITY and word == SUPPORTED:
        if high < 0:
            return "better, and so not worse by the margin"
        words = "worse, but by less than" if low > 0 else "not worse by"
        return f"{words} the margin of {limit:g}"
    if word == INCONCLUSIVE:
        if kind == NON_INFERIORITY:
            return f"the interval contains the margin of {limit:g}"
        if kind == RATIO:
            return f"the interval contains {math.exp(limit):.3g}"
        if low > 0 and estimate < limit:
            return "above 0, but the estimate is below the smallest effect of interest"
        return "the interval contains 0 and effects of interest"
    return {
        SUPPORTED: f"above {math.exp(limit):.3g}" if kind == RATIO else "as predicted",
        OPPOSITE: "the opposite",
        NEGLIGIBLE: "negligible",
        TOO_SMALL: "no effect as large as claimed",
        NOT_TWICE: "not twice",
        WORSE: f"worse by more than the margin of {limit:g}",
    }[word]


def _by_divergence(
    clause: Clause, panel: Panel, prediction: Prediction, worse: int, diverged: dict[str, int]
) -> Clause:
    """Runs that diverged are outcomes: a side that diverged wholly, and alone, is the worse one.

    With fewer than four seeds that is said as a count. Where only some diverged, or both sides,
    or neither side can be called worse, nothing is decided.
    """
    seeds = len(panel.seeds)
    counts = "; ".join(
        f"{arm}: {diverged[arm]} of {seeds} diverged" for arm in prediction.weights if diverged[arm]
    )
    clause = dataclasses.replace(clause, level=_BY_RULE, said=counts)
    sides = {
        sign: [arm for arm, weight in prediction.weights.items() if weight * sign > 0]
        for sign in (1, -1)
    }
    for sign, arms in sides.items():
        whole = all(diverged[arm] == seeds for arm in arms)
        alone = not any(diverged[arm] for arm in sides[-sign])
        if not (whole and alone and worse):
            continue
        p = statistics.all_or_none(seeds * len(arms), seeds * len(sides[-sign]))
        reason = f"{counts}, none of the other side; Fisher's one-sided p {p:.3g}"
        if seeds < FEWEST_DIVERGED:
            return dataclasses.replace(
                clause, reason=f"{reason}; with fewer than four seeds this is only a count"
            )
        up = worse * sign > 0  # the contrast as if its diverged side were infinitely bad
        word = SUPPORTED if up != (clause.kind == NON_INFERIORITY) else BY_RULE
        strict = word if p <= (1 - statistics.STRICT) / 2 else INCONCLUSIVE
        return dataclasses.replace(
            clause,
            word=word,
            word_at_975=strict,
            reason=f"{reason}: that side is worse, by rule",
            p=p if word == SUPPORTED else 1.0,
        )
    return dataclasses.replace(clause, reason=counts)


def _too_short(panel: Panel, quantity: Quantity) -> str:
    """Why an early evaluation of the quantity cannot be used, if so."""
    for run in panel.study.runs.values():
        step = quantity.step(run)
        why = "" if step is None else questions.too_short(run.config, step)
        if why:
            return why
    return ""


def _per_seed(study: Study, prediction: Prediction, quantity: Quantity) -> dict[int, float | None]:
    """The contrast of every seed that has these arms, also of seeds that are left out."""
    found: dict[int, float | None] = {}
    for seed in study.seeds:
        if all((arm, seed) in study.runs for arm in prediction.weights):
            runs = {arm: study.runs[arm, seed] for arm in prediction.weights}
            terms = [
                math.nan if quantity.diverged(run) else weight * quantity.measure(run)
                for run, weight in zip(runs.values(), prediction.weights.values(), strict=True)
            ]
            value = math.fsum(terms) if np.isfinite(terms).all() else math.nan
            found[seed] = value if math.isfinite(value) else None
    return found


# --------------------------------------------------------------------------------------------
# By rule.


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

    It holds or fails, asks the runs of every seed, and enters no p. Where every run of the other
    arms fails too, as small batches make every loss jump, the reason says so.

    Args:
        reaches: whether the limit itself is still allowed.
        measure: None where the run is too short to be measured; infinite where it broke the rule
            without a number.
    """
    per_seed = {run.seed: measure(run) for run in study.of_arm(arm)}
    known = {seed: value for seed, value in per_seed.items() if value is not None}

    def breaks(value: float) -> bool:
        return not (value < limit or (reaches and value == limit))

    broken = [seed for seed, value in known.items() if breaks(value)]
    worst = max(known.values(), default=math.nan)
    clause = Clause(
        name=name,
        text=text,
        kind=RULE,
        unit=unit,
        sesoi=limit,
        estimate=worst if math.isfinite(worst) else None,
        level=_BY_RULE,
        per_seed={
            seed: value if value is not None and math.isfinite(value) else None
            for seed, value in per_seed.items()
        },
        seeds=tuple(known),
    )
    if broken:
        seeds = " and ".join(f"seed {seed}" for seed in broken)
        alone = " (by rule, one seed)" if len(per_seed) == 1 else ""
        others = [
            measure(run)
            for run in study.runs.values()
            if run.arm != arm and run.arm in questions.ARMS
        ]
        shared = bool(others) and all(value is not None and breaks(value) for value in others)
        common = "; so it is by every run of the other arms, which it does not tell apart" * shared
        reason = f"broken by {seeds}{alone}{common}"
        return dataclasses.replace(clause, word=BY_RULE, word_at_975=BY_RULE, reason=reason)
    lacking = [f"{run.arm} seed {run.seed} ({run.why})" for run in study.missing if run.arm == arm]
    if lacking or not per_seed:
        words = f"missing: {listed(lacking)}" if lacking else f"no run of {arm}"
        return dataclasses.replace(clause, reason=words)
    if len(known) < len(per_seed):
        return dataclasses.replace(clause, reason=too_short)
    reason = f"holds for every seed, at most {worst:.4g} {unit}".rstrip()
    return dataclasses.replace(clause, word=SUPPORTED, reason=reason)
