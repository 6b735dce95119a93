"""Statistics against other implementations, worked examples, and simulated studies."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from qkjax.verdicts import statistics

STUDIES = 2_000
TRAP = (0.5, -0.5, 0.5, -0.5)  # the contrast of H1, of four arms


def random_values(seeds: int, arms: int, seed: int = 0) -> np.ndarray:
    chance = np.random.default_rng(seed)
    blocks = 5 * chance.standard_normal((seeds, 1))
    return 40 + blocks + chance.standard_normal(arms) + chance.standard_normal((seeds, arms))


# --------------------------------------------------------------------------------------------
# Contrasts.


@pytest.mark.parametrize(("seeds", "arms"), [(2, 4), (3, 4), (5, 9)])
def test_pooled_interval_is_that_of_a_least_squares_fit(seeds: int, arms: int):
    """A regression on dummies of seeds and arms has the same estimate, error and interval."""
    values = random_values(seeds, arms)
    c = np.zeros(arms)
    c[:4] = TRAP
    rows = [(s, a) for s in range(seeds) for a in range(arms)]
    design = np.array(
        [
            [float(s == i) for i in range(seeds)] + [float(a == i) for i in range(arms)]
            for s, a in rows
        ]
    )
    y = np.array([values[s, a] for s, a in rows])
    beta, _, rank, _ = np.linalg.lstsq(design, y)
    freedom = len(y) - rank
    mse = float(((y - design @ beta) ** 2).sum()) / freedom
    weights = np.concatenate([np.zeros(seeds), c])
    error = math.sqrt(mse * weights @ np.linalg.pinv(design.T @ design) @ weights)
    low, high = stats.t.interval(0.95, freedom, loc=weights @ beta, scale=error)

    found = statistics.contrast(values, c)
    assert freedom == (seeds - 1) * (arms - 1)
    assert found.estimate == pytest.approx(weights @ beta, rel=1e-9)
    assert found.mse == pytest.approx(mse, rel=1e-9)
    assert found.pooled() == pytest.approx((low, high), rel=1e-9)
    own = stats.t.sf(found.estimate / found.paired_error, seeds - 1)
    p = stats.t.sf(weights @ beta / error, freedom)
    assert found.p_above(0.0) == pytest.approx(max(own, p))
    own = stats.t.cdf((found.estimate - 3) / found.paired_error, seeds - 1)
    p = stats.t.cdf((found.estimate - 3) / error, freedom)
    assert found.p_below(3.0) == pytest.approx(max(own, p))


def test_paired_interval_is_the_paired_t_test():
    values = random_values(6, 4)
    found = statistics.contrast(values, TRAP)
    own = values @ np.array(TRAP)
    test = stats.ttest_1samp(own, 0.0)
    assert found.per_seed == pytest.approx(own)
    assert found.paired() == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert found.paired(0.975) == pytest.approx(tuple(test.confidence_interval(0.975)))
    two = statistics.contrast(values[:, :2], (1, -1))
    test = stats.ttest_rel(values[:, 0], values[:, 1], alternative="greater")
    assert two.p_above(0.0) == pytest.approx(test.pvalue)
    assert two.pooled() == pytest.approx(two.paired())  # with two arms they are one


def test_worked_example():
    """Residuals of [[1, 2], [3, 8]] are +-1: MSE 4, error sqrt(2 * 4 / 2) = 2, t 12.706."""
    found = statistics.contrast(np.array([[1.0, 2.0], [3.0, 8.0]]), (-1, 1), offset=0.5)
    assert found.mse == pytest.approx(4.0)
    assert found.estimate == pytest.approx(2.5)
    assert found.per_seed == pytest.approx([0.5, 4.5])
    assert found.pooled() == pytest.approx((2.5 - 25.4124, 2.5 + 25.4124), abs=1e-3)


def test_what_a_seed_does_to_all_arms_alike_does_not_count():
    values = random_values(3, 5)
    c = (*TRAP, 0)
    moved = values + np.array([[100.0], [-70.0], [3.0]]) + np.array([0, 0, 0, 0, 9.0])
    ours, other = statistics.contrast(values, c), statistics.contrast(moved, c)
    assert other.pooled() == pytest.approx(ours.pooled())
    assert other.paired() == pytest.approx(ours.paired())


def test_every_arm_of_the_family_pays_into_the_pooled_error():
    values = random_values(3, 5)
    noisy = values.copy()
    noisy[:, 4] += (10, -20, 10)  # an arm with coefficient 0
    ours, other = (statistics.contrast(v, (*TRAP, 0)) for v in (values, noisy))
    assert other.estimate == ours.estimate and other.paired() == pytest.approx(ours.paired())
    assert other.mse > 10 * ours.mse


def test_the_deciding_interval_is_the_wider_of_both():
    """Quiet other arms leave the paired one to decide; an arm without weight, noisy, the pooled."""
    seen = set()
    for seed in range(20):
        found = statistics.contrast(random_values(3, 4, seed), (1, -1, 0, 0))
        for level in (0.95, 0.975):
            ends = [found.pooled(level), found.paired(level)]
            widest = max(ends, key=lambda pair: pair[1] - pair[0])
            assert found.deciding(level) == pytest.approx(widest)
        seen.add(found.deciding() == found.paired())
        for limit in (-3.0, 0.0, 3.0):  # the larger p excludes the limit where D does
            low, high = found.deciding()
            assert (found.p_above(limit) < 0.025) == (low > limit)
            assert (found.p_below(limit) < 0.025) == (high < limit)
    assert seen == {True, False}


def test_many_studies_at_once_are_each_alone():
    studies = np.stack([random_values(3, 4, seed) for seed in range(6)])
    found = statistics.contrast(studies.reshape(2, 3, 3, 4), TRAP, offset=0.5)
    alone = [statistics.contrast(study, TRAP, offset=0.5) for study in studies]
    assert found.estimate.ravel() == pytest.approx([one.estimate for one in alone])
    assert found.deciding()[1].ravel() == pytest.approx([one.deciding()[1] for one in alone])
    assert found.p_above(1.0).ravel() == pytest.approx([one.p_above(1.0) for one in alone])


@pytest.mark.parametrize("values", [[[1.0, 2.0], [4.0, 5.0]], [[0.1, 0.7], [0.1, 0.7], [0.1, 0.7]]])
def test_seeds_that_do_not_differ_have_no_error(values: list[list[float]]):
    assert statistics.contrast(np.array(values), (-1, 1)).mse == 0


@pytest.mark.parametrize("c", [(1, 1), (0, 0), (1, -1, 0)])
def test_coefficients_that_are_no_contrast_are_refused(c: tuple[float, ...]):
    with pytest.raises(ValueError, match=r"contrast|fit"):
        statistics.contrast(random_values(3, 2), c)


def test_one_seed_is_refused():
    with pytest.raises(ValueError, match="fit"):
        statistics.contrast(random_values(1, 2), (1, -1))


@pytest.mark.parametrize(("size", "p"), [(2, 1 / 6), (3, 0.05), (4, 1 / 70)])
def test_a_side_that_diverged_wholly_against_fisher(size: int, p: float):
    table = [[size, 0], [0, size]]
    assert statistics.all_or_none(size, size) == pytest.approx(p)
    assert stats.fisher_exact(table, alternative="greater").pvalue == pytest.approx(p)


# --------------------------------------------------------------------------------------------
# Correction.


def test_holm_is_the_closed_test_of_bonferroni():
    """It rejects a hypothesis exactly where Bonferroni rejects every intersection with it."""
    chance = np.random.default_rng(0)
    p = chance.uniform(0, 0.03, (300, 4))
    found = statistics.holm(p, 0.025).rejected
    sets = [s for n in range(1, 5) for s in itertools.combinations(range(4), n)]
    for row, rejected in zip(p, found, strict=True):
        closed = [
            all(min(row[i] for i in s) <= 0.025 / len(s) for s in sets if name in s)
            for name in range(4)
        ]
        assert rejected.tolist() == closed


def test_holm_steps_down_and_stops():
    found = statistics.holm(np.array([0.006, 0.0084, 0.012, 0.03]), 0.025)
    assert found.rejected.tolist() == [True, False, False, False]
    assert found.level == pytest.approx([0.025 / 4, 0.025 / 3, 0.025 / 3, 0.025 / 3])
    found = statistics.holm(np.array([0.006, 1.0, 0.008, 0.0124]), 0.025)
    assert found.rejected.tolist() == [True, False, True, True]
    assert found.level == pytest.approx([0.025 / 4, 0.025, 0.025 / 3, 0.0125])


@pytest.mark.parametrize(
    ("first", "others", "rejected"),
    [
        (0.0125, (0.004, 0.006, 0.0124), (True, True, True, True)),
        (0.013, (0.004, 0.006, 0.0126), (False, True, True, False)),  # neither side is won
        (0.01, (0.008, 0.0124, 0.025), (True, True, True, True)),  # H1 passes its level on
        (0.02, (0.004, 0.006, 0.0124), (True, True, True, True)),  # the others pass theirs on
        (0.026, (0.004, 0.006, 0.0124), (False, True, True, True)),
        (None, (0.008, 0.0124, 0.024), (True, True, True)),  # H1 is left out of the family
        (0.02, (), (True,)),
    ],
)
def test_a_side_that_is_won_passes_its_level_on(
    first: float | None, others: tuple[float, ...], rejected: tuple[bool, ...]
):
    p = np.array([] if first is None else [first])
    q = np.array(others)
    found = statistics.correct(p, p < 1, q, q < 1)
    assert (*found[0].rejected, *found[1].rejected) == rejected


def test_a_side_that_is_rejected_but_not_supported_passes_nothing_on():
    """p of H1 is small, its estimate is below the smallest effect of interest."""
    others = np.array([0.008, 0.0124, 0.025])
    found = statistics.correct(np.array([0.001]), np.array([False]), others, others < 1)
    assert found[0].rejected.tolist() == [True]
    assert found[1].rejected.tolist() == [False, False, False]


# --------------------------------------------------------------------------------------------
# Pairs and correlation.


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (5, 0), (0, 5), (12, 7), (40, 61)])
def test_mcnemar_is_the_binomial_test_of_discordant_pairs(only_first: int, only_second: int):
    first = np.array([1] * only_first + [0] * only_second + [1, 0] * 10)
    second = np.array([0] * only_first + [1] * only_second + [1, 0] * 10)
    found = statistics.mcnemar(first, second)
    assert (found.first_only, found.second_only) == (only_first, only_second)
    total = only_first + only_second
    if not total:
        assert found.p_two_sided == found.p_first_better == 1.0
        return
    assert found.p_two_sided == pytest.approx(stats.binomtest(only_first, total).pvalue)
    greater = stats.binomtest(only_first, total, alternative="greater").pvalue
    assert found.p_first_better == pytest.approx(greater)


def test_sequences_in_pairs_are_the_paired_t_test():
    chance = np.random.default_rng(0)
    hard = 3 + chance.standard_normal(200)
    first, second = hard + 0.01 * chance.standard_normal(200), hard
    found = statistics.paired_sequences(first, second)
    test = stats.ttest_rel(first, second)
    assert found.estimate == pytest.approx((first - second).mean())
    assert found.interval == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert found.standard_error == pytest.approx(found.estimate / test.statistic)
    assert found.standard_error < 0.01 < hard.std() / math.sqrt(200)  # what pairing gains


def test_bootstrap_of_pairs():
    chance = np.random.default_rng(0)
    second = chance.standard_normal(500)
    first = second + chance.exponential(size=500)
    found = statistics.paired_bootstrap(first, second, seed=3)
    assert found == statistics.paired_bootstrap(first, second, seed=3)
    assert found.interval != statistics.paired_bootstrap(first, second, seed=4).interval
    other = stats.bootstrap(
        (first - second,), np.mean, method="percentile", n_resamples=4_000, rng=1
    )
    # Ends of percentile intervals of 4,000 resamples: Monte Carlo error about 0.04 of an error.
    tolerance = 0.2 * float(other.standard_error)
    assert found.interval == pytest.approx(tuple(other.confidence_interval), abs=tolerance)
    assert found.standard_error == pytest.approx(float(other.standard_error), rel=0.06)
    assert found.estimate == pytest.approx((first - second).mean())
    assert found.num_pairs == 500


@pytest.mark.parametrize("pair", [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([[1.0]], [[1.0]])])
def test_what_is_not_in_pairs_is_refused(pair: tuple[list, list]):
    for function in (statistics.paired_sequences, statistics.paired_bootstrap, statistics.mcnemar):
        with pytest.raises(ValueError, match="pairs"):
            function(np.array(pair[0]), np.array(pair[1]))


def test_correlation_against_scipy():
    chance = np.random.default_rng(0)
    x = chance.integers(0, 6, 20).astype(float)  # ties
    y = x + 2 * chance.standard_normal(20)
    found = statistics.correlation(x, y)
    pearson = stats.pearsonr(x, y)
    assert found.pearson == pytest.approx(pearson.statistic)
    assert found.interval == pytest.approx(tuple(pearson.confidence_interval(0.95)))
    assert found.spearman == pytest.approx(stats.spearmanr(x, y).statistic)


def test_correlation_of_too_little():
    assert math.isnan(statistics.correlation([1, 2], [1, 2]).pearson)
    assert math.isnan(statistics.correlation([1, 1, 1], [1, 2, 3]).pearson)
    three = statistics.correlation([1, 2, 3], [1, 2, 2.5])
    assert three.interval is None and three.spearman == pytest.approx(1.0)


def test_detectable_difference():
    """HellaSwag's 10,042 items at 20% discordance: 1.25 points; and McNemar's test finds it so."""
    assert statistics.detectable_difference(10_042, 0.2) == pytest.approx(0.0125, abs=5e-5)
    items = 4_000
    difference = statistics.detectable_difference(items, 0.2)
    chance = np.random.default_rng(0)
    shares = [(0.2 + difference) / 2, (0.2 - difference) / 2, 0.8]
    table = chance.multinomial(items, shares, size=1_000)
    found = [stats.binomtest(int(b), int(b + c)).pvalue < 0.05 for b, c, _ in table]
    # 0.8 with Monte Carlo error 0.013; the exact test is a little conservative.
    assert 0.75 < np.mean(found) < 0.84


# --------------------------------------------------------------------------------------------
# Simulated tasks; intervals over seeds are simulated in test_verdict_rates.


def test_error_rates_over_items():
    """Two models that are equally able: 2,000 simulated tasks of 200 items each."""
    chance = np.random.default_rng(12_345)
    holds = found = 0
    for _ in range(STUDIES):
        hard = chance.standard_normal(200)
        first, second = (
            (hard + 0.7 * chance.standard_normal(200) < -0.5).astype(float) for _ in range(2)
        )
        low, high = statistics.paired_bootstrap(first, second, resamples=500).interval
        holds += low <= 0 <= high
        found += statistics.mcnemar(first, second).p_two_sided <= 0.05
    assert 0.94 <= holds / STUDIES <= 0.96
    assert 0.02 < found / STUDIES <= 0.05  # the exact test is conservative
