"""What a number of seeds can decide: whole studies simulated before any training.

Runs are drawn as numbers, truth plus noise, and judged by the rules of real studies: the same
predictions, intervals, words and correction. Pure numpy: thousands of studies take milliseconds.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qkjax.study import questions
from qkjax.study.plan import Plan
from qkjax.verdicts import rules, statistics
from qkjax.verdicts.clauses import ONE_SEED, Panel
from qkjax.verdicts.judgement import INCONCLUSIVE, SUPERIORITY
from qkjax.verdicts.predictions import DECIDING, QUANTITIES, Prediction, deciding
from qkjax.verdicts.results import Study
from qkjax.verdicts.rules import CODES, Decided

Truth = Mapping[str, Mapping[str, float]]  # by quantity, by arm; 0 where nothing is said

STUDIES = 2_000
SEEDS = (2, 3, 5)
MOST_SEEDS = 32
SHARED = (0.0, 0.5)  # of the variance: what the QK arms of a seed have in common
ACCURACY, SESOI_POINTS, NUM_TASKS = "accuracy", 1.0, 2
SCORED = ("adamw_qk", "muon_noqk")
# Assumed standard deviations between runs of one arm; that of PR as a share of head_dim.
ASSUMED: dict[str, float] = {
    "PR": 0.023,
    "PR growth": 0.023,
    "ln PR": 0.04,
    "aa": 0.03,
    "loss": 0.006,
    "early loss": 0.006,
    ACCURACY: 0.5,
}
_SAME_NOISE = {"ln PR": "PR"}  # two forms of one number
# The original's pilot at 25M tokens, PR of 64; where it measured nothing, twice the SESOI.
ORIGINAL_PR = {"adamw_qk": 16.2, "adamw_noqk": 32.8, "muon_qk": 30.0, "muon_noqk": 51.2}
_ORIGINAL_COST = {"adamw": 16.6, "muon": 21.2}  # PR of 64 that QK-Norm cost under each optimiser


@dataclasses.dataclass(frozen=True)
class Spread:
    """The noise of runs."""

    deviations: Mapping[str, float]  # by quantity, in its unit
    shared: float = 0.0  # share of the variance that the QK arms of a seed have in common
    factors: Mapping[str, float] = dataclasses.field(default_factory=dict)  # by arm; 1 if absent
    freedom: int | None = None  # of Student's t, scaled to the same variance; None: normal


def draw(
    quantity: str,
    arms: Sequence[str],
    truth: Truth,
    spread: Spread,
    seeds: int,
    chance: np.random.Generator,
    studies: int = STUDIES,
) -> np.ndarray:
    """[studies, seeds, arms] of one quantity; what a seed does to all arms alike is left out."""

    def noise(*shape: int) -> np.ndarray:
        if spread.freedom is None:
            return chance.standard_normal(shape)
        scale = math.sqrt((spread.freedom - 2) / spread.freedom)
        return scale * chance.standard_t(spread.freedom, shape)

    own = noise(studies, seeds, len(arms))
    common = noise(studies, seeds, 1) if spread.shared else 0.0
    shares = np.array([spread.shared if _has_qk_norm(arm) else 0.0 for arm in arms])
    factors = np.array([spread.factors.get(arm, 1.0) for arm in arms])
    mean = np.array([truth.get(quantity, {}).get(arm, 0.0) for arm in arms])
    mixed = np.sqrt(1 - shares) * own + np.sqrt(shares) * common
    return mean + spread.deviations[quantity] * factors * mixed


def _has_qk_norm(arm: str) -> bool:
    return "noqk" not in arm.split("_")


def draw_all(
    quantities: Sequence[str],
    arms: Sequence[str],
    truth: Truth,
    spread: Spread,
    seeds: int,
    chance: np.random.Generator,
    studies: int = STUDIES,
) -> dict[str, np.ndarray]:
    """Noise by quantity, [studies, seeds, arms]; ln PR has that of PR, all others their own."""
    found: dict[str, np.ndarray] = {}
    for quantity in quantities:
        source = _SAME_NOISE.get(quantity)
        if source in found:
            centred = found[source] - np.array([truth.get(source, {}).get(a, 0.0) for a in arms])
            scale = spread.deviations[quantity] / spread.deviations[source]
            mean = np.array([truth.get(quantity, {}).get(arm, 0.0) for arm in arms])
            found[quantity] = mean + scale * centred
        else:
            found[quantity] = draw(quantity, arms, truth, spread, seeds, chance, studies)
    return found


# --------------------------------------------------------------------------------------------
# Simulated studies, judged.


class Judged(NamedTuple):
    """The words of simulated studies, [studies] each."""

    words: dict[str, np.ndarray]  # by hypothesis, codes after correction
    alone: dict[str, np.ndarray]  # before correction
    clauses: dict[str, Decided]  # by name of the prediction


def judge_clause(
    prediction: Prediction, values: Mapping[str, np.ndarray], arms: Sequence[str], head_dim: int
) -> Decided:
    """One prediction of simulated studies; `arms` are its family."""
    quantity = QUANTITIES[prediction.quantity]
    limit = quantity.limit(head_dim) if prediction.limit is None else prediction.limit
    weights = [prediction.weights.get(arm, 0.0) for arm in arms]
    found = statistics.contrast(values[prediction.quantity], weights)
    return rules.judge_clause(prediction.kind, found, limit)


def judge(
    values: Mapping[str, np.ndarray],
    family: Sequence[str],
    head_dim: int,
    pilot: bool = False,
) -> Judged:
    """The hypotheses of `family` (of H1 to H4) on the four arms; H4's rules are taken as kept.

    Args:
        values: by quantity [studies, seeds, 4], arms as in `questions.ARMS`.
    """
    clauses: dict[str, Decided] = {}
    alone, p = {}, {}
    for name in family:
        found = [
            judge_clause(prediction, values, questions.ARMS, head_dim)
            for prediction in deciding(name, pilot)
        ]
        clauses |= {p.name: d for p, d in zip(deciding(name, pilot), found, strict=True)}
        codes, strict, p_values = (np.stack(part, axis=-1) for part in zip(*found, strict=True))
        alone[name] = rules.judge_hypothesis(codes, strict)
        p[name] = p_values.max(axis=-1)
    return Judged(_corrected(alone, p), alone, clauses)


def _corrected(
    alone: Mapping[str, np.ndarray], p: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    first = [name for name in alone if name == "H1"]
    others = [name for name in alone if name != "H1"]
    studies = len(next(iter(alone.values())))

    def side(names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        empty = np.empty((studies, 0))
        p_values = np.stack([p[n] for n in names], axis=-1) if names else empty
        codes = np.stack([alone[n] for n in names], axis=-1) if names else empty
        return p_values, rules.supported(codes)

    found = statistics.correct(*side(first), *side(others))
    words = {}
    for names, corrected in zip((first, others), found, strict=True):
        for place, name in enumerate(names):
            lost = rules.supported(alone[name]) & ~corrected.rejected[:, place]
            words[name] = np.where(lost, CODES[INCONCLUSIVE], alone[name])
    return words


class Shares(NamedTuple):
    """How often a word is said, of all studies."""

    supported: float
    refuted: float

    @classmethod
    def of(cls, codes: np.ndarray) -> "Shares":
        """The shares of the codes of simulated studies."""
        return cls(float(rules.supported(codes).mean()), float(rules.refuted(codes).mean()))

    def __str__(self) -> str:
        rest = max(0.0, 1 - self.supported - self.refuted)
        return "/".join(f"{round(100 * share):>3}" for share in (*self, rest))


# --------------------------------------------------------------------------------------------
# A plan.


@dataclasses.dataclass(frozen=True)
class Design:
    """What a plan lets studies decide: the questions that it can answer, and its families."""

    family: tuple[str, ...]  # of H1 to H4
    attributed: dict[str, tuple[str, ...]]  # by optimiser: none, decayed, the rest of the family
    scores: bool  # H5
    head_dim: int
    pilot: bool

    @classmethod
    def of(cls, plan: Plan) -> "Design":
        """The design of a plan."""
        config = next(iter(plan.arms.values())).config
        attributed = {}
        for optimizer in _ORIGINAL_COST:
            none, decayed, *others = _gamma_arms(optimizer)
            decayed = plan.left_out.get(decayed, decayed)  # its parent, where that is its twin
            if none in plan.arms and decayed in plan.arms:
                rest = (arm for arm in others if arm in plan.arms)
                attributed[optimizer] = (none, decayed, *rest)
        unanswerable = plan.unanswerable()
        return cls(
            family=tuple(name for name in DECIDING if name not in unanswerable),
            attributed=attributed,
            scores="H5" not in unanswerable,
            head_dim=config.model.head_dim,
            pilot=config.scale == "pilot",
        )

    def simulate(self, effects: bool, spread: Spread, seeds: int) -> dict[str, Shares]:
        """How often each verdict is reached; the same numbers every time.

        Args:
            effects: the original's; else all arms are alike.
        """
        chance = np.random.default_rng((seeds, int(effects), round(100 * spread.shared)))
        found: dict[str, Shares] = {}
        if self.family:
            wanted = [p.quantity for name in self.family for p in deciding(name, self.pilot)]
            if "ln PR" in wanted:
                wanted = ["PR", *wanted]
            truth = original_effects(self.head_dim) if effects else {}
            values = draw_all(
                list(dict.fromkeys(wanted)), questions.ARMS, truth, spread, seeds, chance
            )
            judged = judge(values, self.family, self.head_dim, self.pilot)
            found |= {name: Shares.of(codes) for name, codes in judged.words.items()}
        for optimizer, arms in self.attributed.items():
            none, decayed, *_ = arms
            cost = _ORIGINAL_COST[optimizer] * self.head_dim / 64 if effects else 0.0
            values = {"PR": draw("PR", arms, {"PR": {none: cost}}, spread, seeds, chance)}
            prediction = Prediction("A", "", "PR", {none: 1.0, decayed: -1.0})
            decided = judge_clause(prediction, values, arms, self.head_dim)
            found[f"A {optimizer}"] = Shares.of(decided.code)
        if self.scores:
            found["H5"] = _scores(effects, spread, seeds, chance)
        return found


def _gamma_arms(optimizer: str) -> tuple[str, ...]:
    controls = ("decayed", "frozen", "undecayed", "to_one")
    return (f"{optimizer}_noqk", *(f"{optimizer}_qk_{control}" for control in controls))


def _scores(effects: bool, spread: Spread, seeds: int, chance: np.random.Generator) -> Shares:
    truth = {ACCURACY: {"muon_noqk": 2 * SESOI_POINTS if effects else 0.0}}
    tasks = [draw(ACCURACY, SCORED, truth, spread, seeds, chance) for _ in range(NUM_TASKS)]
    return Shares.of(judge_scores(tasks))


def judge_scores(tasks: Sequence[np.ndarray]) -> np.ndarray:
    """Codes of H5 from accuracies, [studies, seeds, `SCORED`] of each task.

    The items agree where every seed's difference has the sign of the word.
    """
    codes, strict = [], []
    for values in tasks:
        found = statistics.contrast(values, (-1.0, 1.0))
        decided = rules.judge_clause(SUPERIORITY, found, SESOI_POINTS)
        disagree = rules.supported(decided.code) & (found.per_seed <= 0).any(axis=-1)
        codes.append(np.where(disagree, CODES[INCONCLUSIVE], decided.code))
        strict.append(decided.strict)
    return rules.judge_hypothesis(np.stack(codes, axis=-1), np.stack(strict, axis=-1))


def original_effects(head_dim: int) -> Truth:
    """The original's differences between arms; where it measured nothing, twice the SESOI."""
    size = head_dim / 64
    aa, growth, loss = (
        2 * QUANTITIES[name].limit(head_dim) for name in ("aa", "PR growth", "early loss")
    )
    return {
        "PR": {arm: size * pr for arm, pr in ORIGINAL_PR.items()},
        "ln PR": {arm: math.log(size * pr) for arm, pr in ORIGINAL_PR.items()},
        "aa": {"adamw_qk": aa},
        "PR growth": {"muon_noqk": growth},
        "early loss": {"adamw_noqk": loss, "muon_noqk": loss},
    }


def assumed(head_dim: int) -> dict[str, float]:
    """The assumed deviations, in units."""
    return {
        name: sd * head_dim if name in QUANTITIES and QUANTITIES[name].unit == "PR" else sd
        for name, sd in ASSUMED.items()
    }


def measured(study: Study, head_dim: int) -> dict[str, float]:
    """The deviations that a finished study shows: root of the block layout's MSE over its arms.

    Only quantities that every seed's runs have; participation ratios are scaled to `head_dim`.
    """
    panel = Panel.of(study)
    found: dict[str, float] = {}
    if len(panel.seeds) < 2:
        return found
    for name in ASSUMED:
        if name not in QUANTITIES:
            continue
        quantity = QUANTITIES[name]
        rows = [
            [quantity.measure(study.runs[arm, seed]) for arm in panel.family]
            for seed in panel.seeds
        ]
        values = np.array(rows)[:, np.isfinite(rows).all(axis=0)]
        if values.shape[1] < 2:
            continue
        contrast = [1.0, -1.0, *[0.0] * (values.shape[1] - 2)]
        deviation = math.sqrt(float(statistics.contrast(values, contrast).mse))
        scale = head_dim / panel.head_dim if quantity.unit == "PR" else 1.0
        if deviation > 0:
            found[name] = scale * deviation
    scores = _score_deviation(study)
    return found if scores is None else {**found, ACCURACY: scores}


def _score_deviation(study: Study) -> float | None:
    """Between runs of one arm, HellaSwag's acc_norm in points; None where it is not known."""
    from_arms = []
    for arm in ("adamw_qk", "muon_noqk"):
        scores = [
            100 * float(task["metrics"]["acc_norm"]["value"])
            for seed in study.seeds
            if (task := study.downstream.get((arm, seed), {"tasks": {}})["tasks"].get("hellaswag"))
        ]
        if len(scores) > 1:
            from_arms.append(float(np.var(scores, ddof=1)))
    return math.sqrt(float(np.mean(from_arms))) if from_arms and max(from_arms) > 0 else None


# --------------------------------------------------------------------------------------------
# In words.


def describe(plan: Plan, finished: Study | None = None) -> Iterator[str]:
    """What the seeds of a plan can decide, as lines for people.

    Args:
        finished: whose spreads replace the assumed ones, as far as it has them.
    """
    design = Design.of(plan)
    deviations = assumed(design.head_dim)
    known = {} if finished is None else measured(finished, design.head_dim)
    deviations |= known
    yield "what seeds can decide (simulated studies, judged and corrected as real ones):"
    for name, why in plan.unanswerable().items():
        yield f"  {name}: left out, {why}"
    if not (design.family or design.attributed or design.scores):
        yield "  this plan answers none of H1 to H5"
        return
    yield f"  {_spreads(deviations, known, finished)}"
    yield (
        "  effects: the original's pilot (PR 16.2, 32.8, 30.0, 51.2 of 64); where it measured "
        "nothing, twice the smallest effect of interest; equal losses"
    )

    @functools.cache
    def simulated(effects: bool, shared: float, seeds: int) -> dict[str, Shares]:
        return design.simulate(effects, Spread(deviations, shared), seeds)

    def power(name: str, seeds: int) -> float:
        return min(simulated(True, shared, seeds)[name].supported for shared in SHARED)

    names = list(simulated(True, SHARED[0], SEEDS[0]))
    columns = " ".join(f"{f'S = {seeds}':>12}" for seeds in SEEDS)
    yield "  supported/refuted/inconclusive in %, with S seeds:"
    yield f"  {'':<8} {'shared':<6} {columns}  | {columns}"
    for name in names:
        for shared in SHARED:
            cells = [
                " ".join(f"{simulated(effects, shared, s)[name]!s:>12}" for s in SEEDS)
                for effects in (True, False)
            ]
            yield f"  {name:<8} {shared:<6g} {cells[0]}  | {cells[1]}"
    yield (
        "  left: at the original's effects; right: at none; shared: part of the variance that the "
        "QK arms of a seed have in common"
    )
    needed = {name: fewest_seeds(functools.partial(power, name)) for name in names}
    listed = ", ".join(
        f"{name} {seeds or f'more than {MOST_SEEDS}'}" for name, seeds in needed.items()
    )
    yield f"  seeds for 80% power at the original's effects: {listed}"
    yield f"  {_what_these_decide(plan, needed)}"


def _spreads(
    deviations: Mapping[str, float], known: Mapping[str, float], study: Study | None
) -> str:
    listed = [f"{name} {sd:.3g}" for name, sd in deviations.items() if name in known]
    rest = [f"{name} {sd:.3g}" for name, sd in deviations.items() if name not in known]
    said = []
    if listed and study is not None:
        said.append(f"sd between runs of one arm, from {study.workdir.name}: {', '.join(listed)}")
    if rest:
        advice = "" if study else "; --power_from=STUDY takes them from a finished study"
        said.append(f"sd between runs of one arm, assumed: {', '.join(rest)}{advice}")
    return "; ".join(said)


def fewest_seeds(power: Callable[[int], float]) -> int | None:
    """Fewest seeds, from 2 to `MOST_SEEDS`, with 80% power; None where they do not reach it."""
    if power(MOST_SEEDS) < rules.POWER:
        return None
    low, high = 1, MOST_SEEDS  # power(low) < POWER <= power(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= rules.POWER else (middle, high)
    return high


def _what_these_decide(plan: Plan, needed: Mapping[str, int | None]) -> str:
    """What the plan's own seeds are enough for."""
    seeds = plan.study.seeds
    listed = ", ".join(map(str, seeds))
    if len(seeds) == 1:
        return f"this plan: {ONE_SEED}"
    if plan.study.scale == "tiny" or plan.study.quick:
        return f"this plan, {len(seeds)} seeds ({listed}): a rehearsal, nothing is decided"
    own = {name: len(_seeds_of(plan, name)) for name in needed}
    enough = [name for name, fewest in needed.items() if fewest and fewest <= own[name]]
    short = [name for name in needed if name not in enough]
    said = f"likely to decide {', '.join(enough)}" if enough else "likely to decide nothing"
    more = f"; too few for {', '.join(short)}" if short else ""
    extra = [f"{name} has {number}" for name, number in own.items() if number > len(seeds)]
    also = f" ({', '.join(extra)} by extra_seeds)" if extra else ""
    return f"this plan, {len(seeds)} seeds ({listed}){also}: {said}{more}"


def _seeds_of(plan: Plan, name: str) -> list[int]:
    """The seeds that every arm of a verdict's family has."""
    attributed = {f"A {o}": family for o, family in Design.of(plan).attributed.items()}
    family = attributed.get(name, SCORED if name == "H5" else questions.ARMS)
    shared = [set(plan.study.seeds_of(arm)) for arm in family]
    return sorted(set.intersection(*shared))
