"""The study's command with real processes: kill -9 of its process group, signals, the same bits."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import small_run

from qkjax.runs.directory import RunDirectory

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS, SHORT = 240, 10  # of the runs, of the sweep's
TOP = 1e30  # times the base rate: it diverges
RUNS = ["sweep/muon_qk/lr_0.012", f"sweep/muon_qk/lr_{0.012 * TOP:.6g}", "runs/muon_qk/seed_3"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return small_run.make_dataset(tmp_path_factory.mktemp("datasets") / "dataset")


def command(dataset: pathlib.Path, workdir: pathlib.Path, *flags: str) -> list[str]:
    fields = {
        "arms": "muon_qk",
        "seeds": 3,
        "tokens": STEPS * small_run.TOKENS_PER_STEP,
        "sweep.tokens": SHORT * small_run.TOKENS_PER_STEP,
        "sweep.factors": f"(1.0,{TOP})",
        "data_dir": dataset,
        "overrides": repr(small_run.STUDY_OVERRIDES),
        "export": "false",
    }
    return [
        sys.executable,
        "tools/run_study.py",
        "--config=configs/study.py:tiny",
        *(f"--config.{name}={value}" for name, value in fields.items()),
        f"--workdir={workdir}",
        *flags,
    ]


def call(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)


def start(arguments: list[str]) -> subprocess.Popen:
    """The command as the leader of a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


@pytest.fixture(scope="module")
def unbroken(dataset, tmp_path_factory) -> pathlib.Path:
    """The study that every interrupted one must equal, made in one piece."""
    workdir = tmp_path_factory.mktemp("unbroken") / "study"
    done = call(*command(dataset, workdir))
    assert done.returncode == 0, done.stderr
    assert f"diverged, which is a result: {RUNS[1]}\n" in done.stdout
    return workdir


def rows(workdir: pathlib.Path) -> int:
    """Steps that all runs of the study have written."""
    return sum(path.read_bytes().count(b"\n") for path in workdir.glob("*/*/*/metrics.jsonl"))


def wait_for_rows(process: subprocess.Popen, workdir: pathlib.Path, count: int) -> None:
    while process.poll() is None and rows(workdir) < count:
        time.sleep(0.01)


def summary(workdir: pathlib.Path, name: str) -> dict:
    return json.loads((workdir / name / "summary.json").read_text())


@pytest.mark.process
def test_a_study_of_real_runs(unbroken):
    for name in RUNS:
        assert summary(unbroken, name)["diverged"] == (name == RUNS[1])
    chosen = json.loads((unbroken / "sweep" / "learning_rates.json").read_text())
    assert chosen["muon_qk"]["chosen"] == 0.012
    config = json.loads((unbroken / "runs" / "muon_qk" / "seed_3" / "config.json").read_text())
    assert (config["seed"], config["train"]["num_steps"], config["model"]["d_ff"]) == (3, STEPS, 48)


@pytest.mark.process
@pytest.mark.long
def test_kill_9_of_the_process_group_and_signals_end_in_the_same_study(dataset, unbroken, tmp_path):
    chance = random.Random(5)
    workdir = tmp_path / "study"
    whole, shown = rows(unbroken), ""
    for signum, share in (
        (signal.SIGKILL, 0.02),
        (signal.SIGTERM, 0.2),
        (signal.SIGINT, 0.5),
        (signal.SIGKILL, 0.75),
    ):
        process = start(command(dataset, workdir))
        wait_for_rows(process, workdir, round(whole * share + chance.uniform(0, 0.1 * whole)))
        if signum == signal.SIGTERM:
            process.send_signal(signum)  # to the executor alone, as a scheduler may
        else:
            os.killpg(process.pid, signum)  # to all, as Ctrl-C does
        stdout, stderr = process.communicate()
        shown += stdout
        if signum == signal.SIGKILL:
            assert process.returncode == -signum
            continue
        assert process.returncode == 128 + signum, stderr
        assert "steps are left. Run the same command again to resume." in stderr
        assert call("pgrep", "-g", str(process.pid)).stdout == ""  # no run is left behind
    done = call(*command(dataset, workdir))
    assert done.returncode == 0, done.stderr
    assert "runs/muon_qk/seed_3  resumes" in shown + done.stdout
    for name in RUNS:
        expected = summary(unbroken, name)["params_sha256"]
        assert summary(workdir, name)["params_sha256"] == expected, name
        assert small_run.rows(workdir / name) == small_run.rows(unbroken / name), name
    for file in ("sweep/learning_rates.json", "study.json", "report/results.csv"):
        assert (workdir / file).read_bytes() == (unbroken / file).read_bytes(), file


@pytest.mark.process
def test_a_finished_study_starts_no_process_and_a_second_executor_is_refused(dataset, unbroken):
    before = {path: path.stat().st_mtime_ns for path in unbroken.glob("*/*/*/*.json")}
    done = call(*command(dataset, unbroken))
    assert done.returncode == 0 and "starts" not in done.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    status = call(*command(dataset, unbroken, "--status"))
    assert status.returncode == 0
    assert "diverged (at step" in status.stdout and f"{STEPS}/{STEPS}" in status.stdout
    costs = call(*command(dataset, unbroken, "--dry_run"))
    assert "tokens/s: muon_qk " in costs.stdout  # measured by these runs

    with RunDirectory(unbroken).lock():
        second = call(*command(dataset, unbroken))
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert f"(pid {os.getpid()} on " in second.stderr


@pytest.mark.process
def test_a_killed_executor_takes_its_runs_with_it(dataset, tmp_path):
    """kill -9 of the executor alone: a run left behind would hold its directory's lock."""
    if sys.platform != "linux":
        pytest.skip("the kernel's parent-death signal is Linux's")
    workdir = tmp_path / "study"
    process = start(command(dataset, workdir, "--only=dataset,sweep/muon_qk/lr_0.012"))
    lock = workdir / "sweep" / "muon_qk" / "lr_0.012" / "run.lock"
    while not (lock.exists() and lock.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    child = json.loads(lock.read_text())["pid"]
    process.kill()
    process.communicate()
    for _ in range(500):
        if not pathlib.Path(f"/proc/{child}").exists():
            return
        time.sleep(0.01)
    pytest.fail("the run is still there")
