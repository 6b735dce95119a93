"""Streaming spectra against float64 numpy: factors, merges, masks, measures."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from references import BATCH_ROWS, NUM_BATCHES, SPECTRA, K

from qkjax import measures
from qkjax.measures import gram, ranks, spectral

TOLERANCE = 1e-5


@jax.jit
def _stream(batches, masks):
    """Merges [batches, heads, rows, K] one after another; the carry does not grow."""
    start = spectral.empty_factor(batches.shape[1:2], K)

    def add(total, batch):
        return spectral.merge(total, spectral.factor(*batch)), None

    return jax.lax.scan(add, start, (batches, masks))[0]


_singular_values = jax.jit(spectral.singular_values, static_argnums=1)
_merge = jax.jit(spectral.merge)
_factor = jax.jit(spectral.factor)


@functools.cache
def _long_streams():
    """All spectra, with means of 0 to 1,000 spreads, as heads of one stream of 500 batches."""
    heads = {
        (name, spreads): references.vectors(scales, spreads, seed)
        for seed, (name, scales) in enumerate(SPECTRA.items())
        for spreads in (0, 100, 1000)
    }
    batches = np.stack(list(heads.values()), axis=1)
    return heads, batches, _stream(batches, np.ones((NUM_BATCHES, BATCH_ROWS), bool))


@pytest.mark.parametrize("centred", [True, False], ids=["centred", "raw"])
@pytest.mark.parametrize("spreads", [0, 100, 1000])
@pytest.mark.parametrize("name", SPECTRA)
def test_500_batches_agree_with_float64(name, spreads, centred):
    heads, _, total = _long_streams()
    head = list(heads).index((name, spreads))
    expected, expected_sigma = references.spectrum(heads[name, spreads], centred)
    sigma = _singular_values(total, centred)[head]
    assert total.count[head] == NUM_BATCHES * BATCH_ROWS
    assert sigma.dtype == jnp.float32
    assert abs(float(ranks.participation_ratio(sigma)) / expected - 1) < TOLERANCE
    assert np.abs(sigma / expected_sigma[0] - expected_sigma / expected_sigma[0]).max() < TOLERANCE
    assert np.all(np.diff(sigma) <= 0)


def test_the_mean_agrees_with_float64():
    heads, _, total = _long_streams()
    for head, rows in enumerate(heads.values()):
        rows = rows.reshape(-1, K).astype(np.float64)
        mean = rows.mean(axis=0)
        both = np.float64(total.anchor[head]) + np.float64(total.offset[head])
        # In units of the spread: one float32 of 1,000 spreads alone is wrong by 3e-5 of it.
        assert np.abs(both - mean).max() < 1e-6 * rows.std(axis=0).max()
        np.testing.assert_allclose(total.mean[head], mean, rtol=2e-7, atol=1e-6)


def test_the_order_of_batches_does_not_matter():
    _, batches, total = _long_streams()
    order = np.random.default_rng(5).permutation(NUM_BATCHES)
    shuffled = _stream(batches[order], np.ones((NUM_BATCHES, BATCH_ROWS), bool))
    assert np.array_equal(shuffled.count, total.count)
    for centred in (True, False):
        one = ranks.participation_ratio(_singular_values(total, centred))
        other = ranks.participation_ratio(_singular_values(shuffled, centred))
        np.testing.assert_allclose(other, one, rtol=TOLERANCE)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_tree_equals_one_after_another(size):
    _, batches, _ = _long_streams()
    factors = jax.vmap(_factor)(batches[:size])
    tree = jax.jit(spectral.merge_leading_axis)(factors)
    chain = spectral.empty_factor(batches.shape[1:2], K)
    for batch in batches[:size]:
        chain = _merge(chain, _factor(batch))
    assert np.array_equal(tree.count, chain.count)
    np.testing.assert_allclose(tree.mean, chain.mean, rtol=1e-5, atol=1e-6)
    for centred in (True, False):
        tree_sigma, chain_sigma = _singular_values(tree, centred), _singular_values(chain, centred)
        scale = tree_sigma[..., :1]
        np.testing.assert_allclose(tree_sigma / scale, chain_sigma / scale, atol=1e-6)


def test_masked_rows_do_not_exist():
    """Rows that are masked, NaN included, change nothing: the kept rows alone give the same."""
    rng = np.random.default_rng(3)
    # A mean of 3000: the anchor is far enough from it that a masked row of -offset would show.
    means = np.array([3, 3000])[:, None, None]
    rows = (means + rng.standard_normal((2, 96, K))).astype(np.float32)
    mask = rng.random((2, 96)) < 0.8
    dirty = np.where(mask[..., None], rows, np.nan)
    masked = _factor(dirty, mask)
    assert masked.count.dtype == jnp.int32
    for head in range(2):
        kept = rows[head, mask[head]].astype(np.float64)
        assert masked.count[head] == len(kept)
        np.testing.assert_allclose(masked.mean[head], kept.mean(axis=0), rtol=1e-6)
        for centred in (True, False):
            expected = np.linalg.svd(kept - kept.mean(axis=0) * centred, compute_uv=False)
            found = _singular_values(masked, centred)[head]
            np.testing.assert_allclose(found, expected, atol=1e-5 * expected[0])
    one_mask = _factor(rows, mask[0])  # [n]: the same mask for every head
    np.testing.assert_array_equal(one_mask.count, [mask[0].sum()] * 2)
    np.testing.assert_array_equal(one_mask.mean[0], masked.mean[0])


def test_a_partial_batch_counts_only_its_rows():
    """500 rows as 5 full batches of 96 and a last one of 20: equal to float64 over the 500."""
    rng = np.random.default_rng(4)
    rows = (rng.standard_normal((500, K)) * SPECTRA["1/k"] + 2).astype(np.float32)
    padded = np.full((576, K), 1e6, np.float32)
    padded[:500] = rows
    masks = np.arange(576).reshape(6, 96) < 500
    total = _stream(padded.reshape(6, 1, 96, K), masks)
    assert total.count[0] == 500
    for centred in (True, False):
        expected, _ = references.spectrum(rows, centred)
        sigma = _singular_values(total, centred)[0]
        assert abs(float(ranks.participation_ratio(sigma)) / expected - 1) < TOLERANCE


def test_fewer_rows_than_dimensions():
    rows = np.random.default_rng(6).standard_normal((5, K)).astype(np.float32)
    few = _factor(rows)
    assert few.r.shape == (K, K)
    raw = np.linalg.svd(rows.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(_singular_values(few, False)[:5], raw, rtol=1e-5)
    np.testing.assert_allclose(_singular_values(few, False)[5:], 0, atol=1e-5)
    assert float(ranks.participation_ratio(_singular_values(few, True))) < 4.01


def test_empty_sets_are_exact_no_ops():
    rng = np.random.default_rng(7)
    some = _factor(rng.standard_normal((2, 96, K)).astype(np.float32) + 1)
    none = _factor(np.full((2, 96, K), np.nan, np.float32), np.zeros(96, bool))
    empty = spectral.empty_factor((2,), K)
    for found, expected in (
        (none, empty),
        (_merge(some, none), some),
        (_merge(none, some), some),
        (_merge(empty, none), empty),
    ):
        for found_leaf, expected_leaf in zip(found, expected, strict=True):
            assert found_leaf.dtype == expected_leaf.dtype
            np.testing.assert_array_equal(found_leaf, expected_leaf)
    assert not np.any(_singular_values(empty, False))
    with jax.debug_nans(True):
        spectral.merge(empty, empty)


def test_millions_of_vectors_do_not_overflow():
    """Two sets of 2^30 - 1 vectors: their product is far beyond int32, their sum just fits."""
    rng = np.random.default_rng(8)
    count = jnp.int32(2**30 - 1)
    r = np.triu(rng.standard_normal((K, K))).astype(np.float32)
    means = rng.standard_normal((2, K)).astype(np.float32)
    zero = np.zeros(K, np.float32)
    a, b = (spectral.Factor(count, mean, zero, r) for mean in means)
    both = _merge(a, b)
    assert int(both.count) == 2 * (2**30 - 1)
    np.testing.assert_allclose(both.mean, means.mean(axis=0), rtol=1e-5, atol=1e-6)
    difference = (means[1] - means[0]).astype(np.float64) * np.sqrt(int(count) / 2)
    expected = np.linalg.svd(np.vstack([r, r, difference]), compute_uv=False)
    np.testing.assert_allclose(_singular_values(both, True)[0], expected[0], rtol=1e-5)


def test_bfloat16_vectors_are_factored_in_float32():
    rows = jnp.asarray(np.random.default_rng(9).standard_normal((96, K)), jnp.bfloat16)
    for found, expected in zip(_factor(rows), _factor(rows.astype(jnp.float32)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_non_finite_vector_gives_nan_and_no_crash():
    rows = np.ones((2, 96, K), np.float32)
    rows[0, 3, 3] = np.inf
    sigma = _singular_values(_factor(rows), True)
    for name, measure in ranks.MEASURES.items():
        assert np.isnan(measure(sigma)[0]), name


def test_measures_equal_their_formulae():
    assert list(ranks.MEASURES) == ["pr", "pr_cov", "erank", "srank", "r90"]
    spectra = [np.random.default_rng(10).random(K), *SPECTRA.values()]
    for sigma in spectra:
        sigma = np.sort(sigma)[::-1]
        for name, expected in references.measures(sigma).items():
            found = ranks.MEASURES[name](jnp.asarray(sigma, jnp.float32))
            assert found.dtype == jnp.float32
            np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ranks.MEASURES)
def test_identities_of_every_measure(name):
    measure = ranks.MEASURES[name]
    sigma = np.zeros((3, K), np.float32)
    sigma[0] = 1  # orthonormal
    sigma[1, 0] = 1  # rank 1
    found = measure(jnp.asarray(sigma))
    assert found.shape == (3,)
    np.testing.assert_allclose(found[:2], [58 if name == "r90" else 64, 1], rtol=1e-6)
    assert np.isnan(found[2])  # zero

    spectrum = jnp.asarray(SPECTRA["1/k"], jnp.float32)
    for scale in (1e-25, 1e25):  # the squares of both leave float32
        np.testing.assert_allclose(measure(spectrum * scale), measure(spectrum), rtol=1e-6)
    np.testing.assert_allclose(measure(spectrum[::-1]), measure(spectrum), rtol=1e-6)


def test_r90_counts_a_tie_as_held():
    assert float(ranks.r90(jnp.ones(10))) == 9
    assert float(ranks.r90(jnp.ones(20))) == 18
    assert float(ranks.r90(jnp.asarray([3.0, 1.0]))) == 1  # 9 of 10
    assert float(ranks.r90(jnp.asarray([3.0, 1.0001]))) == 2


_alignment = jax.jit(spectral.axis_alignment)
_overlap = jax.jit(spectral.subspace_overlap)


def _factor_of(roots):
    """A factor with the covariance R^T R / 100 for every [K, K] matrix R of roots [..., K, K]."""
    empty = spectral.empty_factor(np.shape(roots)[:-2], K)
    return empty._replace(count=empty.count + 100, r=jnp.asarray(roots, jnp.float32))


@pytest.fixture
def as_on_gpus(monkeypatch):
    """Float64 Gram matrices in place of QR and SVD; their eigenvalues as a CPU computes them."""
    eigh = gram._eigh
    monkeypatch.setattr(gram, "_eigh", lambda matrix, _: eigh(matrix, None))
    monkeypatch.setattr(
        jax.lax,
        "platform_dependent",
        lambda *arrays, default, **by_platform: by_platform.get("cuda", default)(*arrays),
    )


def test_gpus_measure_the_same(as_on_gpus):
    heads, _, total = _long_streams()
    for measure in (spectral.triangles, spectral.axis_alignment, spectral.subspace_overlap):
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(measure(total)))
    for centred in (True, False):
        sigma = spectral.singular_values(total, centred)
        assert sigma.dtype == jnp.float32 and np.all(np.diff(sigma) <= 0)
        for head, rows in enumerate(heads.values()):
            pr, expected = references.spectrum(rows, centred)
            assert abs(float(ranks.participation_ratio(sigma[head])) / pr - 1) < TOLERANCE
            assert np.abs(sigma[head] - expected).max() < TOLERANCE * expected[0]


def test_gpus_find_the_same_directions(as_on_gpus):
    rng = np.random.default_rng(0)
    spreads = 0.7 ** np.arange(16)  # no ties: each direction is one
    turned = np.linalg.qr(rng.normal(size=(3, 16, 16)))[0]
    rows = (rng.normal(size=(3, 400, 16)) * spreads) @ turned

    def look():
        total = spectral.factor(jnp.asarray(rows, jnp.float32))
        return *spectral.axis_alignment(total), spectral.subspace_overlap(total)

    found = look()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", lambda *arrays, default, **_: default(*arrays))
        expected = look()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_gpus_say_nan_of_vectors_that_are_not_finite(as_on_gpus):
    rows = np.ones((2, 8, 4), np.float32)
    rows[1, 3, 2] = np.nan
    sigma = spectral.singular_values_of(spectral.triangular(rows))
    assert np.isfinite(sigma[0]).all() and np.isnan(sigma[1]).all()


def test_axis_alignment_tells_the_axes_from_a_random_orientation():
    rng = np.random.default_rng(11)
    random = np.linalg.qr(rng.standard_normal((20, K, K)))[0]
    for name in ("1/k", "collapsed"):
        roots = np.stack([np.diag(SPECTRA[name]), *(SPECTRA[name][:, None] * random)])
        r, aa = _alignment(_factor_of(roots))
        np.testing.assert_allclose([r[0], aa[0]], 1, rtol=1e-5)
        assert abs(float(aa[1:].mean())) < 0.05
        assert float(jnp.abs(aa[1:]).max()) < 0.25


def test_axis_alignment_equals_its_formula():
    axes = np.linalg.qr(np.eye(K) + 0.3)[0]
    root = SPECTRA["1/k"][:, None] * axes
    covariance = root.T @ root

    def pr(values):
        return values.sum() ** 2 / (values**2).sum()

    rank = pr(np.linalg.eigvalsh(covariance))
    r, r0 = rank / pr(np.diag(covariance)), (rank + 2) / (K + 2)
    # The squares of the last two leave float32.
    found_r, found_aa = _alignment(_factor_of(np.stack([root, root * 1e-25, root * 1e25])))
    assert found_r.dtype == found_aa.dtype == jnp.float32
    np.testing.assert_allclose(found_r, r, rtol=1e-5)
    np.testing.assert_allclose(found_aa, (r - r0) / (1 - r0), rtol=1e-5)


def test_axis_alignment_is_undefined_where_nothing_has_an_orientation():
    nearly = np.linspace(1, 1.5, K)  # its r0 is 0.9506, of its power 1.02 0.9487: limit 0.95
    roots = [np.diag(nearly**1.02), np.diag(nearly), np.eye(K), np.zeros((K, K))]
    r, aa = _alignment(_factor_of(np.stack(roots)))
    np.testing.assert_array_equal(np.isnan(r), [False, False, False, True])
    np.testing.assert_array_equal(np.isnan(aa), [False, True, True, True])


def _leading(axes):
    """A root [K, K] whose 8 leading directions are the given rows [8, K]."""
    return np.vstack([axes * 10, np.linalg.svd(axes)[2][8:]])


def test_overlap_of_equal_orthogonal_and_random_subspaces():
    basis = np.linalg.qr(np.random.default_rng(15).standard_normal((K, K)))[0]
    turned = np.linalg.qr(np.random.default_rng(16).standard_normal((8, 8)))[0] @ basis[:8]
    half = np.vstack([basis[4:8], basis[8:12]])  # shares 4 of 8 directions with the first
    heads = [_leading(axes) for axes in (basis[:8], turned, basis[16:24], half)]
    # Pairs: (0, 1) 1, (0, 2) 0, (0, 3) 0.5, (1, 2) 0, (1, 3) 0.5, (2, 3) 0.
    expected = np.array([1.5, 1.5, 0, 1]) / 3
    random = np.random.default_rng(17).standard_normal((21, 4, K, K))
    found = _overlap(_factor_of(np.stack([heads, *random])))
    assert found.shape == (22, 4) and found.dtype == jnp.float32
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    assert abs(float(found[1:].mean()) - 8 / K) < 0.01


def test_overlap_is_undefined_without_other_heads_or_without_keys():
    roots = np.random.default_rng(18).standard_normal((3, K, K))
    assert np.isnan(_overlap(_factor_of(roots[:, None]))).all()
    dead, alone = roots * [[[1]], [[0]], [[1]]], roots * [[[1]], [[0]], [[0]]]
    found = _overlap(_factor_of(np.stack([roots, dead, alone])))
    assert np.isfinite(found[0]).all() and np.isnan(found[2]).all()
    np.testing.assert_array_equal(np.isnan(found[1]), [False, True, False])
    # The other two are compared with each other alone, in the first row with the third head too.
    pair = _overlap(_factor_of(roots[[0, 2]]))
    np.testing.assert_allclose(found[1, [0, 2]], pair, rtol=1e-5)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_participation_ratios_of_ones_own_vectors_are_float64(convert):
    """Collapsed vectors a hundred spreads from 0: float32 products would lose the small ones."""
    rows = references.vectors(SPECTRA["collapsed"], 100, 19)[:5].reshape(-1, K)
    found = measures.participation_ratio_of(convert(rows))
    expected = [references.spectrum(rows, centred)[0] for centred in (False, True)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found.raw < 2 < 3 < found.centred
    half = jnp.asarray(rows, jnp.bfloat16)
    exact = references.spectrum(np.asarray(half.astype(jnp.float32)), True)[0]
    assert measures.participation_ratio_of(half).centred == pytest.approx(exact, rel=1e-12)
    counts = measures.participation_ratio_of([[1, 0], [0, 1], [0, 0]])
    assert counts.raw == pytest.approx(2) and np.isnan(measures.participation_ratio_of([[0]]).raw)


@pytest.mark.parametrize(
    "vectors", [np.ones(3), np.ones((0, 3)), np.ones((2, 2, 2)), [[np.nan]], [["a"]], [[1j]]]
)
def test_what_is_no_matrix_of_vectors_is_refused(vectors):
    with pytest.raises(ValueError, match=r"vectors: expected finite real numbers \[n, d\], found"):
        measures.participation_ratio_of(vectors)


def test_the_two_lines_of_the_documentation():
    results = doctest.testmod(measures)
    assert results.attempted >= 4 and results.failed == 0
