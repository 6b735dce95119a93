"""What an evaluation gathers of a model's heads, layer by layer, without keeping a single vector.

The spectra of queries, keys and values come from all tokens. So do the norms; they need one stage
only, because RoPE turns a vector and keeps its length. Logits, entropy and sink of the attention
come from the first sequences of each evaluation, always the same ones.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from qkjax import model
from qkjax.config import Config, ModelConfig
from qkjax.measures import moments, spectral

# What is streamed: name in arrays -> its field of model.HeadVectors.
_WITHOUT_NORM = {
    "key_pre_rope": "key_pre_BTGK",
    "key_post_rope": "key_post_BTGK",
    "query_pre_rope": "query_pre_BTHK",
    "query_post_rope": "query_post_BTHK",
    "value": "value_BTGK",
}
# With QK-Norm, pre_rope is post_norm times gamma and costs no stream (`spectral.scaled`).
_WITH_NORM = {
    "key_pre_norm": "key_pre_norm_BTGK",
    "key_post_norm": "key_post_norm_BTGK",
    "key_post_rope": "key_post_BTGK",
    "query_pre_norm": "query_pre_norm_BTHK",
    "query_post_norm": "query_post_norm_BTHK",
    "query_post_rope": "query_post_BTHK",
    "value": "value_BTGK",
}
NORMS = {"key": "key_pre_BTGK", "query": "query_pre_BTHK"}  # fields of model.HeadVectors
ATTENTION_SEQUENCES = 4  # that the attention is looked at in: the first of an evaluation
QUERY_BLOCK = 256  # queries whose logits exist at one time

# Norms are counted in bins that split every power of two into 2^7 equal parts: a bin is at most
# 0.8% wide. What lies outside 2^-20 .. 2^20 is counted in the outermost bins.
_SPLIT_BITS = 7
_LOWEST, _HIGHEST = -20, 20
NUM_BINS = (_HIGHEST - _LOWEST) << _SPLIT_BITS
DROPPED_BITS = 23 - _SPLIT_BITS  # of a float32's mantissa
FIRST_BIN = (127 + _LOWEST) << _SPLIT_BITS
_COLUMNS = 128  # of the table of bins on a TPU: its vectors' width
_QUANTILE = 0.99

Stream = spectral.Factor | moments.Moments


class Norms(NamedTuple):
    """Lengths of a set of vectors, per leading index."""

    count: jax.Array  # type: ignore[assignment]  # [...] int32; hides tuple.count
    mean: jax.Array  # [...] float32
    largest: jax.Array  # [...] float32
    histogram: jax.Array  # [..., bins] int32


class Attention(NamedTuple):
    """Causal logits, after 1 / sqrt(K), of the sequences that were looked at."""

    max_logit: jax.Array  # [..., H] float32, -inf where none was
    entropy_sum: jax.Array  # [..., H] float32: over sequences of the mean over queries, nats
    sink_sum: jax.Array  # [..., H] float32: over sequences of the mean probability of position 0
    sequences: jax.Array  # [...] int32

    @property
    def entropy(self) -> jax.Array:
        """[..., H] mean over queries, in nats."""
        return self.entropy_sum / self.sequences[..., None].astype(jnp.float32)

    @property
    def sink_mass(self) -> jax.Array:
        """[..., H] probability of position 0, mean over the queries after it."""
        return self.sink_sum / self.sequences[..., None].astype(jnp.float32)


class Statistics(NamedTuple):
    """All of it; leading axes [N, heads], or [heads] for one layer."""

    vectors: Stream  # the heads of all stages one after another, see `slices_of`
    norms: dict[str, Norms]  # by NORMS
    attention: Attention


class Rows(NamedTuple):
    """Which sequences of a batch count."""

    valid_B: jax.Array  # bool
    attention: jax.Array  # [A] int32 positions of those whose attention is looked at
    attention_valid: jax.Array  # [A] bool: False where there are fewer than A


def empty_statistics(config: Config, platform: str) -> Statistics:
    """The start of an evaluation: nothing seen.

    Args:
        platform: of the devices; "tpu" has no float64 and merges QR factors instead.
    """
    c = config.model
    empty = spectral.empty_factor if platform == "tpu" else moments.empty_moments
    streamed = _WITHOUT_NORM if c.qk_norm == "none" else _WITH_NORM
    return Statistics(
        empty((c.num_layers, sum(_heads(c, name) for name in streamed)), c.head_dim),
        {name: _empty_norms((c.num_layers, _heads(c, name))) for name in NORMS},
        _no_attention((c.num_layers, c.num_heads)),
    )


def rows_of(valid_B: jax.Array, sequences_seen: jax.Array) -> Rows:
    """The rows of a batch that count, where `sequences_seen` [] int32 were counted before it."""
    number = sequences_seen + jnp.cumsum(valid_B, dtype=jnp.int32)  # 1 for the first
    wanted = valid_B & (number <= ATTENTION_SEQUENCES)
    size = min(ATTENTION_SEQUENCES, len(valid_B))
    (positions,) = jnp.nonzero(wanted, size=size, fill_value=0)
    return Rows(valid_B, positions.astype(jnp.int32), jnp.arange(size) < wanted.sum())


def look(
    vectors: model.HeadVectors, rows: Rows, exact: bool, by_digits: bool = False
) -> Statistics:
    """The statistics of one layer and batch, leading axes [heads].

    Args:
        exact: float64 moments; otherwise QR factors.
        by_digits: of moments, for devices whose float64 is slow.
    """
    streamed = _WITHOUT_NORM if vectors.key_post_norm_BTGK is None else _WITH_NORM
    by_stage = [getattr(vectors, field).swapaxes(1, 2) for field in streamed.values()]
    stream = _stream(by_stage, rows.valid_B, exact, by_digits)
    norms = {name: _norms(getattr(vectors, field), rows.valid_B) for name, field in NORMS.items()}
    q, k = vectors.query_post_BTHK, vectors.key_post_BTGK

    def of_rows() -> Attention:
        return attention_statistics(q[rows.attention], k[rows.attention], rows.attention_valid)

    nothing = _no_attention(q.shape[2:3])
    attention = jax.lax.cond(rows.attention_valid.any(), of_rows, lambda: nothing)
    return Statistics(stream, norms, attention)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of two disjoint sets of sequences."""
    attention = Attention(
        jnp.maximum(a.attention.max_logit, b.attention.max_logit),
        a.attention.entropy_sum + b.attention.entropy_sum,
        a.attention.sink_sum + b.attention.sink_sum,
        a.attention.sequences + b.attention.sequences,
    )
    norms = {name: _merge_norms(one, b.norms[name]) for name, one in a.norms.items()}
    return Statistics(_merge_streams(a.vectors, b.vectors), norms, attention)


def slices_of(statistics: Statistics, qk_norm: bool) -> dict[str, slice]:
    """Where the heads of every streamed stage are among those of `vectors`."""
    num_heads = statistics.norms["query"].count.shape[-1]
    num_kv_heads = statistics.norms["key"].count.shape[-1]
    slices, start = {}, 0
    for name in _WITH_NORM if qk_norm else _WITHOUT_NORM:
        stop = start + (num_heads if name.startswith("query") else num_kv_heads)
        slices[name] = slice(start, stop)
        start = stop
    return slices


def factor(stream: Stream) -> spectral.Factor:
    """The float32 factor that the measures of `spectral` take."""
    return stream if isinstance(stream, spectral.Factor) else moments.to_factor(stream)


def attention_statistics(q_ATHK: jax.Array, k_ATGK: jax.Array, valid_A: jax.Array) -> Attention:
    """Largest causal logit, mean entropy and sink per query head, over the valid sequences.

    Args:
        q_ATHK, k_ATGK: float32, after RoPE. The logits of one kv head's queries exist at a
            time, in blocks of `QUERY_BLOCK` queries: no [B, H, T, T] array.
    Returns:
        Attention with leading axis [H].
    """
    A, T, H, K = q_ATHK.shape
    G = k_ATGK.shape[2]
    # Head-major, and one kv head at a time: several times faster on CPUs, with small buffers.
    q = q_ATHK.reshape(A, T, G, H // G, K).transpose(0, 2, 3, 1, 4) * K**-0.5
    k = k_ATGK.transpose(0, 2, 1, 3)
    pairs = q.reshape(A * G, H // G, T, K), k.reshape(A * G, T, K)
    largest, entropy, sink = jax.lax.map(lambda pair: _one_kv_head(*pair), pairs)
    valid = valid_A[:, None]
    return Attention(
        jnp.where(valid, largest.reshape(A, H), -jnp.inf).max(axis=0),
        jnp.where(valid, entropy.reshape(A, H), 0).sum(axis=0),
        jnp.where(valid, sink.reshape(A, H), 0).sum(axis=0),
        valid_A.sum(dtype=jnp.int32),
    )


def uniform_sink(length: int) -> float:
    """The sink of attention that weighs all earlier positions alike, in sequences of `length`."""
    return sum(1 / (t + 1) for t in range(1, length)) / max(length - 1, 1)


def _one_kv_head(q_RTK: jax.Array, k_TK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Largest logit, mean entropy over the queries, and sink, each [R], of R query heads."""
    T = len(k_TK)
    largest, entropy, sink = [], [], []
    for start in range(0, T, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, T)
        logits = jnp.einsum(
            "rtk,sk->rts", q_RTK[:, start:stop], k_TK[:stop], precision=jax.lax.Precision.HIGHEST
        )
        causal = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
        top = jnp.where(causal, logits, -jnp.inf).max(axis=-1)
        below = jnp.where(causal, logits - top[..., None], 0)
        weights = jnp.where(causal, jnp.exp(below), 0)
        total = weights.sum(axis=-1)
        # -sum p ln p with p = weight / total
        entropies = jnp.log(total) - (weights * below).sum(axis=-1) / total
        largest.append(top.max(axis=-1))
        entropy.append(entropies.sum(axis=-1))
        on_first = jnp.exp(logits[..., 0] - top) / total
        if start == 0:  # the first query sees nothing else
            on_first = on_first[:, 1:]
        sink.append(on_first.sum(axis=-1))
    return (
        jnp.stack(largest).max(axis=0),
        jnp.stack(entropy).sum(axis=0) / T,
        jnp.stack(sink).sum(axis=0) / max(T - 1, 1),
    )


def norm_quantile(norms: Norms) -> jax.Array:
    """99th percentile of the norms, [...] float32, within 0.8%; NaN where the mean is not finite.

    Norms above 2^20 or below 2^-20 are known by the largest alone.
    """
    target = _QUANTILE * norms.count[..., None].astype(jnp.float32)
    reached = jnp.cumsum(norms.histogram, axis=-1).astype(jnp.float32)
    bin_ = jnp.minimum((reached < target).sum(axis=-1, keepdims=True), NUM_BINS - 1)
    inside = jnp.take_along_axis(norms.histogram, bin_, axis=-1).astype(jnp.float32)
    before = jnp.take_along_axis(reached, bin_, axis=-1) - inside
    share = (target - before) / jnp.maximum(inside, 1)
    low, high = _edge(bin_), _edge(bin_ + 1)
    quantile = jnp.minimum((low + share * (high - low))[..., 0], norms.largest)
    return jnp.where(jnp.isfinite(norms.mean), quantile, jnp.nan)


def _edge(bin_: jax.Array) -> jax.Array:
    bits = (bin_.astype(jnp.int32) + FIRST_BIN) << DROPPED_BITS
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _norms(vectors_BTHK: jax.Array, valid_B: jax.Array) -> Norms:
    """Norms of one layer's vectors, leading axis [H]."""
    norm_BTH = jnp.sqrt((vectors_BTHK * vectors_BTHK).sum(axis=-1))
    _, T, H = norm_BTH.shape
    valid = valid_B[:, None, None]
    count = valid_B.sum(dtype=jnp.int32) * T
    norm_BTH = jnp.where(valid, norm_BTH, 0.0)
    mean = norm_BTH.sum(axis=(0, 1)) / jnp.maximum(count, 1).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(norm_BTH, jnp.int32) >> DROPPED_BITS
    bins_BTH = jnp.clip(bits - FIRST_BIN, 0, NUM_BINS - 1)
    histogram = jax.lax.platform_dependent(
        bins_BTH, valid, tpu=_counted_by_products, default=_counted_by_additions
    )
    return Norms(jnp.broadcast_to(count, (H,)), mean, norm_BTH.max(axis=(0, 1)), histogram)


def _counted_by_additions(bins_BTH: jax.Array, valid: jax.Array) -> jax.Array:
    """The number of valid values in every bin, for each head: [H, bins] int32."""
    H = bins_BTH.shape[2]
    bins = bins_BTH + NUM_BINS * jnp.arange(H)
    ones = jnp.broadcast_to(valid, bins.shape).astype(jnp.int32)
    return jnp.zeros(H * NUM_BINS, jnp.int32).at[bins].add(ones).reshape(H, NUM_BINS)


def _counted_by_products(bins_BTH: jax.Array, valid: jax.Array) -> jax.Array:
    """The same counts, below 2^24, for a TPU: its scatter adds one value after another.

    A bin is a row and a column of a table. The product of where the values stand in rows with
    where they stand in columns counts them: zeros and ones, with float32 sums.
    """
    rows = (bins_BTH[..., None] // _COLUMNS == jnp.arange(NUM_BINS // _COLUMNS)) & valid[..., None]
    columns = bins_BTH[..., None] % _COLUMNS == jnp.arange(_COLUMNS)
    counts = jnp.einsum(
        "bthr,bthc->hrc",
        rows.astype(jnp.bfloat16),
        columns.astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )
    return counts.astype(jnp.int32).reshape(-1, NUM_BINS)


def _merge_norms(a: Norms, b: Norms) -> Norms:
    share_b = b.count / jnp.maximum(a.count + b.count, 1)
    return Norms(
        a.count + b.count,
        a.mean + share_b * (b.mean - a.mean),
        jnp.maximum(a.largest, b.largest),
        a.histogram + b.histogram,
    )


def _empty_norms(batch_shape: tuple[int, ...]) -> Norms:
    return Norms(  # four buffers: the step takes them all over
        jnp.zeros(batch_shape, jnp.int32),
        jnp.zeros(batch_shape, jnp.float32),
        jnp.zeros(batch_shape, jnp.float32),
        jnp.zeros((*batch_shape, NUM_BINS), jnp.int32),
    )


def _no_attention(batch_shape: tuple[int, ...]) -> Attention:
    return Attention(
        jnp.full(batch_shape, -jnp.inf, jnp.float32),
        jnp.zeros(batch_shape, jnp.float32),
        jnp.zeros(batch_shape, jnp.float32),
        jnp.zeros(batch_shape[:-1], jnp.int32),
    )


def _stream(by_stage: list[jax.Array], valid_B: jax.Array, exact: bool, by_digits: bool) -> Stream:
    """The stream of one layer, from [B, heads, T, K] of every stage; leading axis all heads."""
    if exact:
        with jax.enable_x64(True):
            seen = [moments.moments(vectors, valid_B, by_digits) for vectors in by_stage]
            return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *seen)
    # One batched QR: see `evaluation.decompose` for what two at a time may do.
    by_sequence = spectral.factor(jnp.concatenate(by_stage, axis=1))
    counted = jnp.where(valid_B[:, None], by_sequence.count, 0)
    return spectral.merge_leading_axis(by_sequence._replace(count=counted))


def _merge_streams(a: Stream, b: Stream) -> Stream:
    if isinstance(a, spectral.Factor) and isinstance(b, spectral.Factor):
        return spectral.merge(a, b)
    if isinstance(a, moments.Moments) and isinstance(b, moments.Moments):
        return moments.merge(a, b)
    raise TypeError("float64 moments and QR factors cannot be merged")


def _heads(c: ModelConfig, stage: str) -> int:
    return c.num_heads if stage.startswith("query") else c.num_kv_heads
