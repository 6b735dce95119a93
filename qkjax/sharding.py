"""The mesh: one axis `data` over all devices, which cut batches and, as `mesh` says, more.

What is cut, by the config's field `mesh` (Rajbhandari et al. 2020; Zhao et al. 2023):

- `data`: batches alone; parameters and optimiser state are on every device.
- `zero1`: the parameters in float32, the optimiser's state, the summed gradients and Newton-Schulz
  too; a step gathers the parameters once, kernels in the dtype of the products.
- `fsdp`: what `zero1` cuts; a pass gathers one layer at a time.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qkjax import errors

DATA_AXIS = "data"
WHOLE = -1  # of `cut_axes`


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of devices along the axis `data`; None: every device of every process."""
    if devices is None and jax.process_count() > 1:
        # Process by process, because rows of a batch are: jax might order them by the network
        # instead.
        ordered = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
        return Mesh(np.array(ordered), (DATA_AXIS,), axis_types=(AxisType.Auto,))
    chosen = jax.devices() if devices is None else devices
    return jax.make_mesh((len(chosen),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=chosen)


def platform(mesh: Mesh) -> str:
    """What its devices are: "cpu", "gpu" or "tpu"."""
    return str(mesh.devices.flat[0].platform)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of parameters, optimiser state and metrics: a whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def cut_axes(tree: Any, mesh: Mesh, kind: str) -> Any:
    """The axis along which each leaf of a state is cut over `data`: a tree of ints, WHOLE for none.

    A stack of kernels [layers, ..., in, out] is cut by layers where these divide over the devices,
    else by the first axis that does; with `fsdp` never by layers, which its loop takes one by one.
    The table of embeddings is cut by rows. Gammas are small and stay whole.

    Args:
        tree: parameters, gradients or optimiser state, named as the parameters are.
        kind: the config's `mesh`.
    """

    def axis_of(path: Any, leaf: Any) -> int:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if kind == "data" or mesh.size == 1 or name.endswith("gamma"):
            return WHOLE
        first = 1 if kind == "fsdp" and "blocks/" in name else 0
        axes = range(first, leaf.ndim - 1)
        return next((axis for axis in axes if leaf.shape[axis] % mesh.size == 0), WHOLE)

    return jax.tree.map_with_path(axis_of, tree)


def specs(axes: Any) -> Any:
    """The partition of every leaf that `cut_axes` speaks of."""
    return jax.tree.map(
        lambda axis: PartitionSpec(*[None] * axis, DATA_AXIS) if axis >= 0 else PartitionSpec(),
        axes,
    )


def shardings(mesh: Mesh, axes: Any) -> Any:
    """The sharding of every leaf that `cut_axes` speaks of."""
    return jax.tree.map(functools.partial(NamedSharding, mesh), specs(axes))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its leading axis is cut over `data`."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def ambient(mesh: Mesh) -> contextlib.AbstractContextManager[object]:
    """While a program is traced: the mesh that `per_device` cuts batches over."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def per_device(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function` of batches, run by each device on its own rows of the ambient mesh, if any.

    For programs that the partitioner would not cut by itself, such as a loop over the batch. Inside
    `summed_over_devices` every device runs on its own rows already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return function
    rows = PartitionSpec(DATA_AXIS)
    # Inputs and outputs are all cut over `data`, so there is no claim of equal copies to check; the
    # check would refuse loops that start with constants.
    return jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)


def per_share(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """`function` of matrices [..., M, N], each by itself, run by each device on its share of them.

    The share is of all axes before the last two together; zeros fill it up where the matrices do
    not divide over the devices of the ambient mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function

    def shared(matrices: jax.Array) -> jax.Array:
        flat = matrices.reshape(-1, *matrices.shape[-2:])
        padded = jnp.pad(flat, ((0, -len(flat) % mesh.size), (0, 0), (0, 0)))
        return per_device(function)(padded)[: len(flat)].reshape(matrices.shape)

    return shared


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(part: jax.Array, axis: int, dtype: Any) -> jax.Array:
    """The whole of a parameter that is cut along `axis`, in `dtype`; where each device runs alone.

    Its gradient is summed over the devices in float32, each part where it lies; that of a
    parameter which is whole is not.
    """
    if axis == WHOLE:
        return part
    return jax.lax.all_gather(part.astype(dtype), DATA_AXIS, axis=axis, tiled=True)


def _gathered_forward(part: jax.Array, axis: int, dtype: Any) -> tuple[jax.Array, None]:
    return gathered(part, axis, dtype), None


def _gathered_backward(axis: int, dtype: Any, kept: None, gradient: jax.Array) -> tuple[jax.Array]:
    del dtype, kept
    if axis == WHOLE:
        return (gradient,)
    gradient = gradient.astype(jnp.float32)
    return (jax.lax.psum_scatter(gradient, DATA_AXIS, scatter_dimension=axis, tiled=True),)


gathered.defvjp(_gathered_forward, _gathered_backward)


def summed_over_devices(
    function: Callable[[Any, jax.Array], Any],
    mesh: Mesh,
    held: Any = None,
    cut: Any = None,
    whole: Callable[[Any], Any] | None = None,
) -> Callable[[Any, jax.Array], Any]:
    """`function` of parameters and a batch, by each device on its own rows, and the sum of these.

    Args:
        function: (parameters, rows [B, ...]) -> a tree of float32 sums over rows.
        held: the axis along which each parameter is cut, as `cut_axes` gives them; None: every
            device has all parameters and keeps all sums.
        cut: likewise, of the sums, of which every device keeps its part.
        whole: makes the whole parameters of this device's parts, once; None: `function` gets the
            parts, and what it returns for them is summed already, as `gathered` does.
    """
    if mesh.size == 1:
        return function
    if held is not None:
        return _parts_of_sums(function, mesh, held, cut, whole)

    def of_rows(parameters: Any, rows: jax.Array) -> Any:
        return jax.lax.psum(function(parameters, rows), DATA_AXIS)

    everywhere, rows = PartitionSpec(), PartitionSpec(DATA_AXIS)
    return jax.shard_map(
        of_rows, mesh=mesh, in_specs=(everywhere, rows), out_specs=everywhere, check_vma=False
    )


def _parts_of_sums(
    function: Callable[[Any, jax.Array], Any],
    mesh: Mesh,
    held: Any,
    cut: Any,
    whole: Callable[[Any], Any] | None,
) -> Callable[[Any, jax.Array], Any]:
    def part(axis: int, x: jax.Array) -> jax.Array:
        if axis == WHOLE:
            return jax.lax.psum(x, DATA_AXIS)
        if whole is None:
            return x
        return jax.lax.psum_scatter(x, DATA_AXIS, scatter_dimension=axis, tiled=True)

    def of_rows(parts: Any, rows: jax.Array) -> Any:
        return jax.tree.map(part, cut, function(whole(parts) if whole else parts, rows))

    in_specs = (specs(held), PartitionSpec(DATA_AXIS))
    return jax.shard_map(
        of_rows, mesh=mesh, in_specs=in_specs, out_specs=specs(cut), check_vma=False
    )


def put_batch(mesh: Mesh, local: np.ndarray) -> jax.Array:
    """Joins each process's rows [B_local, ...] into one global array [B, ...] over `data`."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), local)


def round_up_to_devices(mesh: Mesh, sequences: int) -> int:
    """The least multiple of the mesh's size that holds `sequences`."""
    return -(-sequences // mesh.size) * mesh.size


def microbatches(mesh: Mesh, sequences_per_step: int, microbatch_sequences: int) -> int:
    """Passes that a step is cut into, for at most `microbatch_sequences` (0 = all) per device.

    Raises:
        UsageError: the devices cannot share the step, or a device's share the passes, evenly.
    """
    devices = mesh.size
    if sequences_per_step < devices:
        raise errors.UsageError(
            f"train.tokens_per_step: {sequences_per_step} sequences a step for {devices} devices, "
            f"each of which takes whole sequences. Use at most {sequences_per_step} devices "
            f"(CUDA_VISIBLE_DEVICES), or steps of {devices} sequences."
        )
    if sequences_per_step % devices:
        nearest = round_up_to_devices(mesh, sequences_per_step)
        raise errors.UsageError(
            f"train.tokens_per_step: {sequences_per_step} sequences a step do not divide over "
            f"{devices} devices. The next step that does has {nearest} sequences."
        )
    share = sequences_per_step // devices
    size = min(microbatch_sequences or share, share)
    if share % size:
        raise errors.UsageError(
            f"train.microbatch_sequences: {size} does not divide the {share} sequences of each of "
            f"{devices} devices. Use one of {[n for n in range(1, share + 1) if share % n == 0]}."
        )
    return share // size
