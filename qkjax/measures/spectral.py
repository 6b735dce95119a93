"""Spectra of keys, queries and values: streaming factors, singular values, how heads lie.

The n vectors of one head form an [n, K] matrix that is never stored. A `Factor` holds count, mean
and the triangular R of the QR factorisation of the centred vectors: all that both spectra, raw and
centred, need. Factors of batches are merged pairwise (Chan, Golub & LeVeque 1983, with R in place
of the sum of squares), in float32, without loss where a Gram matrix or a downdated mean would
lose half of the digits. Everything is pure, jit- and vmap-able, and needs no float64 but on GPUs,
which decompose float64 Gram matrices (`gram`) instead of QR and SVD.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qkjax.measures import gram, ranks

_ISOTROPIC_ABOVE = 0.95  # r0 of axis alignment: such a covariance has no orientation to speak of
_LEADING = 8  # directions of a head that overlap compares


class Factor(NamedTuple):
    """Count, mean and centred triangular factor of a set of vectors, per leading index.

    R^T R / count is the covariance of the vectors. Leading axes (layers, heads) are arbitrary.
    The mean is anchor + offset. The anchor is near the mean and is carried along unchanged, so
    that all arithmetic happens at the size of the spread. A mean in one float drifts over
    hundreds of merges by as much as the spread of collapsed keys far from the origin.
    """

    count: jax.Array  # type: ignore[assignment]  # [...] int32 vectors seen; hides tuple.count
    anchor: jax.Array  # [..., K] float32
    offset: jax.Array  # [..., K] float32
    r: jax.Array  # [..., K, K] float32, upper triangular up to signs

    @property
    def mean(self) -> jax.Array:
        """[..., K] float32 mean of the vectors; 0 where there are none."""
        return self.anchor + self.offset


def empty_factor(batch_shape: tuple[int, ...], dim: int) -> Factor:
    """The factor of no vectors: the start of a stream.

    Args:
        batch_shape: leading axes, for instance (layers, heads).
        dim: K, the length of the vectors.
    """
    return Factor(
        count=jnp.zeros(batch_shape, jnp.int32),
        anchor=jnp.zeros((*batch_shape, dim), jnp.float32),
        offset=jnp.zeros((*batch_shape, dim), jnp.float32),
        r=jnp.zeros((*batch_shape, dim, dim), jnp.float32),
    )


def factor(vectors: jax.Array, mask: jax.Array | None = None) -> Factor:
    """The factor of one batch of vectors.

    Args:
        vectors: [..., n, K], n of any size, also below K.
        mask: bool [n] or [..., n], broadcast against vectors; False rows are neither counted nor
            read (they may hold NaN). None: every row counts.
    Returns:
        Factor with leading axes [...]; with no valid row, the same as `empty_factor`.
    """
    vectors = vectors.astype(jnp.float32)
    *batch_shape, num_rows, _ = vectors.shape
    mask = jnp.ones(num_rows, bool) if mask is None else mask.astype(bool)
    valid = jnp.broadcast_to(mask, (*batch_shape, num_rows))
    count = valid.sum(axis=-1, dtype=jnp.int32)
    divisor = jnp.maximum(count, 1).astype(jnp.float32)[..., None]

    def masked(values: jax.Array) -> jax.Array:
        return jnp.where(valid[..., None], values, 0.0)

    mean = masked(vectors).sum(axis=-2) / divisor
    # Rounded to 12 bits, the anchor is one number wherever the compiler computes it again: a full
    # float would differ from fusion to fusion in its last bit (a * b + c contracted or not).
    anchor = jax.lax.reduce_precision(mean, exponent_bits=8, mantissa_bits=12)
    residues = masked(vectors - anchor[..., None, :])
    offset = residues.sum(axis=-2) / divisor
    return Factor(count, anchor, offset, _by_qr(masked(residues - offset[..., None, :])))


def merge(a: Factor, b: Factor) -> Factor:
    """The factor of the union of two disjoint sets of vectors; exact where one is empty.

    Args:
        a, b: factors with equal leading axes and K.
    """
    count_a, count_b = a.count.astype(jnp.float32), b.count.astype(jnp.float32)
    share_b = count_b / jnp.maximum(count_a + count_b, 1.0)
    difference = (b.anchor - a.anchor) + (b.offset - a.offset)
    # count_a * count_b would overflow int32 and waste float32's exactness.
    between = jnp.sqrt(count_a * share_b)[..., None] * difference
    r = _by_qr(jnp.concatenate([a.r, b.r, between[..., None, :]], axis=-2))
    merged = Factor(a.count + b.count, a.anchor, a.offset + difference * share_b[..., None], r)
    return _where(b.count == 0, a, _where(a.count == 0, b, merged))


def _where(condition: jax.Array, yes: Factor, no: Factor) -> Factor:
    def choose(yes_leaf: jax.Array, no_leaf: jax.Array) -> jax.Array:
        trailing = (1,) * (yes_leaf.ndim - condition.ndim)
        return jnp.where(condition.reshape(condition.shape + trailing), yes_leaf, no_leaf)

    return jax.tree.map(choose, yes, no)


def merge_leading_axis(factors: Factor) -> Factor:
    """Merges the factors along the leading axis by a pairwise tree.

    Args:
        factors: with leading axes [M, ...], M at least 1; for instance one factor per sequence
            of a batch. Neighbours are merged first: sharded over devices, they are local.
    Returns:
        Factor with leading axes [...].
    """
    size = factors.count.shape[0]
    while size > 1:
        half = size // 2
        evens, odds, rest = (
            jax.tree.map(lambda leaf, cut=cut: leaf[cut], factors)
            for cut in (
                slice(0, 2 * half, 2),
                slice(1, 2 * half, 2),
                slice(2 * half, size),
            )
        )
        merged = merge(evens, odds)
        factors = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), merged, rest)
        size = half + size % 2
    return jax.tree.map(lambda leaf: leaf[0], factors)


def scaled(f: Factor, gamma_K: jax.Array) -> Factor:
    """The factor of the vectors with each coordinate multiplied by its gamma [..., K]."""
    return Factor(f.count, f.anchor * gamma_K, f.offset * gamma_K, f.r * gamma_K[..., None, :])


def concatenate(factors: Sequence[Factor]) -> Factor:
    """Factors of heads [N, heads] one after another, of one K."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *factors)


def triangles(f: Factor) -> jax.Array:
    """R of the centred vectors, then R of the vectors as they are: [2, ..., K, K] float32.

    Their singular values are those of the [n, K] matrices; of two sets of vectors of equal count,
    those of R_a R_b^T are the singular values of the [n, n] matrix A B^T.
    """
    root = jnp.sqrt(f.count.astype(jnp.float32))
    row = (root[..., None] * f.mean)[..., None, :]
    return jnp.stack([f.r, triangular(jnp.concatenate([f.r, row], axis=-2))])


def singular_values(f: Factor, centred: bool) -> jax.Array:
    """Singular values of the [n, K] matrix of all vectors seen, or of the vectors minus their mean.

    Args:
        f: factor with leading axes [...].
        centred: True: the mean is removed; False: the vectors as they are.
    Returns:
        [..., K] float32, descending; zeros fill up where n < K. NaN where a vector was not finite.
    """
    return singular_values_of(f.r if centred else triangles(f)[1])


def singular_values_of(matrices: jax.Array) -> jax.Array:
    """Singular values of [..., K, K], [..., K] float32, descending."""

    def by_svd(matrices: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return jnp.linalg.svd(matrices, full_matrices=False, compute_uv=False)

    def by_gram(matrices: jax.Array) -> jax.Array:
        return gram.decompose(gram.of(matrices))[0].astype(jnp.float32)

    return jax.lax.platform_dependent(matrices, cuda=by_gram, default=by_svd)


def _right_singular_vectors(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Singular values [..., K] and right singular vectors [..., K, K], one per row, float32."""

    def by_svd(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
        with jax.default_matmul_precision("highest"):
            _, sigma, vectors = jnp.linalg.svd(matrices, full_matrices=False)
        return sigma, vectors

    def by_gram(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
        sigma, vectors = gram.decompose(gram.of(matrices))
        return sigma.astype(jnp.float32), vectors.astype(jnp.float32)

    return jax.lax.platform_dependent(matrices, cuda=by_gram, default=by_svd)


def product(a_RK: jax.Array, b_SK: jax.Array) -> jax.Array:
    """A B^T [..., R, S], in full float32 everywhere."""
    return jnp.einsum("...rk,...sk->...rs", a_RK, b_SK, precision=jax.lax.Precision.HIGHEST)


def triangular(rows: jax.Array) -> jax.Array:
    """R [..., K, K] of the QR factorisation of [..., n, K]; zero rows fill up where n < K.

    On GPUs another R of the same R^T R, with one singular vector per row: what is read from it is
    equal.
    """
    return jax.lax.platform_dependent(
        rows, cuda=lambda rows: gram.root(gram.of(rows)), default=_by_qr
    )


def _by_qr(rows: jax.Array) -> jax.Array:
    num_rows, dim = rows.shape[-2:]
    if num_rows < dim:
        widths = [(0, 0)] * (rows.ndim - 2) + [(0, dim - num_rows), (0, 0)]
        rows = jnp.pad(rows, widths)
    with jax.default_matmul_precision("highest"):
        return jnp.linalg.qr(rows, mode="r")


def axis_alignment(f: Factor) -> tuple[jax.Array, jax.Array]:
    """How far the covariance's eigenvectors are the coordinate axes.

    With D = K, lambda the eigenvalues and d the diagonal of the centred covariance:
    r = pr_cov(lambda) / pr_cov(d), which is about r0 = (pr_cov(lambda) + 2) / (D + 2) for a
    random orientation; aa = (r - r0) / (1 - r0).

    Args:
        f: factor with leading axes [...].
    Returns:
        r and aa, [...] float32. aa is 0 for a random orientation, 1 where the axes are the
        eigenvectors, NaN where r0 > 0.95; both are NaN where the covariance is 0.
    """
    sigma = singular_values(f, centred=True)
    dim = sigma.shape[-1]
    scaled = f.r / sigma[..., :1, None]  # R^T R neither under- nor overflows, as in `ranks`
    of_eigenvalues = ranks.participation_ratio_cov(sigma)
    r = of_eigenvalues / ranks.participation_ratio((scaled**2).sum(axis=-2))
    r0 = (of_eigenvalues + 2) / (dim + 2)
    return r, jnp.where(r0 > _ISOTROPIC_ABOVE, jnp.nan, (r - r0) / (1 - r0))


def subspace_overlap(f: Factor) -> jax.Array:
    """Mean overlap of a head's 8 leading centred directions with those of its layer's other heads.

    Of heads i and j: ||V_i^T V_j||_F^2 / 8, V the 8 leading right singular vectors.

    Args:
        f: factor with leading axes [..., G], G the kv heads of a layer.
    Returns:
        [..., G] float32 in [0, 1]; random directions give 8 / K. Heads whose keys do not vary are
        left out; NaN where the head is one of them, or where there is no other.
    """
    sigma, vectors = _right_singular_vectors(f.r)
    leading = vectors[..., :_LEADING, :]
    with jax.default_matmul_precision("highest"):
        products = jnp.einsum("...iak,...jbk->...ijab", leading, leading)
    overlap = (products**2).sum(axis=(-2, -1)) / leading.shape[-2]
    varies = sigma[..., 0] > 0
    compared = varies[..., :, None] & varies[..., None, :] & ~jnp.eye(varies.shape[-1], dtype=bool)
    return jnp.where(compared, overlap, 0.0).sum(axis=-1) / compared.sum(axis=-1)
