"""A model of transformers measured as a run's evaluation is, and written as one."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from qkjax import evaluation
from qkjax.measures import probes
from qkjax.observatory import capture, heads, spectra, streams

_LENGTHS = {"query": "query_post_rope", "key": "key_post_rope"}  # RoPE keeps lengths


def measure_model(
    model: Any,
    batches: Iterable[np.ndarray],
    *,
    skip_first: bool = False,
    name: str = "model",
    batch_done: Callable[[float], None] = lambda loss: None,
) -> evaluation.Evaluation:
    """Measures a decoder of transformers; no vector is kept, so any number of batches will do.

    Args:
        model: of transformers, in torch, on any device; afterwards it is as it was.
        batches: integers [B, T + 1] each: T tokens that the model sees, and those it predicts.
        skip_first: leave the first position of every sequence out of spectra and lengths: many
            models put a vector there that is like no other.
        name: what messages call it.
        batch_done: gets the mean loss so far, nats per token.
    Returns:
        What an evaluation of a run returns: metrics by the names of docs/metrics.md, arrays by
        those of docs/run_directory.md. What the model does not have is absent.
    Raises:
        UsageError: a model whose keys cannot be measured; see docs/models.md.
        ValueError: there is no batch.
    """
    with capture.Capture(model, name) as captured:
        return one_pass(captured, batches, skip_first=skip_first, batch_done=batch_done)


def one_pass(
    captured: capture.Capture,
    batches: Iterable[np.ndarray],
    *,
    skip_first: bool = False,
    batch_done: Callable[[float], None] = lambda loss: None,
) -> evaluation.Evaluation:
    """`measure_model` of a model that is captured; see there."""
    return _Pass(captured, skip_first).over(batches, batch_done)


class _Pass:
    """The streams of one pass, by layer."""

    def __init__(self, captured: capture.Capture, skip_first: bool) -> None:
        self.captured, self.skip_first = captured, skip_first
        layers = range(captured.num_layers)
        self.stages: dict[str, list[streams.VectorStream]] = {}
        self.lengths = {side: [streams.LengthStream() for _ in layers] for side in _LENGTHS}
        self.max_logit: list[Any] = [-np.inf for _ in layers]
        self.entropy: list[Any] = [0.0 for _ in layers]
        self.sink: list[Any] = [0.0 for _ in layers]

    def over(
        self, batches: Iterable[np.ndarray], batch_done: Callable[[float], None]
    ) -> evaluation.Evaluation:
        started = time.monotonic()
        sums: list[np.ndarray] = []
        seen, length = 0, 0
        for batch in batches:
            length = batch.shape[1] - 1
            looked = max(0, min(probes.ATTENTION_SEQUENCES - seen, len(batch)))
            sums.append(
                self.captured.losses(
                    batch, self.look, skip_first=self.skip_first, attention_sequences=looked
                )
            )
            seen += len(batch)
            batch_done(float(np.concatenate(sums).sum() / (seen * length)))
        if not seen:
            raise ValueError("batches: none, expected at least one")
        loss_sum = np.concatenate(sums).astype(np.float32)
        loss = float(loss_sum.sum(dtype=np.float64) / (seen * length))
        attention = self._attention(min(seen, probes.ATTENTION_SEQUENCES))
        parts = [self._vectors(), *self._weights(), attention]
        metrics: dict[str, float | np.floating | None] = {
            "val/loss": loss,
            "val/perplexity": float(np.exp(loss)),
        }
        arrays: dict[str, np.ndarray] = {}
        for part in parts:
            metrics |= {key: np.float32(value) for key, value in part.metrics.items()}
            arrays |= {key: value.astype(np.float32) for key, value in part.arrays.items()}
        metrics["sink/uniform"] = probes.uniform_sink(length)
        metrics["perf/eval_seconds"] = time.monotonic() - started
        count = np.full(seen, length, np.float32)
        return evaluation.Evaluation(metrics, arrays, {"loss_sum": loss_sum, "count": count})

    def look(self, layer: int, seen: capture.LayerVectors) -> None:
        """Takes one layer's vectors of a batch."""
        for stage, vectors in seen.stages.items():
            if stage not in self.stages:
                layers = range(self.captured.num_layers)
                self.stages[stage] = [streams.VectorStream() for _ in layers]
            self.stages[stage][layer].add(vectors)
        for side, stage in _LENGTHS.items():
            before = stage.replace("post", "pre")  # cos and sin may be scaled
            self.lengths[side][layer].add(seen.stages.get(before, seen.stages[stage]))
        self.max_logit[layer] = np.maximum(self.max_logit[layer], seen.max_logit)
        self.entropy[layer] = self.entropy[layer] + seen.entropy
        self.sink[layer] = self.sink[layer] + seen.sink

    def _vectors(self) -> spectra.Decomposed:
        stages = {
            stage: [stream.moments() for stream in layers] for stage, layers in self.stages.items()
        }
        found = spectra.of_stages(stages)
        lengths = spectra.of_lengths(
            {side: [one.norms() for one in layers] for side, layers in self.lengths.items()}
        )
        return spectra.Decomposed(found.metrics | lengths.metrics, found.arrays | lengths.arrays)

    def _attention(self, sequences: int) -> spectra.Decomposed:
        arrays = {
            "max_logit": np.stack(self.max_logit),
            "entropy": np.stack(self.entropy) / sequences,
            "sink_mass": np.stack(self.sink) / sequences,
        }
        metrics = {
            "attention/max_logit": float(arrays["max_logit"].max()),
            "attention/entropy": spectra.over_heads(arrays["entropy"]),
            "sink/mass": spectra.over_heads(arrays["sink_mass"]),
        }
        return spectra.Decomposed(metrics, arrays)

    def _weights(self) -> Iterator[spectra.Decomposed]:
        layers = range(self.captured.num_layers)
        gammas = {
            side: np.stack([self.captured.gammas[layer, side] for layer in layers])
            for side in _LENGTHS
            if all((layer, side) in self.captured.gammas for layer in layers)
        }
        yield spectra.of_gammas(gammas)
        assert self.captured.shape is not None
        found: dict[str, list[np.ndarray]] = {}
        for layer in layers:
            for side, slices in heads.kernels(self.captured.modules[layer], self.captured.shape):
                found.setdefault(side, []).append(slices)
        kernels = {side: np.stack(each) for side, each in found.items()}
        yield spectra.of_kernels(kernels, gammas)
