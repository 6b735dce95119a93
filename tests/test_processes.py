"""Several processes on this machine, through the command: the same run, and one end for all."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import small_run

from qkjax import train
from qkjax.runs import checkpoint

pytestmark = [pytest.mark.process, pytest.mark.long]
ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 50
TOKENS = f"--config.train.tokens={STEPS * small_run.TOKENS_PER_STEP}"
# Cut arrays are summed in other orders, and a rounding grows: 4e-7 of the loss after 20 steps, 1e-5
# after 28.
MESH_STEPS = 20
# What is seen of a peer that was killed comes from the heartbeat, after 20 s; the rest is a guard.
END_SECONDS = 1200


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return small_run.make_dataset(tmp_path_factory.mktemp("datasets") / "dataset")


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory) -> pathlib.Path:
    """The run of one process, of `STEPS` steps."""
    return run_of_one(dataset, tmp_path_factory.mktemp("alone") / "run", STEPS)


@pytest.fixture(scope="module")
def alone_for_less(dataset, tmp_path_factory) -> pathlib.Path:
    """The same of `MESH_STEPS`."""
    return run_of_one(dataset, tmp_path_factory.mktemp("alone") / "run", MESH_STEPS)


def run_of_one(dataset: pathlib.Path, workdir: pathlib.Path, steps: int) -> pathlib.Path:
    tokens = steps * small_run.TOKENS_PER_STEP
    config = small_run.make_config(dataset, "muon", "learned", train__tokens=tokens)
    train.train_and_evaluate(config, workdir)
    return workdir


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    count: int, command: list[str], own: dict[int, list[str]] | None = None, devices: int = 1
) -> list:
    """The processes of one command on `devices` each; `own` has more flags of some of them."""
    forced = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    port = free_port()
    return [
        subprocess.Popen(
            [
                *command,
                f"--coordinator=127.0.0.1:{port}",
                f"--num_processes={count}",
                f"--process_id={index}",
                *(own or {}).get(index, []),
            ],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": forced},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def start_in_slurm(count: int, command: list[str]) -> list:
    """The processes of one command, as srun starts them: jax reads who they are."""
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(count),
        "JAX_COORDINATOR_PORT": str(free_port()),
    }
    return [
        subprocess.Popen(
            [*command, "--distributed"],
            cwd=ROOT,
            env={**os.environ, **job, "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def ends(processes: list) -> list[tuple[int, str]]:
    """Exit code and stderr of each."""
    try:
        texts = [process.communicate(timeout=END_SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


def wait_for_rows(processes: list, workdir: pathlib.Path, count: int) -> None:
    path = workdir / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert all(process.poll() is None for process in processes), ends(processes)
        time.sleep(0.01)


def error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("ERROR: ")]


def assert_same_run(workdir: pathlib.Path, other: pathlib.Path, steps: int = STEPS) -> None:
    """One row a step with the same names, losses to 1e-5, and one set of files."""
    ours, theirs = small_run.rows(workdir), small_run.rows(other)
    assert [row["step"] for row in ours] == list(range(steps + 1))
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for name in ("train/loss", "val/loss"):
        pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True) if name in a]
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-5)
    for folder in ("spectra", "validation"):
        names = sorted(path.name for path in (other / folder).iterdir())
        assert sorted(path.name for path in (workdir / folder).iterdir()) == names
        for name in names:
            with np.load(workdir / folder / name) as a, np.load(other / folder / name) as b:
                assert a.files == b.files
                if folder == "validation":  # the mean is to 1e-5; one of n sequences is not
                    rtol = 1e-5 * len(b["loss_sum"]) ** 0.5
                    np.testing.assert_allclose(a["loss_sum"], b["loss_sum"], rtol=rtol)


def test_two_processes_train_the_run_of_one(dataset, alone, tmp_path):
    found = ends(start_in_slurm(2, small_run.command(dataset, tmp_path / "run", TOKENS)))
    assert [code for code, _ in found] == [0, 0], found
    assert_same_run(tmp_path / "run", alone)


RESTORED = """
import runpy, sys
from qkjax import processes, train
from qkjax.runs import checkpoint
original = train._Run._train
def say(run, state):
    trees = processes.whole((state.params, state.opt_state))
    print("RESTORED", *(checkpoint.digests(tree)[1] for tree in trees), file=sys.stderr)
    return original(run, state)
train._Run._train = say
sys.argv = ["qkjax.main", *sys.argv[1:]]
runpy.run_module("qkjax.main", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("mesh", "other", "count", "devices"), [("zero1", "fsdp", 2, 1), ("fsdp", "zero1", 1, 4)]
)
def test_a_mesh_over_two_processes_is_the_run_of_one_and_resumes_elsewhere(
    dataset, alone_for_less, tmp_path, mesh, other, count, devices
):
    """Two processes of two devices each; then another mesh on other processes and devices."""
    workdir = tmp_path / "run"
    command = small_run.command(
        dataset, workdir, f"--config.train.tokens={MESH_STEPS * small_run.TOKENS_PER_STEP}"
    )
    cut = ends(start(2, [*command, f"--config.mesh={mesh}"], devices=2))
    assert [code for code, _ in cut] == [0, 0], cut
    assert_same_run(workdir, alone_for_less, MESH_STEPS)

    with contextlib.closing(
        checkpoint.Checkpoints(workdir / "checkpoints", read_only=True)
    ) as checkpoints:
        step = checkpoints.steps()[-2]
        meta = checkpoints.meta(step)
    assert 0 < step < MESH_STEPS
    changed = (f"--config.mesh={other}", "--allow_config_change=mesh")
    flags = [*command[3:], *changed, f"--restore_step={step}"]
    elsewhere = ends(start(count, [sys.executable, "-c", RESTORED, *flags], devices=devices))
    for code, text in elsewhere:
        assert code == 0, text
        words = f"RESTORED {meta['params_sha256']} {meta['opt_state_sha256']}"
        assert words in text.splitlines()
    assert_same_run(workdir, alone_for_less, MESH_STEPS)


def test_a_run_survives_a_signal_and_a_kill_on_two_and_four_and_one(dataset, alone, tmp_path):
    workdir = tmp_path / "run"
    command = small_run.command(dataset, workdir, TOKENS)
    two = start(2, command)
    wait_for_rows(two, workdir, 4)
    two[1].send_signal(signal.SIGTERM)
    for code, text in ends(two):
        assert code == 143 and len(error_lines(text)) == 1, text
        assert "stopped after step" in text and "which is saved" in text
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert saved == small_run.rows(workdir)[-1]["step"] < STEPS

    four = start(4, command)
    wait_for_rows(four, workdir, saved + 14)  # there is a later checkpoint
    four[2].kill()
    killed = ends(four)
    assert killed[2][0] == -signal.SIGKILL
    for index in (0, 1, 3):
        assert killed[index][0] not in (0, None)
        assert len(error_lines(killed[index][1])) == 1, killed[index][1]

    last = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert "resumed after step" in last.stdout and "from scratch" not in last.stdout
    assert_same_run(workdir, alone)
    again = start(2, command)
    assert [code for code, _ in ends(again)] == [0, 0]


def test_one_that_refuses_ends_all_with_its_words(dataset, alone, tmp_path):
    for own, code, expected in (
        # Process 0 alone knows the run directory.
        ({}, 2, "this run started with other settings: optimizer.learning_rate: old "),
        # Files of the host of process 1.
        ({1: ["--config.data.dir=/nowhere"]}, 2, "/nowhere"),
        # Every process sees that the second differs.
        ({1: ["--config.seed=7"]}, 2, "--process_id=1: config.seed is 7, expected 42 as in "),
    ):
        rate = "--config.optimizer.learning_rate=0.5" if not own else TOKENS
        workdir = tmp_path / "new" if own else alone
        for found, text in ends(start(2, small_run.command(dataset, workdir, TOKENS, rate), own)):
            assert found == code, text
            assert len(error_lines(text)) == 1 and expected in error_lines(text)[0], text


def test_a_run_that_diverges_names_the_records_of_all_processes(dataset, tmp_path):
    flags = ("--config.optimizer.learning_rate=1e30", "--config.optimizer.adam_learning_rate=1e30")
    command = small_run.command(dataset, tmp_path / "one", *flags)
    one = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    two = ends(start(2, small_run.command(dataset, tmp_path / "two", *flags)))
    records = re.compile(r"training records ([\d, ]+)\.")
    wanted = records.findall(one.stderr)
    assert one.returncode == 3 and len(wanted[0].split(", ")) == 4
    for code, text in two:
        assert code == 3 and records.findall(text) == wanted, text
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["diverged"]


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_is_not_there_is_named(dataset, tmp_path, index):
    """Process 1 does not reach the coordinator; or process 0 waits for process 1."""
    address = f"127.0.0.1:{free_port()}"
    flags = ("--num_processes=2", f"--process_id={index}", "--join_seconds=2")
    command = small_run.command(dataset, tmp_path / "run", f"--coordinator={address}", *flags)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(error_lines(done.stderr)) == 1
    missing = f"{address} cannot be reached within 2 s"
    expected = missing if index else f"2 processes did not meet at {address} within 2 s"
    assert done.stderr.startswith(f"ERROR: --coordinator: {expected}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


DOES = """
import os, runpy, signal, sys, time
import jax
from qkjax.data import pipeline
join = jax.distributed.initialize
def initialize(*args, **kwargs):
    global joined
    join(*args, **kwargs)
    joined = time.monotonic()
jax.distributed.initialize = initialize
original = pipeline.TrainLoader.__next__
def do(loader):
    if loader.step == 7 and "--process_id={index}" in sys.argv:
        {what}
    return original(loader)
pipeline.TrainLoader.__next__ = do
sys.argv = ["qkjax.main", *sys.argv[1:]]
runpy.run_module("qkjax.main", run_name="__main__")
"""


def start_two_of_which_one(index: int, what: str, command: list[str]) -> list:
    """Two processes; before its eighth step one of them executes a statement."""
    program = DOES.format(index=index, what=what)
    return start(2, [sys.executable, "-c", program, *command[3:]])


def test_one_that_raises_ends_the_other_with_the_cause(dataset, tmp_path):
    command = small_run.command(dataset, tmp_path / "run")
    two = start_two_of_which_one(1, "raise ValueError('of a test')", command)
    (first, text), (second, own) = ends(two)
    assert first == second == 1
    assert error_lines(text) == ["ERROR: process 1: ValueError: of a test"]
    assert "Traceback" in own


# Just before its next heartbeat (one in 10 s): the coordinator, in process 0, misses it soonest,
# and jaxlib then aborts process 0, which must have said why by then.
LATE = "time.sleep(9.5 - (time.monotonic() - joined) % 10 % 9.5)"


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    "what",
    [f"{LATE}; os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)"],
    ids=["killed", "left"],
)
def test_one_that_is_gone_ends_the_other_with_the_cause(dataset, alone, tmp_path, index, what):
    """Also process 0, with whom the others meet and who writes the run; it can be resumed."""
    workdir = tmp_path / "run"
    command = small_run.command(dataset, workdir, TOKENS)
    code, text = ends(start_two_of_which_one(index, what, command))[1 - index]
    if index == 0:  # jaxlib ends a process whose coordinator is gone, before any code of ours runs
        assert code == -signal.SIGABRT and "Either the leader task was preempted/died" in text
    else:
        assert code == 1 and len(error_lines(text)) == 1, text
        assert "Usually one of them was killed: look at the last line of each" in text
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert_same_run(workdir, alone)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--coordinator=a:1",), "--num_processes: missing."),
        (("--num_processes=2", "--process_id=0"), "--coordinator: missing."),
        (("--coordinator=a", "--num_processes=2", "--process_id=0"), "--coordinator: 'a' is no"),
        (("--coordinator=a:1", "--num_processes=2", "--process_id=2"), "--process_id: 2 of 2"),
        (("--coordinator=a:1", "--distributed"), "--distributed: it takes everything from"),
        (("--distributed",), "--distributed: jax detects no cluster here"),
    ],
)
def test_flags_that_do_not_fit_together(dataset, tmp_path, flags, expected):
    command = small_run.command(dataset, tmp_path / "run", *flags)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"ERROR: {expected}")
