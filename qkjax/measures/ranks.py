"""How many directions a spectrum uses: one formula each, for arrays of jax and of numpy.

An evaluation computes them in float32 under jit, a figure in float64 from the singular values that
a run saved. Every function takes [..., S] singular values, any order, non-negative, and returns
[...] of their dtype in [1, S]; NaN where every singular value is 0 or one is not finite.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    import jax

Array = TypeVar("Array", np.ndarray, "jax.Array")

_HOLDS = 0.9  # the share of r90
_TIE = 1e-6  # float32 sums: 9 of 10 equal directions do hold 90%


def participation_ratio(sigma_S: Array) -> Array:
    """Effective number of directions in use: (sum s)^2 / sum s^2.

    Source: the QK-Norm study's PR (`pr`); for the covariance form see `participation_ratio_cov`.
    """
    s = _over_largest(sigma_S)
    return s.sum(axis=-1) ** 2 / (s**2).sum(axis=-1)


def participation_ratio_cov(sigma_S: Array) -> Array:
    """Participation ratio of the covariance's eigenvalues: (sum s^2)^2 / sum s^4.

    Source: the usual PR of the literature (Gao et al. 2017), `pr_cov`.
    """
    return participation_ratio(_over_largest(sigma_S) ** 2)


def effective_rank(sigma_S: Array) -> Array:
    """Exponential of the entropy of the normalised singular values.

    Source: Roy & Vetterli 2007; RankMe (Garrido et al. 2023), `erank`.
    """
    s, xp = _over_largest(sigma_S), _namespace(sigma_S)
    p = s / s.sum(axis=-1, keepdims=True)
    return xp.exp(xp.where(p == 0, 0, -(p * xp.log(xp.where(p == 0, 1, p)))).sum(axis=-1))


def stable_rank(sigma_S: Array) -> Array:
    """Squared Frobenius norm over squared spectral norm: sum s^2 / max s^2.

    Source: Rudelson & Vershynin 2007, `srank`.
    """
    return (_over_largest(sigma_S) ** 2).sum(axis=-1)


def r90(sigma_S: Array) -> Array:
    """Fewest directions that hold 90% of sum s^2, whole; a tie within 1e-6 counts as held."""
    s, xp = _over_largest(sigma_S), _namespace(sigma_S)
    held = xp.cumsum(xp.flip(xp.sort(s**2, axis=-1), axis=-1), axis=-1)
    total = held[..., -1:]
    short = (held < (_HOLDS - _TIE) * total).sum(axis=-1).astype(s.dtype)
    return xp.where(xp.isfinite(total[..., 0]), short + 1, xp.nan)


def mean_share(raw_S: Array, centred_S: Array) -> Array:
    """Share of the energy that is the mean vector's: 1 - sum centred^2 / sum raw^2, 0 to 1.

    Args:
        raw_S, centred_S: singular values [..., S] of vectors, and of the vectors minus their mean.
    """
    largest = raw_S.max(axis=-1, keepdims=True)
    return 1 - ((centred_S / largest) ** 2).sum(axis=-1) / ((raw_S / largest) ** 2).sum(axis=-1)


class ParticipationRatios(NamedTuple):
    """The PR of one set of vectors, 1 .. d; NaN where nothing is left of them."""

    raw: float  # of the vectors as they are: `pr/key/pre_rope/raw` of a run, before RoPE
    centred: float  # of the vectors minus their mean


def participation_ratio_of(vectors: np.typing.ArrayLike) -> ParticipationRatios:
    """The participation ratio of your own vectors, for instance the keys of a head.

    Args:
        vectors: [n, d], one vector per row, an array of numpy, jax or torch (on the CPU).
    Returns:
        (sum s)^2 / sum s^2 of their singular values s, computed in float64 throughout; raw, and
        with the mean vector removed.
    Raises:
        ValueError: not a matrix of finite real numbers with a row and a column.
    """
    rows = np.asarray(vectors)
    if rows.dtype.kind == "V" or rows.dtype.kind in "fiub":  # bfloat16 is numpy's "V" by ml_dtypes
        rows = rows.astype(np.float64)
    if rows.dtype != np.float64 or rows.ndim != 2 or not rows.size or not np.isfinite(rows).all():
        raise ValueError(
            f"vectors: expected finite real numbers [n, d], found {rows.dtype} of shape "
            f"{rows.shape}. Give one vector per row, and no inf or NaN."
        )
    with np.errstate(invalid="ignore"):  # nothing is left: 0 / 0
        raw, centred = (
            float(participation_ratio(np.linalg.svd(x, compute_uv=False)))
            for x in (rows, rows - rows.mean(axis=0))
        )
    return ParticipationRatios(raw, centred)


MEASURES: dict[str, Callable[[Any], Any]] = {
    "pr": participation_ratio,
    "pr_cov": participation_ratio_cov,
    "erank": effective_rank,
    "srank": stable_rank,
    "r90": r90,
}


def _over_largest(sigma_S: Array) -> Array:
    """Singular values divided by the largest, so that no square under- or overflows; 0/0 is NaN."""
    return sigma_S / sigma_S.max(axis=-1, keepdims=True)


def _namespace(array: Array) -> Any:
    """numpy or jax.numpy, by the array (the Python array API standard)."""
    return array.__array_namespace__()
