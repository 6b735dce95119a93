"""One pass over the frozen validation split: the host's loop around the jitted eval step."""

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from qkjax import eval_step, model, sharding
from qkjax.config import Config
from qkjax.data import pipeline


class Evaluation(NamedTuple):
    """What one pass measured."""

    metrics: dict[str, float | np.floating | None]  # names of DESIGN.md section 4
    spectra: dict[str, np.ndarray]  # arrays of spectra/step_*.npz
    validation: dict[str, np.ndarray]  # arrays of validation/step_*.npz


class Evaluator:
    """Evaluates parameters on batches of one size; compiled once for all passes."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._config = config
        self._mesh = mesh
        self._jitted: dict[str, Any] = {
            "step": eval_step.make_eval_step(config, mesh),
            "decompose": jax.jit(eval_step.decompose),
            "loss": eval_step.make_loss_step(config, mesh),
        }
        self._compiled: dict[tuple[str, int], Any] = {}  # by name and rows of a batch
        self._probe_fraction: float | None = None

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
        statistics = eval_step.empty_statistics(self._config, self._mesh)
        clock = _Clock(self._probe_fraction is None)
        sums, masks, length = [], [], self._config.model.sequence_length
        for batch in batches:
            if interrupted():
                return None
            valid = sharding.put_batch(self._mesh, batch.mask)
            tokens = sharding.put_batch(self._mesh, batch.tokens)
            step = self._program("step", len(valid), params, statistics, tokens, valid)
            statistics, loss_sum = clock.time(step, params, statistics, tokens, valid)
            sums.append(loss_sum)
            masks.append(valid)
        # Every device has the same: one of them is enough, and several would deadlock in LAPACK.
        one_device = jax.tree.map(lambda leaf: leaf.addressable_data(0), (statistics, params))
        decompose = self._program("decompose", 0, *one_device)
        decomposed = clock.time(decompose, *one_device)
        spectra, sums, masks = jax.device_get((decomposed, sums, masks))
        if clock.wanted and not interrupted():
            alone = self._program("loss", len(valid), params, tokens, valid)
            self._probe_fraction = clock.probe_fraction(alone, len(sums), params, tokens, valid)
        loss_sum = np.concatenate(sums)[np.concatenate(masks)]
        count = np.full(len(loss_sum), length, np.float32)
        loss = float(loss_sum.sum(dtype=np.float64) / count.sum(dtype=np.float64))
        metrics: dict[str, float | np.floating | None] = {
            "val/loss": loss,
            "val/perplexity": float(np.exp(loss)),
            **{name: np.float32(value) for name, value in spectra.metrics.items()},
            "perf/eval_seconds": time.monotonic() - begun,
            "perf/eval_probe_fraction": self._probe_fraction,
        }
        return Evaluation(metrics, spectra.arrays, {"loss_sum": loss_sum, "count": count})

    def _program(self, name: str, rows: int, *arguments: Any) -> Any:
        """The program compiled for batches of so many rows, apart from its first use."""
        if (name, rows) not in self._compiled:
            self._compiled[name, rows] = self._compile(self._jitted[name], arguments)
        return self._compiled[name, rows]

    def _compile(self, jitted: Any, arguments: tuple[Any, ...]) -> Any:
        return jitted.lower(*arguments).compile()


class _Clock:
    """Adds up the seconds of an evaluation's programs; waits for each of them, where wanted."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self._seconds = 0.0

    def time(self, program: Callable[..., Any], *arguments: Any) -> Any:
        """The program's result."""
        if not self.wanted:
            return program(*arguments)
        begun = time.monotonic()
        result = jax.block_until_ready(program(*arguments))
        self._seconds += time.monotonic() - begun
        return result

    def probe_fraction(
        self, loss_step: Callable[..., Any], num_batches: int, *arguments: Any
    ) -> float:
        """Share of the seconds so far that the loss alone would not have taken.

        The loss alone is measured on one batch, the second time it runs.
        """
        jax.block_until_ready(loss_step(*arguments))
        begun = time.monotonic()
        jax.block_until_ready(loss_step(*arguments))
        return 1 - num_batches * (time.monotonic() - begun) / self._seconds
