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
    assert found.pooled == pytest.approx((low, high), rel=1e-9)
    assert found.p_above(0.0) == pytest.approx(stats.t.sf(weights @ beta / error, freedom))
    assert found.p_below(3.0) == pytest.approx(stats.t.cdf((found.estimate - 3) / error, freedom))


def test_paired_interval_is_the_paired_t_test():
    values = random_values(6, 4)
    found = statistics.contrast(values, TRAP)
    own = values @ np.array(TRAP)
    test = stats.ttest_1samp(own, 0.0)
    assert found.per_seed == pytest.approx(tuple(own))
    assert found.paired == pytest.approx(tuple(test.confidence_interval(0.95)))
    two = statistics.contrast(values[:, :2], (1, -1))
    test = stats.ttest_rel(values[:, 0], values[:, 1], alternative="greater")
    assert two.p_above(0.0) == pytest.approx(test.pvalue)
    assert two.pooled == pytest.approx(two.paired)  # with two arms they are one


def test_worked_example():
    """Residuals of [[1, 2], [3, 8]] are +-1: MSE 4, error sqrt(2 * 4 / 2) = 2, t 12.706."""
    found = statistics.contrast(np.array([[1.0, 2.0], [3.0, 8.0]]), (-1, 1), offset=0.5)
    assert found.mse == pytest.approx(4.0)
    assert found.estimate == pytest.approx(2.5)
    assert found.per_seed == pytest.approx((0.5, 4.5))
    assert found.pooled == pytest.approx((2.5 - 25.4124, 2.5 + 25.4124), abs=1e-3)


def test_what_a_seed_does_to_all_arms_alike_does_not_count():
    values = random_values(3, 5)
    c = (*TRAP, 0)
    moved = values + np.array([[100.0], [-70.0], [3.0]]) + np.array([0, 0, 0, 0, 9.0])
    ours, other = statistics.contrast(values, c), statistics.contrast(moved, c)
    assert other.pooled == pytest.approx(ours.pooled)
    assert other.paired == pytest.approx(ours.paired)


def test_every_arm_of_the_plan_pays_into_the_error():
    values = random_values(3, 5)
    noisy = values.copy()
    noisy[:, 4] += (10, -20, 10)  # an arm with coefficient 0
    ours, other = (statistics.contrast(v, (*TRAP, 0)) for v in (values, noisy))
    assert other.estimate == ours.estimate and other.paired == pytest.approx(ours.paired)
    assert other.mse > 10 * ours.mse


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([[1.0, 2.0]], "no replication"),
        ([[1.0, 2.0], [4.0, 5.0]], "the seeds do not differ (MSE = 0)"),
        ([[0.1, 0.7], [0.1, 0.7], [0.1, 0.7]], "the seeds do not differ (MSE = 0)"),
        ([[1.0, 2.0], [math.nan, 5.0]], "a value is not finite"),
        ([[1.0, 2.0], [3.0, math.inf]], "a value is not finite"),
    ],
)
def test_what_has_no_interval_says_why(values: list[list[float]], why: str):
    found = statistics.contrast(np.array(values), (-1, 1))
    assert found.unusable == why
    assert found.pooled is None and found.paired is None
    assert found.p_above(0.0) is None and found.p_below(0.0) is None
    assert found.needed_seeds(1.0) is None


def test_an_arm_without_weight_that_is_not_finite_spoils_the_error_only():
    values = np.array([[1.0, 2.0, math.nan], [3.0, 5.0, 1.0]])
    found = statistics.contrast(values, (-1, 1, 0))
    assert found.estimate == pytest.approx(1.5) and found.pooled is None


@pytest.mark.parametrize("c", [(1, 1), (0, 0), (1, -1, 0)])
def test_coefficients_that_are_no_contrast_are_refused(c: tuple[float, ...]):
    with pytest.raises(ValueError, match=r"contrast|fit"):
        statistics.contrast(random_values(3, 2), c)


@pytest.mark.parametrize("distance", [5.0, 1.0, 0.3])
def test_needed_seeds_is_the_fewest_whose_half_width_is_below_the_distance(distance: float):
    found = statistics.contrast(random_values(3, 4), TRAP)

    def half(seeds: int) -> float:
        t = stats.t.ppf(0.975, (seeds - 1) * 3)
        return t * math.sqrt(found.sum_of_squares * found.mse / seeds)

    needed = found.needed_seeds(distance)
    assert half(needed) < distance
    assert needed == 2 or half(needed - 1) >= distance
    assert half(3) == pytest.approx((found.pooled[1] - found.pooled[0]) / 2)


def test_needed_seeds_without_an_answer():
    found = statistics.contrast(random_values(3, 4), TRAP)
    assert found.needed_seeds(0.0) is None
    assert found.needed_seeds(math.nan) is None
    assert found.needed_seeds(1e-6) is None  # more than MOST_SEEDS


# --------------------------------------------------------------------------------------------
# Holm.


def test_holm_is_the_closed_test_of_bonferroni():
    """It rejects a hypothesis exactly where Bonferroni rejects every intersection with it."""
    chance = np.random.default_rng(0)
    for _ in range(300):
        p = dict(zip("abcd", chance.uniform(0, 0.03, 4), strict=True))
        subsets = [s for n in range(1, 5) for s in itertools.combinations(p, n)]
        closed = {
            name: all(min(p[i] for i in s) <= 0.025 / len(s) for s in subsets if name in s)
            for name in p
        }
        assert statistics.holm(p, 0.025) == closed


def test_holm_steps_down_and_stops():
    p = {"H1": 0.006, "H2": 0.0084, "H3": 0.012, "H4": 0.03}
    assert statistics.holm(p, 0.025) == {"H1": True, "H2": False, "H3": False, "H4": False}
    p = {"H1": 0.006, "H2": None, "H3": 0.008, "H4": 0.0124}
    assert statistics.holm(p, 0.025) == {"H1": True, "H2": False, "H3": True, "H4": True}


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
    assert found.num_runs == 20
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
# Simulated studies: the intervals do what they say.


def coverage(seeds: int, spreads: tuple[float, ...], c: tuple[float, ...]) -> tuple[float, float]:
    """Share of 2,000 studies whose pooled and whose paired interval hold the truth."""
    chance = np.random.default_rng(12_345)
    truth = np.linspace(20.0, 50.0, len(spreads))
    wanted = float(np.dot(c, truth))
    pooled = paired = 0
    for _ in range(STUDIES):
        blocks = 3 * chance.standard_normal((seeds, 1))
        noise = np.array(spreads) * chance.standard_normal((seeds, len(spreads)))
        found = statistics.contrast(truth + blocks + noise, c)
        pooled += found.pooled[0] <= wanted <= found.pooled[1]
        paired += found.paired[0] <= wanted <= found.paired[1]
    return pooled / STUDIES, paired / STUDIES


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("c", [TRAP, (1, -1, 0, 0), (*TRAP, 0, 0, 0, 0, 0)])
def test_coverage_where_arms_vary_alike(seeds: int, c: tuple[float, ...]):
    """Of four arms, and of nine, as many as the study has with its controls."""
    pooled, paired = coverage(seeds, (1.0,) * len(c), c)
    assert 0.94 <= pooled <= 0.96
    assert 0.94 <= paired <= 0.96


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_coverage_where_one_arm_varies_four_times_as_much(seeds: int):
    """The pooled interval of a contrast with that arm falls short; the paired one does not."""
    pooled, paired = coverage(seeds, (4.0, 1.0, 1.0, 1.0), (1, -1, 0, 0))
    assert 0.84 <= pooled <= 0.92
    assert 0.94 <= paired <= 0.96


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
