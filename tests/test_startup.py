"""startup: what a command sets before jax is imported, and that importing qkjax sets nothing."""

import ast
import importlib.metadata
import json
import os
import pathlib
import resource
import subprocess
import sys

import pytest
import small_run
from absl import flags

from qkjax import commands, errors, train
from qkjax.cli import command_line, startup

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The tests' own process has them already.
OURS = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "OPENBLAS_NUM_THREADS",
    "XLA_FLAGS",
)
YNN = "--xla_cpu_experimental_ynn_fusion_type="
has_ynn = pytest.mark.skipif(
    importlib.metadata.version("jaxlib") not in ("0.10.2", "0.11.0"), reason="another jaxlib"
)


def run(code: str, **variables: str) -> str:
    """What the code prints in a process without this project's variables, but with these."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in OURS and name[:7] != "MALLOC_"
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**kept, **variables},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


MODULES = [
    *(f"qkjax.commands.{verb}" for verb in commands.VERBS),
    "qkjax.data.pipeline",
    "qkjax.muon",
    "qkjax.report.report",
    "qkjax.study.run",
    "qkjax.train",
]
IMPORT_THEN_COMMAND = f"""
import importlib, json, os, sys
import jax  # which sets two variables of its own
before = dict(os.environ)
def changed():
    return sorted(name for name in os.environ if os.environ[name] != before.get(name))
for name in {MODULES}:
    importlib.import_module(name)
imported = changed()
sys.argv = ["qkjax", "check", "--help"]
try:
    sys.modules["qkjax.commands"].main()
except SystemExit:
    print(json.dumps([imported, changed()]))
"""


@pytest.mark.process
def test_importing_changes_no_environment_variable_and_a_command_does():
    """All modules at once: no two commands define a flag for each other either."""
    imported, commanded = json.loads(run(IMPORT_THEN_COMMAND, JAX_PLATFORMS="cpu").splitlines()[-1])
    assert imported == []
    assert set(commanded) in (set(OURS), set(OURS) - {"XLA_FLAGS"})


@pytest.fixture
def bare(monkeypatch):
    """This process without the variables; they are back after the test."""
    for name in (*OURS, "JAX_PLATFORMS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_every_command_prepares_its_process(bare):
    """As `python -m qkjax.main` does, which no verb leads to."""
    bare.setattr(sys, "argv", ["command"])
    bare.setattr(startup, "keep_freed_memory", lambda: None)  # this process is pytest's
    seen = []
    with pytest.raises(SystemExit):
        command_line.run(lambda: seen.append(os.environ.copy()), flags.FlagValues(), "")
    assert seen[0]["OPENBLAS_NUM_THREADS"] == "1"


@has_ynn
@pytest.mark.parametrize("given", ["", "--a=1", YNN, f"{YNN} --a=1"])
def test_cpu_flags_join_those_of_the_user(bare, given):
    bare.setenv("JAX_PLATFORMS", "cpu")
    bare.setenv("XLA_FLAGS", given)
    startup.prepare_process()
    assert os.environ["XLA_FLAGS"] == (given if YNN in given else f"{given} {YNN}".strip())
    assert os.environ["OPENBLAS_NUM_THREADS"] == "1"


def test_an_accelerator_gets_no_cpu_flag_and_the_users_values_stay(bare):
    bare.setenv("JAX_PLATFORMS", "cuda")
    bare.setenv("OPENBLAS_NUM_THREADS", "3")
    startup.prepare_process()
    assert YNN not in os.environ["XLA_FLAGS"]
    assert os.environ["OPENBLAS_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("platforms", "given", "asked"),
    [
        ("cuda", "", True),
        ("cuda", "--a=1", True),
        ("gpu,cpu", "", True),
        ("cuda", "--xla_gpu_deterministic_ops=false", False),  # the user's own
        ("cpu", "", None),
        ("tpu", "", None),
    ],
)
def test_gpus_are_asked_for_one_order_of_sums(bare, platforms, given, asked):
    bare.setenv("JAX_PLATFORMS", platforms)
    bare.setenv("XLA_FLAGS", given)
    startup.prepare_process()
    assert startup.gpu_determinism() is asked
    assert given in os.environ["XLA_FLAGS"]
    startup.allow_gpu_nondeterminism()
    assert startup.gpu_determinism() is (None if asked is None else False)


@has_ynn
@pytest.mark.parametrize("plugin", ["jax_cuda12_plugin", "jax_cuda13_plugin", "libtpu", None])
@pytest.mark.parametrize("device", ["nvidia0", "vendor", None])
def test_a_plugin_without_its_device_changes_nothing(bare, tmp_path, plugin, device):
    """The CPU's bits depend on the flag, and a machine for compilation has plugins alone."""
    bare.syspath_prepend(tmp_path)
    (tmp_path / f"{plugin}.py").touch()
    if device:
        (tmp_path / device).write_text("0x1ae0\n")
    bare.setattr(startup, "_NVIDIA_DEVICES", (str(tmp_path / "nvidia0"),))
    bare.setattr(startup, "_PCI_VENDORS", str(tmp_path / "vend*"))
    startup.prepare_process()
    pairs = {"nvidia0": "jax_cuda", "vendor": "libtpu"}
    is_used = bool(device and plugin and plugin.startswith(pairs[device]))
    assert (YNN in os.environ.get("XLA_FLAGS", "")) != is_used


def test_cpus_are_counted_where_the_system_cannot_say_which(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 5}, raising=False)
    assert startup.cpu_count() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert startup.cpu_count() == 7


def test_a_limit_of_memory_under_which_jax_hangs_is_refused(monkeypatch):
    limits = {resource.RLIMIT_STACK: 8 << 20, resource.RLIMIT_AS: resource.RLIM_INFINITY}
    monkeypatch.setattr(
        resource, "getrlimit", lambda kind: (limits.get(kind, resource.RLIM_INFINITY), 0)
    )
    monkeypatch.setattr(startup, "cpu_count", lambda: 2)
    startup.check_memory_limit(10**15)  # no limit at all
    limits[resource.RLIMIT_AS] = 3_000_000 << 10
    startup.check_memory_limit()  # the smallest run takes 2.1 GB
    with pytest.raises(errors.OutOfMemoryError, match=r"3\.07 GB .* 3\.24 GB, of which 1\.00 GB"):
        startup.check_memory_limit(10**9)
    limits[resource.RLIMIT_STACK] = 64 << 20  # of 100 threads
    with pytest.raises(errors.OutOfMemoryError, match=r"ulimit -v: .* 8\.11 GB"):
        startup.check_memory_limit()


def test_nothing_else_takes_linux_for_granted():
    for path in [*(ROOT / "qkjax").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        named = {n.attr for n in ast.walk(ast.parse(path.read_text())) if hasattr(n, "attr")}
        affinity = {"sched_getaffinity", "sched_setaffinity"} & named
        assert not affinity or path.name == "startup.py", path


@pytest.mark.process
def test_compiled_programs_are_kept_for_the_next_start(tmp_path):
    code = (
        "import qkjax; qkjax.prepare_process()\n"
        "import jax, jax.numpy as jnp\n"
        "jax.jit(lambda x: jnp.linalg.svd(x @ x.T)[1].sum())(jnp.ones((9, 9)))"
    )
    soon = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    run(code, **soon, XDG_CACHE_HOME=str(tmp_path))
    assert list((tmp_path / "qkjax" / "jax").iterdir())
    (tmp_path / "file").touch()  # no directory can be made in it: a warning, and the result
    run(code, **soon, XDG_CACHE_HOME=str(tmp_path / "file"))
    run(code, **soon, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert list((tmp_path / "own").iterdir())


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_stays_with_the_process_on_cpus():
    """64 MB are taken and given back six times by a thread: pages are mapped at the first alone."""
    code = (
        "import resource, sys, threading\n"
        "from absl import flags\n"
        "from qkjax.cli import command_line\n"
        "def take():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(6): bytearray(2**26)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
        "def work():\n"
        "    thread = threading.Thread(target=take); thread.start(); thread.join()\n"
        "sys.argv = ['command']; command_line.run(work, flags.FlagValues(), '')"
    )

    def faults(**variables: str) -> float:
        return int(run(code, **variables)) / (2**26 / os.sysconf("SC_PAGE_SIZE"))

    assert faults(JAX_PLATFORMS="cpu") < 1.5
    assert faults(JAX_PLATFORMS="cuda") > 5  # as glibc has it
    assert faults(JAX_PLATFORMS="cpu", MALLOC_TRIM_THRESHOLD_="131072") > 5  # as the user has it


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own")
def test_what_a_compiler_has_freed_goes_back_to_the_system():
    """Pieces between what lives on, as LLVM leaves them, in a process that keeps freed memory."""
    code = """
import os
from qkjax.cli import startup
startup.keep_freed_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
pieces = [bytes([1]) * 100_000 for _ in range(2000)]
kept = pieces[::50]
del pieces
freed = resident()
startup.give_back_freed_memory()
print(freed - resident(), sum(map(len, kept)))
"""
    returned, kept = map(int, run(code, JAX_PLATFORMS="cpu").split())
    assert returned > 150_000_000 and kept == 4_000_000


@pytest.mark.long
def test_a_run_gives_back_what_compiling_took_before_its_first_step(monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(startup, "give_back_freed_memory", lambda: said.append(True))
    data = small_run.make_dataset(tmp_path / "data")
    config = small_run.make_config(
        data, train__tokens=2 * small_run.TOKENS_PER_STEP, eval__at_tokens=()
    )
    train.train_and_evaluate(config, tmp_path / "run")
    assert said == [True]  # after the step's program, the last before the first step
