"""Fixtures that several test files share."""

import functools
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import qkjax

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools" / "airgapped"))  # its packing.py
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
qkjax.prepare_process()  # before any test file imports numpy or jax


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """Reference vectors and real text, beside the repository; not part of the product."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"no reference data at {path.name}/ beside the repository")
    return path


@pytest.fixture(scope="session")
def on_devices() -> Callable[[str, int], str]:
    """Runs Python code in a process with `devices` virtual CPU devices; returns what it printed."""

    def run(code: str, devices: int) -> str:
        forced = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        env = {**os.environ, "XLA_FLAGS": forced, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=env,
            cwd=ROOT,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def _programs() -> Callable[..., Any]:
    from qkjax import train

    return functools.cache(train.make_programs)


@pytest.fixture
def programs_built_once(_programs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of one config share their programs, as the processes of one run share a cache.

    Not for tests that change what is traced: they would get the programs of another test.
    """
    from qkjax import train

    monkeypatch.setattr(train, "make_programs", _programs)


@pytest.fixture
def stub_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts are laid out and none is rendered: for tests that read a report's words alone."""
    from qkjax.report import drawing

    stub = b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"></svg>'
    monkeypatch.setattr(drawing, "to_bytes", lambda figure, file_format: stub)
