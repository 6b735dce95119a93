"""One update as a pure function: (state, batch) -> (state, metrics)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from qkjax import losses, model, sharding
from qkjax.config import Config


class TrainState(NamedTuple):
    """All that a run carries from step to step."""

    step: jax.Array  # [] int32: finished updates
    params: model.Params
    opt_state: Any
    finite: jax.Array  # [] bool: False from the first non-finite step on, which changes nothing


class StepMetrics(NamedTuple):
    """What one step reports; it stays on the device until it is read."""

    loss: jax.Array  # [] float32, nats per predicted token of this batch
    grad_norm: jax.Array  # [] float32, before clipping
    finite: jax.Array  # [] bool: this step's loss, gradient, norm and parameters, and all before
    leaf_finite: jax.Array  # [leaves] bool, gradients in the order of jax.tree.leaves
    updated_finite: jax.Array  # [leaves] bool, the parameters after the update, likewise


def init_state(
    key: jax.Array, config: Config, transformation: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The state before the first update, made on the devices, cut as `state_shardings` says."""

    init = functools.partial(_init, config=config, transformation=transformation)
    return jax.jit(init, out_shardings=state_shardings(config, transformation, mesh))(key)


def state_of(
    params: model.Params,
    config: Config,
    transformation: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """The state before the first update of given parameters, cut as `state_shardings` says."""
    placed = state_shardings(config, transformation, mesh)
    params = jax.device_put(params, placed.params)
    opt_state = jax.jit(transformation.init, out_shardings=placed.opt_state)(params)
    fresh = TrainState(jnp.zeros((), jnp.int32), params, opt_state, jnp.ones((), bool))
    return jax.device_put(fresh, placed)


def state_shapes(config: Config, transformation: optax.GradientTransformation) -> TrainState:
    """The tree of `init_state` as jax.ShapeDtypeStruct."""
    return jax.eval_shape(lambda: _init(jax.random.key(0), config, transformation))


def state_shardings(
    config: Config, transformation: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Where every part of a state lies under the config's mesh: a tree of NamedSharding."""
    shapes = state_shapes(config, transformation)
    whole: Any = sharding.replicated(mesh)
    return TrainState(
        whole,
        sharding.shardings(mesh, sharding.cut_axes(shapes.params, mesh, config.mesh)),
        sharding.shardings(mesh, sharding.cut_axes(shapes.opt_state, mesh, config.mesh)),
        whole,
    )


def _init(
    key: jax.Array, config: Config, transformation: optax.GradientTransformation
) -> TrainState:
    params = model.init(key, config.model)
    return TrainState(
        jnp.zeros((), jnp.int32), params, transformation.init(params), jnp.ones((), bool)
    )


def make_train_step(
    config: Config, transformation: optax.GradientTransformation, mesh: Mesh
) -> jax.stages.Wrapped:
    """Compiles `step(state, tokens [B, T+1] int32, sharded over `data`)`; the state is donated.

    Raises:
        UsageError: the batch does not divide over the devices and their passes.
    """
    passes = sharding.microbatches(
        mesh, config.train.sequences_per_step, config.train.microbatch_sequences
    )

    def update(gradients: model.Params, opt_state: Any, params: model.Params) -> tuple[Any, Any]:
        if config.mesh == "data":
            return transformation.update(gradients, opt_state, params)
        with sharding.ambient(mesh):  # over whose devices Muon shares its matrices
            updates, opt_state = transformation.update(gradients, opt_state, params)
        cut = sharding.cut_axes(updates, mesh, config.mesh)
        return jax.lax.with_sharding_constraint(updates, sharding.shardings(mesh, cut)), opt_state

    def step(state: TrainState, tokens: jax.Array) -> tuple[TrainState, StepMetrics]:
        loss, gradients = _loss_and_gradients(state.params, tokens, config, passes, mesh)
        leaf_finite = _finite_leaves(gradients)
        # Squares overflow before gradients do: clipping would then make the update 0 unnoticed, and
        # Adam's second moment would stay infinite.
        grad_norm = optax.global_norm(gradients)
        finite = state.finite & jnp.isfinite(loss) & leaf_finite.all() & jnp.isfinite(grad_norm)
        updates, opt_state = update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        updated = TrainState(state.step + 1, params, opt_state, finite)
        # Twice: the compiler fuses a check of the update with the update, which changes its bits;
        # a check of what was chosen does not.
        updated = _chosen(finite, updated, state)
        # A rate or decay beyond float32 makes finite gradients into parameters that are not.
        updated_finite = _finite_leaves(updated.params)
        finite = finite & updated_finite.all()
        kept = _chosen(finite, updated, state)
        metrics = StepMetrics(loss, grad_norm, finite, leaf_finite, updated_finite)
        return kept._replace(finite=finite), metrics

    placed = state_shardings(config, transformation, mesh)
    return jax.jit(
        step,
        in_shardings=(placed, sharding.batch_sharding(mesh)),
        out_shardings=(placed, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def _chosen(finite: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)


def _finite_leaves(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)])


def _loss_and_gradients(
    params: model.Params, tokens: jax.Array, config: Config, passes: int, mesh: Mesh
) -> tuple[jax.Array, model.Params]:
    """Mean loss and its gradient, in `passes` forward-backward passes of equal size.

    Every device sums over its own rows, and the devices' sums are added once, in float32. Left to
    the partitioner, each pass would add them, kernels in the dtype of the products.
    """

    is_cut, by_layer = config.mesh != "data" and mesh.size > 1, config.mesh == "fsdp"
    held: Any = sharding.cut_axes(params, mesh, config.mesh) if is_cut else None

    def whole_blocks(blocks: Any, is_layer: bool = False) -> Any:
        """Of all layers, or of one; kernels in the dtype that products would round them to."""

        def one(part: jax.Array, axis: int) -> jax.Array:
            inside = axis if axis == sharding.WHOLE else axis - is_layer
            return sharding.gathered(part, inside, jnp.dtype(config.model.dtype))

        return jax.tree.map(one, blocks, held["blocks"])

    def with_whole_table(params: model.Params) -> model.Params:
        table = sharding.gathered(params["embedding"], held["embedding"], jnp.float32)
        return {**params, "embedding": table}

    def whole(params: model.Params) -> model.Params:
        return with_whole_table({**params, "blocks": whole_blocks(params["blocks"])})

    def summed_loss(params: model.Params, tokens: jax.Array) -> jax.Array:
        whole_layer = None
        if is_cut and by_layer:
            params = with_whole_table(params)
            whole_layer = functools.partial(whole_blocks, is_layer=True)
        hidden = model.apply(
            params, tokens[:, :-1], config.model.on(sharding.platform(mesh)), whole_layer
        )
        return losses.next_token_loss(
            hidden,
            params["embedding"],
            tokens[:, 1:],
            chunk_tokens=config.train.loss_chunk_tokens,
        )

    def of_rows(params: model.Params, tokens: jax.Array) -> tuple[jax.Array, model.Params]:
        if passes == 1:
            loss, gradients = jax.value_and_grad(summed_loss)(params, tokens)
            return loss, jax.tree.map(lambda x: x.astype(jnp.float32), gradients)

        def add_pass(carry: Any, tokens: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(
                jnp.add, carry, jax.value_and_grad(summed_loss)(params, tokens)
            ), None

        start = (jnp.zeros(()), jax.tree.map(lambda x: jnp.zeros(x.shape), params))
        return jax.lax.scan(add_pass, start, tokens.reshape(passes, -1, tokens.shape[-1]))[0]

    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    cut = (sharding.WHOLE, held)
    sums = sharding.summed_over_devices(of_rows, mesh, held, cut, None if by_layer else whole)(
        params, tokens
    )
    return jax.tree.map(lambda x: x / predicted, sums)
