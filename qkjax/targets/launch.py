"""Starts the compiler for a target, where it is installed. Imports no jax."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from qkjax import errors, files
from qkjax.cli import children, places
from qkjax.config import Config
from qkjax.targets.target import Target

_PACKAGES = {
    "gpu": ("jax_cuda12_plugin", "jax_cuda13_plugin"),
    "tpu": ("libtpu",),
}
_DETERMINISTIC = "--xla_gpu_deterministic_ops"
# What libtpu would ask the machine, which has no TPU.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def interpreter(platform: str) -> str | None:
    """The Python that has the compiler for a platform: .venv-aot's, or this one; None: neither."""
    root = places.checkout()
    if root is not None:
        own = root / ".venv-aot"
        for package in _PACKAGES[platform]:
            if any(own.glob(f"lib/python*/site-packages/{package}")):
                return str(own / "bin" / "python")
    found = any(importlib.util.find_spec(package) for package in _PACKAGES[platform])
    return sys.executable if found else None


def ask(
    config: Config,
    target: Target,
    programs: Sequence[str],
    keep_text: pathlib.Path | None = None,
) -> list[dict[str, Any]]:
    """Compiles programs of a run's config for a target, in a process of its own.

    Args:
        config: resolved; dtypes "auto" are settled for the target.
        programs: names, of `programs.ALL`.
        keep_text: where the compiler's text is left, as keep_text.NAME.hlo; None: nowhere.
    Returns:
        What `programs.describe` says, of each.
    Raises:
        UsageError: no compiler here, or the target's devices do not fit the config.
        OutOfMemoryError: the target's devices do not hold a program.
    """
    python = interpreter(target.chip.platform)
    if python is None:
        raise errors.UsageError(
            f"--aot: the compiler for {target} is not installed. Install the extra "
            f"{target.extra} (0.7 GB) in an environment of its own and start the command there; "
            "in a checkout, docs/targets.md has the line that makes one."
        )
    question = {
        "config": config.to_dict(),
        "target": str(target),
        "programs": list(programs),
        "keep_text": str(keep_text or ""),
    }
    done = subprocess.run(
        [python, "-P", "-m", "qkjax.targets.child"],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        env=_environment(config, target),
    )
    answers = [
        files.parse_json(line.encode(), python, "Install the extra again")
        for line in done.stdout.splitlines()
        if line.startswith("{")
    ]
    for answer in answers:
        if "error" in answer:
            kind = errors.UsageError if answer["exit_code"] == 2 else errors.OutOfMemoryError
            raise kind(answer["error"])
    if done.returncode or len(answers) != len(programs):
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise errors.UsageError(
            f"--aot: the compiler for {target} ended with code {done.returncode} "
            f"({last[0][:300]}). Install the extra {target.extra} again, with the versions that "
            "pyproject.toml names."
        )
    return answers


def _environment(config: Config, target: Target) -> dict[str, str]:
    flags = ""
    if target.chip.platform == "gpu":
        flags = f"{_DETERMINISTIC}={str(config.determinism.gpu).lower()}"
    return {
        **children.environment(),
        **_NO_TPU_HERE,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "XLA_FLAGS": flags,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_TRACEBACK_FILTERING": "off",  # its last line would be a hint about itself
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
