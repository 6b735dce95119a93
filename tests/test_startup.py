"""startup: what stands in the environment before jax is imported."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

SHOW = (
    "import os, qkjax; print(os.environ.get('OPENBLAS_NUM_THREADS'), os.environ.get('XLA_FLAGS'))"
)
YNN = "--xla_cpu_experimental_ynn_fusion_type="


def show(**variables: str) -> list[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("OPENBLAS_NUM_THREADS", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-c", SHOW], capture_output=True, text=True, env={**kept, **variables}
    )
    return done.stdout.strip().split(" ", 1)


@pytest.mark.skipif(
    importlib.metadata.version("jaxlib") not in ("0.10.2", "0.11.0"), reason="another jaxlib"
)
def test_cpu_flags_are_set_and_join_those_of_the_user():
    assert show(JAX_PLATFORMS="cpu") == ["1", YNN]
    assert show(JAX_PLATFORMS="cpu", XLA_FLAGS="--a=1") == ["1", f"--a=1 {YNN}"]
    assert show(JAX_PLATFORMS="cpu", XLA_FLAGS=YNN) == ["1", YNN]


def test_an_accelerator_gets_no_cpu_flag_and_the_users_values_stay():
    assert show(JAX_PLATFORMS="cuda") == ["1", "None"]
    assert show(JAX_PLATFORMS="cuda", OPENBLAS_NUM_THREADS="3")[0] == "3"


def test_compiled_programs_are_kept_for_the_next_start(tmp_path):
    code = (
        "import qkjax, jax, jax.numpy as jnp; "
        "jax.jit(lambda x: jnp.linalg.svd(x @ x.T)[1].sum())(jnp.ones((9, 9)))"
    )
    settings = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    env = {k: v for k, v in os.environ.items() if k not in settings}
    env |= {"XDG_CACHE_HOME": str(tmp_path), settings[1]: "0"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    assert list((tmp_path / "qkjax" / "jax").iterdir())
    (tmp_path / "file").touch()  # no directory can be made in it: a warning, and the result
    unwritable = env | {"XDG_CACHE_HOME": str(tmp_path / "file")}
    subprocess.run([sys.executable, "-c", code], check=True, env=unwritable)
    own = env | {settings[0]: str(tmp_path / "own")}
    subprocess.run([sys.executable, "-c", code], check=True, env=own)
    assert list((tmp_path / "own").iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_stays_with_the_process_on_cpus():
    """64 MB are taken and given back six times by a thread: pages are mapped at the first alone."""
    code = (
        "import resource, sys, threading\n"
        "from qkjax.cli import command_line\n"
        "def take():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(6): bytearray(2**26)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
        "def main():\n"
        "    thread = threading.Thread(target=take); thread.start(); thread.join()\n"
        "sys.argv = ['command']; command_line.run(main)"
    )

    def faults(**variables: str) -> float:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**kept, **variables}
        )
        return int(done.stdout) / (2**26 / os.sysconf("SC_PAGE_SIZE"))

    assert faults(JAX_PLATFORMS="cpu") < 1.5
    assert faults(JAX_PLATFORMS="cuda") > 5  # as glibc has it
    assert faults(JAX_PLATFORMS="cpu", MALLOC_TRIM_THRESHOLD_="131072") > 5  # as the user has it
