"""Before a run: does the fused attention of this machine work, and does it compute the same?"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qkjax import attention, errors
from qkjax.config import FUSED_ATTENTION, Config, ModelConfig

_TOLERANCE = 2e-2  # of bfloat16, relative to the largest value


_LONG = ("pilot", "full", "1b5")  # hours on accelerators


class _Kernel(NamedTuple):
    """Words for people."""

    name: str
    devices: str
    loss: str  # what XLA's attention would make a step of `full` do (docs/performance.md)
    remedy: str


_KERNELS = {
    "cudnn": _Kernel(
        "cuDNN's fused attention",
        "NVIDIA GPUs",
        "2.5 times slower",
        "Install a cuDNN that works",
    ),
    "splash": _Kernel(
        "jax's splash attention",
        "TPUs",
        "move 1.8 times the bytes",
        "Install a libtpu that fits jax",
    ),
}


def refuse_elsewhere(config: ModelConfig, platform: str) -> None:
    """Looks whether the platform is that of an attention asked for by name.

    Args:
        platform: of the devices: "cpu", "gpu" or "tpu".
    Raises:
        UsageError: it is another one's.
    """
    name = config.attention
    if name in _KERNELS and name != FUSED_ATTENTION.get(platform):
        raise errors.UsageError(
            f"model.attention: {name} runs on {_KERNELS[name].devices} only, found the platform "
            f"{platform}. Use model.attention=auto."
        )


def settle(
    config: Config,
    platform: str,
    report: Callable[[str], None] = print,
    *,
    may_be_slow: bool = False,
) -> Config:
    """The config, with model.attention "xla" where "auto" means a fused kernel that does not work.

    Args:
        platform: of jax.default_backend().
        report: called with a warning in that case.
        may_be_slow: fall back at every scale; runs from pilot on are refused otherwise.
    Raises:
        UsageError: model.attention asks for the kernel by name, or the run is a long one.
    """
    refuse_elsewhere(config.model, platform)
    name = config.model.attention_on(platform)
    fault = _fault(config.model, name) if name in _KERNELS else None
    if fault is None:
        return config
    if config.model.attention == name:
        raise errors.UsageError(
            f"model.attention: {name} does not work here ({fault}). Use model.attention=xla, or "
            "auto, which falls back to it."
        )
    kernel = _KERNELS[name]
    if config.scale in _LONG and not may_be_slow:
        raise errors.UsageError(
            f"model.attention: {kernel.name} does not work here ({fault}), and XLA's would make "
            f"this {config.scale} run {kernel.loss}. {kernel.remedy}, or ask for it with "
            "model.attention=xla."
        )
    report(
        f"WARNING: {kernel.name} does not work here ({fault}). This run uses XLA's, which is "
        "slower and takes more memory (model.attention=xla)."
    )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla"))


def _fault(c: ModelConfig, fused: str) -> str | None:
    """What is wrong with fused attention and its gradients at the model's shape, if anything."""
    keys = jax.random.split(jax.random.key(0), 3)
    vectors = [
        jax.random.normal(key, (1, c.sequence_length, heads, c.head_dim), jnp.dtype(c.dtype))
        for key, heads in zip(keys, (c.num_heads, c.num_kv_heads, c.num_kv_heads), strict=True)
    ]

    def results(implementation: str) -> Any:
        def value(*vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = attention.causal_attention(*vectors, implementation=implementation)
            return jnp.square(out.astype(jnp.float32)).sum(), out

        return jax.jit(jax.grad(value, argnums=(0, 1, 2), has_aux=True))(*vectors)

    try:
        found = jax.block_until_ready(results(fused))
    except Exception as error:  # plugin, driver and compiler may raise anything
        return errors.one_line(error)
    for ours, plain in zip(jax.tree.leaves(found), jax.tree.leaves(results("xla")), strict=True):
        difference = jnp.abs(ours.astype(jnp.float32) - plain.astype(jnp.float32)).max()
        relative = float(difference / jnp.abs(plain.astype(jnp.float32)).max())
        if not relative <= _TOLERANCE:  # NaN differs too
            return f"it differs from XLA's by {relative:.2g} of the largest value"
    return None
