"""Which parameter gets which rule: by name, total, and printed; schedules; Muon's granularity.

A parameter's name is its '/'-joined path. Every name must match exactly one row of `_GROUPS`, so
that a new parameter is an error and never silently changes its optimiser.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qkjax import errors, muon
from qkjax.config import Config, Schedule

_GROUPS = {
    "matrix": r"blocks/(attention/(query|key|value|output)|mlp/(gate|up|down))/kernel",
    "qk_gamma": r"blocks/attention/(query|key)_norm/gamma",
    "auxiliary": r"embedding|(blocks/(attention|mlp)_norm|final_norm)/gamma",
}
_ATTENTION = "blocks/attention"
_OUTPUT = f"{_ATTENTION}/output/kernel"
_INPUTS = tuple(f"{_ATTENTION}/{name}/kernel" for name in ("query", "key", "value"))
_ATTENTION_KERNELS = (*_INPUTS, _OUTPUT)

_Named = dict[str, jax.Array]
_Regroup = Callable[[_Named], _Named]


@dataclasses.dataclass(frozen=True)
class Route:
    """What happens to one parameter at every update."""

    name: str
    shape: tuple[int, ...]
    matrix: tuple[int, ...] | None  # [in, out] of what Muon orthogonalises, None with AdamW
    rule: str  # "muon" | "adamw" | "frozen" (no update, no state)
    learning_rate: float  # peak
    weight_decay: float


def routing_table(params_shapes: Any, config: Config) -> list[Route]:
    """The route of every parameter, in the order of the parameter tree's leaves.

    Args:
        params_shapes: the parameter tree, as arrays or jax.ShapeDtypeStruct.
    Raises:
        UsageError: a parameter matches no group of names or several, or the attention kernels
            cannot be merged.
    """
    shapes = _by_name(params_shapes)
    groups = {name: _group_of(name) for name in shapes}
    muon_shapes = {n: s for n, s in shapes.items() if _rule(groups[n], config) == "muon"}
    group, _ = _grouping(config)
    grouped = jax.eval_shape(group, muon_shapes) if muon_shapes else {}
    routes = []
    for name, shape in shapes.items():
        rule = _rule(groups[name], config)
        matrix = grouped[name if name in grouped else _ATTENTION] if rule == "muon" else None
        rate, decay = _rate_and_decay(groups[name], rule, config)
        routes.append(Route(name, shape.shape, matrix and matrix.shape[-2:], rule, rate, decay))
    return routes


def format_routing_table(routes: list[Route]) -> str:
    """One line a parameter, columns aligned: the text of parameters.txt."""
    rows = [("parameter", "shape", "matrix", "optimiser", "peak_lr", "weight_decay")]
    for r in routes:
        shape, matrix = ("x".join(map(str, s)) if s else "-" for s in (r.shape, r.matrix))
        rate, decay = f"{r.learning_rate:.6g}", f"{r.weight_decay:.6g}"
        rows.append((r.name, shape, matrix, r.rule, rate, decay))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def learning_rate(schedule: Schedule, peak: float) -> optax.Schedule:
    """`peak` times `schedule.factor` of an update counted from 0, traceable; 0 after the last.

    Returns:
        A function from the count [] (int32) to the learning rate [] (float32).
    """

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        factor = jnp.ones((), jnp.float32)
        if schedule.warmup_steps:
            factor = jnp.minimum(factor, (count + 1) / schedule.warmup_steps)
        if schedule.decay_steps:
            left = jnp.maximum(schedule.num_steps - count, 0)
            factor = jnp.minimum(factor, left / schedule.decay_steps)
        return peak * factor

    return rate


def make_optimizer(config: Config, params_shapes: Any) -> optax.GradientTransformation:
    """Clipping by the global norm, then every parameter's rule as in `routing_table`.

    Args:
        config: with its dtypes settled (`Config.for_platform`).
        params_shapes: the parameter tree, as arrays or jax.ShapeDtypeStruct.
    Raises:
        UsageError: as `routing_table`.
    """
    routes = routing_table(params_shapes, config)
    rules = {
        "muon": lambda: _muon(config),
        "adamw": lambda: _adamw(config, {r.name: r.weight_decay for r in routes}),
        "frozen": optax.set_to_zero,
    }
    used = {route.rule: rules[route.rule]() for route in routes}
    labels = jax.tree.unflatten(jax.tree.structure(params_shapes), [r.rule for r in routes])
    by_rule = optax.partition(used, labels)
    clip_norm = config.optimizer.clip_norm
    return optax.chain(optax.clip_by_global_norm(clip_norm), by_rule) if clip_norm else by_rule


def _group_of(name: str) -> str:
    found = [group for group, pattern in _GROUPS.items() if re.fullmatch(pattern, name)]
    if len(found) != 1:
        raise errors.UsageError(
            f"{name}: {' and '.join(found) or 'none'} of the optimiser's groups of names match "
            f"this parameter, expected exactly one of {', '.join(_GROUPS)}. "
            "Correct _GROUPS in qkjax/optimizer.py."
        )
    return found[0]


def _rule(group: str, config: Config) -> str:
    if group == "qk_gamma" and config.model.qk_norm == "frozen":
        return "frozen"
    return "muon" if group == "matrix" and config.optimizer.name == "muon" else "adamw"


def _rate_and_decay(group: str, rule: str, config: Config) -> tuple[float, float]:
    if rule == "frozen":
        return 0.0, 0.0
    optimizer = config.optimizer
    decay = {
        "matrix": optimizer.weight_decay,
        "qk_gamma": optimizer.gamma_weight_decay,
        "auxiliary": optimizer.auxiliary_weight_decay,
    }[group]
    is_main = group == "matrix"  # in AdamW arms the two rates are one
    return optimizer.learning_rate if is_main else optimizer.auxiliary_learning_rate, decay


def _adamw(config: Config, weight_decay: dict[str, float]) -> optax.GradientTransformation:
    """AdamW with decoupled decay of each parameter's own strength (Loshchilov & Hutter 2019)."""
    optimizer = config.optimizer

    def add_decay(path: Any, update: jax.Array, param: jax.Array) -> jax.Array:
        return update + weight_decay[_name(path)] * param

    return optax.chain(
        optax.scale_by_adam(optimizer.beta1, optimizer.beta2, optimizer.eps),
        optax.stateless(lambda updates, params: jax.tree.map_with_path(add_decay, updates, params)),
        optax.scale_by_learning_rate(
            learning_rate(config.schedule, optimizer.auxiliary_learning_rate)
        ),
    )


def _muon(config: Config) -> optax.GradientTransformation:
    """Muon on the matrices that `muon.granularity` makes of the kernels; its state has theirs."""
    inner = muon.muon(
        learning_rate(config.schedule, config.optimizer.learning_rate),
        momentum=config.muon.momentum,
        nesterov=config.muon.nesterov,
        weight_decay=config.optimizer.weight_decay,
        coefficients=config.muon.coefficients,
        scale=config.muon.scale,
        dtype=jnp.dtype(config.muon.dtype),
    )
    group, ungroup = _grouping(config)

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(group(_by_name(params)))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        named = _by_name(updates)
        grouped, state = inner.update(group(named), state, group(_by_name(params)))
        results = ungroup(grouped)
        ordered = [results[name] for name in named]
        return jax.tree.unflatten(jax.tree.structure(updates), ordered), state

    return optax.GradientTransformation(init, update)


def _grouping(config: Config) -> tuple[_Regroup, _Regroup]:
    """The matrices that Muon orthogonalises, made of the kernels by name, and the way back."""
    model = config.model
    if config.muon.granularity == "merged":
        query, key = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        return _merge, functools.partial(_unmerge, widths=(query, key, key))
    if config.muon.granularity == "per_head":
        return functools.partial(_split_heads, head_dim=model.head_dim), _join_heads
    return dict, dict  # separate: every kernel is a matrix


def _merge(kernels: _Named) -> _Named:
    """Query | key | value | output side by side, [N, D, D + 2 G K + D]: the original's matrix.

    The output kernel [N, H K, D] is not transposed, so this needs H K = D.
    """
    attention = [kernels[name] for name in _ATTENTION_KERNELS]
    if len({kernel.shape[-2] for kernel in attention}) > 1:
        raise errors.UsageError(
            "muon.granularity: merged needs attention kernels of equally many rows, found "
            f"{', '.join(str(kernel.shape) for kernel in attention)}. "
            "Choose separate or per_head, or num_heads * head_dim = d_model."
        )
    others = {name: x for name, x in kernels.items() if name not in _ATTENTION_KERNELS}
    return others | {_ATTENTION: jnp.concatenate(attention, axis=-1)}


def _unmerge(matrices: _Named, *, widths: tuple[int, ...]) -> _Named:
    attention = jnp.split(matrices[_ATTENTION], list(itertools.accumulate(widths)), axis=-1)
    others = {name: x for name, x in matrices.items() if name != _ATTENTION}
    return others | dict(zip(_ATTENTION_KERNELS, attention, strict=True))


def _split_heads(kernels: _Named, *, head_dim: int) -> _Named:
    """[N, D, H K] to [N, H, D, K]; the output kernel, [N, H K, D], to [N, H, K, D]."""

    def split(name: str, x: jax.Array) -> jax.Array:
        if name == _OUTPUT:
            return x.reshape(*x.shape[:-2], -1, head_dim, x.shape[-1])
        return x.reshape(*x.shape[:-1], -1, head_dim).swapaxes(-3, -2)

    return {n: split(n, x) if n in _ATTENTION_KERNELS else x for n, x in kernels.items()}


def _join_heads(matrices: _Named) -> _Named:
    def join(name: str, x: jax.Array) -> jax.Array:
        if name == _OUTPUT:
            return x.reshape(*x.shape[:-3], -1, x.shape[-1])
        x = x.swapaxes(-3, -2)
        return x.reshape(*x.shape[:-2], -1)

    return {n: join(n, x) if n in _ATTENTION_KERNELS else x for n, x in matrices.items()}


def _by_name(tree: Any) -> dict[str, Any]:
    """Leaves by '/'-joined path, in the order of jax.tree.leaves."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
