"""One pass over the frozen validation split: the host's loop around the jitted eval step."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from qkjax import eval_step, sharding
from qkjax.config import Config


class Evaluation(NamedTuple):
    """What one pass measured."""

    metrics: dict[str, float]  # names of DESIGN.md section 4
    spectra: dict[str, np.ndarray]  # arrays of spectra/step_*.npz
    validation: dict[str, np.ndarray]  # arrays of validation/step_*.npz


class Evaluator:
    """Evaluates parameters on a fixed set of sequences; compiled once for all passes."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._mesh = mesh
        self._empty = lambda: eval_step.empty_factors(config)
        self._step = eval_step.make_eval_step(config, mesh)
        self._batch = config.eval.batch_sequences * mesh.size

    def __call__(
        self, params: Any, sequences: np.ndarray, interrupted: Callable[[], bool]
    ) -> Evaluation | None:
        """Measures all of `sequences` [S, T+1], in order, S at least 1.

        Args:
            interrupted: asked between batches; when True the pass is given up.
        Returns:
            None when it was given up.
        """
        begun = time.monotonic()
        # A short split is not padded to the full batch: that would only cost time.
        size = min(self._batch, sharding.round_up_to_devices(self._mesh, len(sequences)))
        factors = jax.device_put(self._empty(), sharding.replicated(self._mesh))
        sums = []
        for start in range(0, len(sequences), size):
            if interrupted():
                return None
            rows = sequences[start : start + size]
            padded = np.zeros((size, sequences.shape[1]), np.int32)
            padded[: len(rows)] = rows
            factors, loss_sum = self._step(
                params,
                factors,
                self._put(padded),
                self._put(np.arange(size) < len(rows)),
            )
            sums.append(loss_sum)
        spectra = jax.device_get(eval_step.decompose(factors))
        loss_sum = np.concatenate(jax.device_get(sums))[: len(sequences)]
        count = np.full(len(sequences), sequences.shape[1] - 1, np.float32)
        loss = float(loss_sum.sum(dtype=np.float64) / count.sum(dtype=np.float64))
        metrics = {
            "val/loss": loss,
            "val/perplexity": float(np.exp(loss)),
            **{name: float(value) for name, value in spectra.metrics.items()},
            "perf/eval_seconds": time.monotonic() - begun,
        }
        return Evaluation(metrics, spectra.arrays, {"loss_sum": loss_sum, "count": count})

    def _put(self, rows: np.ndarray) -> jax.Array:
        """Every process holds the whole split and hands over the rows of its own devices."""
        share = len(rows) // jax.process_count()
        start = jax.process_index() * share
        return sharding.put_batch(self._mesh, rows[start : start + share])
