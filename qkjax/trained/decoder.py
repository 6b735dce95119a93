"""The decoder with a cache: keys and values of earlier tokens are kept instead of computed again.

The forward pass of `model.py` for one sequence, in float32 for every run; tests hold the
two equal. Tokens may form a tree: what each one sees, and its position, are arguments.
Generation extends one line; scoring lets the continuations of a text branch off its end.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qkjax import attention, model
from qkjax.config import ModelConfig


class Cache(NamedTuple):
    """Keys (after RoPE) and values of the tokens taken in so far, zeros beyond; float32.

    The first axis is the model's layers.
    """

    key_NGSK: jax.Array  # S: slots, one for every token that the cache has room for
    value_NGSK: jax.Array

    @property
    def slots(self) -> int:
        """For how many tokens there is room."""
        return self.key_NGSK.shape[2]


def empty_cache(config: ModelConfig, slots: int) -> Cache:
    """A cache with room for `slots` tokens."""
    shape = (config.num_layers, config.num_kv_heads, slots, config.head_dim)
    return Cache(jnp.zeros(shape), jnp.zeros(shape))


def next_token_logits(
    params: model.Params, config: ModelConfig, cache: Cache, tokens_C: np.ndarray, start: int
) -> tuple[jax.Array, Cache]:
    """Takes tokens at positions start ... start + C - 1 in; earlier ones must be in the cache.

    Args:
        tokens_C: int32 [C], C at least 1.
    Returns:
        Logits [V] float32 of the token after the last, and the cache with these positions; the
        old cache is given up.
    """
    with jax.default_matmul_precision("highest"):  # GPUs would take TF32
        return _next_token_logits(params, cache, tokens_C, jnp.int32(start), config)


@functools.partial(jax.jit, static_argnums=4, donate_argnums=1)
def _next_token_logits(
    params: model.Params, cache: Cache, tokens_C: jax.Array, start: jax.Array, config: ModelConfig
) -> tuple[jax.Array, Cache]:
    position_C = start + jnp.arange(len(tokens_C))
    is_seen_CS = jnp.arange(cache.slots)[None, :] <= position_C[:, None]
    hidden_CD, cache = extend(params, config, cache, tokens_C, start, position_C, is_seen_CS)
    return params["embedding"] @ hidden_CD[-1], cache


def extend(
    params: model.Params,
    config: ModelConfig,
    cache: Cache,
    tokens_C: jax.Array,
    start: jax.Array | int,
    position_C: jax.Array,
    is_seen_CS: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Takes tokens in, in the slots start ... start + C - 1; to be called under jit.

    Args:
        position_C: int [C], of every token in its own text, below the number of slots.
        is_seen_CS: bool [C, S], whose keys a token sees, by slot; its own must be among them.
    Returns:
        The final norm's output [C, D] float32, whose product with the embedding is the logits, and
        the cache with these slots filled.
    """
    cos_SK, sin_SK = attention.rotary_tables(cache.slots, config.head_dim, config.rope_base)
    rotary = cos_SK[position_C], sin_SK[position_C]

    def block(x_CD: jax.Array, layer: tuple[Any, Cache]) -> tuple[jax.Array, Cache]:
        p, kept = layer
        normed = _rms_norm(x_CD, p["attention_norm"], config)
        attended, kept = _attend(p["attention"], normed, kept, rotary, is_seen_CS, start, config)
        x_CD = x_CD + attended
        normed = _rms_norm(x_CD, p["mlp_norm"], config)
        return x_CD + _mlp(p["mlp"], normed, config), kept

    x_CD = params["embedding"][tokens_C] * math.sqrt(config.d_model)
    x_CD, cache = jax.lax.scan(block, x_CD, (params["blocks"], cache))
    return _rms_norm(x_CD, params["final_norm"], config), cache


def _attend(
    p: Any,
    x_CD: jax.Array,
    kept: Cache,  # of this layer: [G, S, K]
    rotary: tuple[jax.Array, jax.Array],
    is_seen_CS: jax.Array,
    start: jax.Array | int,
    config: ModelConfig,
) -> tuple[jax.Array, Cache]:
    C, G, K = len(x_CD), config.num_kv_heads, config.head_dim
    query_CHK = (x_CD @ p["query"]["kernel"]).reshape(C, -1, K)
    key_CGK = (x_CD @ p["key"]["kernel"]).reshape(C, G, K)
    value_CGK = (x_CD @ p["value"]["kernel"]).reshape(C, G, K)
    if config.qk_norm != "none":
        query_CHK = _rms_norm(query_CHK, p["query_norm"], config)
        key_CGK = _rms_norm(key_CGK, p["key_norm"], config)
    query_CHK = attention.apply_rotary(query_CHK, *rotary)
    key_CGK = attention.apply_rotary(key_CGK, *rotary)
    update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
    keys = update(kept.key_NGSK, key_CGK.swapaxes(0, 1))
    values = update(kept.value_NGSK, value_CGK.swapaxes(0, 1))
    query = query_CHK.reshape(C, G, -1, K).transpose(1, 2, 0, 3)  # R: query heads of a kv head
    scores = jnp.einsum("grck,gsk->grcs", query, keys) * K**-0.5
    weights = jax.nn.softmax(jnp.where(is_seen_CS, scores, -jnp.inf), axis=-1)
    out = jnp.einsum("grcs,gsk->grck", weights, values)
    return out.transpose(2, 0, 1, 3).reshape(C, -1) @ p["output"]["kernel"], Cache(keys, values)


def _mlp(p: Any, x_CD: jax.Array, config: ModelConfig) -> jax.Array:
    up_CF = x_CD @ p["up"]["kernel"]
    if config.mlp == "swiglu":
        hidden_CF = jax.nn.silu(x_CD @ p["gate"]["kernel"]) * up_CF
    else:
        hidden_CF = jnp.square(jax.nn.relu(up_CF))
    return hidden_CF @ p["down"]["kernel"]


def _rms_norm(x: jax.Array, p: Any, config: ModelConfig) -> jax.Array:
    mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + config.norm_eps) * p["gamma"]
