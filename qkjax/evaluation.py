"""One pass over the frozen validation split: the host's loop around the jitted eval step."""

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from qkjax import eval_step, model, sharding
from qkjax.config import Config
from qkjax.data import pipeline


class Evaluation(NamedTuple):
    """What one pass measured."""

    metrics: dict[str, float | np.floating]  # names of DESIGN.md section 4
    spectra: dict[str, np.ndarray]  # arrays of spectra/step_*.npz
    validation: dict[str, np.ndarray]  # arrays of validation/step_*.npz


class Evaluator:
    """Evaluates parameters on batches of one size; compiled once for all passes."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._config = config
        self._mesh = mesh
        self._step = eval_step.make_eval_step(config, mesh)

    def sequences_per_batch(self, num_sequences: int) -> int:
        """Rows of a batch for a pass over so many: few sequences are not padded to a full one."""
        most = self._config.eval.batch_sequences * self._mesh.size
        return min(most, sharding.round_up_to_devices(self._mesh, num_sequences))

    def __call__(
        self,
        params: model.Params,
        batches: Iterable[pipeline.ValidationBatch],
        interrupted: Callable[[], bool],
    ) -> Evaluation | None:
        """Measures the valid rows of `batches`, this process's share of each, in their order.

        Args:
            interrupted: asked between batches; when True the pass is given up.
        Returns:
            None when it was given up.
        """
        begun = time.monotonic()
        factor = jax.device_put(
            eval_step.empty_factor(self._config), sharding.replicated(self._mesh)
        )
        sums, masks, length = [], [], self._config.model.sequence_length
        for batch in batches:
            if interrupted():
                return None
            valid = sharding.put_batch(self._mesh, batch.mask)
            tokens = sharding.put_batch(self._mesh, batch.tokens)
            factor, loss_sum = self._step(params, factor, tokens, valid)
            sums.append(loss_sum)
            masks.append(valid)
        spectra, sums, masks = jax.device_get((eval_step.decompose(factor), sums, masks))
        loss_sum = np.concatenate(sums)[np.concatenate(masks)]
        count = np.full(len(loss_sum), length, np.float32)
        loss = float(loss_sum.sum(dtype=np.float64) / count.sum(dtype=np.float64))
        metrics: dict[str, float | np.floating] = {
            "val/loss": loss,
            "val/perplexity": float(np.exp(loss)),
            **{name: np.float32(value) for name, value in spectra.metrics.items()},
            "perf/eval_seconds": time.monotonic() - begun,
        }
        return Evaluation(metrics, spectra.arrays, {"loss_sum": loss_sum, "count": count})
