"""How often verdicts are wrong: simulated studies judged by the rules of real ones, as a table.

    python -m benchmarks.verdict_rates --studies=20000 > rates.md

Nine arms; noise that is equal, twice or four times as large in one arm (the worst arm is shown),
shared by the QK arms of a seed, or heavy-tailed (Student's t with 3 degrees of freedom, the same
variance); its standard deviation 0.5 or 5 times the smallest effect of interest (SESOI).
docs/statistics.md has the promise with which the table is compared.
"""

import argparse
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from qkjax.study import questions
from qkjax.verdicts import power, rules, statistics
from qkjax.verdicts.judgement import NON_INFERIORITY, OPPOSITE, SUPERIORITY
from qkjax.verdicts.power import Spread, Truth
from qkjax.verdicts.predictions import DECIDING, QUANTITIES, Prediction

HEAD_DIM = 64
SHARED, FREEDOM = 0.5, 3
GAMMA = ("adamw_noqk", "adamw_qk_frozen", "adamw_qk_undecayed", "adamw_qk_decayed")
ARMS = (*questions.ARMS, *GAMMA[1:], "adamw_qk_to_one", "muon_noqk_merged")  # nine
NAMES = (*DECIDING, "H5", "A")
NOISES = ("equal", "x2", "x4", "shared", "heavy")
_OPPOSITE = rules.CODES[OPPOSITE]
_HALF = Prediction(
    "half",
    "",
    "PR",
    {"adamw_qk_undecayed": 1.0, "adamw_noqk": -0.5, "adamw_qk_decayed": -0.5},
    limit=0.0,
)
_A = Prediction("A", "", "PR", {"adamw_noqk": 1.0, "adamw_qk_decayed": -1.0})


class Rates(NamedTuple):
    """Of one hypothesis, before correction; shares of all studies."""

    supported: float  # at effect 0; the same with one clause on its border, whichever is worse
    opposite: float  # "the opposite", at effect 0
    refuted: float  # with every clause exactly at its SESOI
    coverage: float  # of D, the least of its clauses

    def worse(self, other: "Rates") -> "Rates":
        """The worse of both in every point."""
        return Rates(
            max(self.supported, other.supported),
            max(self.opposite, other.opposite),
            max(self.refuted, other.refuted),
            min(self.coverage, other.coverage),
        )


def spreads(noise: str, size: float) -> list[Spread]:
    """The spreads that a kind of noise stands for: one, or one for each arm that is the noisy one.

    Args:
        size: standard deviation in SESOIs.
    """
    deviations = {name: size * q.limit(HEAD_DIM) for name, q in QUANTITIES.items()}
    deviations[power.ACCURACY] = size * power.SESOI_POINTS
    if noise in ("x2", "x4"):
        factor = float(noise[1:])
        return [Spread(deviations, factors={arm: factor}) for arm in ARMS[:4]]
    if noise == "shared":
        return [Spread(deviations, shared=SHARED)]
    return [Spread(deviations, freedom=FREEDOM if noise == "heavy" else None)]


def border(prediction: Prediction) -> float:
    """The truth of a contrast that its null hypothesis just holds: 0, the ratio, the margin."""
    limit = _limit(prediction)
    return 0.0 if prediction.kind == SUPERIORITY else limit


def _limit(prediction: Prediction) -> float:
    quantity = QUANTITIES[prediction.quantity]
    return quantity.limit(HEAD_DIM) if prediction.limit is None else prediction.limit


def truth_of(contrasts: Mapping[str, float], predictions: tuple[Prediction, ...]) -> Truth:
    """Means by quantity and arm that give each prediction's contrast this value.

    The least-norm solution of weights @ means = value, one quantity at a time.
    """
    found = {}
    for quantity in dict.fromkeys(p.quantity for p in predictions):
        own = [p for p in predictions if p.quantity == quantity]
        arms = list(dict.fromkeys(arm for p in own for arm in p.weights))
        weights = np.array([[p.weights.get(arm, 0.0) for arm in arms] for p in own])
        values = np.array([contrasts[p.name] for p in own])
        means = np.linalg.lstsq(weights, values, rcond=None)[0]
        found[quantity] = dict(zip(arms, means.tolist(), strict=True))
    return found


def rates_of(name: str, spread: Spread, seeds: int, studies: int, chance: int) -> Rates:
    """One hypothesis of H1 to H4 with this noise."""
    predictions = DECIDING[name]
    quantities = list(dict.fromkeys(p.quantity for p in predictions))
    noise = power.draw_all(
        quantities, questions.ARMS, {}, spread, seeds, np.random.default_rng(chance), studies
    )

    def judged(contrasts: Mapping[str, float]) -> power.Judged:
        truth = truth_of(contrasts, predictions)
        values = {
            quantity: noise[quantity]
            + np.array([truth[quantity].get(arm, 0.0) for arm in questions.ARMS])
            for quantity in quantities
        }
        return power.judge(values, (name,), HEAD_DIM)

    nothing = judged({p.name: 0.0 for p in predictions}).alone[name]
    borders = [nothing]
    far = 1e3 * max(spread.deviations[q] for q in quantities)
    for chosen in predictions:
        others = {p.name: -far if p.kind == NON_INFERIORITY else far for p in predictions}
        borders.append(judged({**others, chosen.name: border(chosen)}).alone[name])
    at_sesoi = judged({p.name: _limit(p) for p in predictions}).alone[name]
    coverages = []
    for prediction in predictions:
        weights = [prediction.weights.get(arm, 0.0) for arm in questions.ARMS]
        low, high = statistics.contrast(noise[prediction.quantity], weights).deciding()
        coverages.append(float(((low <= 0) & (high >= 0)).mean()))
    return Rates(
        supported=max(float(rules.supported(codes).mean()) for codes in borders),
        opposite=float((nothing == _OPPOSITE).mean()),
        refuted=float(rules.refuted(at_sesoi).mean()),
        coverage=min(coverages),
    )


def rates_of_attribution(spread: Spread, seeds: int, studies: int, chance: int) -> Rates:
    """A and decay - A/2 of AdamW; "refuted" here: a share claimed where decay is exactly half."""
    arms = (*GAMMA, "adamw_qk_to_one")
    noise = power.draw("PR", arms, {}, spread, seeds, np.random.default_rng(chance), studies)
    total = power.judge_clause(_A, {"PR": noise}, arms, HEAD_DIM)
    half = power.judge_clause(_HALF, {"PR": noise}, arms, HEAD_DIM)
    coverages = []
    for prediction in (_A, _HALF):
        weights = [prediction.weights.get(arm, 0.0) for arm in arms]
        low, high = statistics.contrast(noise, weights).deciding()
        coverages.append(float(((low <= 0) & (high >= 0)).mean()))
    claimed = rules.supported(half.code) | (half.code == _OPPOSITE)
    return Rates(
        supported=float(rules.supported(total.code).mean()),
        opposite=float((total.code == _OPPOSITE).mean()),
        refuted=float(claimed.mean()),
        coverage=min(coverages),
    )


def rates_of_scores(spread: Spread, seeds: int, studies: int, chance: int) -> Rates:
    """H5: two tasks, the trained model as the unit."""
    random = np.random.default_rng(chance)
    noise = [
        power.draw(power.ACCURACY, power.SCORED, {}, spread, seeds, random, studies)
        for _ in range(power.NUM_TASKS)
    ]

    def judged(*differences: float) -> np.ndarray:
        return power.judge_scores(
            [x + np.array([0.0, d]) for x, d in zip(noise, differences, strict=True)]
        )

    sesoi = power.SESOI_POINTS
    nothing, border = judged(0.0, 0.0), judged(0.0, 1e3 * spread.deviations[power.ACCURACY])
    covers = []
    for values in noise:
        low, high = statistics.contrast(values, (-1.0, 1.0)).deciding()
        covers.append(float(((low <= 0) & (high >= 0)).mean()))
    return Rates(
        supported=max(float(rules.supported(codes).mean()) for codes in (nothing, border)),
        opposite=float((nothing == _OPPOSITE).mean()),
        refuted=float(rules.refuted(judged(sesoi, sesoi)).mean()),
        coverage=min(covers),
    )


def rates(name: str, spread: Spread, seeds: int, studies: int, chance: int = 0) -> Rates:
    """Of H1 to H5, or A, the attribution of AdamW."""
    if name == "A":
        return rates_of_attribution(spread, seeds, studies, chance)
    if name == "H5":
        return rates_of_scores(spread, seeds, studies, chance)
    return rates_of(name, spread, seeds, studies, chance)


def worst(name: str, noise: str, size: float, seeds: int, studies: int) -> Rates:
    """The worst over the spreads that a kind of noise stands for."""
    found = [
        rates(name, spread, seeds, studies, place + 100 * seeds)
        for place, spread in enumerate(spreads(noise, size))
    ]
    return functools.reduce(Rates.worse, found)


def table(studies: int) -> Iterator[str]:
    """Rows of Markdown: noise, its size, S, least coverage, and the rates of each hypothesis."""
    yield f"| noise | sd / SESOI | S | coverage | {' | '.join(NAMES)} |"
    yield "|---|--:|--:|--:|" + "---|" * len(NAMES)
    for noise, size, seeds in itertools.product(NOISES, (0.5, 5.0), (2, 3, 5)):
        found = [worst(name, noise, size, seeds, studies) for name in NAMES]
        least = _share(min(one.coverage for one in found))
        cells = " | ".join(" / ".join(_share(share) for share in one[:3]) for one in found)
        yield f"| {noise} | {size:g} | {seeds} | {least} | {cells} |"


def _share(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def main() -> None:
    parser = argparse.ArgumentParser(description="How often verdicts are wrong, as a table.")
    parser.add_argument("--studies", type=int, default=20_000, help="simulated for every number")
    for line in table(parser.parse_args().studies):
        print(line, flush=True)


if __name__ == "__main__":
    main()
