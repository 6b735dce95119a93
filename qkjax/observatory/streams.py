"""Float64 sums over vectors that pass by: what spectra and lengths need, and no vector is kept.

As `measures.moments`, but on the host: models of torch hand out numpy arrays. The products are
summed around an anchor near the mean, the mean of the first batch, so that the spectrum of vectors
far from the origin keeps its digits.
"""

from typing import NamedTuple

import numpy as np

from qkjax.measures import probes


class Moments(NamedTuple):
    """Count, mean and scatter matrix of the vectors of some heads."""

    number: int
    mean: np.ndarray  # [heads, K] float64
    scatter: np.ndarray  # [heads, K, K] float64: sum of (x - mean) (x - mean)^T


class VectorStream:
    """The moments of vectors, batch by batch."""

    def __init__(self) -> None:
        self._number = 0
        self._anchor = np.zeros(0)
        self._sum = np.zeros(0)
        self._products = np.zeros(0)

    def add(self, vectors: np.ndarray) -> None:
        """Args: [heads, n, K] floats, n at least 1; heads and K as in the first batch."""
        x = vectors.astype(np.float64)
        if not self._number:
            self._anchor = x.mean(axis=1)
            self._sum = np.zeros_like(self._anchor)
            self._products = np.zeros((*self._anchor.shape, x.shape[-1]))
        x -= self._anchor[:, None]
        self._number += x.shape[1]
        self._sum += x.sum(axis=1)
        self._products += x.swapaxes(1, 2) @ x

    def moments(self) -> Moments:
        """Of all vectors so far; at least one batch."""
        offset = self._sum / self._number
        between = self._number * offset[:, :, None] * offset[:, None, :]
        return Moments(self._number, self._anchor + offset, self._products - between)


class LengthStream:
    """Mean, 99th percentile and largest of the lengths of vectors, as a run's evaluation has them.

    The percentile comes from the bins of `measures.probes`, each at most 0.8% wide.
    """

    def __init__(self) -> None:
        self._number = 0
        self._sum = np.zeros(0)
        self._largest = np.zeros(0, np.float32)
        self._histogram = np.zeros(0, np.int64)

    def add(self, vectors: np.ndarray) -> None:
        """Args: [heads, n, K] floats, n at least 1; heads as in the first batch."""
        lengths = np.sqrt(np.square(vectors, dtype=np.float64).sum(axis=-1))
        heads = len(lengths)
        if not self._number:
            self._sum, self._largest = np.zeros(heads), np.zeros(heads, np.float32)
            self._histogram = np.zeros((heads, probes.NUM_BINS), np.int64)
        self._number += lengths.shape[1]
        self._sum += lengths.sum(axis=1)
        single = lengths.astype(np.float32)
        self._largest = np.maximum(self._largest, single.max(axis=1))
        bins = (single.view(np.int32) >> probes.DROPPED_BITS) - probes.FIRST_BIN
        for head, found in enumerate(np.clip(bins, 0, probes.NUM_BINS - 1)):
            self._histogram[head] += np.bincount(found, minlength=probes.NUM_BINS)

    def norms(self) -> probes.Norms:
        """Of all vectors so far; at least one batch."""
        heads = len(self._sum)
        return probes.Norms(
            np.full(heads, self._number, np.int32),  # type: ignore[arg-type]
            (self._sum / self._number).astype(np.float32),  # type: ignore[arg-type]
            self._largest,  # type: ignore[arg-type]
            self._histogram.astype(np.int32),  # type: ignore[arg-type]
        )
