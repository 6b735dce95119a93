"""--wandb: what wandb has of a run is metrics.jsonl, each row once, and nothing else changes.

wandb itself is in these tests, offline: its files are read back.
"""

import json
import os
import pathlib
import struct
import subprocess
import sys
import zlib

import pytest
import small_run

from qkjax import errors, train
from qkjax.cli import startup
from qkjax.data import pipeline
from qkjax.runs import signals, writers
from qkjax.runs.directory import RunDirectory

wandb = pytest.importorskip("wandb", reason="the extra [wandb] is not installed")
from wandb.proto import wandb_internal_pb2  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]
_BLOCK, _HEADER = 32_768, struct.Struct("<IHB")  # of LevelDB's log, behind wandb's 7 bytes


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No account, no network, nothing of this machine's own settings."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()
    yield
    wandb.teardown()


def records(path):
    """The records of one .wandb file, with every checksum compared."""
    data, position, whole = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while position < len(data):
        if _BLOCK - position % _BLOCK < _HEADER.size:  # the rest of a block is filled up
            position += _BLOCK - position % _BLOCK
            continue
        checksum, length, kind = _HEADER.unpack_from(data, position)
        position += _HEADER.size
        part = data[position : position + length]
        assert zlib.crc32(bytes([kind]) + part) == checksum
        position += length
        whole += part  # 1: all of a record; 2, 3, 4: its first, middle and last part
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def sent(workdir):
    """What wandb has of each start: (id, config, [(step, row)], summary, exit code)."""
    found = []
    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        name, config, rows, summary, code = None, {}, [], {}, None
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                name = record.run.run_id
                config |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
            elif kind == "history":
                items = {
                    i.key or "/".join(i.nested_key): json.loads(i.value_json)
                    for i in record.history.item
                }
                row = {key: value for key, value in items.items() if not key.startswith("_")}
                rows.append((items["_step"], row))
            elif kind == "summary":
                summary |= {u.key: json.loads(u.value_json) for u in record.summary.update}
            elif kind == "exit":
                code = record.exit.exit_code
        found.append((name, config, rows, summary, code))
    return found


def recorded(workdir):
    """What wandb is to have: the rows of metrics.jsonl without nulls."""
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [
        (row["step"], {k: v for k, v in row.items() if k != "step" and v is not None})
        for row in rows
    ]


def make_directory(workdir, **fields):
    """A run directory as `train` has it when it makes its writer."""
    directory = RunDirectory.make(workdir)
    config = small_run.make_config(workdir.parent, **fields).for_platform("cpu")
    directory.record_config(config, "0123")
    directory.write_environment("0123")
    return directory


def write(workdir, resume_step, last_step):
    """An evaluation every fifth step; returns the writer, open."""
    writer = writers.create_run_writer(workdir, resume_step, wandb=True)
    for step in range(resume_step + 1, last_step + 1):
        row = {"step": step, "tokens": 128 * step, "train/loss": 3 / (step + 1), "perf/mfu": None}
        writer.write_row(row | ({"val/loss": 2 / (step + 1)} if step % 5 == 0 else {}))
    return writer


def finish(directory, step, diverged=False):
    summary = {"arm": "muon", "seed": 42, "step": step, "tokens": 128 * step, "val/loss": 0.5}
    summary |= {"params_sha256": "ab", "diverged": diverged, "diverged_step": None}
    directory.write_summary(summary)


def test_a_run_that_is_killed_and_resumed_is_one_run_with_each_row_once(tmp_path):
    directory = make_directory(tmp_path / "first")
    write(directory.path, -1, 12)
    wandb.teardown()  # killed: row 12 is in metrics.jsonl, and was not sent
    write(directory.path, 10, 11)  # 11 again
    wandb.teardown()
    writer = write(directory.path, 10, 20)
    finish(directory, 20)
    writer.close()
    starts = sent(directory.path)
    assert len({name for name, *_ in starts}) == 1
    assert [[step for step, _ in rows] for _, _, rows, *_ in starts] == [
        [*range(12)],
        [],
        [*range(12, 21)],
    ]
    assert [row for _, _, rows, *_ in starts for row in rows] == recorded(directory.path)
    *_, (_, config, _, summary, code) = starts
    assert code == 0 and summary["val/loss"] == 0.5 and summary["params_sha256"] == "ab"
    expected = directory.read_config().to_dict()
    commit = directory.read_environment()["git"]["sha"]
    assert config.pop("commit") == commit and config.pop("commit_is_dirty") in (True, False, None)
    assert {k: config[k] for k in expected} == json.loads(json.dumps(expected))
    assert (config["arm"], config["seed"]) == ("muon_noqk", 42)
    assert writer.errors() == {}


def test_what_a_resumed_run_adds_to_its_row_is_in_that_row(tmp_path):
    """A signal in an evaluation: the row is saved without it."""
    directory = make_directory(tmp_path / "run")
    writer = write(directory.path, -1, 7)
    writer.close()  # stopped: no summary.json
    writer = writers.create_run_writer(directory.path, 7, wandb=True)
    writer.write_row({**writer.last_row(), "val/loss": 0.25})
    writer.write_row({"step": 8, "train/loss": 0.125})
    finish(directory, 8, diverged=True)
    writer.close()
    (_, _, first, _, stopped), (_, _, second, _, diverged) = sent(directory.path)
    assert [step for step, _ in first] == [*range(7)] and [step for step, _ in second] == [7, 8]
    assert second[0][1]["val/loss"] == 0.25 and first + second == recorded(directory.path)
    assert (stopped, diverged) == (1, 3)


def test_a_run_that_began_without_wandb_is_sent_from_its_start(tmp_path):
    directory = make_directory(tmp_path / "run")
    writer = writers.create_run_writer(directory.path)
    for step in range(6):
        writer.write_row({"step": step, "train/loss": 1 / 3})
    writer.close()
    assert not (directory.path / "wandb").exists()
    writer = write(directory.path, 3, 4)
    finish(directory, 4)
    writer.close()
    [(_, _, rows, _, code)] = sent(directory.path)
    assert rows == recorded(directory.path) and len(rows) == 5 and code == 0


def test_the_server_says_how_far_a_run_is_that_was_sent_to_it(tmp_path, monkeypatch):
    """Of a killed machine: wandb.json has more rows than reached the server."""
    directory = make_directory(tmp_path / "run")
    write(directory.path, -1, 12)
    wandb.teardown()
    monkeypatch.setattr(wandb.Run, "offline", property(lambda self: False))
    monkeypatch.setattr(wandb.Run, "step", property(lambda self: 8))  # that of the next row
    monkeypatch.setattr(wandb.Run, "url", property(lambda self: "https://example.com/run"))
    writer = write(directory.path, 10, 11)
    finish(directory, 11)
    writer.close()
    assert [step for step, _ in sent(directory.path)[-1][2]] == [8, 9, 10, 11]


def test_no_secret_reaches_wandbs_files(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "swordfish" * 5)
    monkeypatch.setenv("HF_TOKEN", "swordfish2")
    monkeypatch.setattr(sys, "argv", ["qkjax", "--token=swordfish3"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "qkjax", "--token=swordfish3"])
    directory = make_directory(tmp_path / "run", data__dir="gs://data?X-Goog-Signature=swordfish4")
    writer = write(directory.path, -1, 3)
    finish(directory, 3)
    writer.close()
    written = [path for path in (directory.path / "wandb").rglob("*") if path.is_file()]
    assert {path.suffix for path in written} >= {".wandb", ".log"}
    assert not [path for path in written if b"swordfish" in path.read_bytes()]
    assert sent(directory.path)[0][1]["data"]["dir"] == "gs://data?X-Goog-Signature=***"


@pytest.mark.parametrize("damage", ["init", "log", "record"])
def test_a_failure_of_wandb_is_one_line_and_the_run_continues(
    tmp_path, monkeypatch, caplog, damage
):
    directory = make_directory(tmp_path / "run")

    def fail(*_, **__):
        raise wandb.errors.CommError("no such host\nmore of it")

    if damage == "init":
        monkeypatch.setattr(wandb, "init", fail)
    elif damage == "log":
        monkeypatch.setattr(wandb.Run, "log", fail)
    else:
        (directory.path / "wandb.json").write_text('{"id": 7}')
    writer = write(directory.path, -1, 5)
    finish(directory, 5)
    writer.close()
    assert len(recorded(directory.path)) == 6
    [warned] = [r.getMessage() for r in caplog.records if r.name == "absl"]
    said = "wandb.json: " if damage == "record" else "no such host"
    assert said in warned and "\n" not in warned


# ------------------------------------------------------------------------------- known at start


def test_without_wandb_or_login_a_run_is_refused_at_its_start(monkeypatch):
    startup.check_wandb()  # offline
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()
    with pytest.raises(errors.UsageError, match=r"--wandb: nobody is logged in .*`wandb login`"):
        startup.check_wandb()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    wandb.teardown()
    startup.check_wandb()
    monkeypatch.setenv("WANDB_API_KEY", "short")
    wandb.teardown()
    with pytest.raises(errors.UsageError, match="--wandb: WANDB_API_KEY invalid") as refused:
        startup.check_wandb()
    assert "\n" not in str(refused.value)
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    wandb.teardown()
    with pytest.raises(errors.UsageError, match=r"--wandb: .*mode") as refused:
        startup.check_wandb()
    assert "\n" not in str(refused.value)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        errors.UsageError, match=r"wandb is not installed.*pip install -e '.\[wandb"
    ):
        startup.check_wandb()


# ------------------------------------------------------------------------------------ whole runs


@pytest.mark.long
@pytest.mark.usefixtures("programs_built_once")
def test_wandb_changes_no_number_of_a_run_and_has_its_rows(tmp_path, monkeypatch):
    """Stopped in the first evaluation of a step, and resumed."""
    dataset = small_run.make_dataset(tmp_path / "data")
    config = small_run.make_config(dataset)
    train.train_and_evaluate(config, tmp_path / "without")
    workdir = tmp_path / "with"

    original = pipeline.TrainLoader.__next__

    def stop_here(loader):
        if loader.step == 8:  # the step before an evaluation
            os.kill(os.getpid(), 15)
        return original(loader)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.TrainLoader, "__next__", stop_here)
        with pytest.raises(signals.Stopped):
            train.train_and_evaluate(config, workdir, wandb=True)
    train.train_and_evaluate(config, workdir, wandb=True)
    assert small_run.identity(workdir) == small_run.identity(tmp_path / "without")
    assert small_run.rows(workdir) == small_run.rows(tmp_path / "without")
    (_, _, first, _, stopped), (_, _, second, _, ended) = sent(workdir)
    assert first and first + second == recorded(workdir) and (stopped, ended) == (1, 0)
    assert not (tmp_path / "without" / "wandb.json").exists()


@pytest.mark.long
@pytest.mark.process
def test_the_command_sends_a_run_or_refuses_at_its_start(tmp_path):
    dataset = small_run.make_dataset(tmp_path / "data")
    command = small_run.command(dataset, tmp_path / "run", "--wandb")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert f"wandb      {tmp_path / 'run' / 'wandb'}, for `wandb sync`" in done.stdout
    assert "wandb" not in done.stderr
    [(_, config, rows, _, code)] = sent(tmp_path / "run")
    assert rows == recorded(tmp_path / "run") and config["arm"] == "muon_qk" and code == 0
    online = {**os.environ, "WANDB_MODE": "online"}
    refused = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=online)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert refused.stderr.startswith("ERROR: --wandb: nobody is logged in")
