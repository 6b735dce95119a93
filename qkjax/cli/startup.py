"""Settings of the process, with reasons: most must be set before numpy and jax are imported."""

import ctypes
import glob
import importlib.metadata
import importlib.util
import os
import pathlib
import resource
import sys

from qkjax import errors
from qkjax.cli import places

# jaxlib 0.10.2 and 0.11.0 can crash or hang in YNN fusions on x86 CPUs (jax issue 39257).
_YNN_OFF = "--xla_cpu_experimental_ynn_fusion_type="
_YNN_VERSIONS = ("0.10.2", "0.11.0")
# Options of glibc's mallopt (malloc.h): never give memory back, never map a block of its own, one
# arena for all threads.
_KEEP_MEMORY = ((-1, 2**31 - 1), (-4, 0), (-8, 1))  # M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX
# One order of sums on GPUs: scatters sort, cuDNN's backward pass waits, nothing is autotuned.
_DETERMINISTIC = "--xla_gpu_deterministic_ops"
# Address space that jax, its compiler and the readers of shards take: bytes, threads, and threads
# for each CPU; a thread takes a stack. Measured: 2.1 GB in 100 threads for the smallest run on 2
# CPUs.
# With less, libraries wait for ever for threads that did not start, or abort.
_SPACE_BYTES, _THREADS, _THREADS_OF_A_CPU = 1_400_000_000, 80, 10
_STACK_BYTES = 8 << 20  # where the system names no limit
# What jax needs to use a kind of accelerator: one of these packages, and one of these files.
_CUDA = ("jax_cuda12_plugin", "jax_cuda13_plugin")
_NVIDIA_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")  # the last one under WSL
_TPU = ("libtpu",)
_PCI_VENDORS = "/sys/bus/pci/devices/*/vendor"
_GOOGLE = "0x1ae0"


def prepare_process() -> None:
    """Sets the environment variables that this project computes under, before jax is imported.

    Commands call it first; a notebook or script of your own that is to give a command's bits does
    the same. Importing qkjax sets nothing. A value that the user has set stays.
    """
    # XLA calls LAPACK from all threads of its pool. An OpenBLAS with threads of its own then spins
    # on its lock: 8 virtual devices on 2 cores made no progress in a minute (docs/log.md).
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # A study starts the same few programs dozens of times; JAX_ENABLE_COMPILATION_CACHE=false ends
    # it. A directory that cannot be written costs a warning of jax.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(places.cache() / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    if _is_cpu_only() and importlib.metadata.version("jaxlib") in _YNN_VERSIONS:
        if _YNN_OFF not in os.environ.get("XLA_FLAGS", ""):
            _add_flag(_YNN_OFF)  # other versions would abort on the unknown flag

    if _is_gpu() and gpu_determinism() is None:
        _add_flag(f"{_DETERMINISTIC}=true")


def gpu_determinism() -> bool | None:
    """Whether XLA_FLAGS asks for deterministic operations on GPUs; None: it does not say."""
    given = [f for f in os.environ.get("XLA_FLAGS", "").split() if f.startswith(_DETERMINISTIC)]
    if not given:
        return None
    return given[-1].partition("=")[2].lower() not in ("false", "0")


def allow_gpu_nondeterminism() -> None:
    """Takes back what `prepare_process` asks of GPUs; before jax looks for devices."""
    if _is_gpu():
        _add_flag(f"{_DETERMINISTIC}=false")


def _add_flag(flag: str) -> None:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def keep_freed_memory() -> None:
    """Lets freed memory stay with the process, on CPUs with glibc; for commands, not for imports.

    XLA's CPU client allocates a step's temporaries at every step, and glibc gives large blocks
    back: the kernel then maps and clears 120 to 360 MB again, 10 to 17% of a step's CPU time.
    """
    if sys.platform != "linux" or not _is_cpu_only():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        for option, value in _KEEP_MEMORY:
            mallopt(option, value)


def give_back_freed_memory() -> None:
    """Returns what has been freed to the system, where glibc can; after a step is compiled.

    The compiler takes 0.35 GB for a step of tiny. Freed, it lies in pieces between what lives on,
    where a step's arrays do not fit, and would add to their peak.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def check_memory_limit(more: int = 0) -> None:
    """Refuses to compute under a limit of memory (ulimit -v, ulimit -d) that is too low for jax.

    Args:
        more: bytes that the work itself takes at least.
    Raises:
        OutOfMemoryError: names the limit, and what is needed.
    """
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    if stack == resource.RLIM_INFINITY:
        stack = _STACK_BYTES
    needed = _SPACE_BYTES + (_THREADS + _THREADS_OF_A_CPU * cpu_count()) * stack + more
    for name, kind in (("v", resource.RLIMIT_AS), ("d", resource.RLIMIT_DATA)):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY and limit < needed:
            raise errors.OutOfMemoryError(
                f"ulimit -{name}: this process may take {limit / 1e9:.2f} GB of memory, and needs "
                f"at least {needed / 1e9:.2f} GB, of which {more / 1e9:.2f} GB for the model. "
                f"Raise the limit, or remove it with `ulimit -{name} unlimited`."
            )


def check_wandb() -> None:
    """Refuses --wandb where it is certain that wandb would take nothing.

    Raises:
        UsageError: wandb is not installed, or nobody is logged in and it is not offline.
    """
    try:
        import wandb
    except ImportError as error:
        raise errors.UsageError(
            f"--wandb: {error.name} is not installed. Run pip install -e '.[wandb]'."
        ) from error
    try:
        settings = wandb.setup(settings=wandb.Settings(silent=True)).settings
        here = settings.mode in ("disabled", "dryrun", "offline")
        ready = here or wandb.login(prompt=False, verify=False)
    except (wandb.errors.Error, ValueError) as error:
        said = " ".join(str(error).split())
        raise errors.UsageError(
            f"--wandb: {said}. Correct wandb's settings, or leave the flag out."
        ) from error
    if not ready:
        raise errors.UsageError(
            "--wandb: nobody is logged in to wandb here. Run `wandb login`, or set "
            "WANDB_MODE=offline and run `wandb sync` later."
        )


def cpu_count() -> int:
    """How many CPUs this process may use; all of the machine where the system cannot say."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def stay_on_one_cpu() -> None:
    """Binds this process to the last of its CPUs, where the system can do that."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _is_cpu_only() -> bool:
    """Whether jax will compute on the CPU: asked for, or no accelerator with its plugin.

    A plugin without its device changes nothing, as jax falls back to the CPU there.
    """
    wanted = os.environ.get("JAX_PLATFORMS", "")
    return wanted == "cpu" or not (wanted or _has_accelerator())


def _is_gpu() -> bool:
    """Whether jax will compute on NVIDIA GPUs: asked for, or one with its plugin."""
    wanted = os.environ.get("JAX_PLATFORMS", "")
    return wanted.startswith(("cuda", "gpu")) or (not wanted and _has_gpu())


def _has_gpu() -> bool:
    return any(os.path.exists(path) for path in _NVIDIA_DEVICES) and _has_package(_CUDA)


def _has_accelerator() -> bool:
    return _has_gpu() or (
        _has_package(_TPU)
        and any(
            pathlib.Path(path).read_text().strip() == _GOOGLE for path in glob.glob(_PCI_VENDORS)
        )
    )


def _has_package(names: tuple[str, ...]) -> bool:
    return any(importlib.util.find_spec(name) for name in names)
