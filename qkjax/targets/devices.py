"""Devices that are not here, which XLA compiles for."""

from typing import Any

import jax
from jax.experimental import topologies

from qkjax import errors
from qkjax.targets.target import Target

# The last cuDNN whose limits jax 0.10 knows of. No cuDNN is needed to compile.
_CUDNN = (9, 12, 0)
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads_per_core}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared_per_core}
  shared_memory_per_block_optin: {shared_per_block}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  core_count: {cores} fpus_per_core: {fpus_per_core} clock_rate_ghz: {ghz}
  memory_bandwidth: {bandwidth:.0f} l2_cache_size: {l2} device_memory_size: {memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  device_vendor: "NVIDIA Corporation" name: "{kind}"
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} patch: {cudnn[2]} }}
device_description_str: "{kind}"
"""


def of(target: Target) -> list[jax.Device]:
    """The target's devices, to make a mesh of; nothing can run on them.

    Raises:
        UsageError: the compiler's package is not installed, or knows no such slice.
    """
    try:
        return _gpus(target) if target.chip.platform == "gpu" else _tpus(target)
    except (RuntimeError, ImportError, ValueError) as error:  # of any plugin
        raise errors.UsageError(
            f"--aot: {target} is no target of the compiler here ({errors.one_line(error)}). "
            f"Install the extra {target.extra}, or give another slice."
        ) from error


def _gpus(target: Target) -> list[jax.Device]:
    compiler: dict[str, Any] = target.chip.compiler or {}
    text = _GPU.format(
        **compiler,
        bandwidth=target.chip.bandwidth,
        extension="ACCELERATED_FEATURES" if compiler["accelerated"] else "NONE",
        kind=target.chip.kinds[0],
        cudnn=_CUDNN,
    )
    _answer_for_cudnn((compiler["major"], compiler["minor"]))
    return list(
        topologies.get_topology_desc(
            platform="cuda", topology=f"1x1x{target.num_devices}", target_config=text
        ).devices
    )


def _answer_for_cudnn(capability: tuple[int, int]) -> None:
    """Lets jax lower fused attention: it asks the first GPU of the process, which is not there."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    def number(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split("."))

    version = _CUDNN[0] * 10_000 + _CUDNN[1] * 100 + _CUDNN[2]
    fused.check_cudnn_version = lambda: version
    fused.check_compute_capability = lambda wanted: capability >= number(wanted)
    fused.is_cuda_compute_capability_equal = lambda wanted: capability == number(wanted)


def _tpus(target: Target) -> list[jax.Device]:
    name = f"{target.chip.name}:{'x'.join(map(str, target.topology))}"
    options = {} if target.num_devices > 1 else {"chips_per_host_bounds": (1, 1, 1)}
    return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)
