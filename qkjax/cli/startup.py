"""Settings of the process, with their reasons: most must stand before numpy and jax are there."""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

# jaxlib 0.10.2 and 0.11.0 can crash or hang in YNN fusions on x86 CPUs (jax issue 39257).
_YNN_OFF = "--xla_cpu_experimental_ynn_fusion_type="
_YNN_VERSIONS = ("0.10.2", "0.11.0")
# Options of glibc's mallopt (malloc.h): never give memory back, never map a block of its own, one
# arena for all threads.
_KEEP_MEMORY = ((-1, 2**31 - 1), (-4, 0), (-8, 1))  # M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX
_ACCELERATOR_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu")


def prepare_process() -> None:
    """Sets the environment variables; a value that the user has set stays."""
    # XLA calls LAPACK from all threads of its pool. An OpenBLAS with threads of its own then spins
    # on its lock: 8 virtual devices on 2 cores made no headway in a minute (docs/log.md).
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # A study starts the same few programs dozens of times; JAX_ENABLE_COMPILATION_CACHE=false ends
    # it. A directory that cannot be written costs a warning of jax.
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "qkjax", "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    if _is_cpu_only() and importlib.metadata.version("jaxlib") in _YNN_VERSIONS:
        present = os.environ.get("XLA_FLAGS", "")
        if _YNN_OFF not in present:  # other versions would abort on the unknown flag
            os.environ["XLA_FLAGS"] = f"{present} {_YNN_OFF}".strip()


def keep_freed_memory() -> None:
    """Lets freed memory stay with the process, on CPUs with glibc; for commands, not for imports.

    XLA's CPU client takes a step's temporaries anew at every step, and glibc gives large blocks
    back: the kernel then maps and clears 120 to 360 MB again, 10 to 17% of a step's CPU time.
    """
    if sys.platform != "linux" or not _is_cpu_only():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        for option, value in _KEEP_MEMORY:
            mallopt(option, value)


def _is_cpu_only() -> bool:
    wanted = os.environ.get("JAX_PLATFORMS", "")
    has_accelerator = any(importlib.util.find_spec(name) for name in _ACCELERATOR_PLUGINS)
    return wanted == "cpu" or not (wanted or has_accelerator)
