"""What a run costs in memory, disk and arithmetic: before it starts, and when it was too much."""

import shutil
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging
from jax.sharding import Mesh

from qkjax import errors, flops, sharding, train_step
from qkjax.cli import startup
from qkjax.config import Config
from qkjax.runs.directory import RunDirectory


def state_bytes(config: Config, transformation: optax.GradientTransformation) -> int:
    """Bytes of parameters and optimiser state: of a checkpoint, and of each device's copy."""
    state = train_step.state_shapes(config, transformation)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def disk_bytes(config: Config, transformation: optax.GradientTransformation) -> int:
    """Bytes of all checkpoints that exist at one time: those kept, and the one being written."""
    most = len(config.checkpoint.steps)
    return state_bytes(config, transformation) * (
        most if config.checkpoint.keep_all else min(most, 4)
    )


def check_disk(
    directory: RunDirectory, config: Config, transformation: optax.GradientTransformation
) -> None:
    """Refuses to start a run whose checkpoints the disk cannot hold.

    Raises:
        StorageError: with the bytes needed, there, and free.
    """
    needed = disk_bytes(config, transformation)
    # What was set aside or left incomplete there frees nothing when the run resumes.
    checkpoints = [path for path in directory.checkpoints.glob("*") if path.name.isdigit()]
    files = [file for path in checkpoints for file in path.rglob("*") if file.is_file()]
    present = sum(file.stat().st_size for file in files)
    free = shutil.disk_usage(directory.path).free
    if free < needed - present:
        raise errors.StorageError(
            f"{directory}: the run's checkpoints need {needed / 1e9:.3g} GB, of which "
            f"{present / 1e9:.3g} GB are there, and {free / 1e9:.3g} GB are free. Make room, or "
            "use another --workdir."
        )


def check_memory(config: Config, transformation: optax.GradientTransformation) -> None:
    """Refuses a run that a limit of this process's memory cannot hold (ulimit -v).

    Parameters and optimiser state are there three times: on the device, in the copy for the
    checkpoint, and as what Orbax writes.

    Raises:
        OutOfMemoryError: names the limit, and what is needed.
    """
    startup.check_memory_limit(3 * state_bytes(config, transformation))


def warn_of_cpu(config: Config, platform: str) -> None:
    """Warns if a run that is meant for accelerators finds none."""
    if platform == "cpu" and config.scale != "tiny":
        logging.warning(
            "NO ACCELERATOR: jax found no GPU or TPU, so this %s run trains on the CPU. If the "
            "machine has one, stop this run and install jax for it: pip install -e '.[cuda]' or "
            "'.[tpu]'.",
            config.scale,
        )


def explain(
    error: jax.errors.JaxRuntimeError,
    config: Config,
    transformation: optax.GradientTransformation,
) -> Exception:
    """The advice for a step that does not fit into the device's memory; others stay as they are."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return error
    gigabytes = state_bytes(config, transformation) / 1e9
    return errors.OutOfMemoryError(
        "train.microbatch_sequences: the device's memory does not hold a pass "
        f"({str(error).splitlines()[0]}). Parameters and optimiser state alone take "
        f"{gigabytes:.2g} GB. Lower train.microbatch_sequences, eval.batch_sequences or "
        "train.loss_chunk_tokens, or set model.dtype=bfloat16; the same --workdir accepts them "
        "with "
        "--allow_config_change."
    )


def compile_step(
    step: jax.stages.Wrapped, config: Config, state: train_step.TrainState, mesh: Mesh
) -> jax.stages.Compiled:
    """The program of `make_train_step`'s step, for a state of arrays or jax.ShapeDtypeStruct."""
    batch = jax.ShapeDtypeStruct(
        (config.train.sequences_per_step, config.model.sequence_length + 1),
        jnp.int32,
        sharding=sharding.batch_sharding(mesh),
    )
    program = step.lower(state, batch).compile()
    startup.give_back_freed_memory()
    return program


def program_cost(program: jax.stages.Compiled) -> str:
    """The compiler's own account of memory and arithmetic, on one device, as far as it gives one.

    It counts the body of a loop once, not once per iteration.
    """
    parts = []
    memory = program.memory_analysis()
    if memory is not None:
        parts.append(
            f"{memory.argument_size_in_bytes / 1e9:.3f} GB of arguments, "
            f"{memory.temp_size_in_bytes / 1e9:.3f} GB of temporaries"
        )
    cost = program.cost_analysis() or {}
    if "flops" in cost:
        parts.append(f"{cost['flops'] / 1e9:.3f} GFLOP with each loop's body once")
    return ", ".join(parts) or "no analysis on this platform"


def describe(
    config: Config, transformation: optax.GradientTransformation, mesh: Mesh | None
) -> dict[str, Any]:
    """Tokens, steps, FLOP, memory and disk of a run, without running it.

    memory_bytes is what XLA's compiled train step takes on one device of the mesh, which this
    compiles; None without a mesh.
    """
    parameters = flops.num_parameters(config.model)
    tokens = config.train.num_steps * config.train.tokens_per_step
    memory = None
    if mesh is not None:
        step = train_step.make_train_step(config, transformation, mesh)
        state = train_step.state_shapes(config, transformation)
        memory = compile_step(step, config, state, mesh).memory_analysis()
    return {
        "parameters": parameters,
        "tokens": tokens,
        "tokens_per_step": config.train.tokens_per_step,
        "steps": config.train.num_steps,
        "evaluations": len(config.eval.steps) + (config.eval.final_tokens >= 0),
        "training_flop": tokens * flops.training_flops_per_token(config.model, parameters),
        "memory_bytes": None
        if memory is None
        else memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "disk_bytes": disk_bytes(config, transformation),
    }
