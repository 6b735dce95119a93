"""The words of a clause and of a hypothesis, from intervals alone (docs/statistics.md).

Arrays of studies go in and codes come out, places in `judgement.WORDS`: what a report says and
what is simulated are decided here alike.
"""

import math
from typing import NamedTuple

import numpy as np

from qkjax.verdicts import statistics
from qkjax.verdicts.judgement import (
    INCONCLUSIVE,
    NEGLIGIBLE,
    NON_INFERIORITY,
    NOT_TWICE,
    OPPOSITE,
    RATIO,
    SUPERIORITY,
    SUPPORTED,
    TOO_SMALL,
    WORDS,
    WORSE,
)
from qkjax.verdicts.statistics import Contrast

CODES = {word: code for code, word in enumerate(WORDS)}
LOG_SESOI = math.log(1.1)  # of ratios
_SUPPORTED, _INCONCLUSIVE = CODES[SUPPORTED], CODES[INCONCLUSIVE]


def decide(
    kind: str,
    estimate: np.ndarray,
    interval: tuple[np.ndarray, np.ndarray],
    limit: float,
) -> np.ndarray:
    """The word of a clause; the first rule that holds, in this order.

    Args:
        kind: SUPERIORITY: supported where the interval lies above 0 and the estimate reaches the
            SESOI, else the opposite below -SESOI, negligible within both, "no effect as large as
            claimed" below the SESOI. RATIO, of logarithms: supported above the limit, the opposite
            below -ln 1.1, "not twice" below the limit. NON_INFERIORITY: supported below the margin,
            worse above it.
        interval: its ends, [...] as `estimate`.
        limit: the SESOI, the logarithm of the ratio, or the margin.
    Returns:
        [...] int, places in WORDS.
    """
    low, high = interval
    rules: dict[str, dict[str, np.ndarray]] = {
        SUPERIORITY: {
            SUPPORTED: (low > 0) & (estimate >= limit),
            OPPOSITE: high < -limit,
            NEGLIGIBLE: (low > -limit) & (high < limit),
            TOO_SMALL: high < limit,
        },
        RATIO: {
            SUPPORTED: low > limit,
            OPPOSITE: high < -LOG_SESOI,
            NOT_TWICE: high < limit,
        },
        NON_INFERIORITY: {SUPPORTED: high < limit, WORSE: low > limit},
    }
    words = rules[kind]
    return np.select(list(words.values()), [CODES[word] for word in words], _INCONCLUSIVE)


class Decided(NamedTuple):
    """A clause of each study, [...]."""

    code: np.ndarray  # by D at 95%
    strict: np.ndarray  # by D at 97.5%: what may refute a hypothesis
    p: np.ndarray  # one-sided, against 0, the limit of a ratio, or the margin


def judge_clause(kind: str, found: Contrast, limit: float) -> Decided:
    """A clause by the deciding interval of its contrast."""
    code, strict = (
        decide(kind, found.estimate, found.deciding(level), limit)
        for level in (statistics.LEVEL, statistics.STRICT)
    )
    if kind == NON_INFERIORITY:
        return Decided(code, strict, found.p_below(limit))
    return Decided(code, strict, found.p_above(limit if kind == RATIO else 0.0))


def supported(codes: np.ndarray) -> np.ndarray:
    """Which codes are SUPPORTED."""
    return np.asarray(codes) == _SUPPORTED


def refuted(codes: np.ndarray) -> np.ndarray:
    """Which codes are a refuting word."""
    return (np.asarray(codes) != _SUPPORTED) & (np.asarray(codes) != _INCONCLUSIVE)


def judge_hypothesis(codes_C: np.ndarray, strict_C: np.ndarray) -> np.ndarray:
    """The word of a hypothesis before correction, from the codes of its clauses.

    All supported: supported. A clause refuted at 97.5%: its word, that of the first such clause.
    Else inconclusive.

    Args:
        codes_C, strict_C: [..., clauses] at 95% and at 97.5%.
    """
    against = refuted(strict_C)
    first = np.take_along_axis(strict_C, against.argmax(axis=-1)[..., None], -1)[..., 0]
    return np.select(
        [supported(codes_C).all(axis=-1), against.any(axis=-1)],
        [_SUPPORTED, first],
        _INCONCLUSIVE,
    )


# --------------------------------------------------------------------------------------------
# How many seeds a clause needs.

POWER, MOST_SEEDS = 0.8, 200  # if more are needed, no number is given
_STUDIES = 4_000


def seeds_for_power(
    kind: str, estimate: float, spread: float, num_arms: int, limit: float
) -> int | None:
    """Fewest seeds with which 80% of studies decide a clause, if the estimate were the truth.

    Simulated: the seeds' own contrasts and the other residuals of the family are independent
    normals of one spread, so both errors are sums of squares over one draw.

    Args:
        spread: standard deviation of the contrast between seeds.
        num_arms: F, of the family.
    Returns:
        None where more than `MOST_SEEDS` are needed: also where the truth stands on the border.
    """
    wanted = supported if _holds(kind, estimate, limit) else refuted

    def power(seeds: int) -> float:
        codes = decide(kind, *_simulated(estimate, spread, num_arms, seeds), limit)
        return float(wanted(codes).mean())

    if power(MOST_SEEDS) < POWER:
        return None
    low, high = 1, MOST_SEEDS  # power(low) < POWER <= power(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high


def _holds(kind: str, truth: float, limit: float) -> bool:
    return truth < limit if kind == NON_INFERIORITY else truth >= limit


def _simulated(
    truth: float, spread: float, num_arms: int, seeds: int
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Estimates and deciding intervals of studies whose contrast has this truth and spread."""
    chance = np.random.default_rng(seeds)
    estimate = truth + spread * chance.standard_normal(_STUDIES) / math.sqrt(seeds)
    own = chance.chisquare(seeds - 1, _STUDIES)
    others = chance.chisquare((seeds - 1) * (num_arms - 2), _STUDIES) if num_arms > 2 else 0.0
    freedom = (seeds - 1) * (num_arms - 1)
    half = (spread / math.sqrt(seeds)) * np.maximum(
        statistics.quantile(freedom, statistics.LEVEL) * np.sqrt((own + others) / freedom),
        statistics.quantile(seeds - 1, statistics.LEVEL) * np.sqrt(own / (seeds - 1)),
    )
    return estimate, (estimate - half, estimate + half)
