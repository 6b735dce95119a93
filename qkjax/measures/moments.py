"""Float64 sums of float32 vectors: the cheapest exact way to their spectra, where float64 exists.

CPUs and NVIDIA GPUs have float64; TPUs have not and take `spectral.Factor` instead. The products
are centred before they are summed, so that the spectrum of collapsed keys far from the origin
keeps its digits, and summed in float64, whose half (eigenvalues are squares) is more than float32.
Where float64 is slow, at 1/64 of the rate of float32 on many GPUs, the products are of bfloat16 and
lose nothing there (`_by_digits`). Nothing else of the program leaves 32 bits: float64 is switched
on inside these functions alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qkjax.measures import gram, spectral

# Of `_by_digits`: three digits of 9 bits hold more than a float32 does, and sums of 256 products of
# two of them, at most 2^8 each, are integers up to 2^24, which float32 holds all.
_DIGITS = 3
_BASE = 512.0
_LARGEST_DIGIT = 256.0
_ROWS = 256
_LEAST_EXPONENT = -110  # below, the scale of a column would not be a float32


class Moments(NamedTuple):
    """Count, mean and scatter matrix of a set of vectors, per leading index."""

    count: jax.Array  # type: ignore[assignment]  # [...] int32 vectors seen; hides tuple.count
    mean: jax.Array  # [..., K] float64; 0 where there are none
    scatter: jax.Array  # [..., K, K] float64: sum of (k - mean) (k - mean)^T


def empty_moments(batch_shape: tuple[int, ...], dim: int) -> Moments:
    """The moments of no vectors: the start of a stream.

    Args:
        batch_shape: leading axes, for instance (layers, heads).
        dim: K, the length of the vectors.
    """
    with jax.enable_x64(True):
        return Moments(
            jnp.zeros(batch_shape, jnp.int32),
            jnp.zeros((*batch_shape, dim), jnp.float64),
            jnp.zeros((*batch_shape, dim, dim), jnp.float64),
        )


def moments(vectors: jax.Array, valid_B: jax.Array, by_digits: bool = False) -> Moments:
    """The moments of a batch of sequences.

    Args:
        vectors: [B, ..., n, K] float32.
        valid_B: bool; the sequences that are False are not counted and may hold NaN.
        by_digits: for devices whose float64 is slow: products of bfloat16, 1e-8 of the largest
            value of a column.
    Returns:
        Moments with leading axes [...].
    """
    num_rows = vectors.shape[-2]
    with jax.enable_x64(True):
        valid = valid_B.reshape(-1, *(1,) * (vectors.ndim - 1))
        means, scatter = _by_sequence(jnp.where(valid, vectors, 0), by_digits)
        # Between the sequences: each stands for n vectors at its mean.
        sequences = valid_B.sum(dtype=jnp.float64)
        mean = means.sum(axis=0) / jnp.maximum(sequences, 1)
        apart = jnp.where(valid[..., 0], means - mean, 0)
        between = jnp.einsum("b...a,b...c->...ac", apart, apart, precision="highest")
        count = jnp.broadcast_to(valid_B.sum(dtype=jnp.int32) * num_rows, mean.shape[:-1])
        return Moments(count.astype(jnp.int32), mean, scatter + num_rows * between)


def _by_sequence(vectors: jax.Array, by_digits: bool) -> tuple[jax.Array, jax.Array]:
    """Mean of every sequence [B, ..., K], scatter around these means summed over B [..., K, K].

    A CPU takes one head at a time, whose float64 copies stay in its cache.
    """
    batch, *leading, num_rows, dim = vectors.shape
    heads = vectors.reshape(batch, -1, num_rows, dim).swapaxes(0, 1)  # [heads, B, n, K]

    def of_head(rows_BnK: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows_BnK = rows_BnK.astype(jnp.float64)
        mean_BK = rows_BnK.sum(axis=-2) / num_rows
        residues = rows_BnK - mean_BK[..., None, :]
        # One product per sequence: contracting over b and n at once takes three times as long.
        products = jnp.einsum("bna,bnc->bac", residues, residues, precision="highest")
        return mean_BK, products.sum(axis=0)

    if by_digits:
        mean, scatter = _by_digits(heads)
    else:
        mean, scatter = jax.lax.platform_dependent(
            heads, cpu=lambda x: jax.lax.map(of_head, x), default=jax.vmap(of_head)
        )
    return mean.swapaxes(0, 1).reshape(batch, *leading, dim), scatter.reshape(*leading, dim, dim)


def _by_digits(rows_HBnK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean [H, B, K] of every sequence, scatter around these means summed over B [H, K, K].

    Float32 vectors less a float32 mean become integers of 26 bits and a power of two a column, and
    these integers three digits. Products of digits are exact in bfloat16 and their sums over 256
    rows in float32, in any order; float64 adds such sums alone.

    Source: Ozaki, Ogita, Oishi & Rump 2012; on tensor cores Mukunoki, Ozaki, Ogita & Imamura 2020.
    """
    num_rows, dim = rows_HBnK.shape[-2:]
    mean = rows_HBnK.mean(axis=-2, keepdims=True, dtype=jnp.float32)
    # One number wherever the compiler computes it again, as in `spectral.factor`.
    anchor = jax.lax.reduce_precision(mean, exponent_bits=8, mantissa_bits=12)
    residues = rows_HBnK - anchor
    exponent = jnp.frexp(jnp.abs(residues).max(axis=-2, keepdims=True))[1]
    exponent = jnp.maximum(exponent, _LEAST_EXPONENT)
    unit = jnp.ldexp(jnp.float32(1 / _LARGEST_DIGIT), exponent)
    rest = residues / unit  # at most 256; a power of two rounds nothing
    digits = []
    for _ in range(_DIGITS):
        digit = jnp.round(rest)
        digits.append(digit.astype(jnp.bfloat16))
        rest = (rest - digit) * jnp.float32(_BASE)
    padding = [(0, 0)] * (rows_HBnK.ndim - 2) + [(0, -num_rows % _ROWS), (0, 0)]
    stacked = jnp.pad(jnp.concatenate(digits, axis=-1), padding)
    chunks = stacked.reshape(*stacked.shape[:-2], -1, _ROWS, _DIGITS * dim)
    products = jnp.einsum("hbmni,hbmnj->hbmij", chunks, chunks, preferred_element_type=jnp.float32)
    products = products.astype(jnp.float64).sum(axis=2)
    sums = chunks.sum(axis=3, dtype=jnp.float32).astype(jnp.float64).sum(axis=2)

    worth = jnp.float64(_BASE) ** -jnp.arange(_DIGITS)
    unit = unit.astype(jnp.float64)
    offset = jnp.einsum("hbik,i->hbk", sums.reshape(*sums.shape[:-1], _DIGITS, dim), worth)
    offset = offset * unit[..., 0, :] / num_rows
    by_digit = products.reshape(*products.shape[:-2], _DIGITS, dim, _DIGITS, dim)
    around_anchor = jnp.einsum("hbiajc,i,j->hbac", by_digit, worth, worth)
    around_anchor = around_anchor * unit.mT * unit
    apart = num_rows * offset[..., :, None] * offset[..., None, :]
    return anchor[..., 0, :] + offset, (around_anchor - apart).sum(axis=1)


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of the union of two disjoint sets of vectors; exact where one is empty.

    Source: Chan, Golub & LeVeque 1983.
    """
    with jax.enable_x64(True):
        count_a, count_b = a.count.astype(jnp.float64), b.count.astype(jnp.float64)
        share_b = count_b / jnp.maximum(count_a + count_b, 1)
        difference = b.mean - a.mean
        outer = difference[..., :, None] * difference[..., None, :]
        between = (count_a * share_b)[..., None, None] * outer
        mean = a.mean + share_b[..., None] * difference
        return Moments(a.count + b.count, mean, a.scatter + b.scatter + between)


def to_factor(m: Moments) -> spectral.Factor:
    """The float32 factor of the same vectors, for the measures of `spectral`.

    Its R is sqrt(eigenvalue) x eigenvector, a row per direction, largest first: not triangular,
    and R^T R is the scatter matrix all the same.
    """
    with jax.enable_x64(True):
        anchor = m.mean.astype(jnp.float32)
        offset = (m.mean - anchor).astype(jnp.float32)
        return spectral.Factor(m.count, anchor, offset, gram.root(m.scatter))
