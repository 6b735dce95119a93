"""Repeated and resumed runs, compared to the bit by the command a user calls."""

import json
import pathlib
import shutil
import subprocess
import sys
import time

import jax
import pytest
import small_run

from qkjax import config as config_lib
from qkjax import errors, train
from qkjax.runs.directory import RunDirectory
from qkjax.trained import determinism

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIZES = (
    "model.num_layers=1",
    "model.d_model=16",
    "model.num_heads=1",
    "model.num_kv_heads=1",
    "model.head_dim=16",
    "model.d_ff=16",
    f"model.vocab_size={small_run.VOCABULARY}",
    f"model.sequence_length={small_run.LENGTH}",
    f"train.tokens={10 * 128}",
    "train.tokens_per_step=128",
    "eval.at_tokens=()",
    f"checkpoint.every_tokens={2 * 128}",
)


def command(workdir: pathlib.Path, data: pathlib.Path) -> list[str]:
    return [
        sys.executable,
        "tools/check_determinism.py",
        "--config=configs/muon_qk.py:tiny",
        f"--config.data.dir={data}",
        *(f"--config.{field}" for field in SIZES),
        f"--workdir={workdir}",
    ]


def check(workdir: pathlib.Path, data: pathlib.Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(workdir, data), cwd=ROOT, capture_output=True, text=True)


@pytest.mark.process
@pytest.mark.long
def test_a_repeated_and_a_resumed_run_are_equal_and_a_changed_one_is_found(tmp_path, monkeypatch):
    data = small_run.make_dataset(tmp_path / "data")
    workdir = tmp_path / "check"
    done = check(workdir, data)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("again: equal to the bit\nresumed: equal to the bit\n")
    outcome = json.loads((workdir / "determinism.json").read_text())
    # Of the checkpoints 0, 2, 4, 6, 8 and 10 a finished run keeps the first and the last two.
    assert outcome["equal"] and outcome["resumed_from"] == 8 and outcome["steps"] == 10
    assert outcome["environment"]["versions"]["jax"]
    first, resumed = (RunDirectory(workdir / name).read_metrics() for name in ("first", "resumed"))
    speeds = [[row.get("perf/data_wait") for row in rows] for rows in (first, resumed)]
    assert speeds[0][:9] == speeds[1][:9]  # steps 0 to 8 are the first run's own
    assert speeds[0][9:] != speeds[1][9:]  # and the rest was trained again
    assert "start      resumed after step 8" in done.stdout  # shown while it trains

    # The same command on a machine that computes something else: other initial values.
    run_config = config_lib.from_dict(json.loads((workdir / "first" / "config.json").read_text()))
    shutil.rmtree(workdir / "again")
    monkeypatch.setattr(train, "initialisation_key", lambda seed: jax.random.key(seed + 1))
    train.train_and_evaluate(run_config, workdir / "again")
    done = check(workdir, data)
    assert done.returncode == 2 and "ERROR:" in done.stderr.splitlines()[-1]
    assert "resumed: equal to the bit" in done.stdout
    outcome = json.loads((workdir / "determinism.json").read_text())
    assert not outcome["equal"] and outcome["resumed"] is None
    assert outcome["again"]["step"] == 1
    assert "params/embedding" in outcome["again"]["leaves"]
    assert any(leaf.startswith("opt_state/") for leaf in outcome["again"]["leaves"])


def test_a_run_without_a_checkpoint_in_between_is_refused(tmp_path):
    data = small_run.make_dataset(tmp_path / "data")
    run_config = small_run.make_config(data, checkpoint__every_tokens=10**6)
    with pytest.raises(errors.UsageError, match=r"checkpoint.every_tokens: the run saves at \[0"):
        determinism.check(run_config, ["--config=configs/muon_qk.py:tiny"], tmp_path / "check")
    assert not (tmp_path / "check").exists()


def test_a_run_that_fails_is_named(tmp_path, capfd):
    data = small_run.make_dataset(tmp_path / "data")
    run_config = small_run.make_config(data)
    arguments = ["--config=configs/muon_qk.py:tiny", "--config.model.vocab_size=300"]
    with pytest.raises(errors.UsageError, match=r"first: the run ended with exit code 2, "):
        determinism.check(run_config, [*arguments, f"--config.data.dir={tmp_path}"], tmp_path / "c")
    assert f"ERROR: {tmp_path}/dataset.json: missing" in capfd.readouterr().err


@pytest.mark.process
@pytest.mark.long
def test_a_signal_to_the_check_stops_the_run_under_way(tmp_path):
    data = small_run.make_dataset(tmp_path / "data")
    process = subprocess.Popen(
        [
            *command(tmp_path / "check", data),
            f"--config.train.tokens={100_000 * 128}",
            "--config.data.max_epochs=1000000",
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    rows = tmp_path / "check" / "first" / "metrics.jsonl"
    while process.poll() is None and not (rows.exists() and rows.read_bytes()):
        time.sleep(0.05)
    process.terminate()  # this process alone, not its group
    _, stderr = process.communicate()
    assert process.returncode == 143
    assert "first: stopped after step" in stderr  # it had saved before the check ended
    assert stderr.splitlines()[-1].endswith("Run the same command again to resume.")
