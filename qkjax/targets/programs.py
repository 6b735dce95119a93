"""The programs of a run, compiled for a target: a train step, an evaluation step, a decomposition.

They are made by the functions that a run calls; arguments are shapes.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from qkjax import evaluation, sharding, train, train_step
from qkjax.config import Config
from qkjax.measures import probes
from qkjax.runs import attention_check, resources
from qkjax.targets import hlo, roofline
from qkjax.targets.target import Target

TRAIN, EVALUATE, DECOMPOSE = "train", "evaluate", "decompose"
ALL = (TRAIN, EVALUATE, DECOMPOSE)


class Compiled:
    """A program, its text read, and the state that it should take over."""

    def __init__(self, name: str, lowered: Callable[[], Any], donated: int) -> None:
        started = time.monotonic()
        program = lowered()
        self.name = name
        self.seconds = time.monotonic() - started
        self.memory = program.memory_analysis()
        self.text = program.as_text()
        self.hlo = hlo.Program(self.text)
        self.donated = (len(self.hlo.donated()), donated)

    @property
    def device_bytes(self) -> int:
        """Arguments, results that take over no argument, and temporaries, on one device."""
        m = self.memory
        return int(
            m.argument_size_in_bytes
            + m.temp_size_in_bytes
            + m.output_size_in_bytes
            - m.alias_size_in_bytes
        )


def compile_for(
    config: Config, devices: list[jax.Device], names: tuple[str, ...] = ALL
) -> Iterator[Compiled]:
    """Compiles programs of a config, one after another.

    Args:
        config: with its dtypes settled for the devices' platform.
        devices: of `devices.of`.
        names: some of ALL.
    Raises:
        UsageError: the batch does not divide over the devices, or the attention asked for is that
            of other ones.
        OutOfMemoryError: the compiler refuses what no device of the target holds.
    """
    mesh = sharding.make_mesh(devices)
    attention_check.refuse_elsewhere(config.model, sharding.platform(mesh))
    programs = train.make_programs(config, mesh)
    state = train_step.state_shapes(config, programs.transformation)
    statistics = _shapes(lambda: probes.empty_statistics(config, sharding.platform(mesh)))
    try:
        if TRAIN in names:
            yield Compiled(
                TRAIN,
                lambda: resources.compile_step(programs.train_step, config, state, mesh),
                len(jax.tree.leaves(state)),
            )
        if EVALUATE in names:
            rows = config.eval.batch_sequences * mesh.size
            tokens = jax.ShapeDtypeStruct((rows, config.model.sequence_length + 1), jnp.int32)
            valid = jax.ShapeDtypeStruct((rows,), bool)
            step: Any = evaluation.make_eval_step(config, mesh)
            yield Compiled(
                EVALUATE,
                lambda: step.lower(state.params, statistics, tokens, valid).compile(),
                len(jax.tree.leaves(statistics)),
            )
        if DECOMPOSE in names:
            here = jax.sharding.SingleDeviceSharding(devices[0])
            params = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
                state.params,
            )
            decompose = jax.jit(evaluation.decompose)
            yield Compiled(DECOMPOSE, lambda: decompose.lower(statistics, params).compile(), 0)
    except jax.errors.JaxRuntimeError as error:
        raise resources.explain(error, config, programs.transformation) from error


def _shapes(make: Callable[[], Any]) -> Any:
    """What `make` returns, as arguments to lower with: a ShapeDtypeStruct would lose float64."""
    return jax.tree.map(
        lambda leaf: jax.core.ShapedArray(leaf.shape, leaf.dtype), jax.eval_shape(make)
    )


def describe(compiled: Compiled, target: Target) -> dict[str, Any]:
    """What a program shows, as plain values."""
    program = compiled.hlo
    time_ = roofline.estimate(program, target.chip, target.num_devices)
    products: dict[str, float] = {}
    for kernel in program.kernels:
        for product in kernel.products:
            name = " x ".join(sorted(set(product.dtypes)))
            products[name] = products.get(name, 0.0) + kernel.times * product.flop
    collectives: dict[str, dict[str, int]] = {}
    for c in program.collectives:
        entry = collectives.setdefault(f"{c.kind} {c.dtype}", {"times": 0, "bytes": 0})
        entry["times"] += c.times
        entry["bytes"] += c.times * c.bytes
    return {
        "name": compiled.name,
        "compile_seconds": compiled.seconds,
        "argument_bytes": compiled.memory.argument_size_in_bytes,
        "temporary_bytes": compiled.memory.temp_size_in_bytes,
        "device_bytes": compiled.device_bytes,
        "donated": compiled.donated,
        "kernels": sum(kernel.times for kernel in program.kernels),
        "bytes": sum(kernel.times * kernel.bytes for kernel in program.kernels),
        "product_flop": products,
        "attention_flop": sum(k.times * k.attention_flop for k in program.kernels),
        "attention_calls": dict(
            Counter(k.attention for k in program.kernels for _ in range(k.times) if k.attention)
        ),
        "decompositions": sum(k.times * k.decompositions for k in program.kernels),
        "collectives": collectives,
        "unknown_loops": program.unknown_loops,
        "seconds": dataclasses.asdict(time_) | {"total": time_.total},
    }
