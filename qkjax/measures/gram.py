"""Decompositions by float64 Gram matrices: what GPUs use instead of SVD and QR.

cuSOLVER decomposes matrices larger than 32 x 32 one after another, an evaluation of the 88M some
4,000 of them, but Jacobi's eigenvalues of symmetric matrices in one batch. Squares in float64 keep
what float32 vectors hold: 1e-8 of the largest singular value.
"""

import jax
import jax.numpy as jnp
from jax.lax.linalg import EighImplementation


def of(rows: jax.Array) -> jax.Array:
    """R^T R [..., K, K] in float64 of float32 rows [..., n, K]."""
    with jax.enable_x64(True):
        wide = rows.astype(jnp.float64)
        return jnp.einsum("...na,...nb->...ab", wide, wide, precision=jax.lax.Precision.HIGHEST)


def decompose(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Singular values and right singular vectors of any R with R^T R = `gram`.

    Args:
        gram: [..., K, K] float64, symmetric and positive semidefinite up to rounding.
    Returns:
        sigma [..., K] float64, descending; vectors [..., K, K] float64, one per row. NaN where gram
        is not finite.
    """
    with jax.enable_x64(True):
        eigenvalues, axes = jax.lax.platform_dependent(
            gram,
            cuda=lambda g: _eigh(g, EighImplementation.JACOBI),
            default=lambda g: _eigh(g, None),
        )
        sigma = jnp.sqrt(jnp.maximum(eigenvalues, 0))[..., ::-1]
        return sigma, axes.swapaxes(-1, -2)[..., ::-1, :]


def _eigh(
    gram: jax.Array, implementation: EighImplementation | None
) -> tuple[jax.Array, jax.Array]:
    vectors, values = jax.lax.linalg.eigh(gram, implementation=implementation)
    finite = jnp.isfinite(gram).all(axis=(-2, -1))[..., None]
    return jnp.where(finite, values, jnp.nan), jnp.where(finite[..., None], vectors, jnp.nan)


def root(gram: jax.Array) -> jax.Array:
    """R [..., K, K] float32 with R^T R = `gram`: one sigma x vector per row, largest first."""
    with jax.enable_x64(True):
        sigma, vectors = decompose(gram)
        return (sigma[..., None] * vectors).astype(jnp.float32)
