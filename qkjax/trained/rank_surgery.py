"""Rank surgery: how many dimensions of its keys does a trained model use?

At evaluation the keys that enter the attention are projected to a few directions of their head:
to the top ones (right singular vectors of the keys) or to random ones, as they are or, centred,
around their mean, which stays. The loss that this costs, against the number of directions kept, is
the measure. Nothing is trained.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qkjax import errors, files, losses, model, sharding
from qkjax.config import FUSED_ATTENTION, Config
from qkjax.data import dataset as dataset_lib
from qkjax.data import pipeline
from qkjax.measures import spectral
from qkjax.runs import attention_check
from qkjax.trained import rank_curves, trained_run
from qkjax.trained.rank_curves import ALL, KINDS, Row

STAGES = {"pre_rope": "pre-RoPE", "post_rope": "post-RoPE"}
CENTRINGS = ("raw", "centred")


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure; None stands for the default."""

    step: int | None = None  # of the checkpoint; the latest
    ranks: tuple[int, ...] | None = None  # directions kept; powers of two and head_dim
    stage: str = "pre_rope"  # of the keys that are projected
    centring: str = "raw"  # or "centred": what varies around the mean key is projected
    layers: tuple[str, ...] = (ALL, "each")  # "all" together, "each" alone, or indices
    kinds: tuple[str, ...] = KINDS  # of directions
    tokens: int | None = None  # of the validation split, 0 = all; the run's eval.tokens
    seed: int = 0  # of the random directions
    data_dir: str | None = None  # where the dataset lies now; where the run found it
    out: pathlib.Path | None = None  # the CSV; rank_surgery/step_* in the run directory


class Measured(NamedTuple):
    """What a measurement found, and what it is of."""

    rows: list[Row]
    path: pathlib.Path  # of the CSV
    head_dim: int
    title: str  # for a figure


def measure(
    workdir: pathlib.Path, request: Request, report: Callable[[str], None] = print
) -> Measured:
    """Measures a checkpoint of a run; the same call resumes one that was stopped.

    Rows gather in NAME.part.json. NAME.csv is there only when it has all of them, and is never
    replaced: it may have taken hours, with other settings.

    Args:
        workdir: the run directory; nothing else in it is written.
        report: gets one line for every row, with the time left, and the answer.
    Raises:
        UsageError: no run, no such checkpoint or a damaged one, no dataset or another one, a
            wrong request, a CSV that is there, or a part with other settings.
        StorageError: the disk failed.
    """
    run = trained_run.open_run(
        workdir, step=request.step, data_dir=request.data_dir, finished=False
    )
    config, step = _here(run.config), run.step
    ranks, layers, tokens = _check(request, config)
    path = request.out or workdir / "rank_surgery" / f"{_name(request, step)}.csv"
    if path.exists():
        raise errors.UsageError(
            f"{path}: already exists, and no measurement is overwritten. Move it away."
        )
    settings = [(layer, kind, rank) for layer in layers for kind in request.kinds for rank in ranks]
    passes = _Passes(config, run.dataset, run.params, tokens, request.stage)
    part = _Part(
        path,
        {
            **run.identity,
            "stage": request.stage,
            "centring": request.centring,
            "tokens": passes.num_tokens,
            "seed": request.seed,
            "settings": settings,
        },
    )
    done = len(part.rows)
    progress = _Progress(
        report, config.log.every_seconds, 1 + len(settings) - done, passes.num_batches
    )
    full_loss, factor = passes.look(progress.batch_done)
    if not np.isfinite(factor.r).all():
        raise errors.UsageError(
            f"{workdir}: the keys of step {step} are not finite. Give an earlier --step."
        )
    centred = request.centring == "centred"
    top = top_directions(factor, centred)
    directions = {"top": top, "random": random_directions(top.shape, request.seed)}
    mean_NGK = np.asarray(factor.mean, np.float64) if centred else np.zeros(top.shape[:-1])
    about = f"step {step}, {passes.num_tokens:,} validation tokens, val/loss {full_loss:.4f}"
    report(about)
    if done:
        report(f"{part.path}: resumes after {done} of {len(settings)} rows")

    for layer, kind, rank in settings[done:]:
        projected_NGKK = projection(directions[kind], rank, layer)
        loss = passes.loss(projected_NGKK, kept_mean(mean_NGK, projected_NGKK), progress.batch_done)
        seed = request.seed if kind == "random" else None
        what = (layer, request.stage, request.centring, kind, rank, seed, passes.num_tokens)
        row = Row(*what, run.params_sha256, loss, loss - full_loss)
        part.add(row)
        progress.row_done(row)
    part.finish()
    report(str(path))
    report(rank_curves.answer(part.rows, config.model.head_dim))
    keys = "Centred keys" if centred else "Keys"
    title = f"{keys} projected {STAGES[request.stage]}: {config.arm}, {about}"
    return Measured(part.rows, path, config.model.head_dim, title)


def _name(request: Request, step: int) -> str:
    stage = "" if request.stage == "pre_rope" else f"_{request.stage}"
    return f"step_{step:08d}{stage}" + ("" if request.centring == "raw" else "_centred")


class _Part:
    """The rows of a measurement that is under way, kept beside its CSV until that is whole."""

    def __init__(self, csv_path: pathlib.Path, identity: Mapping[str, Any]) -> None:
        """Resumes from what an earlier call with the same settings has left.

        Raises:
            UsageError: what lies there has other settings, or is damaged.
        """
        self._csv = csv_path
        self._identity = files.plain(identity)  # tuples as a file gives them back
        self.path = csv_path.with_suffix(".part.json")
        self.rows: list[Row] = []
        fix = "Move it away; its rows are measured again."
        found = files.read_object(self.path, fix)
        if found is None:
            return
        files.need(self.path, "", found, {"identity": dict, "rows": list}, fix)
        theirs = found["identity"]
        changed = [name for name in self._identity if theirs.get(name) != self._identity[name]]
        if changed:
            raise errors.UsageError(
                f"{self.path}: part of a measurement with other {', '.join(changed)}. "
                "Give those settings again, or move it away."
            )
        for number, row in enumerate(found["rows"]):
            files.need(self.path, f"rows[{number}]", row, Row._fields, fix)
            self.rows.append(Row(**row))

    def add(self, row: Row) -> None:
        """Appends one row and writes all."""
        self.rows.append(row)
        rows = [each._asdict() for each in self.rows]
        files.write_sealed(self.path, {"identity": self._identity, "rows": rows})

    def finish(self) -> None:
        """Makes the CSV of the rows; the part goes."""
        files.replace(self._csv, rank_curves.to_csv(self.rows))
        self.path.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------
# Directions and projections, on the host in float64.


def top_directions(factor: spectral.Factor, centred: bool) -> np.ndarray:
    """Right singular vectors of a factor's vectors, strongest first.

    Args:
        factor: with leading axes [N, G], on the host.
        centred: True: of the vectors minus their mean; False: as they are.
    Returns:
        [N, G, K, K] float64; column r is direction r, columns are orthonormal.
    """
    r, mean = np.asarray(factor.r, np.float64), np.asarray(factor.mean, np.float64)
    root = np.sqrt(np.asarray(factor.count, np.float64))
    of_mean = (0.0 if centred else root[..., None]) * mean
    rows = np.concatenate([r, of_mean[..., None, :]], axis=-2)
    return np.linalg.svd(rows, full_matrices=True)[2].swapaxes(-1, -2)


def random_directions(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Orthonormalised Gaussian vectors, [..., K, K] float64; every column is a direction.

    The r directions of a rank are the first r columns: those of a smaller rank are among them.
    """
    return np.linalg.qr(np.random.default_rng(seed).standard_normal(shape))[0]


def projection(directions_NGKK: np.ndarray, rank: int, layer: str) -> np.ndarray:
    """The projectors on the first directions of each head, [N, G, K, K] float32.

    Args:
        directions_NGKK: orthonormal columns.
        rank: how many directions are kept.
        layer: "all", or the index of the only layer that is projected; others get the identity.
    """
    kept = directions_NGKK[..., :rank]
    projectors = kept @ kept.swapaxes(-1, -2)
    if layer != ALL:
        only = projectors[int(layer)]
        projectors = np.broadcast_to(np.eye(kept.shape[-2]), projectors.shape).copy()
        projectors[int(layer)] = only
    return projectors.astype(np.float32)


def kept_mean(mean_NGK: np.ndarray, projection_NGKK: np.ndarray) -> np.ndarray:
    """[N, G, K] float32 that keeps the mean m where k becomes k P + b: b = m - m P."""
    projected = np.einsum("ngk,ngkj->ngj", mean_NGK, projection_NGKK.astype(np.float64))
    return (mean_NGK - projected).astype(np.float32)


# --------------------------------------------------------------------------------------------
# Passes over the validation tokens.


class _Batch(NamedTuple):
    tokens: jax.Array  # [B, T+1]
    valid: jax.Array  # bool [B], False where a row is padding


class _Passes:
    """A checkpoint and its validation batches on the devices. Each step compiles once."""

    def __init__(
        self,
        config: Config,
        dataset: dataset_lib.Dataset,
        params: model.Params,
        tokens: int,
        stage: str,
    ) -> None:
        self._config = config
        self._model = config.model.on(jax.default_backend())
        self._stage = stage
        self._mesh = sharding.make_mesh()
        self._replicated = sharding.replicated(self._mesh)
        self._params = jax.device_put(params, self._replicated)
        sequences = pipeline.num_validation_sequences(dataset.manifest, tokens)
        self.num_tokens = sequences * config.model.sequence_length
        most = config.eval.batch_sequences * self._mesh.size
        read = pipeline.read_validation(
            dataset.directory,
            dataset.manifest,
            num_tokens=tokens,
            sequences_per_batch=min(most, sharding.round_up_to_devices(self._mesh, sequences)),
        )
        put = functools.partial(sharding.put_batch, self._mesh)
        self._batches = [_Batch(put(batch.tokens), put(batch.mask)) for batch in read]
        self.num_batches = len(self._batches)
        self._look = jax.jit(self._look_step, out_shardings=self._replicated, donate_argnums=1)
        self._project = jax.jit(self._project_step, out_shardings=self._replicated)

    def look(self, batch_done: Callable[[], None]) -> tuple[float, spectral.Factor]:
        """Loss of the model as it is, and the factor [N, G] of its keys over all tokens."""
        c = self._config.model
        empty = spectral.empty_factor((c.num_layers, c.num_kv_heads), c.head_dim)
        factor, total = jax.device_put(empty, self._replicated), 0.0
        for batch in self._batches:
            factor, loss_sum = self._look(self._params, factor, batch)
            total += np.asarray(loss_sum).sum(dtype=np.float64)
            batch_done()
        return float(total / self.num_tokens), jax.device_get(factor)

    def loss(
        self,
        projection_NGKK: np.ndarray,
        shift_NGK: np.ndarray,
        batch_done: Callable[[], None],
    ) -> float:
        """Validation loss with keys k P + b, nats per predicted token."""
        affine, total = jax.device_put((projection_NGKK, shift_NGK), self._replicated), 0.0
        for batch in self._batches:
            loss_sum = self._project(self._params, *affine, batch)
            total += np.asarray(loss_sum).sum(dtype=np.float64)
            batch_done()
        return float(total / self.num_tokens)

    def _look_step(
        self, params: model.Params, factor: spectral.Factor, batch: _Batch
    ) -> tuple[spectral.Factor, jax.Array]:
        pre_rope = self._stage == "pre_rope"

        def keys(vectors: model.HeadVectors) -> spectral.Factor:
            seen = vectors.key_pre_BTGK if pre_rope else vectors.key_post_BTGK
            return spectral.factor(seen.swapaxes(1, 2))  # [B, G]

        inputs_BT = batch.tokens[:, :-1]
        with sharding.ambient(self._mesh):
            hidden, seen = model.apply_with_probe(params, inputs_BT, self._model, keys)
        seen = seen._replace(count=jnp.where(batch.valid[None, :, None], seen.count, 0))
        by_sequence = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), seen)
        merged = spectral.merge(factor, spectral.merge_leading_axis(by_sequence))
        return merged, self._loss_sums(params, hidden, batch)

    def _project_step(
        self, params: model.Params, matrices: jax.Array, shifts: jax.Array, batch: _Batch
    ) -> jax.Array:
        with sharding.ambient(self._mesh):
            hidden = model.apply_with_key_projection(
                params, batch.tokens[:, :-1], self._model, matrices, shifts, self._stage
            )
        return self._loss_sums(params, hidden, batch)

    def _loss_sums(self, params: model.Params, hidden: jax.Array, batch: _Batch) -> jax.Array:
        """[B] summed losses of the rows, 0 where a row is padding."""
        sums = losses.token_losses(
            hidden,
            params["embedding"],
            batch.tokens[:, 1:],
            chunk_tokens=self._config.train.loss_chunk_tokens * self._mesh.size,
        )
        return jnp.where(batch.valid, sums, 0.0)


# --------------------------------------------------------------------------------------------
# What is asked for.


def _here(config: Config) -> Config:
    """The run's config with attention and unroll for this machine, which need not be the run's."""
    there_alone = config.model.attention in FUSED_ATTENTION.values()
    attention = "auto" if there_alone else config.model.attention
    model_config = dataclasses.replace(config.model, attention=attention, unroll=0)
    config = dataclasses.replace(config, model=model_config)
    return attention_check.settle(config, jax.default_backend(), may_be_slow=True)


def _check(request: Request, config: Config) -> tuple[list[int], list[str], int]:
    """Ranks ascending, "all" or indices of layers in order, and tokens, all in range."""
    head_dim, num_layers = config.model.head_dim, config.model.num_layers
    ranks = request.ranks
    if ranks is None:
        ranks = (*(2**i for i in range(head_dim.bit_length()) if 2**i < head_dim), head_dim)
    wrong = [rank for rank in ranks if not 1 <= rank <= head_dim]
    if wrong or not ranks:
        raise errors.UsageError(
            f"--ranks: expected ranks from 1 to the run's head_dim {head_dim}, found "
            f"{wrong or 'none'}. Give others, separated by commas."
        )
    if request.stage not in STAGES:
        raise errors.UsageError(
            f"--stage: expected one of {', '.join(STAGES)}, found {request.stage!r}. Give one."
        )
    if request.centring not in CENTRINGS:
        raise errors.UsageError(
            f"--centring: expected one of {', '.join(CENTRINGS)}, found {request.centring!r}. "
            "Give one."
        )
    if not request.kinds or not set(request.kinds) <= set(KINDS):
        raise errors.UsageError(
            f"--kinds: expected some of {', '.join(KINDS)}, found "
            f"{', '.join(request.kinds) or 'none'}. Give one or both."
        )
    indices = [str(index) for index in range(num_layers)]
    layers: list[str] = []
    for layer in request.layers:
        if layer not in (ALL, "each", *indices):
            raise errors.UsageError(
                f"--layers: expected all, each or indices from 0 to {num_layers - 1}, found "
                f"{layer!r}. Give some of these, separated by commas."
            )
        layers += indices if layer == "each" else [layer]
    if not layers:
        raise errors.UsageError("--layers: empty. Give all, each or indices of layers.")
    tokens = config.eval.tokens if request.tokens is None else request.tokens
    if tokens < 0:
        raise errors.UsageError(f"--tokens: {tokens}, expected 0 (all) or more. Give another.")
    return sorted(set(ranks)), list(dict.fromkeys(layers)), tokens


class _Progress:
    """A line for every row, and one now and then within a long pass."""

    def __init__(
        self, report: Callable[[str], None], every_seconds: float, num_passes: int, num_batches: int
    ) -> None:
        self._report, self._every_seconds = report, every_seconds
        self._num_passes, self._num_batches = num_passes, num_batches
        self._batches = 0
        self._begun = self._shown = time.monotonic()

    def batch_done(self) -> None:
        self._batches += 1
        now = time.monotonic()
        done, batch = divmod(self._batches, self._num_batches)
        if batch and now - self._shown >= self._every_seconds:
            self._shown = now
            self._report(
                f"pass {done + 1}/{self._num_passes}  batch {batch}/{self._num_batches}  "
                f"{self._left()}"
            )

    def row_done(self, row: Row) -> None:
        self._shown = time.monotonic()
        where = "all layers" if row.layer == ALL else f"layer {row.layer}"
        self._report(
            f"pass {self._batches // self._num_batches}/{self._num_passes}  {where}, {row.kind} "
            f"{row.rank}: val/loss {row.val_loss:.4f} ({row.delta:+.4f})  {self._left()}"
        )

    def _left(self) -> str:
        pace = (time.monotonic() - self._begun) / self._batches
        seconds = round(pace * (self._num_passes * self._num_batches - self._batches))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
