"""The decoder as a pure function of its parameters: `init`, `apply`, and a probe into its heads.

This module alone knows flax. Blocks are scanned over stacked parameters [N, in, out]; every
kernel is stored [in, out]. Parameter names are the contract that `optimizer.py` and the exporter
read: see `parameter_shapes`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from qkjax import attention, sharding
from qkjax.config import ModelConfig

Params = dict[str, Any]
_normal = nn.initializers.normal(stddev=0.02)


class HeadVectors(NamedTuple):
    """What a probe sees of one layer: float32, from the projections' float32 accumulators."""

    query_pre_BTHK: jax.Array  # after QK-Norm, before RoPE
    query_post_BTHK: jax.Array  # as they enter the attention
    key_pre_BTGK: jax.Array
    key_post_BTGK: jax.Array
    value_BTGK: jax.Array
    # Of models with QK-Norm: before it, and after its division, before gamma.
    query_pre_norm_BTHK: jax.Array | None = None
    query_post_norm_BTHK: jax.Array | None = None
    key_pre_norm_BTGK: jax.Array | None = None
    key_post_norm_BTGK: jax.Array | None = None


Probe = Callable[[HeadVectors], Any]
WholeLayer = Callable[[Any], Any]  # the parameters of one layer, from a device's parts of them


class _Affine(NamedTuple):
    """Keys k become k @ matrix + shift."""

    matrix: jax.Array  # [N, G, K, K]
    shift: jax.Array  # [N, G, K]


class _KeyProjection(NamedTuple):
    """The change of the keys at each stage; None: no change."""

    pre_rope: _Affine | None = None
    post_rope: _Affine | None = None


_NO_PROJECTION = _KeyProjection()


def init(key: jax.Array, config: ModelConfig) -> Params:
    """Fresh float32 parameters: N(0, 0.02) for every matrix, 1 for every gamma.

    A parameter's values depend on the key and on its own name alone, so the arms of a seed share
    the initial values of every tensor that they have in common.
    """
    # Traced only, never computed: parameters depend on neither, and some trace on GPUs alone.
    anywhere = dataclasses.replace(config, attention="xla", unroll=1)
    return _decoder(anywhere).init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def parameter_shapes(config: ModelConfig) -> Params:
    """The tree of `init` as jax.ShapeDtypeStruct, without computing it."""
    return jax.eval_shape(lambda: init(jax.random.key(0), config))


def apply(
    params: Params,
    tokens_BT: jax.Array,
    config: ModelConfig,
    whole_layer: WholeLayer | None = None,
) -> jax.Array:
    """Final hidden states [B, T, D] in the compute dtype; logits are hidden @ embedding^T.

    Args:
        config: best settled for the platform that computes, by `ModelConfig.on`. What is left
            open, here and in the functions below, is what runs on every platform: attention
            "xla", layers in a loop.
        whole_layer: makes one layer's parameters whole, where those of `blocks` are a device's
            parts; it is called inside the layer loop, forward and backward.
    """
    return _decoder(config, whole_layer=whole_layer).apply({"params": params}, tokens_BT)[0]


def apply_with_probe(
    params: Params, tokens_BT: jax.Array, config: ModelConfig, probe: Probe
) -> tuple[jax.Array, Any]:
    """As `apply`, and what `probe` returns for every layer, stacked on a leading axis [N, ...].

    The probe runs inside the layer loop, so what it reduces is never held for all layers.
    """
    return _decoder(config, probe).apply({"params": params}, tokens_BT)


def apply_with_key_projection(
    params: Params,
    tokens_BT: jax.Array,
    config: ModelConfig,
    projection_NGKK: jax.Array,
    shift_NGK: jax.Array,
    stage: str,
) -> jax.Array:
    """As `apply`, with every key k that enters the attention replaced by k @ P + b.

    Args:
        projection_NGKK: P of every layer and kv head, float32; the identity changes nothing.
        shift_NGK: b of every layer and kv head, float32.
        stage: "pre_rope" (after QK-Norm, before RoPE) or "post_rope".
    Raises:
        TypeError: another stage.
    """
    projection = _KeyProjection(**{stage: _Affine(projection_NGKK, shift_NGK)})
    return _decoder(config).apply({"params": params}, tokens_BT, projection)[0]


def logits(params: Params, tokens_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """Next-token logits [B, T, V] float32. For short inputs: training never holds them all."""
    hidden = apply(params, tokens_BT, config)
    table = params["embedding"].astype(hidden.dtype)
    return jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)


def _decoder(
    config: ModelConfig, probe: Probe | None = None, whole_layer: WholeLayer | None = None
) -> "_Decoder":
    return _Decoder(config.on("any"), probe, whole_layer)


class _RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * gamma over the last axis, in float32 (Zhang & Sennrich 2019)."""

    eps: float
    trained: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gamma = self.param("gamma", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        if not self.trained:  # no gradient: a frozen gamma also stays out of the clip norm
            gamma = jax.lax.stop_gradient(gamma)
        return _divided_by_rms(x, self.eps) * gamma


class _Linear(nn.Module):
    """x @ kernel in the compute dtype, without bias."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, out_dtype: Any = None) -> jax.Array:
        kernel = self.param("kernel", _normal, (x.shape[-1], self.features), jnp.float32)
        # A float32 output of bfloat16 inputs would run the backward products in float32, so only
        # the probe asks for it.
        # Two axes: XLA's CPU compiler transposes operands that are contracted over more than one,
        # as the kernel's gradient is over batch and time.
        y = jnp.dot(
            x.reshape(-1, x.shape[-1]).astype(self.dtype),
            kernel.astype(self.dtype),
            preferred_element_type=out_dtype or self.dtype,
        )
        return y.reshape(*x.shape[:-1], self.features)


class _Attention(nn.Module):
    config: ModelConfig
    probe: Probe | None

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        projection: _KeyProjection,
    ) -> tuple[jax.Array, Any]:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        query = _Linear(c.num_heads * c.head_dim, dtype, name="query")
        key = _Linear(c.num_kv_heads * c.head_dim, dtype, name="key")
        value = _Linear(c.num_kv_heads * c.head_dim, dtype, name="value")
        if c.qk_norm == "none":
            query_norm = key_norm = _to_float32
        else:
            trained = c.qk_norm == "learned"
            query_norm = _RMSNorm(c.norm_eps, trained, name="query_norm")
            key_norm = _RMSNorm(c.norm_eps, trained, name="key_norm")

        def vectors(out_dtype: Any) -> HeadVectors:
            projected_q = _split_heads(query(x_BTD, out_dtype), c.head_dim)
            projected_k = _split_heads(key(x_BTD, out_dtype), c.head_dim)
            q = query_norm(projected_q)
            k = _project(key_norm(projected_k), projection.pre_rope)
            v = _split_heads(value(x_BTD, out_dtype), c.head_dim)
            q_post = attention.apply_rotary(q, *rotary)
            k_post = _project(attention.apply_rotary(k, *rotary), projection.post_rope)
            seen = HeadVectors(q, q_post, k, k_post, v)
            if c.qk_norm == "none":
                return seen
            return seen._replace(
                query_pre_norm_BTHK=_to_float32(projected_q),
                query_post_norm_BTHK=_divided_by_rms(projected_q, c.norm_eps),
                key_pre_norm_BTGK=_to_float32(projected_k),
                key_post_norm_BTGK=_divided_by_rms(projected_k, c.norm_eps),
            )

        seen = vectors(dtype)
        attend = functools.partial(
            attention.causal_attention,
            implementation=c.attention,
        )
        out_BTHK = sharding.per_device(attend)(
            seen.query_post_BTHK.astype(dtype), seen.key_post_BTGK.astype(dtype), seen.value_BTGK
        )
        out = _Linear(c.d_model, dtype, name="output")(out_BTHK.reshape(*x_BTD.shape[:2], -1))
        probed = None if self.probe is None else self.probe(vectors(jnp.float32))
        return out, probed


class _MLP(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        up_BTF = _Linear(c.d_ff, dtype, name="up")(x_BTD)
        if c.mlp == "swiglu":  # Shazeer 2020
            hidden_BTF = nn.silu(_Linear(c.d_ff, dtype, name="gate")(x_BTD)) * up_BTF
        else:  # relu2: So et al. 2021 (Primer)
            hidden_BTF = jnp.square(nn.relu(up_BTF))
        return _Linear(c.d_model, dtype, name="down")(hidden_BTF)


class _Block(nn.Module):
    config: ModelConfig
    probe: Probe | None

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        projection: _KeyProjection,
    ) -> tuple[jax.Array, Any]:
        eps = self.config.norm_eps
        normed = _RMSNorm(eps, name="attention_norm")(x_BTD)
        attended, probed = _Attention(self.config, self.probe, name="attention")(
            normed, rotary, projection
        )
        x_BTD = x_BTD + attended
        normed = _RMSNorm(eps, name="mlp_norm")(x_BTD)
        return x_BTD + _MLP(self.config, name="mlp")(normed), probed


class _Decoder(nn.Module):
    config: ModelConfig
    probe: Probe | None
    whole_layer: WholeLayer | None = None

    @nn.compact
    def __call__(
        self, tokens_BT: jax.Array, projection: _KeyProjection = _NO_PROJECTION
    ) -> tuple[jax.Array, Any]:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        embedding = self.param("embedding", _normal, (c.vocab_size, c.d_model), jnp.float32)
        x_BTD = (embedding[tokens_BT] * math.sqrt(c.d_model)).astype(dtype)
        rotary = attention.rotary_tables(tokens_BT.shape[1], c.head_dim, c.rope_base)
        block, whole_layer = _Block, self.whole_layer
        if whole_layer is not None:
            block = nn.map_variables(
                _Block, "params", trans_in_fn=lambda cut: {"params": whole_layer(cut["params"])}
            )
        # Of unrolled layers a compiler would keep what was gathered: two equal gathers are one.
        prevent_cse = whole_layer is not None
        policy = _is_kept if c.remat == "none" else jax.checkpoint_policies.nothing_saveable
        blocks = nn.scan(
            nn.remat(block, policy=policy, prevent_cse=prevent_cse),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=c.num_layers,
            unroll=c.unroll,
        )(c, self.probe, name="blocks")
        x_BTD, probed = blocks(x_BTD, rotary, projection)
        return _RMSNorm(c.norm_eps, name="final_norm")(x_BTD).astype(dtype), probed


def _is_kept(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """What the backward pass takes from the forward pass: linear layers, and what attention gives.

    Everything else of a layer is cheaper to compute again than to store and read. Products of
    batches of matrices are attention's own, of size T x T.
    """
    name = primitive.name
    return (
        (name == "dot_general" and parameters["dimension_numbers"][1] == ((), ()))
        or name.startswith("dot_product_attention_fwd")  # cuDNN's
        or (name == "name" and parameters["name"] == attention.RESULT)
    )


def _split_heads(x: jax.Array, head_dim: int) -> jax.Array:
    return x.reshape(*x.shape[:2], -1, head_dim)


def _project(key_BTGK: jax.Array, affine: _Affine | None) -> jax.Array:
    """The keys of one layer, projected by its matrices [G, K, K] and shifts [G, K]."""
    if affine is None:
        return key_BTGK
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("btgk,gkj->btgj", key_BTGK, affine.matrix, precision=highest) + affine.shift


def _divided_by_rms(x: jax.Array, eps: float) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def _to_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)
