"""Oracles that several test files compare with: spectra in float64, straight from the formulae."""

import numpy as np

K = 64
NUM_BATCHES, BATCH_ROWS = 500, 96

SPECTRA = {  # singular values of planted vectors
    "isotropic": np.ones(K),
    "1/k": 1 / np.arange(1, K + 1),
    "1/k^2": 1 / np.arange(1, K + 1) ** 2,
    "collapsed": np.array([1.0] * 3 + [1e-3] * (K - 3)),
    "hard": np.array([1.0] + [1e-5] * (K - 1)),
}


def vectors(scales, mean_spreads, seed):
    """[batches, rows, K] float32 with principal axes in general position, mean in spreads."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((K, K)))[0]
    rows = rng.standard_normal((NUM_BATCHES * BATCH_ROWS, K)) * scales @ axes
    direction = rng.standard_normal(K)
    spread = np.sqrt((scales**2).sum())
    rows += mean_spreads * spread * direction / np.linalg.norm(direction)
    return rows.astype(np.float32).reshape(NUM_BATCHES, BATCH_ROWS, K)


def participation_ratio(sigma):
    """[...] of singular values [..., K]."""
    return sigma.sum(-1) ** 2 / (sigma**2).sum(-1)


def spectrum(rows, centred):
    """(participation ratio, singular values [K]) of vectors [..., K], in float64."""
    rows = rows.reshape(-1, rows.shape[-1]).astype(np.float64)
    sigma = np.linalg.svd(rows - rows.mean(axis=0) * centred, compute_uv=False)
    return participation_ratio(sigma), sigma


def measures(sigma):
    """Every measure of dimension, in float64; sigma positive and descending."""
    p, energy = sigma / sigma.sum(), sigma**2
    return {
        "pr": participation_ratio(sigma),
        "pr_cov": energy.sum() ** 2 / (energy**2).sum(),
        "erank": np.exp(-(p * np.log(p)).sum()),
        "srank": energy.sum() / energy[0],
        "r90": 1 + np.flatnonzero(np.cumsum(energy) >= 0.9 * energy.sum())[0],
    }
