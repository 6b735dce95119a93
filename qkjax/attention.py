"""Causal attention with grouped queries, and the rotary position embedding."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# What a rematerialised layer should keep carries this name (jax.ad_checkpoint).
RESULT = "attention"
IMPLEMENTATIONS = ("xla", "blocked", "cudnn", "splash")
# Queries are taken in blocks, each with the keys up to its own end: a causal row computes no keys
# that it may not see, and no [T, T] matrix exists.
_QUERY_BLOCK = 256  # "xla"
_TILE = 128  # "blocked": queries of a head, and keys
# "splash": queries and keys of a block. Blocks behind the diagonal are skipped, so at T 2048 blocks
# of 512 compute 62% of the square, of 1024 75%; smaller ones start more, and shorter, products.
_MOST_SPLASH_BLOCK = 512
_LANES = 128  # of a TPU's vectors: its kernels take multiples

_Pair = tuple[jax.Array, jax.Array]
_Triple = tuple[jax.Array, jax.Array, jax.Array]
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


def causal_attention(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, *, implementation: str = "xla"
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over the keys at and before each query.

    Query heads g*H/G to (g+1)*H/G - 1 share key/value head g. The softmax is float32; products
    are in the dtype of the inputs with float32 accumulation. Scores are recomputed in the
    backward pass, so nothing of size T x T is kept for it.

    Args:
        implementation: "xla": einsums over all heads, for any device; "blocked": one head after
            another in tiles that fit the cache, with gradients of its own, for CPUs; "cudnn": the
            fused kernel of NVIDIA GPUs, for bfloat16; "splash": the fused kernels of TPUs.
    Returns:
        [B, T, H, K] in the dtype of the inputs.
    Raises:
        ValueError: unknown implementation.
    """
    if implementation == "xla":
        return _over_all_heads(q_BTHK, k_BTGK, v_BTGK)
    if implementation == "blocked":
        return _over_tiles(q_BTHK, k_BTGK, v_BTGK)
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(
            q_BTHK, k_BTGK, v_BTGK, is_causal=True, implementation="cudnn"
        )
    if implementation == "splash":
        return _by_splash(q_BTHK, k_BTGK, v_BTGK)
    raise ValueError(
        f"implementation: {implementation!r} is unknown. Choose one of {IMPLEMENTATIONS}."
    )


# --------------------------------------------------------------------------------------------
# "xla"


def _over_all_heads(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array) -> jax.Array:
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    q = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)  # [B, G, H/G, T, K]
    k, v = k_BTGK.transpose(0, 2, 1, 3), v_BTGK.transpose(0, 2, 1, 3)  # [B, G, T, K]
    blocks = []
    for start in range(0, T, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, T)
        blocks.append(_attend_block(q[..., start:stop, :], k[:, :, :stop], v[:, :, :stop]))
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
# - One key/value head at a time, in square tiles of scores that stay in a core's cache from the
#   product that makes them to the products that use them.
# - Plain two-dimensional products whose operands lie as they are read: those that contract the
#   long axis of scores from the left run at a third of the speed. So scores are held transposed,
#   [C keys, R C queries], in both passes, and no product transposes them.
# - Maxima and sums over the keys are then sums of rows, which are vectorised.
# The algorithm is that of Dao et al. 2022 (FlashAttention) and 2023.


@jax.custom_vjp
def _over_tiles(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array) -> jax.Array:
    return _tiles_forward(q_BTHK, k_BTGK, v_BTGK)[0]


def _tiles_forward(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array
) -> tuple[jax.Array, _Residuals]:
    G = k_BTGK.shape[2]
    heads = (_query_tiles(q_BTHK, G), _key_tiles(k_BTGK), _key_tiles(v_BTGK))
    out, log_sum = jax.lax.map(lambda head: _attend_head(*head), heads)
    out = _untile_queries(out, q_BTHK.shape).astype(q_BTHK.dtype)
    out, log_sum = checkpoint_name((out, log_sum), RESULT)
    return out, (q_BTHK, k_BTGK, v_BTGK, out, log_sum)


def _attend_head(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One kv head: output [n, K, R C] and log of the softmax's denominator [n, R C], float32.

    Args:
        q: [n, R C, K] in n tiles; k, v: [n, C, K].
    """
    rows, K = q.shape[1:]
    v_nKC = jax.lax.optimization_barrier(v.mT)  # else it is transposed for every tile

    def attend_tile(_: None, tile: tuple[jax.Array, jax.Array]) -> tuple[None, _Pair]:
        i, q_i = tile
        q_i = jax.lax.optimization_barrier(q_i.T)

        def see(j: jax.Array, seen: _Triple, *, mask: bool = False) -> _Triple:
            highest, total, out = seen
            scores = _scores(q_i, k[j], mask)
            new_highest = jnp.maximum(highest, scores.max(axis=0))
            weights = jnp.exp(scores - new_highest)
            faded = jnp.exp(highest - new_highest)
            return (
                new_highest,
                total * faded + weights.sum(axis=0),
                out * faded + _product(v_nKC[j], weights.astype(v.dtype)),
            )

        nothing = (jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros((K, rows)))
        seen = jax.lax.fori_loop(0, i, see, nothing)
        highest, total, out = see(i, seen, mask=True)
        return None, (out / total, highest + jnp.log(total))

    return jax.lax.scan(attend_tile, None, (jnp.arange(len(q)), q))[1]


def _tiles_backward(
    residuals: _Residuals, out_gradient_BTHK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    q_BTHK, k_BTGK, v_BTGK, out_BTHK, log_sum = residuals
    G = k_BTGK.shape[2]
    # Sum over the keys of weight x gradient of the weight.
    mean_gradient = jnp.sum(
        out_gradient_BTHK.astype(jnp.float32) * out_BTHK.astype(jnp.float32), axis=-1, keepdims=True
    )
    heads = (
        _query_tiles(q_BTHK, G),
        _key_tiles(k_BTGK),
        _key_tiles(v_BTGK),
        _query_tiles(out_gradient_BTHK, G),
        log_sum,
        _query_tiles(mean_gradient, G)[..., 0],
    )
    q, k, v = jax.lax.map(lambda head: _head_gradients(*head), heads)
    return (
        _untile_queries(q, q_BTHK.shape).astype(q_BTHK.dtype),
        _untile_keys(k, k_BTGK.shape).astype(k_BTGK.dtype),
        _untile_keys(v, v_BTGK.shape).astype(v_BTGK.dtype),
    )


def _head_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out_gradient: jax.Array,
    log_sum: jax.Array,
    mean_gradient: jax.Array,
) -> _Triple:
    """Gradients of one kv head, float32: of queries [n, K, R C], keys and values [n, C, K].

    Args: as in `_attend_head`; log_sum and mean_gradient: [n, R C].
    """
    rows, K = q.shape[1:]
    k_nKC = jax.lax.optimization_barrier(k.mT)

    def differentiate_tile(carry: _Pair, tile: tuple[jax.Array, ...]) -> tuple[_Pair, jax.Array]:
        i, q_i, gradient_i, log_sum_i, mean_gradient_i = tile
        turned_q, turned_gradient = jax.lax.optimization_barrier((q_i.T, gradient_i.T))

        def see(j: jax.Array, carry: _Triple, *, mask: bool = False) -> _Triple:
            by_q, by_k, by_v = carry
            weights = jnp.exp(_scores(turned_q, k[j], mask) - log_sum_i)
            by_scores = weights * (_product(v[j], turned_gradient) - mean_gradient_i)
            by_scores = by_scores.astype(q.dtype)
            return (
                by_q + _product(k_nKC[j], by_scores),
                by_k.at[j].add(_product(by_scores, q_i)),
                by_v.at[j].add(_product(weights.astype(q.dtype), gradient_i)),
            )

        start = (jnp.zeros((K, rows)), *carry)
        by_q, by_k, by_v = see(i, jax.lax.fori_loop(0, i, see, start), mask=True)
        return (by_k, by_v), by_q

    start = (jnp.zeros(k.shape), jnp.zeros(v.shape))
    tiles = (jnp.arange(len(q)), q, out_gradient, log_sum, mean_gradient)
    (by_k, by_v), by_q = jax.lax.scan(differentiate_tile, start, tiles)
    return by_q * K**-0.5, by_k * K**-0.5, by_v


_over_tiles.defvjp(_tiles_forward, _tiles_backward)


def _scores(q_KQ: jax.Array, k_CK: jax.Array, mask: bool) -> jax.Array:
    """[C, R C] float32; with `mask` of the tile on the diagonal, -inf behind each query."""
    C, K = k_CK.shape
    scores = _product(k_CK, q_KQ) * K**-0.5
    if not mask:
        return scores
    query = jnp.arange(q_KQ.shape[1]) % C
    return jnp.where(jnp.arange(C)[:, None] <= query[None, :], scores, -jnp.inf)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _tiles(length: int) -> tuple[int, int]:
    """Number and length C of the tiles; the last one is padded, which no query before it sees."""
    size = min(length, _TILE)
    return -(-length // size), size


def _query_tiles(x_BTHK: jax.Array, num_groups: int) -> jax.Array:
    """[B, T, H, K] to [B G, n, R C, K]."""
    B, T, H, K = x_BTHK.shape
    n, C = _tiles(T)
    x = jnp.pad(x_BTHK, ((0, 0), (0, n * C - T), (0, 0), (0, 0)))
    x = x.reshape(B, n, C, num_groups, H // num_groups, K).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(B * num_groups, n, -1, K)


def _untile_queries(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B G, n, K, R C] to [B, T, H, K], which is `shape`."""
    B, T, H, K = shape
    n, C = _tiles(T)
    x = x.reshape(B, -1, n, K, x.shape[-1] // C, C).transpose(0, 2, 5, 1, 4, 3)
    return x.reshape(B, n * C, H, K)[:, :T]


def _key_tiles(x_BTGK: jax.Array) -> jax.Array:
    """[B, T, G, K] to [B G, n, C, K]."""
    B, T, G, K = x_BTGK.shape
    n, C = _tiles(T)
    x = jnp.pad(x_BTGK, ((0, 0), (0, n * C - T), (0, 0), (0, 0)))
    return x.transpose(0, 2, 1, 3).reshape(B * G, n, C, K)


def _untile_keys(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B G, n, C, K] to [B, T, G, K], which is `shape`."""
    B, T, G, K = shape
    return x.reshape(B, G, -1, K).transpose(0, 2, 1, 3)[:, :T]


# --------------------------------------------------------------------------------------------
# "splash": the Pallas kernels that jax has for TPUs. One kernel forward; backward one for the
# queries and one for keys and values, each with float32 sums in the core's memory. (Their fused
# form writes a share of the queries' gradient for every block of keys, in the inputs' dtype.)


def _by_splash(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array) -> jax.Array:
    # Imported where it is used: Pallas takes a second that other platforms need not wait for.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, H, K = q_BTHK.shape[1:]
    length = -(-T // _LANES) * _LANES  # padded at the end, which no query before it sees
    block = _splash_block(length)
    attend = kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * H),
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        residual_checkpoint_name=RESULT,
    )
    scaled = (q_BTHK.astype(jnp.float32) * K**-0.5).astype(q_BTHK.dtype)

    def heads_first(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, length - T), (0, 0), (0, 0)))
        return padded.transpose(0, 2, 1, 3)

    out_BHTK = jax.vmap(attend)(*(heads_first(x) for x in (scaled, k_BTGK, v_BTGK)))
    return out_BHTK.transpose(0, 2, 1, 3)[:, :T]


def _splash_block(length: int) -> int:
    """The longest block that divides a length, which is a multiple of `_LANES`."""
    return max(
        block for block in range(_LANES, _MOST_SPLASH_BLOCK + 1, _LANES) if length % block == 0
    )
