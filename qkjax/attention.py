"""Causal attention with grouped queries, and the rotary position embedding."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# What a rematerialised layer should keep carries this name (jax.ad_checkpoint).
RESULT = "attention"
IMPLEMENTATIONS = ("xla", "blocked", "cudnn")
# Queries are taken in blocks, each against the keys up to its own end: a causal row never pays for
# the keys that it may not see, and no [T, T] matrix outlives its block.
_QUERY_BLOCK = {"xla": 256, "blocked": 128}

_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def rotary_tables(length: int, head_dim: int, base: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles, each [T, K/2] float32.

    Frequency i turns by base^(-2i/K) radians a position. Source: Su et al. 2021 (RoFormer).
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = jnp.arange(length, dtype=jnp.float32)[:, None] / base ** exponents[None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x_BTHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns each head's pairs (i, i + K/2) by the angle of their position; float32 in and out.

    This is the rotate-half layout of Llama and Qwen3 in Hugging Face, not the interleaved one.
    """
    first, second = jnp.split(x_BTHK, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def choose_implementation(wanted: str, platform: str, dtype: str) -> str:
    """What "auto" stands for on a platform of jax.default_backend(); other names stay."""
    if wanted != "auto":
        return wanted
    if platform == "cpu":
        return "blocked"
    return "cudnn" if platform == "gpu" and dtype == "bfloat16" else "xla"


def causal_attention(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, *, implementation: str = "xla"
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over the keys at and before each query.

    Query heads g*H/G to (g+1)*H/G - 1 share key/value head g. The softmax is float32; products
    are in the dtype of the inputs with float32 accumulation. Scores are recomputed in the
    backward pass, so nothing of size T x T is kept for it.

    Args:
        implementation: "xla": einsums over all heads, for any device; "blocked": one head after
            another, each in its cache, with gradients of its own, for CPUs; "cudnn": the fused
            kernel of NVIDIA GPUs, for bfloat16.
    Returns:
        [B, T, H, K] in the dtype of the inputs.
    Raises:
        ValueError: unknown implementation.
    """
    if implementation == "xla":
        return _over_all_heads(q_BTHK, k_BTGK, v_BTGK)
    if implementation == "blocked":
        return _over_single_heads(q_BTHK, k_BTGK, v_BTGK)
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(
            q_BTHK, k_BTGK, v_BTGK, is_causal=True, implementation="cudnn"
        )
    raise ValueError(
        f"implementation: {implementation!r} is unknown. Choose one of {IMPLEMENTATIONS}."
    )


def _blocks(length: int, implementation: str) -> list[tuple[int, int]]:
    """Where each block of queries starts and ends."""
    block = _QUERY_BLOCK[implementation]
    return [(start, min(start + block, length)) for start in range(0, length, block)]


# --------------------------------------------------------------------------------------------
# "xla"


def _over_all_heads(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array) -> jax.Array:
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    q = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)  # [B, G, H/G, T, K]
    k, v = k_BTGK.transpose(0, 2, 1, 3), v_BTGK.transpose(0, 2, 1, 3)  # [B, G, T, K]
    blocks = [
        _attend_block(q[..., start:stop, :], k[:, :, :stop], v[:, :, :stop])
        for start, stop in _blocks(T, "xla")
    ]
    out = jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)
    return checkpoint_name(out, RESULT)


@jax.checkpoint
def _attend_block(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The last rows of causal attention: q [B, G, R, C, K] are the last C of k's S positions."""
    block, seen = q.shape[3], k.shape[2]
    scores = jnp.einsum("bgrck,bgsk->bgrcs", q, k, preferred_element_type=jnp.float32)
    scores = scores * (q.shape[-1] ** -0.5)
    position = jnp.arange(seen - block, seen)
    causal = position[:, None] >= jnp.arange(seen)[None, :]
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1).astype(v.dtype)
    return jnp.einsum("bgrcs,bgsk->bgrck", weights, v)


# --------------------------------------------------------------------------------------------
# "blocked": what XLA's CPU compiler does well (docs/performance.md has the measurements).
# - Plain two-dimensional products whose operands lie as they are read: those that contract the
#   long axis of scores from the left run at a third of the speed. So scores are held transposed,
#   [S keys, R C queries], in both passes, and no product transposes them.
# - Maxima and sums over the keys are then sums of rows, which are vectorised.
# - A block of one key/value head and its R query heads fits into the cache.


@jax.custom_vjp
def _over_single_heads(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array) -> jax.Array:
    return _single_heads_forward(q_BTHK, k_BTGK, v_BTGK)[0]


def _single_heads_forward(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array
) -> tuple[jax.Array, _Residuals]:
    heads = (_group_queries(q_BTHK, k_BTGK.shape[2]), _group_keys(k_BTGK), _group_keys(v_BTGK))
    out, log_sum = jax.lax.map(lambda head: _attend_head(*head), heads)
    out = _ungroup_queries(out.transpose(0, 2, 3, 1), q_BTHK.shape).astype(q_BTHK.dtype)
    out, log_sum = checkpoint_name((out, log_sum), RESULT)
    return out, (q_BTHK, k_BTGK, v_BTGK, out, log_sum)


def _attend_head(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output [K, R, T] and log of the softmax's denominator [R, T], float32, of one kv head.

    Args:
        q: [R, T, K]; k, v: [T, K].
    """
    R, T, K = q.shape
    v_KT = v.T
    outs, log_sums = [], []
    for start, stop in _blocks(T, "blocked"):
        scores = _masked_scores(q[:, start:stop], k[:stop])
        highest = scores.max(axis=0)
        weights = jnp.exp(scores - highest)
        total = weights.sum(axis=0)
        out = _product(v_KT[:, :stop], weights.astype(v.dtype)) / total
        outs.append(out.reshape(K, R, stop - start))
        log_sums.append((highest + jnp.log(total)).reshape(R, stop - start))
    return jnp.concatenate(outs, axis=-1), jnp.concatenate(log_sums, axis=-1)


def _single_heads_backward(
    residuals: _Residuals, out_gradient_BTHK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q_BTHK, k_BTGK, v_BTGK, out_BTHK, log_sum = residuals
    B, T, G, K = k_BTGK.shape
    # Sum over the keys of weight x gradient of the weight (Dao et al. 2022, FlashAttention).
    mean_gradient = jnp.sum(
        out_gradient_BTHK.astype(jnp.float32) * out_BTHK.astype(jnp.float32), axis=-1, keepdims=True
    )
    heads = (
        _group_queries(q_BTHK, G),
        _group_keys(k_BTGK),
        _group_keys(v_BTGK),
        _group_queries(out_gradient_BTHK, G),
        log_sum,
        _group_queries(mean_gradient, G)[..., 0],
    )
    q, k, v = jax.lax.map(lambda head: _head_gradients(*head), heads)
    k, v = (x.reshape(B, G, T, K).transpose(0, 2, 1, 3) for x in (k, v))
    q = _ungroup_queries(q.transpose(0, 2, 3, 1), q_BTHK.shape)
    return q.astype(q_BTHK.dtype), k.astype(k_BTGK.dtype), v.astype(v_BTGK.dtype)


def _head_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out_gradient: jax.Array,
    log_sum: jax.Array,
    mean_gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of one kv head, float32: by its queries [K, R, T], keys and values [T, K]."""
    R, T, K = q.shape
    scale = K**-0.5
    k_KT = jax.lax.optimization_barrier(k.T)  # else it is transposed again for every block
    by_q = []
    by_k = by_v = jnp.zeros((T, K), jnp.float32)
    for start, stop in _blocks(T, "blocked"):
        rows = R * (stop - start)
        block_q = q[:, start:stop].reshape(rows, K)
        block_gradient = out_gradient[:, start:stop].reshape(rows, K)
        scores = _masked_scores(q[:, start:stop], k[:stop])
        weights = jnp.exp(scores - log_sum[:, start:stop].reshape(rows))
        by_weights = _product(v[:stop], block_gradient.T)
        by_scores = weights * (by_weights - mean_gradient[:, start:stop].reshape(rows)) * scale
        by_scores = by_scores.astype(q.dtype)
        by_v = by_v.at[:stop].add(_product(weights.astype(q.dtype), block_gradient))
        by_k = by_k.at[:stop].add(_product(by_scores, block_q))
        by_q.append(_product(k_KT[:, :stop], by_scores).reshape(K, R, stop - start))
    return jnp.concatenate(by_q, axis=-1), by_k, by_v


_over_single_heads.defvjp(_single_heads_forward, _single_heads_backward)


def _masked_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """[S, R C] float32, -inf where a key is behind its query: q [R, C, K] are the last C of S."""
    R, block, K = q.shape
    seen = len(k)
    scores = _product(k, q.reshape(R * block, K).T) * K**-0.5
    query = jnp.tile(jnp.arange(seen - block, seen), R)
    return jnp.where(jnp.arange(seen)[:, None] <= query[None, :], scores, -jnp.inf)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _group_queries(x_BTHK: jax.Array, num_groups: int) -> jax.Array:
    """[B, T, H, K] to [B G, R, T, K]."""
    B, T, H, K = x_BTHK.shape
    x = x_BTHK.reshape(B, T, num_groups, H // num_groups, K).transpose(0, 2, 3, 1, 4)
    return x.reshape(B * num_groups, H // num_groups, T, K)


def _ungroup_queries(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B G, R, T, K] to [B, T, H, K], which is `shape`."""
    B, T, H, K = shape
    return x.reshape(B, H, T, K).transpose(0, 2, 1, 3)


def _group_keys(x_BTGK: jax.Array) -> jax.Array:
    """[B, T, G, K] to [B G, T, K]."""
    B, T, G, K = x_BTGK.shape
    return x_BTGK.transpose(0, 2, 1, 3).reshape(B * G, T, K)
