"""Which parameter gets which rule: by name, total, and printed; schedules; Muon's granularity.

A parameter's name is its '/'-joined path. Every name must match exactly one row of `_GROUPS`, so
that a new parameter is an error and never silently changes its optimiser.
"""

import dataclasses
import functools
import itertools
import pkgutil
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qkjax import errors, muon, presets, sharding
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
    rule: str  # a name of presets.OPTIMIZERS, or "frozen" (no update, no state)
    learning_rate: float  # peak
    weight_decay: float
    decay_target: float  # what the decay pulls to; 0 but for gamma_q and gamma_k


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
        update = _rate_decay_target(groups[name], rule, config)
        routes.append(Route(name, shape.shape, matrix and matrix.shape[-2:], rule, *update))
    return routes


def format_routing_table(routes: list[Route]) -> str:
    """One line per parameter, columns aligned: the text of parameters.txt."""
    rows = [("parameter", "shape", "matrix", "optimiser", "peak_lr", "weight_decay")]
    for r in routes:
        shape, matrix = ("x".join(map(str, s)) if s else "-" for s in (r.shape, r.matrix))
        rate, decay = f"{r.learning_rate:.6g}", f"{r.weight_decay:.6g}"
        if r.decay_target:
            decay += f" to {r.decay_target:g}"
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
        factor = schedule.factor(count, jnp.minimum, jnp.maximum)
        return peak * jnp.asarray(factor, jnp.float32)

    return rate


def make_optimizer(config: Config, params_shapes: Any) -> optax.GradientTransformation:
    """Clipping by the global norm, then every parameter's rule as in `routing_table`.

    Args:
        config: with its dtypes settled (`Config.for_platform`).
        params_shapes: the parameter tree, as arrays or jax.ShapeDtypeStruct.
    Raises:
        UsageError: as `routing_table`; an optimiser's factory cannot be imported.
    """
    routes = routing_table(params_shapes, config)
    rules: dict[str, optax.GradientTransformation] = {}
    for name in dict.fromkeys(route.rule for route in routes):
        if name == "frozen":
            rules[name] = optax.set_to_zero()
        else:
            rules[name] = _factory(name)(config, routes)
    structure = jax.tree.structure(params_shapes)
    by_rule = optax.partition(rules, jax.tree.unflatten(structure, [r.rule for r in routes]))
    if not config.optimizer.clip_norm:
        return by_rule
    clip = optax.clip_by_global_norm(config.optimizer.clip_norm)
    if "frozen" in rules:  # their gradients are no part of the norm
        clip = optax.masked(
            clip, jax.tree.unflatten(structure, [r.rule != "frozen" for r in routes])
        )
    return optax.chain(clip, by_rule)


def _factory(name: str) -> Callable[[Config, list[Route]], optax.GradientTransformation]:
    """The function that makes the optimiser of this name.

    Raises:
        UsageError: its module or the function is not there.
    """
    named = presets.OPTIMIZERS[name].factory
    try:
        found: Callable[..., Any] = pkgutil.resolve_name(named)
    except (ModuleNotFoundError, AttributeError) as error:
        raise errors.UsageError(
            f"presets.OPTIMIZERS[{name!r}].factory is {named!r}: {error}. Name a function as "
            "module:function; put the module into qkjax/, or its folder on PYTHONPATH."
        ) from error
    return found


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
    name = config.optimizer.name
    has_auxiliary = presets.OPTIMIZERS[name].auxiliary_rate is not None
    return "adamw" if has_auxiliary and group != "matrix" else name


def _rate_decay_target(group: str, rule: str, config: Config) -> tuple[float, float, float]:
    optimizer = config.optimizer
    if rule == "frozen":
        return 0.0, 0.0, 0.0
    if group == "qk_gamma":
        decay, target = optimizer.gamma_weight_decay, optimizer.gamma_decay_target
        return optimizer.rate_of_gamma, decay, target
    if group == "matrix":
        return optimizer.learning_rate, optimizer.weight_decay, 0.0
    return optimizer.auxiliary_learning_rate, optimizer.auxiliary_weight_decay, 0.0


# --------------------------------------------------------------------------------------------
# The factories that presets.OPTIMIZERS names: the config and all routes -> the transformation of
# the parameters that have this rule, at each parameter's own rate and decay.


def adamw(config: Config, routes: list[Route]) -> optax.GradientTransformation:
    """AdamW with decoupled decay (Loshchilov & Hutter 2019), of each parameter's own strength."""
    optimizer = config.optimizer
    peak = optimizer.auxiliary_learning_rate
    return optax.chain(
        optax.scale_by_adam(optimizer.beta1, optimizer.beta2, optimizer.eps),
        decay_each(routes, peak),
        optax.scale_by_learning_rate(learning_rate(config.schedule, peak)),
    )


def decay_each(routes: list[Route], peak: float) -> optax.GradientTransformation:
    """Adds every parameter's decay to its update, and scales both to its own rate.

    u <- (rate / peak) (u + weight_decay (p - decay_target)), where `peak` is the rate that all
    updates are multiplied by afterwards.
    """
    by_name = {route.name: route for route in routes}

    def one(path: Any, update: jax.Array, param: jax.Array) -> jax.Array:
        route = by_name[_name(path)]
        decayed = update + route.weight_decay * (param - route.decay_target)
        return (route.learning_rate / peak) * decayed

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(one, updates, params))


def muon_of_matrices(config: Config, routes: list[Route]) -> optax.GradientTransformation:
    """Muon on the matrices that `muon.granularity` makes of the kernels; its state has theirs.

    Updates are scaled by the shape of the whole kernel in every granularity but "merged", so that
    granularities differ in what is orthogonalised and not in the size of the step.
    """
    del routes
    orthogonalized = muon.scale_by_muon(
        momentum=config.muon.momentum,
        nesterov=config.muon.nesterov,
        coefficients=config.muon.coefficients,
        dtype=jnp.dtype(config.muon.dtype),
        shared=sharding.per_share,  # without an ambient mesh: by itself
    )
    rest = (
        muon.scale_by_matrix_shape(config.muon.scale),
        optax.add_decayed_weights(config.optimizer.weight_decay),
        optax.scale_by_learning_rate(
            learning_rate(config.schedule, config.optimizer.learning_rate)
        ),
    )
    if config.muon.granularity == "merged":
        return _grouped(optax.chain(orthogonalized, *rest), *_grouping(config))
    return optax.chain(_grouped(orthogonalized, *_grouping(config)), *rest)


def _grouped(
    inner: optax.GradientTransformation, group: _Regroup, ungroup: _Regroup
) -> optax.GradientTransformation:
    """`inner` on the matrices that are made of the kernels."""

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
    if config.muon.granularity in ("per_head", "groups_of"):
        width = config.muon.group_heads * model.head_dim  # of per_head the group is one
        return functools.partial(_split_columns, width=width), _join_columns
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


def _split_columns(kernels: _Named, *, width: int) -> _Named:
    """Query, key and value [N, D, H K] as [N, H K / width, D, width]; other kernels whole."""

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], -1, width).swapaxes(-3, -2)

    return {name: split(x) if name in _INPUTS else x for name, x in kernels.items()}


def _join_columns(matrices: _Named) -> _Named:
    def join(x: jax.Array) -> jax.Array:
        x = x.swapaxes(-3, -2)
        return x.reshape(*x.shape[:-2], -1)

    return {name: join(x) if name in _INPUTS else x for name, x in matrices.items()}


def _by_name(tree: Any) -> dict[str, Any]:
    """Leaves by '/'-joined path, in the order of jax.tree.leaves."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
