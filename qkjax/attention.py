"""Causal attention with grouped queries, and the rotary position embedding."""

import jax
import jax.numpy as jnp

# Queries are taken in blocks, each against the keys up to its own end: a causal row never pays for
# the keys that it may not see, and no [T, T] matrix outlives its block.
_QUERY_BLOCK = 256


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


def causal_attention(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over the keys at and before each query.

    Query heads g*H/G to (g+1)*H/G - 1 share key/value head g. The softmax is float32; products
    are in the dtype of the inputs with float32 accumulation. Scores are recomputed in the
    backward pass, so nothing of size T x T is kept for it.

    Returns:
        [B, T, H, K] in the dtype of the inputs.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    q = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)  # [B, G, H/G, T, K]
    k, v = k_BTGK.transpose(0, 2, 1, 3), v_BTGK.transpose(0, 2, 1, 3)  # [B, G, T, K]
    blocks = []
    for start in range(0, T, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, T)
        blocks.append(_attend_block(q[..., start:stop, :], k[:, :, :stop], v[:, :, :stop]))
    out = jnp.concatenate(blocks, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


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
