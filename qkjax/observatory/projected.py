"""Rank curves of a public model: the loss with its keys projected, as rank surgery has of a run."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qkjax import errors, files
from qkjax.measures import spectral
from qkjax.observatory import capture, streams
from qkjax.runs.directory import RunDirectory
from qkjax.trained import rank_curves, rank_surgery
from qkjax.trained.rank_curves import ALL, KINDS, Row

_SEED = 0  # of the random directions


def path_of(directory: RunDirectory, step: int) -> pathlib.Path:
    """Where the rows of a revision lie, as those of a run's checkpoint."""
    return directory.path / "rank_surgery" / f"step_{step:08d}.csv"


def write(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Writes the CSV of rank surgery.

    Raises:
        StorageError: the disk is full or fails.
    """
    files.replace(path, rank_curves.to_csv(rows))


def measure(
    captured: capture.Capture,
    batches: Sequence[np.ndarray],
    params_sha256: str,
    report: Callable[[str], None] = print,
) -> tuple[list[Row], str]:
    """The loss with every layer's keys projected to their strongest and to random directions.

    Before RoPE where the model has it; ranks are powers of two up to head_dim.

    Args:
        captured: the model; `batches` as of `measure_model`.
        report: gets a line for every row, and the answer.
    Returns:
        The rows, and words for a figure's title.
    Raises:
        UsageError: keys that are not finite.
    """
    keys: dict[str, list[streams.VectorStream]] = {}

    def look(layer: int, seen: capture.LayerVectors) -> None:
        stage = "pre_rope" if "key_pre_rope" in seen.stages else "post_rope"
        empty = [streams.VectorStream() for _ in range(captured.num_layers)]
        keys.setdefault(stage, empty)[layer].add(seen.stages[f"key_{stage}"])

    tokens = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)

    def loss(**options: Any) -> float:
        return float(sum(captured.losses(batch, **options).sum() for batch in batches) / tokens)

    full = loss(look=look)
    ((stage, found),) = keys.items()
    top = rank_surgery.top_directions(_factor([stream.moments() for stream in found]), False)
    if not np.isfinite(top).all():
        raise errors.UsageError(f"{captured.name}: its keys are not finite. Give another model.")
    directions = {"top": top, "random": rank_surgery.random_directions(top.shape, _SEED)}
    head_dim = top.shape[-1]
    ranks = [*(2**i for i in range(head_dim.bit_length()) if 2**i < head_dim), head_dim]
    no_shift = np.zeros(top.shape[:-1], np.float32)
    rows = []
    for kind in KINDS:
        for rank in ranks:
            matrix = rank_surgery.projection(directions[kind], rank, ALL)
            value = loss(change=capture.Change(stage, matrix, no_shift))
            seed = _SEED if kind == "random" else None
            row = Row(
                ALL, stage, "raw", kind, rank, seed, tokens, params_sha256, value, value - full
            )
            rows.append(row)
            report(f"all layers, {kind} {rank}: loss {value:.4f} ({row.delta:+.4f})")
    report(rank_curves.answer(rows, head_dim))
    return rows, f"{rank_surgery.STAGES[stage]}, {tokens:,} tokens, loss {full:.4f}"


def _factor(layers: Sequence[streams.Moments]) -> spectral.Factor:
    """On the host, float64, for `rank_surgery.top_directions`."""
    eigenvalues, axes = np.linalg.eigh(np.stack([layer.scatter for layer in layers]))
    mean: Any = np.stack([layer.mean for layer in layers])
    r: Any = np.sqrt(np.maximum(eigenvalues, 0))[..., None] * axes.swapaxes(-1, -2)
    count: Any = np.full(mean.shape[:-1], layers[0].number)
    return spectral.Factor(count, mean, np.zeros_like(mean), r)
