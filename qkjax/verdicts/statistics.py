"""Statistics of a study: contrasts between arms over seeds, items and sequences in pairs.

Pure numpy and scipy.special. Contrasts take one study or, by leading axes, thousands of simulated
ones, so that the rules that decide are those that are simulated. `docs/statistics.md` says which
of these decides what.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

LEVEL = 0.95  # two-sided, of the interval that decides a clause
STRICT = 0.975  # two-sided, of the interval that refutes a hypothesis
ALPHA = 0.0125  # one-sided: of H1, and of H2 to H4 together
RESAMPLES = 2_000
# A root mean square residual below this share of the largest value is
# rounding: the seeds do not differ.
_ROUNDING = 64 * np.finfo(np.float64).eps

Interval = tuple[float, float]


# --------------------------------------------------------------------------------------------
# Contrasts: seeds are blocks, arms are treatments.


class Contrast(NamedTuple):
    """sum c_a mean_a - offset of each study, with two standard errors; all fields are [...]."""

    estimate: np.ndarray
    per_seed: np.ndarray  # [..., S] sum c_a value_sa - offset
    mse: np.ndarray  # residual of the block layout of the family's F arms
    pooled_error: np.ndarray  # sqrt(sum c^2 MSE / S)
    pooled_freedom: int  # (S-1)(F-1)
    paired_error: np.ndarray  # sd(per seed) / sqrt(S)
    paired_freedom: int  # S-1

    def pooled(self, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the two-sided interval from the family's error."""
        half = quantile(self.pooled_freedom, level) * self.pooled_error
        return self.estimate - half, self.estimate + half

    def paired(self, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the two-sided interval from the seeds' own contrasts."""
        half = quantile(self.paired_freedom, level) * self.paired_error
        return self.estimate - half, self.estimate + half

    def deciding(self, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
        """Ends of D, the wider of both: the paired one covers; the pooled one only widens."""
        half = np.maximum(
            quantile(self.pooled_freedom, level) * self.pooled_error,
            quantile(self.paired_freedom, level) * self.paired_error,
        )
        return self.estimate - half, self.estimate + half

    def p_above(self, limit: float) -> np.ndarray:
        """One-sided p of "the contrast is at most `limit`", the larger of both."""
        return np.maximum(*self._p(self.estimate - limit))

    def p_below(self, limit: float) -> np.ndarray:
        """One-sided p of "the contrast is at least `limit`", the larger of both."""
        return np.maximum(*self._p(limit - self.estimate))

    def _p(self, distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (
                special.stdtr(self.pooled_freedom, -distance / self.pooled_error),
                special.stdtr(self.paired_freedom, -distance / self.paired_error),
            )


def contrast(
    values_SF: np.ndarray, coefficients_F: Sequence[float], offset: float = 0.0
) -> Contrast:
    """A contrast of arms over seeds that are blocks: block ANOVA, and the paired t beside it.

    residual_sa = y_sa - mean_s - mean_a + mean, MSE = sum residual^2 / ((S-1)(F-1)), pooled
    interval = estimate +- t_{(S-1)(F-1)} sqrt(sum c^2 MSE / S). The MSE is that of all F arms of
    the family, which pays where arms vary alike and under-covers where they do not; the paired
    interval needs no such thing: estimate +- t_{S-1} sd(per seed) / sqrt(S).

    Args:
        values_SF: [..., seeds, arms] finite, one value per run; two seeds or more; every arm of the
            family, also those with coefficient 0.
        coefficients_F: [arms] c, with sum 0.
        offset: subtracted from the contrast.
    Raises:
        ValueError: shapes that do not fit, or coefficients that do not add up to 0.
    Source: randomised complete block design (Montgomery, Design and Analysis of Experiments).
    """
    values, c = np.asarray(values_SF, np.float64), np.asarray(coefficients_F, np.float64)
    if values.ndim < 2 or c.shape != values.shape[-1:] or values.shape[-2] < 2:
        raise ValueError(f"values {values.shape} and coefficients {c.shape} do not fit")
    if abs(c.sum()) > 1e-12 * np.abs(c).sum() or not c.any():
        raise ValueError(f"the coefficients {c.tolist()} are no contrast")
    seeds, arms = values.shape[-2:]
    per_seed = values @ c - offset
    rows, columns = values.mean(axis=-1, keepdims=True), values.mean(axis=-2, keepdims=True)
    residual = values - rows - columns + values.mean(axis=(-2, -1), keepdims=True)
    freedom = (seeds - 1) * (arms - 1)
    mse = (residual**2).sum(axis=(-2, -1)) / freedom
    tiny = np.sqrt(mse) <= _ROUNDING * np.abs(values).max(axis=(-2, -1))
    mse = np.where(tiny, 0.0, mse)
    return Contrast(
        estimate=per_seed.mean(axis=-1),
        per_seed=per_seed,
        mse=mse,
        pooled_error=np.sqrt(float(c @ c) * mse / seeds),
        pooled_freedom=freedom,
        paired_error=per_seed.std(axis=-1, ddof=1) / math.sqrt(seeds),
        paired_freedom=seeds - 1,
    )


@functools.cache
def quantile(freedom: int, level: float) -> float:
    """The quantile of Student's t: half the width of an interval of this level, in errors."""
    return float(special.stdtrit(freedom, (1 + level) / 2))


def all_or_none(first: int, second: int) -> float:
    """Fisher's exact one-sided p where all of `first` runs diverged and none of `second`.

    1 / binomial(first + second, first): .167 with two runs each, .05 with 3, .014 with 4.

    Source: Fisher 1935.
    """
    return 1 / math.comb(first + second, first)


class Corrected(NamedTuple):
    """For each hypothesis of a family: whether its p is small enough, and for which level."""

    rejected: np.ndarray  # bool [..., m]
    level: np.ndarray  # [..., m] one-sided


def holm(p_values: np.ndarray, alpha: float | np.ndarray) -> Corrected:
    """Holm's step-down procedure, family-wise at `alpha`.

    Ordered p_(1) <= ... <= p_(m): p_(i) is rejected while p_(i) <= alpha / (m - i + 1). The level
    of a hypothesis is that of its own step or, after the step that stopped, of that one.

    Args:
        p_values: [..., m].
        alpha: one-sided, of all studies or [...].
    Source: Holm 1979.
    """
    p = np.asarray(p_values, np.float64)
    m = p.shape[-1]
    order = np.argsort(p, axis=-1, kind="stable")
    levels = np.asarray(alpha, np.float64)[..., None] / (m - np.arange(m))
    passed = np.logical_and.accumulate(np.take_along_axis(p, order, -1) <= levels, axis=-1)
    reached = np.minimum(np.arange(m), passed.sum(axis=-1, keepdims=True))
    tested = np.take_along_axis(np.broadcast_to(levels, p.shape), reached, -1)
    rejected, level = np.zeros(p.shape, bool), np.zeros(p.shape)
    np.put_along_axis(rejected, order, passed, -1)
    np.put_along_axis(level, order, tested, -1)
    return Corrected(rejected, level)


def correct(
    first_p: np.ndarray,
    first_holds: np.ndarray,
    others_p: np.ndarray,
    others_hold: np.ndarray,
    alpha: float = ALPHA,
) -> tuple[Corrected, Corrected]:
    """Two sides at `alpha` each: one hypothesis, and others by Holm; a side that holds helps.

    Whichever side is wholly supported passes its level to the other, which is then tested at
    2 alpha; a side without hypotheses has passed its own from the start.

    Args:
        first_p, first_holds: [..., 0 or 1] its p, and whether its clauses are supported.
        others_p, others_hold: [..., m] likewise.
    Returns:
        The first side's and the others'.
    Source: Bretz, Maurer, Brannath and Posch 2009 (graphical procedures).
    """
    first, others = holm(first_p, alpha), holm(others_p, alpha)
    won = (first.rejected & first_holds).all(axis=-1)
    won_others = (others.rejected & others_hold).all(axis=-1)
    return (
        holm(first_p, np.where(won_others, 2 * alpha, alpha)),
        holm(others_p, np.where(won, 2 * alpha, alpha)),
    )


# --------------------------------------------------------------------------------------------
# Pairs: sequences of the validation split, items of a task.


class Paired(NamedTuple):
    """A mean of differences between pairs."""

    estimate: float
    standard_error: float
    interval: Interval
    num_pairs: int


def paired_sequences(first_N: np.ndarray, second_N: np.ndarray) -> Paired:
    """Mean of first - second over the sequences that both were measured on, by paired t.

    sd(difference) / sqrt(N) is the error of sampling the validation text, given the two trained
    models; the spread between seeds is not in it.

    Args:
        first_N, second_N: [sequences] nat per token, in the same order.
    Raises:
        ValueError: unequal lengths, or fewer than two.
    """
    difference = _difference(first_N, second_N)
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    half = quantile(len(difference) - 1, LEVEL) * error
    mean = float(difference.mean())
    return Paired(mean, error, (mean - half, mean + half), len(difference))


def paired_bootstrap(
    first_N: np.ndarray, second_N: np.ndarray, seed: int = 0, resamples: int = RESAMPLES
) -> Paired:
    """Mean of first - second over items, with the percentile interval of resampled items.

    Args:
        first_N, second_N: [items] in the same order.
        seed: of the resampling; the same one gives the same interval.
    Raises:
        ValueError: unequal lengths, or fewer than two.
    Source: Efron 1979; percentile interval.
    """
    difference = _difference(first_N, second_N)
    random = np.random.default_rng(seed)
    means = np.empty(resamples)
    rows = max(1, 2_000_000 // len(difference))  # 16 MB of indices at a time
    for start in range(0, resamples, rows):
        size = (min(rows, resamples - start), len(difference))
        picked = random.integers(len(difference), size=size)
        means[start : start + size[0]] = difference[picked].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Paired(
        estimate=float(difference.mean()),
        standard_error=float(means.std(ddof=1)),
        interval=(float(low), float(high)),
        num_pairs=len(difference),
    )


def _difference(first_N: np.ndarray, second_N: np.ndarray) -> np.ndarray:
    first, second = np.asarray(first_N, np.float64), np.asarray(second_N, np.float64)
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        raise ValueError(f"{first.shape} and {second.shape} are not two or more pairs")
    return first - second


class McNemar(NamedTuple):
    """Pairs in which only one of the two is right, and the exact test of them."""

    first_only: int
    second_only: int
    p_two_sided: float
    p_first_better: float  # one-sided

    @property
    def discordant(self) -> int:
        """Pairs that say anything about the difference."""
        return self.first_only + self.second_only


def mcnemar(first_N: np.ndarray, second_N: np.ndarray) -> McNemar:
    """Exact McNemar test of paired scores: the sign test of the pairs that differ.

    Under the null hypothesis the b + c discordant pairs fall either way with 1/2:
    p = P(Binomial(b + c, 1/2) >= b) for "the first is better". Of right and wrong answers this is
    McNemar's test; of any other scores the sign test.

    Args:
        first_N, second_N: [items] scores, in the same order.
    Source: McNemar 1947; exact binomial form.
    """
    difference = _difference(first_N, second_N)
    first, second = int((difference > 0).sum()), int((difference < 0).sum())
    total = first + second

    def at_least(count: int) -> float:
        return float(special.bdtrc(count - 1, total, 0.5)) if count else 1.0

    two_sided = min(1.0, 2.0 * at_least(max(first, second)))
    return McNemar(first, second, two_sided, at_least(first))


def detectable_difference(
    num_items: int, discordant_share: float, power: float = 0.8, alpha: float = 1 - LEVEL
) -> float:
    """The difference of two accuracies that McNemar's test finds with this power.

    (z_{1-alpha/2} + z_{power}) sqrt(discordant share / items), as a fraction of the items.
    """
    z = float(special.ndtri(1 - alpha / 2) + special.ndtri(power))
    return z * math.sqrt(discordant_share / num_items)


# --------------------------------------------------------------------------------------------
# Correlation.


class Correlation(NamedTuple):
    """The correlation of two quantities; NaN where either is constant or fewer than 3 runs."""

    pearson: float
    spearman: float
    interval: Interval | None  # of Pearson's, by Fisher's z; None below 4 runs


def correlation(x_N: Sequence[float], y_N: Sequence[float]) -> Correlation:
    """Pearson's and Spearman's correlation.

    Interval: tanh(atanh r +- z_{.975} / sqrt(n - 3)), rough at the few runs of a study.

    Source: Fisher 1921; Spearman 1904 as Pearson's r of average ranks.
    """
    x, y = np.asarray(x_N, np.float64), np.asarray(y_N, np.float64)
    pearson, spearman = _pearson(x, y), _pearson(_ranks(x), _ranks(y))
    interval = None
    if len(x) > 3 and abs(pearson) < 1:
        half = float(special.ndtri((1 + LEVEL) / 2)) / math.sqrt(len(x) - 3)
        interval = (math.tanh(math.atanh(pearson) - half), math.tanh(math.atanh(pearson) + half))
    return Correlation(pearson, spearman, interval)


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 3 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(np.clip(float(x @ y) / size, -1.0, 1.0)) if size > 0 else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; ties share their average."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]
