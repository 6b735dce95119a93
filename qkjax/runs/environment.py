"""What a run ran on: versions, devices, source tree, command line; no secrets."""

import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from qkjax.cli import places

_PACKAGES = (
    "qkjax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "array_record",
    "clu",
    "numpy",
)
# Never the whole environment: it holds tokens.
_VARIABLES = re.compile(r"XLA_FLAGS|CUDA_VISIBLE_DEVICES|JAX_\w+|TPU_\w+")
_GIT_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")

_MASK = "***"
_SECRET = (
    r"(?:token|secret|password|passwd|pwd|passphrase|(?:api_?|account_?|access_?)?key(?:_?id)?"
    r"|credentials?|auth|bearer|cookie|jwt|pat|sig(?:nature)?)"
)
_SECRET_NAME = re.compile(rf"(?:[^/?&;#]*[-_.])?{_SECRET}", re.IGNORECASE)
# What is kept before and after the secret is in groups 1 and 2.
_SECRET_VALUES = (
    re.compile(
        r"()\b(?:hf|gh[pousr]|github_pat|npm|dckr_pat|figd|lin_api|[rs]k_(?:live|test))"
        r"_[A-Za-z0-9_-]{8,}()"
    ),
    re.compile(
        r"()\b(?:sk|gl(?:agent|cbt|dt|ft|imt|oas|pat|ptt|rt|soat)|xapp|xox[a-z]|nvapi|pypi)"
        r"-[A-Za-z0-9_-]{8,}()"
    ),
    re.compile(r"()\b(?:AKIA|ASIA)[A-Z0-9]{16}\b()"),  # access keys of AWS
    re.compile(r"()\b(?:AIza[\w-]{30,}|ya29\.[\w-]{8,})()"),  # of Google
    re.compile(r"()\bSG\.[\w-]{16,}\.[\w-]{16,}()"),  # of SendGrid
    re.compile(
        r"()\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]*)?()"
    ),  # JSON web tokens
    re.compile(r"(\b(?:Bearer|Basic)\s+)[\w.~+/=-]{8,}()", re.IGNORECASE),
    re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----).+()", re.DOTALL),
    # Of addresses, as of signed ones of buckets, and of connection strings.
    re.compile(rf"([?&;#](?:[\w-]*[-_])?{_SECRET}=)[^&;\s]+()", re.IGNORECASE),
    re.compile(rf"""(["'](?:[\w-]*[-_])?{_SECRET}["']\s*:\s*["'])[^"']+()""", re.IGNORECASE),
    re.compile(r"(://[^/\s:@]*:)[^/\s@]+(@)"),
    re.compile(r"(://)[^/\s:@]{20,}(@)"),  # a token instead of a user
)


def describe(command: Sequence[str] | None = None) -> dict[str, Any]:
    """Everything that environment.json records of one start but the dataset and the time.

    Args:
        command: the command line; None is this process's own. Secrets in it are masked.
    """
    import jax

    devices = jax.devices()
    return {
        "command": mask_secrets(sys.orig_argv if command is None else command),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "process_count": jax.process_count(),
        },
        "variables": _variables(os.environ),
        "jax_threefry_partitionable": bool(
            jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
        ),
        "cpu_count": os.cpu_count(),
        "git": git_state(places.PACKAGE.parent),
    }


def mask_secrets(command: Sequence[str]) -> list[str]:
    """The arguments with every value that looks like a token, key or password replaced by ***.

    A value is masked for the name before its "=" (or, after a --name alone, as the next argument):
    one that ends in token, key, secret, password, credentials or auth; and for its own form.
    """
    masked, next_is_secret = [], False
    for argument in command:
        name, equals, value = argument.partition("=")
        secret_name = bool(_SECRET_NAME.fullmatch(name.lstrip("-")))
        if next_is_secret and not argument.startswith("-"):
            argument = _MASK
        elif equals and secret_name and value:
            argument = f"{name}={_MASK}"
        else:
            argument = _mask_values(argument)
        next_is_secret = not equals and secret_name and name.startswith("-")
        masked.append(argument)
    return masked


def _mask_values(text: str) -> str:
    for pattern in _SECRET_VALUES:
        text = pattern.sub(rf"\g<1>{_MASK}\g<2>", text)
    return text


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    chosen = sorted(name for name in environment if _VARIABLES.fullmatch(name))
    masked = mask_secrets([f"{name}={environment[name]}" for name in chosen])
    return {name: pair.partition("=")[2] for name, pair in zip(chosen, masked, strict=True)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(directory: pathlib.Path) -> dict[str, Any]:
    """Commit of the checkout in `directory`, and whether files differ from it.

    Both are None where there is no git, or where `directory` is not the top of a checkout (an
    installed package may lie inside a repository that is not its own).
    """

    # Set inside git hooks, these would answer for another repository.
    variables = {k: v for k, v in os.environ.items() if k not in _GIT_VARIABLES}

    def git(*arguments: str) -> str:
        # --no-optional-locks: asking for the state must not write the index.
        command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=30, env=variables
        )
        return done.stdout.strip()

    try:
        if pathlib.Path(git("rev-parse", "--show-toplevel")).resolve() != directory.resolve():
            return {"sha": None, "dirty": None}
        return {"sha": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {"sha": None, "dirty": None}
