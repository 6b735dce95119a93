"""What the streams of a whole model decompose into: the metrics and arrays of a run's evaluation.

`evaluation.decompose` does the same of a run, in float32 under jit; this is float64 on the host,
for models that lack some stages. A test measures an exported run both ways.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qkjax.measures import probes, ranks
from qkjax.observatory.streams import Moments

_ISOTROPIC_ABOVE = 0.95  # as `spectral.axis_alignment`
_LEADING = 8  # as `spectral.subspace_overlap`
_SIDES = ("query", "key")
Metrics = dict[str, float]
Arrays = dict[str, np.ndarray]


class Decomposed(NamedTuple):
    """Metrics by the names of docs/metrics.md, arrays by those of docs/run_directory.md."""

    metrics: Metrics
    arrays: Arrays


class _Spectrum(NamedTuple):
    """The spectra of one set of heads, float64; R^T R is the scatter, centred and raw."""

    factors: dict[str, np.ndarray]  # "centred", "raw" -> [..., K, K]
    sigma: dict[str, np.ndarray]  # likewise [..., K], descending


def of_stages(stages: Mapping[str, Sequence[Moments]]) -> Decomposed:
    """Spectra of every stage, and what keys and queries show together.

    Args:
        stages: name -> the moments of every layer, such as "key_pre_rope".
    """
    metrics: Metrics = {}
    arrays: Arrays = {}
    spectra: dict[str, _Spectrum] = {}
    for stage, layers in stages.items():
        mean = np.stack([layer.mean for layer in layers])
        scatter = np.stack([layer.scatter for layer in layers])
        spectra[stage] = found = _spectrum(scatter, layers[0].number, mean)
        where = stage.replace("_", "/", 1)
        for centring, sigma in found.sigma.items():
            arrays[f"{stage}_{centring}"] = sigma
            for name, measure in ranks.MEASURES.items():
                metrics[f"{name}/{where}/{centring}"] = over_heads(measure(sigma))
        arrays[f"{stage}_mean"] = mean
        share = ranks.mean_share(found.sigma["raw"], found.sigma["centred"])
        metrics[f"mean_share/{where}"] = over_heads(share)
    pr = ranks.participation_ratio(arrays["key_post_rope_raw"])
    metrics["pr/undefined_heads"] = float(np.isnan(pr).sum())
    # Without RoPE the keys that enter the attention are those "before" it.
    keys = "key_pre_rope" if "key_pre_rope" in stages else "key_post_rope"
    scatter = np.stack([layer.scatter for layer in stages[keys]])
    arrays["aa_ratio"], arrays["aa"] = _axis_alignment(scatter)
    arrays["overlap"] = _overlap(spectra[keys].factors["centred"])
    with np.errstate(invalid="ignore"):
        metrics["aa/key"] = _nanmean(arrays["aa"])
        metrics["overlap/key"] = _nanmean(arrays["overlap"])
    arrays["num_tokens"] = np.array(stages[keys][0].number)
    if "key_pre_rope" in stages:
        for centring in ("raw", "centred"):
            sigma = _product(*(spectra[f"{s}_pre_rope"].factors[centring] for s in _SIDES))
            arrays[f"qk_pre_rope_{centring}"] = sigma
            metrics[f"pr/qk/pre_rope/{centring}"] = over_heads(ranks.participation_ratio(sigma))
    return Decomposed(metrics, arrays)


def of_lengths(norms: Mapping[str, Sequence[probes.Norms]]) -> Decomposed:
    """Lengths of queries and keys. Args: by "query" and "key", of every layer."""
    metrics: Metrics = {}
    arrays: Arrays = {}
    for name, layers in norms.items():
        mean = np.stack([layer.mean for layer in layers])
        arrays[f"{name}_norm_mean"] = mean
        arrays[f"{name}_norm_p99"] = np.stack([probes.norm_quantile(layer) for layer in layers])
        arrays[f"{name}_norm_max"] = np.stack([layer.largest for layer in layers])
        metrics[f"norm/{name}"] = over_heads(mean)
        metrics[f"norm/{name}_largest_layer"] = float(mean.mean(axis=1).max())
    return Decomposed(metrics, arrays)


def of_gammas(gammas: Mapping[str, np.ndarray]) -> Decomposed:
    """The gammas of QK-Norm. Args: by "query" and "key", [N, K], or [N, heads K]."""
    metrics: Metrics = {}
    arrays: Arrays = {}
    for name, gamma in gammas.items():
        arrays[f"gamma_{name[0]}"] = gamma
        size = np.abs(gamma.astype(np.float64))
        low, high = np.quantile(size, [0.1, 0.9], axis=-1)
        spread = np.divide(high, low, out=np.full_like(high, np.nan), where=low > 0)
        metrics[f"gamma/{name}_pr"] = float(ranks.participation_ratio(size).mean())
        metrics[f"gamma/{name}_spread"] = float(np.nanmedian(spread))
        metrics[f"gamma/{name}_negative"] = float((gamma < 0).mean())
    return Decomposed(metrics, arrays)


def of_kernels(kernels: Mapping[str, np.ndarray], gammas: Mapping[str, np.ndarray]) -> Decomposed:
    """Spectra of every head's slice of the kernels, and of W_q^T W_k with the gammas folded in.

    Args:
        kernels: side -> [N, heads, D, K] float64.
        gammas: as in `of_gammas`.
    """
    metrics: Metrics = {}
    arrays: Arrays = {}
    for side, slices in kernels.items():
        arrays[f"weight_{side}"] = sigma = np.linalg.svd(slices, compute_uv=False)
        metrics[f"weight/pr/{side}"] = over_heads(ranks.participation_ratio(sigma))
    if {"query", "key"} <= kernels.keys():
        folded = []
        for side in _SIDES:
            triangle: np.ndarray = np.linalg.qr(kernels[side], mode="r")  # type: ignore[assignment]
            if side in gammas:
                head_dim = triangle.shape[-1]
                gamma = gammas[side].astype(np.float64).reshape(len(triangle), -1, 1, head_dim)
                triangle = triangle * gamma
            folded.append(triangle)
        # With kernels Q R, W_q^T W_k is Q_q R_q R_k^T Q_k^T.
        arrays["wqk_singular_values"] = sigma = _product(*folded)
        metrics["wqk/pr"] = over_heads(ranks.participation_ratio(sigma))
    return Decomposed(metrics, arrays)


def over_heads(values_NH: np.ndarray) -> float:
    """The mean over heads, then over layers."""
    return float(np.asarray(values_NH, np.float64).mean(axis=1).mean())


def _nanmean(values: np.ndarray) -> float:
    found = values[np.isfinite(values)]
    return float(found.mean()) if found.size else float("nan")


def _spectrum(scatter: np.ndarray, number: int, mean: np.ndarray) -> _Spectrum:
    factors, sigma = {}, {}
    of_mean = number * mean[..., :, None] * mean[..., None, :]
    for centring, matrix in (("raw", scatter + of_mean), ("centred", scatter)):
        eigenvalues, axes = np.linalg.eigh(matrix)
        roots = np.sqrt(np.maximum(eigenvalues, 0))[..., ::-1]
        sigma[centring] = roots
        factors[centring] = roots[..., :, None] * axes.swapaxes(-1, -2)[..., ::-1, :]
    return _Spectrum(factors, sigma)


def _product(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Singular values of A B^T, a query head with its kv head."""
    sharing = query.shape[1] // key.shape[1]
    key = np.repeat(key, sharing, axis=1)
    return np.linalg.svd(query @ key.swapaxes(-1, -2), compute_uv=False)


def _axis_alignment(scatter: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """r and aa of `spectral.axis_alignment`."""
    dim = scatter.shape[-1]
    eigenvalues = np.maximum(np.linalg.eigvalsh(scatter), 0)
    diagonal = np.diagonal(scatter, axis1=-2, axis2=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        of_eigenvalues = ranks.participation_ratio(eigenvalues)
        r = of_eigenvalues / ranks.participation_ratio(diagonal)
        r0 = (of_eigenvalues + 2) / (dim + 2)
        return r, np.where(r0 > _ISOTROPIC_ABOVE, np.nan, (r - r0) / (1 - r0))


def _overlap(factors: np.ndarray) -> np.ndarray:
    """`spectral.subspace_overlap`, of rows sigma_i v_i^T."""
    lengths = np.linalg.norm(factors, axis=-1, keepdims=True)
    leading = np.divide(factors, lengths, out=np.zeros_like(factors), where=lengths > 0)
    leading = leading[..., :_LEADING, :]
    products = np.einsum("...iak,...jbk->...ijab", leading, leading)
    overlap = (products**2).sum(axis=(-2, -1)) / leading.shape[-2]
    varies = lengths[..., 0, 0] > 0
    others = varies[..., :, None] & varies[..., None, :] & ~np.eye(varies.shape[-1], dtype=bool)
    with np.errstate(invalid="ignore"):
        return np.where(others, overlap, 0).sum(axis=-1) / others.sum(axis=-1)
