"""The command itself, as a process: kill -9 at random moments, signals, locks, full disks."""

import json
import os
import pathlib
import random
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import small_run

from qkjax import errors, train

pytestmark = pytest.mark.process
ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return small_run.make_dataset(tmp_path_factory.mktemp("datasets") / "dataset")


@pytest.fixture(scope="module")
def unbroken(dataset, tmp_path_factory) -> pathlib.Path:
    """The run that every interrupted one must equal, made in one piece."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    train.train_and_evaluate(small_run.make_config(dataset, "muon", "learned"), workdir)
    return workdir


command = small_run.command


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_rows(process: subprocess.Popen, workdir: pathlib.Path, count: int) -> None:
    """Returns when metrics.jsonl has N rows, or the process has ended."""
    path = workdir / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.005)


@pytest.mark.long
def test_kill_9_at_random_moments_ends_in_the_same_bits(dataset, unbroken, tmp_path):
    chance = random.Random(11)
    workdir = tmp_path / "run"
    for rows in (1, 17):  # before the first checkpoint after 0, and between two
        process = start(command(dataset, workdir))
        wait_for_rows(process, workdir, rows)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    last = subprocess.run(command(dataset, workdir), cwd=ROOT, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    expected = json.loads((unbroken / "summary.json").read_text())
    found = json.loads((workdir / "summary.json").read_text())
    assert found["params_sha256"] == expected["params_sha256"]
    assert small_run.identity(workdir) == small_run.identity(unbroken)
    assert small_run.rows(workdir) == small_run.rows(unbroken)


def test_signals_locks_and_the_second_start(dataset, unbroken, tmp_path):
    workdir = tmp_path / "run"
    process = start(command(dataset, workdir))
    wait_for_rows(process, workdir, 3)
    second = subprocess.run(command(dataset, workdir), cwd=ROOT, capture_output=True, text=True)
    if process.poll() is None:  # the first run is still there, so the second was refused
        assert second.returncode == 2
        assert str(process.pid) in second.stderr and second.stderr.count("\n") == 1
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    if process.returncode != 0:  # it was not yet finished
        assert process.returncode == 130
        assert "stopped after step" in stderr
    last = subprocess.run(command(dataset, workdir), cwd=ROOT, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert small_run.rows(workdir) == small_run.rows(unbroken)
    again = subprocess.run(command(dataset, workdir), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0
    assert "already complete" in again.stdout


def test_a_workdir_that_is_a_file_is_a_disk_error(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        command(dataset, tmp_path / "file"), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 4
    assert done.stderr.startswith("ERROR: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("kilobytes", "verb", "message"),
    [
        (1_600_000, "train", "ulimit -v: this process may take 1.64 GB of memory, and needs at "),
        (500_000, "check", r"ulimit: \d+ of the 64 threads that read shards could be started \("),
    ],
)
def test_a_limit_of_memory_is_one_line_and_no_endless_wait(
    dataset, tmp_path, kilobytes, verb, message
):
    """The readers of shards would wait for ever for those of their threads that did not start."""
    arguments = {"train": command(dataset, tmp_path / "run")[3:], "check": [str(dataset)]}[verb]
    start = [sys.executable, "-m", "qkjax.commands", verb, *arguments]
    limited = f"ulimit -v {kilobytes} && exec {shlex.join(start)}"
    done = subprocess.run(
        ["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == errors.OutOfMemoryError.exit_code
    assert re.match(f"ERROR: {message}", done.stderr) and done.stderr.count("\n") == 1
    assert "Raise the limit" in done.stderr


@pytest.mark.long
def test_divergence_exits_3_and_names_what_broke(dataset, tmp_path):
    flags = ("--config.optimizer.learning_rate=1e30", "--config.optimizer.adam_learning_rate=1e30")
    for text in ("training records", "diverged at step"):
        done = subprocess.run(
            command(dataset, tmp_path / "run", *flags), cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 3
        assert text in done.stderr


def test_dry_run_shows_the_costs_and_writes_nothing(dataset, tmp_path):
    done = subprocess.run(
        command(dataset, tmp_path / "run", "--dry_run"), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "steps           20 of 128 tokens" in done.stdout
    assert '"arm": "muon_qk"' in done.stdout
    assert "GB a device\n" in done.stdout and "\nv5e  " in done.stdout  # hours, by chip
    assert not (tmp_path / "run").exists()


def test_a_target_is_read_before_anything_is_computed(dataset, tmp_path):
    for flags, message in (
        (("--aot=h100",), "--aot: it compiles and trains nothing. Add --dry_run."),
        (("--dry_run", "--aot=h10"), "--aot: unknown chip 'h10'. Did you mean 'h100'?"),
    ):
        done = subprocess.run(
            command(dataset, tmp_path / "run", *flags), cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stderr.startswith(f"ERROR: {message}")


@pytest.mark.long
def test_profile_writes_a_trace(dataset, tmp_path):
    done = subprocess.run(
        command(dataset, tmp_path / "run", "--config.profile.steps=(3,4)"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    traces = list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000
    assert os.path.exists(next(traces[0].parent.glob("*.trace.json.gz")))


NO_MEMORY = """
import runpy, sys
import jax
from qkjax.runs import resources
def full(*arguments):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
resources.compile_step = full
sys.argv = ["qkjax.main", *sys.argv[1:]]
runpy.run_module("qkjax.main", run_name="__main__")
"""


def test_a_dry_run_that_does_not_fit_gives_the_advice_of_a_run(dataset, tmp_path):
    flags = command(dataset, tmp_path / "run", "--dry_run")[3:]
    done = subprocess.run(
        [sys.executable, "-c", NO_MEMORY, *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("ERROR: train.microbatch_sequences: the device's memory does not")
    assert done.stderr.count("\n") == 1
