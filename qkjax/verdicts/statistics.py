"""Statistics of a study: contrasts between arms over seeds, items and sequences in pairs.

Pure numpy and scipy.special; every interval is two-sided at 95%. SCIENCE.md section 8 fixes which
of these decides what; `docs/statistics.md` says it in words.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

LEVEL = 0.95
MOST_SEEDS = 1_000  # a need of more than these is told as no number
RESAMPLES = 4_000
# A root mean square residual below so many units in the last place of the largest value is
# rounding: the seeds do not differ.
_ROUNDING = 64 * np.finfo(np.float64).eps

Interval = tuple[float, float]


# --------------------------------------------------------------------------------------------
# Contrasts: seeds are blocks, arms are treatments.


class Contrast(NamedTuple):
    """sum c_a mean_a - offset with its intervals; without them where `unusable` says why."""

    estimate: float  # NaN where a value is not finite
    per_seed: tuple[float, ...]  # sum c_a value_sa - offset of each seed
    num_arms: int  # C, all arms of the plan
    sum_of_squares: float  # sum c^2
    mse: float | None  # residual of the two-way layout; None with one seed
    pooled: Interval | None  # t with (S-1)(C-1) degrees of freedom
    paired: Interval | None  # t with S-1, from the seeds' own contrasts
    unusable: str  # why there is no pooled interval, for people; "" where there is one

    @property
    def num_seeds(self) -> int:
        """S."""
        return len(self.per_seed)

    def p_above(self, limit: float) -> float | None:
        """One-sided p of "the contrast is at most `limit`", from the pooled error."""
        if self.pooled is None or self.mse is None:
            return None
        error = _standard_error(self.mse, self.sum_of_squares, self.num_seeds)
        freedom = (self.num_seeds - 1) * (self.num_arms - 1)
        return float(special.stdtr(freedom, -(self.estimate - limit) / error))

    def p_below(self, limit: float) -> float | None:
        """One-sided p of "the contrast is at least `limit`", from the pooled error."""
        above = self.p_above(limit)
        return None if above is None else 1.0 - above

    def needed_seeds(self, distance: float) -> int | None:
        """Fewest seeds whose pooled half-width, at the MSE measured, is below `distance`.

        Smallest S >= 2 with t_{.975,(S-1)(C-1)} sqrt(sum c^2 MSE / S) < distance. It takes
        estimate and MSE as they stand: an order of size, and no promise of power.

        Returns:
            None without an interval, for a distance of 0, or above `MOST_SEEDS`.
        """
        if self.pooled is None or self.mse is None or not distance > 0:
            return None
        for seeds in range(2, MOST_SEEDS + 1):
            freedom = (seeds - 1) * (self.num_arms - 1)
            if (
                _quantile(freedom) * _standard_error(self.mse, self.sum_of_squares, seeds)
                < distance
            ):
                return seeds
        return None


def contrast(
    values_SC: np.ndarray, coefficients_C: Sequence[float], offset: float = 0.0
) -> Contrast:
    """A contrast of arms over seeds that are blocks: block ANOVA, and the paired t beside it.

    residual_sa = y_sa - mean_s - mean_a + mean, MSE = sum residual^2 / ((S-1)(C-1)),
    interval = estimate +- t_{.975,(S-1)(C-1)} sqrt(sum c^2 MSE / S). The MSE is that of all C arms,
    which pays where arms vary alike and under-covers where they do not; the paired interval
    needs no such thing: estimate +- t_{.975,S-1} sd(per seed) / sqrt(S).

    Args:
        values_SC: [seeds, arms] one value per run; every arm of the plan, also those with
            coefficient 0.
        coefficients_C: [arms] c, with sum 0.
        offset: subtracted from the contrast, such as ln 2 from a difference of logarithms.
    Raises:
        ValueError: shapes that do not fit, or coefficients that do not add up to 0.
    Source: randomised complete block design (Montgomery, Design and Analysis of Experiments).
    """
    values, c = np.asarray(values_SC, np.float64), np.asarray(coefficients_C, np.float64)
    if values.ndim != 2 or c.shape != values.shape[1:] or len(values) < 1:
        raise ValueError(f"values {values.shape} and coefficients {c.shape} do not fit")
    if abs(c.sum()) > 1e-12 * np.abs(c).sum() or not c.any():
        raise ValueError(f"the coefficients {c.tolist()} are no contrast")
    seeds, arms = values.shape
    involved = np.where(c == 0, 0.0, values)  # so that 0 x inf does not make a NaN
    per_seed = involved @ c - offset
    base = Contrast(
        estimate=float(per_seed.mean()),
        per_seed=tuple(per_seed.tolist()),
        num_arms=arms,
        sum_of_squares=float(c @ c),
        mse=None,
        pooled=None,
        paired=None,
        unusable="",
    )
    if not np.isfinite(values).all():
        return base._replace(unusable="a value is not finite")
    if seeds == 1:
        return base._replace(unusable="no replication")
    rows, columns = values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    residual = values - rows - columns + values.mean()
    mse = float((residual**2).sum()) / ((seeds - 1) * (arms - 1))
    if math.sqrt(mse) <= _ROUNDING * float(np.abs(values).max()):
        return base._replace(mse=0.0, unusable="the seeds do not differ (MSE = 0)")
    half = _quantile((seeds - 1) * (arms - 1)) * _standard_error(mse, base.sum_of_squares, seeds)
    deviation = float(per_seed.std(ddof=1))
    own = _quantile(seeds - 1) * deviation / math.sqrt(seeds)
    return base._replace(
        mse=mse,
        pooled=(base.estimate - half, base.estimate + half),
        paired=(base.estimate - own, base.estimate + own),
    )


def _standard_error(mse: float, sum_of_squares: float, seeds: int) -> float:
    return math.sqrt(sum_of_squares * mse / seeds)


def _quantile(freedom: int) -> float:
    """Of Student's t, two-sided at `LEVEL`."""
    return float(special.stdtrit(freedom, (1 + LEVEL) / 2))


def holm(p_values: Mapping[str, float | None], alpha: float) -> dict[str, bool]:
    """Which null hypotheses Holm's step-down procedure rejects, family-wise at `alpha`.

    Ordered p_(1) <= ... <= p_(m): p_(i) is rejected while p_(i) <= alpha / (m - i + 1).

    Args:
        p_values: by name; None, an untested hypothesis of the family, counts as 1.
    Source: Holm 1979.
    """
    known = {name: 1.0 if p is None else p for name, p in p_values.items()}
    rejected = dict.fromkeys(known, False)
    for tested, name in enumerate(sorted(known, key=lambda name: known[name])):
        if known[name] > alpha / (len(known) - tested):
            break
        rejected[name] = True
    return rejected


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
    half = _quantile(len(difference) - 1) * error
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
    for begin in range(0, resamples, rows):
        size = (min(rows, resamples - begin), len(difference))
        picked = random.integers(len(difference), size=size)
        means[begin : begin + size[0]] = difference[picked].mean(axis=1)
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
    """Of two quantities over runs; NaN where either is constant or there are fewer than 3."""

    num_runs: int
    pearson: float
    spearman: float
    interval: Interval | None  # of Pearson's, by Fisher's z; None below 4 runs


def correlation(x_N: Sequence[float], y_N: Sequence[float]) -> Correlation:
    """Pearson's and Spearman's correlation, with n.

    Interval: tanh(atanh r +- z_{.975} / sqrt(n - 3)), rough at the few runs of a study.

    Source: Fisher 1921; Spearman 1904 as Pearson's r of average ranks.
    """
    x, y = np.asarray(x_N, np.float64), np.asarray(y_N, np.float64)
    pearson, spearman = _pearson(x, y), _pearson(_ranks(x), _ranks(y))
    interval = None
    if len(x) > 3 and abs(pearson) < 1:
        half = float(special.ndtri((1 + LEVEL) / 2)) / math.sqrt(len(x) - 3)
        interval = (math.tanh(math.atanh(pearson) - half), math.tanh(math.atanh(pearson) + half))
    return Correlation(len(x), pearson, spearman, interval)


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 3 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(np.clip(float(x @ y) / size, -1.0, 1.0)) if size > 0 else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 1, ties share their average."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]
