"""What happens to the parameters after the optimiser's update: hooks, by name; QK-Clip is one.

A hook measures what it needs of the parameters before the update and the batch of the step, and
changes the parameters after it. To add a clip or projection, add an entry to `HOOKS`. Measuring and
changing are separate programs, so that the step's program rounds as it does without hooks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qkjax import model, sharding
from qkjax.config import Config

Rows = dict[str, jax.Array]  # scalars [] float32 by name, for the step's row of metrics.jsonl
_QUERY_BLOCK = 256  # query positions whose logits exist at one time


class Hook(NamedTuple):
    """A measurement before an update and a change after it."""

    # (parameters before the update, tokens [B, T+1] of the step, sharded over `data`) -> arrays
    measure: Callable[[model.Params, jax.Array], Any]
    # (parameters after the update, what `measure` returned) -> (parameters to keep, rows)
    apply: Callable[[model.Params, Any], tuple[model.Params, Rows]]


class Programs(NamedTuple):
    """All hooks of a config, compiled; without any they do nothing."""

    measure: Callable[[model.Params, jax.Array], Any]  # as in `Hook`, before the step
    # (parameters, measured, whether the step was finite [] bool) -> (parameters, rows); a step
    # that was not finite keeps its parameters. Donates the parameters.
    apply: Callable[[model.Params, Any, jax.Array], tuple[model.Params, Rows]]


def make_programs(config: Config, mesh: Mesh) -> Programs:
    """Everything of `HOOKS` that the config asks for."""
    made = {name: make(config, mesh) for name, make in HOOKS.items()}
    hooks = {name: hook for name, hook in made.items() if hook is not None}
    if not hooks:
        return Programs(lambda params, tokens: None, lambda params, measured, finite: (params, {}))

    def measure(params: model.Params, tokens: jax.Array) -> Any:
        return {name: hook.measure(params, tokens) for name, hook in hooks.items()}

    def apply(params: model.Params, measured: Any, finite: jax.Array) -> tuple[model.Params, Rows]:
        rows: Rows = {}
        after = params
        for name, hook in hooks.items():
            after, more = hook.apply(after, measured[name])
            rows |= more
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, params)
        return kept, rows

    same = sharding.replicated(mesh)
    cut = sharding.cut_axes(model.parameter_shapes(config.model), mesh, config.mesh)
    held, rows = sharding.shardings(mesh, cut), sharding.batch_sharding(mesh)
    return Programs(
        jax.jit(measure, in_shardings=(held, rows), out_shardings=same),
        jax.jit(
            apply,
            in_shardings=(held, same, same),
            out_shardings=(held, same),
            donate_argnums=0,
        ),
    )


# --------------------------------------------------------------------------------------------
# QK-Clip.


def qk_clip(config: Config, mesh: Mesh) -> Hook | None:
    """Scales the query kernel of every head whose largest logit was above optimizer.qk_clip.

    The logits are those of the first `optimizer.qk_clip_sequences` sequences of the step's batch,
    by the parameters before the update. Rows: `train/max_logit`, `train/clipped_heads`.

    Keys, which grouped heads share, and the optimiser's state are not touched, so a head's logits
    are multiplied by its own factor and no other head's change.

    Source: Kimi Team, Kimi K2 (2025), its rule for shared keys.
    """
    limit = config.optimizer.qk_clip
    if not limit:
        return None

    def measure(params: model.Params, tokens: jax.Array) -> jax.Array:
        return max_logits(params, _first(tokens, config, mesh), config, mesh)

    def apply(params: model.Params, logits_NH: jax.Array) -> tuple[model.Params, Rows]:
        factors_NH = clip_factors(logits_NH, limit)
        attention = params["blocks"]["attention"]
        kernel = attention["query"]["kernel"]
        by_head = kernel.reshape(*kernel.shape[:-1], config.model.num_heads, -1)
        kernel = (by_head * factors_NH[:, None, :, None]).reshape(kernel.shape)
        attention = {**attention, "query": {"kernel": kernel}}
        clipped = {**params, "blocks": {**params["blocks"], "attention": attention}}
        rows = {
            "train/max_logit": logits_NH.max(),
            "train/clipped_heads": jnp.sum(factors_NH != 1, dtype=jnp.float32),
        }
        return clipped, rows

    return Hook(measure, apply)


def clip_factors(max_logits: jax.Array, limit: float) -> jax.Array:
    """limit / S where the largest logit S is finite and above the limit, else 1.

    Args:
        max_logits: [...] float32, of each head.
    Returns:
        [...] float32 in (0, 1].
    """
    is_above = jnp.isfinite(max_logits) & (max_logits > limit)
    return jnp.where(is_above, limit / jnp.where(is_above, max_logits, 1.0), 1.0)


def max_logits(params: model.Params, tokens: jax.Array, config: Config, mesh: Mesh) -> jax.Array:
    """The largest causal logit of every query head, after 1/sqrt(head_dim), in float32.

    Args:
        tokens: [B, T+1] int32, sharded over `data`, B a multiple of the devices.
    Returns:
        [layers, heads] float32; not finite where a logit is not.
    """
    with sharding.ambient(mesh):
        _, found = model.apply_with_probe(
            params, tokens[:, :-1], config.model.on(sharding.platform(mesh)), _largest_by_head
        )
    return found


def _largest_by_head(vectors: model.HeadVectors) -> jax.Array:
    """[H] of one layer; each device looks at its own sequences."""
    by_sequence = sharding.per_device(_largest_by_sequence)
    return by_sequence(vectors.query_post_BTHK, vectors.key_post_BTGK).max(axis=0)


def _largest_by_sequence(query_BTHK: jax.Array, key_BTGK: jax.Array) -> jax.Array:
    """[B, H]; the logits of one kv head's queries exist at a time, in blocks of queries."""
    B, T, H, K = query_BTHK.shape
    G = key_BTGK.shape[2]
    query = query_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4) * K**-0.5
    pairs = query.reshape(B * G, H // G, T, K), key_BTGK.transpose(0, 2, 1, 3).reshape(-1, T, K)
    return jax.lax.map(lambda pair: _largest_of_kv_head(*pair), pairs).reshape(B, H)


def _largest_of_kv_head(query_RTK: jax.Array, key_TK: jax.Array) -> jax.Array:
    largest = []
    for start in range(0, len(key_TK), _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, len(key_TK))
        logits_RTS = jnp.einsum(
            "rtk,sk->rts",
            query_RTK[:, start:stop],
            key_TK[:stop],
            precision=jax.lax.Precision.HIGHEST,
        )
        causal = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None, :]
        largest.append(jnp.where(causal, logits_RTS, -jnp.inf).max(axis=(1, 2)))
    return jnp.stack(largest).max(axis=0)


def _first(tokens: jax.Array, config: Config, mesh: Mesh) -> jax.Array:
    """The first sequences of the batch, repeated up to a multiple of the devices."""
    wanted = min(config.optimizer.qk_clip_sequences, tokens.shape[0])
    indices = jnp.arange(sharding.round_up_to_devices(mesh, wanted)) % wanted
    return jax.lax.with_sharding_constraint(tokens[indices], sharding.batch_sharding(mesh))


# What may follow an update; each returns None where the config does not ask for it.
HOOKS: dict[str, Callable[[Config, Mesh], Hook | None]] = {"qk_clip": qk_clip}
