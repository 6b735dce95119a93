"""XLA flags that must be set before jax is imported, each with its reason."""

import importlib.metadata
import importlib.util
import os

# jaxlib 0.10.2 and 0.11.0 can crash or hang in YNN fusions on x86 CPUs (jax issue 39257).
_YNN_OFF = "--xla_cpu_experimental_ynn_fusion_type="
_YNN_VERSIONS = ("0.10.2", "0.11.0")
_ACCELERATOR_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu")


def set_cpu_flags() -> None:
    """Switches YNN fusions off on CPU; other versions would abort on the unknown flag."""
    wanted = os.environ.get("JAX_PLATFORMS", "")
    has_accelerator = any(importlib.util.find_spec(name) for name in _ACCELERATOR_PLUGINS)
    if wanted != "cpu" and (wanted or has_accelerator):
        return
    if importlib.metadata.version("jaxlib") not in _YNN_VERSIONS:
        return
    present = os.environ.get("XLA_FLAGS", "")
    if _YNN_OFF not in present:
        os.environ["XLA_FLAGS"] = f"{present} {_YNN_OFF}".strip()
