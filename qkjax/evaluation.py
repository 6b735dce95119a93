"""One pass over the frozen validation split: loss and spectra.

Statistics are accumulated and decomposed under jit (`make_eval_step`, `decompose`); `Evaluator` is
the host's loop around them.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qkjax import chips, losses, model, processes, sharding
from qkjax.config import Config
from qkjax.data import pipeline
from qkjax.measures import probes, ranks, spectral


class Spectra(NamedTuple):
    """What the statistics of a whole evaluation decompose into."""

    metrics: dict[str, jax.Array]  # metric name of docs/metrics.md -> [] float32
    arrays: dict[str, jax.Array]  # its array name -> float32


EvalStep = Callable[
    [model.Params, probes.Statistics, jax.Array, jax.Array], tuple[probes.Statistics, jax.Array]
]
LossStep = Callable[[model.Params, jax.Array, jax.Array], jax.Array]


def empty_statistics(config: Config, mesh: Mesh) -> probes.Statistics:
    """The start of an evaluation: nothing seen; on every device of the mesh."""
    empty = probes.empty_statistics(config, sharding.platform(mesh))
    return jax.device_put(empty, sharding.replicated(mesh))


def make_eval_step(config: Config, mesh: Mesh) -> EvalStep:
    """Compiles `step(params, statistics, tokens, valid) -> (statistics, loss_sum [B])`.

    tokens [B, T+1] and valid [B] are sharded over `data`. Rows that are not valid count nowhere;
    loss_sum is the float32 sum over the T predicted positions of each row, in nats.
    """

    def step(
        params: model.Params, statistics: probes.Statistics, tokens: jax.Array, valid: jax.Array
    ) -> tuple[probes.Statistics, jax.Array]:
        exact = not isinstance(statistics.vectors, spectral.Factor)
        chip = chips.of_kind(mesh.devices.flat[0].device_kind)
        by_digits = chip is not None and chip.has_slow_float64
        sequences_seen = statistics.vectors.count[0, 0] // config.model.sequence_length
        rows = probes.rows_of(valid, sequences_seen)

        def probe(vectors: model.HeadVectors) -> probes.Statistics:
            return probes.look(vectors, rows, exact, by_digits)

        with sharding.ambient(mesh):
            hidden, seen = model.apply_with_probe(
                params, tokens[:, :-1], config.model.on(sharding.platform(mesh)), probe
            )
        return probes.merge(statistics, seen), _loss_sums(
            config, mesh, params, hidden, tokens, valid
        )

    replicated, over_rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    return jax.jit(
        step,
        in_shardings=(replicated, replicated, over_rows, over_rows),
        out_shardings=(replicated, replicated),
        donate_argnums=1,
    )


def make_loss_step(config: Config, mesh: Mesh) -> LossStep:
    """Compiles `step(params, tokens, valid) -> loss_sum`: the eval step without its probes."""

    def step(params: model.Params, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        with sharding.ambient(mesh):
            hidden = model.apply(params, tokens[:, :-1], config.model.on(sharding.platform(mesh)))
        return _loss_sums(config, mesh, params, hidden, tokens, valid)

    replicated, over_rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    return jax.jit(step, in_shardings=(replicated, over_rows, over_rows), out_shardings=replicated)


def _loss_sums(
    config: Config,
    mesh: Mesh,
    params: model.Params,
    hidden: jax.Array,
    tokens: jax.Array,
    valid: jax.Array,
) -> jax.Array:
    loss_sum = losses.token_losses(
        hidden,
        params["embedding"],
        tokens[:, 1:],
        chunk_tokens=config.train.loss_chunk_tokens * mesh.size,
    )
    return jnp.where(valid, loss_sum, 0.0)


def decompose(statistics: probes.Statistics, params: model.Params) -> Spectra:
    """Every array and metric of an evaluation but the loss, after its last batch.

    A metric is the mean over heads, then over layers; of `aa` and `overlap` over the heads that
    have one; `attention/max_logit` is the largest of all, `pr/undefined_heads` a count. Call it
    under jit, on one device.
    """
    # jaxlib's batched LAPACK calls wait on XLA's thread pool for parts of themselves: as many of
    # them at a time as the pool has threads, and none returns. So all stages go into one call, and
    # each call comes after the one before; many devices of one host would break that order.
    attention = params["blocks"]["attention"]
    factors = _by_stage(statistics, attention)
    triangles = spectral.triangles(spectral.concatenate(tuple(factors.values())))
    sigma = spectral.singular_values_of(triangles)  # [centred and raw, N, heads of all, K]
    metrics: dict[str, jax.Array] = {}
    arrays: dict[str, jax.Array] = {}
    triangles_of: dict[str, jax.Array] = {}
    start = 0
    for stage, factor in factors.items():
        heads = slice(start, start := start + factor.count.shape[1])
        triangles_of[stage] = triangles[:, :, heads]
        centred, raw = sigma[:, :, heads]
        where = stage.replace("_", "/", 1)
        for centring, values in (("raw", raw), ("centred", centred)):
            arrays[f"{stage}_{centring}"] = values
            for name, measure in ranks.MEASURES.items():
                metrics[f"{name}/{where}/{centring}"] = _over_heads(measure(values))
        arrays[f"{stage}_mean"] = factor.mean
        metrics[f"mean_share/{where}"] = _over_heads(ranks.mean_share(raw, centred))

    pr = ranks.participation_ratio(arrays["key_post_rope_raw"])
    metrics["pr/undefined_heads"] = jnp.isnan(pr).sum(dtype=jnp.float32)
    keys = factors["key_pre_rope"]
    ratio, arrays["aa"] = spectral.axis_alignment(_after(keys, sigma))
    arrays["aa_ratio"] = ratio
    arrays["overlap"] = overlap = spectral.subspace_overlap(_after(keys, ratio))
    metrics["aa/key"] = jnp.nanmean(arrays["aa"])
    metrics["overlap/key"] = jnp.nanmean(overlap)
    for name, norms in statistics.norms.items():
        arrays[f"{name}_norm_mean"] = norms.mean
        arrays[f"{name}_norm_p99"] = probes.norm_quantile(norms)
        arrays[f"{name}_norm_max"] = norms.largest
        metrics[f"norm/{name}"] = _over_heads(norms.mean)
        metrics[f"norm/{name}_largest_layer"] = norms.mean.mean(axis=1).max()
    arrays["max_logit"] = statistics.attention.max_logit
    arrays["entropy"] = statistics.attention.entropy
    arrays["sink_mass"] = statistics.attention.sink_mass
    metrics["attention/max_logit"] = arrays["max_logit"].max()
    metrics["attention/entropy"] = _over_heads(arrays["entropy"])
    metrics["sink/mass"] = _over_heads(arrays["sink_mass"])
    arrays["num_tokens"] = keys.count[0, 0].astype(jnp.float32)
    of_products = _of_products(triangles_of, attention, overlap)
    for name, metric in _PR_OF_PRODUCTS.items():
        metrics[metric] = _over_heads(ranks.participation_ratio(of_products[name]))
    of_gammas = _of_gammas(attention)
    return Spectra(metrics | of_gammas.metrics, arrays | of_products | of_gammas.arrays)


_KERNELS = ("query", "key", "value", "output")
_PR_OF_PRODUCTS = {  # array -> the metric that is its pr
    "wqk_singular_values": "wqk/pr",
    "qk_pre_rope_raw": "pr/qk/pre_rope/raw",
    "qk_pre_rope_centred": "pr/qk/pre_rope/centred",
    **{f"weight_{name}": f"weight/pr/{name}" for name in _KERNELS},
}


def _by_stage(statistics: probes.Statistics, attention: model.Params) -> dict[str, spectral.Factor]:
    """The factors of every stage, [N, heads]; with QK-Norm pre_rope is made of post_norm."""
    factors = probes.factor(statistics.vectors)
    found = {}
    for stage, heads in probes.slices_of(statistics, "key_norm" in attention).items():
        found[stage] = jax.tree.map(lambda leaf, heads=heads: leaf[:, heads], factors)
        side, _, place = stage.partition("_")
        if place == "post_norm":
            gamma_NK = attention[f"{side}_norm"]["gamma"]
            found[f"{side}_pre_rope"] = spectral.scaled(found[stage], gamma_NK[:, None])
    return found


def _after(factor: spectral.Factor, done: jax.Array) -> spectral.Factor:
    """The factor, but not before `done`, which is never negative: a dependency XLA cannot drop."""
    return factor._replace(r=_wait(factor.r, done))


def _wait(x: jax.Array, done: jax.Array) -> jax.Array:
    return jnp.where(done.ravel()[0] < 0, 0.0, x)


def _of_gammas(attention: model.Params) -> Spectra:
    """The gammas of QK-Norm, and how even they are; nothing without it."""
    metrics, arrays = {}, {}
    for name in ("query", "key"):
        if f"{name}_norm" not in attention:
            continue
        arrays[f"gamma_{name[0]}"] = gamma_NK = attention[f"{name}_norm"]["gamma"]
        size = jnp.abs(gamma_NK)
        low, high = jnp.quantile(size, jnp.array([0.1, 0.9]), axis=-1)
        spread = jnp.where(low > 0, high / low, jnp.nan)
        metrics[f"gamma/{name}_pr"] = ranks.participation_ratio(size).mean()
        metrics[f"gamma/{name}_spread"] = jnp.nanmedian(spread)
        metrics[f"gamma/{name}_negative"] = (gamma_NK < 0).mean()
    return Spectra(metrics, arrays)


def _of_products(
    triangles: dict[str, jax.Array], attention: model.Params, done: jax.Array
) -> dict[str, jax.Array]:
    """Singular values, [N, heads, K], of kernels and of what queries and keys make together.

    Of every head's slice of the kernels (gamma not in it), of W_q^T W_k (in the [in, out] layout of
    the kernels W_q W_k^T), with the gammas of QK-Norm, and of the [n, n] matrix of q.k over all
    tokens before RoPE, of which the triangles of queries and keys have the singular values.
    """
    head_dim = triangles["key_pre_rope"].shape[-1]
    slices = []
    for name in _KERNELS:
        kernel = attention[name]["kernel"].astype(jnp.float32)
        kernel = kernel.mT if name == "output" else kernel  # [N, D, heads K]
        slices.append(kernel.reshape(*kernel.shape[:2], -1, head_dim).swapaxes(1, 2))
    of_slices = spectral.triangular(_wait(jnp.concatenate(slices, axis=1), done))
    by_kernel = dict(zip(_KERNELS, _split_like(of_slices, slices), strict=True))

    def together(query_NHKK: jax.Array, key_NGKK: jax.Array) -> jax.Array:
        sharing = query_NHKK.shape[1] // key_NGKK.shape[1]
        return spectral.product(query_NHKK, jnp.repeat(key_NGKK, sharing, axis=1))

    with_gamma = [
        by_kernel[name] * attention[f"{name}_norm"]["gamma"][:, None, None]
        if f"{name}_norm" in attention
        else by_kernel[name]
        for name in ("query", "key")
    ]
    matrices = {f"weight_{name}": triangle for name, triangle in by_kernel.items()}
    matrices["wqk_singular_values"] = together(*with_gamma)
    for i, centring in enumerate(("centred", "raw")):
        matrices[f"qk_pre_rope_{centring}"] = together(
            triangles["query_pre_rope"][i], triangles["key_pre_rope"][i]
        )
    parts = list(matrices.values())
    sigma = spectral.singular_values_of(jnp.concatenate(parts, axis=1))
    return dict(zip(matrices, _split_like(sigma, parts), strict=True))


def _split_like(joined: jax.Array, parts: list[jax.Array]) -> list[jax.Array]:
    """The heads, axis 1, of each of the parts that were joined."""
    return jnp.split(joined, np.cumsum([part.shape[1] for part in parts])[:-1], axis=1)


def _over_heads(values_NH: jax.Array) -> jax.Array:
    return values_NH.mean(axis=1).mean(axis=0)


# --------------------------------------------------------------------------------------------
# The pass, on the host.


class Evaluation(NamedTuple):
    """What one pass measured."""

    metrics: dict[str, float | np.floating | None]  # names of docs/metrics.md
    spectra: dict[str, np.ndarray]  # arrays of spectra/step_*.npz
    validation: dict[str, np.ndarray]  # arrays of validation/step_*.npz


class Evaluator:
    """Evaluates parameters on batches of one size; compiled once for all passes."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._config = config
        self._mesh = mesh
        self._jitted: dict[str, Any] = {
            "step": make_eval_step(config, mesh),
            "decompose": jax.jit(decompose),
            "loss": make_loss_step(config, mesh),
        }
        self._compiled: dict[tuple[str, int], Any] = {}  # by name and rows of a batch
        self._probe_fraction: float | None = None

    def sequences_per_batch(self, num_sequences: int) -> int:
        """Rows of a batch for a pass over `num_sequences`: few are not padded to a full batch."""
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
            None when it was given up. Process 0 alone has spectra.
        """
        started = time.monotonic()
        if self._config.mesh != "data":  # an evaluation keeps nothing for a backward pass
            params = jax.device_put(params, sharding.replicated(self._mesh))
        statistics = empty_statistics(self._config, self._mesh)
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
        decomposed = Spectra({}, {})
        if processes.is_first():
            one_device = jax.tree.map(lambda leaf: leaf.addressable_data(0), (statistics, params))
            decompose = self._program("decompose", 0, *one_device)
            decomposed = clock.time(decompose, *one_device)
        processes.meet()  # collectives would not wait for a long decomposition
        spectra, sums, masks = processes.whole((decomposed, sums, masks))
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
            "sink/uniform": probes.uniform_sink(length),
            "perf/eval_seconds": time.monotonic() - started,
            "perf/eval_probe_fraction": self._probe_fraction,
        }
        return Evaluation(metrics, spectra.arrays, {"loss_sum": loss_sum, "count": count})

    def _program(self, name: str, rows: int, *arguments: Any) -> Any:
        """The program compiled for batches of `rows` rows, before its first use."""
        if (name, rows) not in self._compiled:
            self._compiled[name, rows] = self._compile(self._jitted[name], arguments)
            if name != "decompose":  # of process 0 alone; no collective waits for compilers
                processes.meet()
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
        started = time.monotonic()
        result = jax.block_until_ready(program(*arguments))
        self._seconds += time.monotonic() - started
        return result

    def probe_fraction(
        self, loss_step: Callable[..., Any], num_batches: int, *arguments: Any
    ) -> float:
        """Share of the seconds so far that the loss alone would not have taken.

        The loss alone is measured on one batch, the second time it runs.
        """
        jax.block_until_ready(loss_step(*arguments))
        started = time.monotonic()
        jax.block_until_ready(loss_step(*arguments))
        return 1 - num_batches * (time.monotonic() - started) / self._seconds
