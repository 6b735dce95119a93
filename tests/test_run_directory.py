"""Run directory: lock, atomic files, numbers in JSON, config and environment on record."""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile

import limits
import numpy as np
import pytest

from qkjax import config as config_lib
from qkjax import errors, files
from qkjax.runs import directory as run_directory
from qkjax.runs import environment, writers
from qkjax.runs.directory import RunDirectory

FULL = pathlib.Path("/dev/full")
DATA_ORDER = {"dataset": "abc", "seed": 42, "sequences_per_step": 8, "sequence_length": 256}
needs_dev_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full on this machine")


def tiny(**changes):
    return dataclasses.replace(
        config_lib.resolve(config_lib.base("muon", "none", "tiny")), **changes
    )


# ---------------------------------------------------------------------------- the directory


def test_make_workdir_creates_parents_and_returns_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_directory.make_workdir("a/b") == tmp_path / "a" / "b"
    assert run_directory.make_workdir("a/b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("path", ["", "gs://bucket/run", "a\0b"])
def test_make_workdir_refuses_what_is_no_local_path(path):
    with pytest.raises(errors.UsageError, match=r"--workdir: .* local directory"):
        run_directory.make_workdir(path)


@pytest.mark.parametrize("inner", ["", "run"])
def test_make_workdir_refuses_a_file(tmp_path, inner):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.StorageError, match=r"file.*cannot be used as the run directory"):
        run_directory.make_workdir(tmp_path / "file" / inner)


@pytest.mark.parametrize("name", ["dataset.json", "study.json"])
def test_a_dataset_or_a_study_becomes_no_run(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(errors.UsageError, match=rf": holds {name}, expected a new directory or"):
        RunDirectory.make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_make_refuses_a_folder_of_other_files_and_takes_one_of_logs(tmp_path):
    """A run among somebody's texts, or around other runs, could not be told from them."""
    for name in ("texts.jsonl", "first"):
        (tmp_path / name).mkdir()
    with pytest.raises(errors.UsageError, match=r"other files \(first, texts\.jsonl\), expected a"):
        RunDirectory.make(tmp_path)
    logs = tmp_path / "first"
    for name in ("slurm-1.out", "train.log", ".nfs0", "run.lock", "events.out.tfevents.1"):
        (logs / name).touch()
    assert RunDirectory.make(logs).path == logs
    (tmp_path / "config.json").touch()
    assert RunDirectory.make(tmp_path).path == tmp_path


@needs_dev_full
def test_make_workdir_notices_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: FULL.open("wb"))
    with pytest.raises(errors.StorageError, match="No space left"):
        run_directory.make_workdir(tmp_path)
    assert list(tmp_path.iterdir()) == []


SUMMARY = {
    "arm": "muon_noqk",
    "seed": 42,
    "step": 3,
    "tokens": 384,
    "params_sha256": "0" * 64,
    "diverged": False,
    "diverged_step": None,
}
WRONG = (
    {"step": "3"},
    {"step": True},
    {"diverged": 0},
    {"diverged_step": "never"},
    {"params_sha256": None},
    {"val/loss": "2.5"},
    {"val/loss": [2.5]},
)


def test_second_lock_is_refused_naming_the_holder(tmp_path):
    with RunDirectory(tmp_path).lock():
        with pytest.raises(errors.UsageError) as caught, RunDirectory(tmp_path).lock():
            pass
        holder = json.loads((tmp_path / "run.lock").read_text())
    for part in (f"pid {os.getpid()}", socket.gethostname(), holder["start_time"], "--workdir"):
        assert part in str(caught.value)
    with RunDirectory(tmp_path).lock():  # released, and what the first wrote is no hindrance
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


@pytest.mark.process
def test_lock_dies_with_its_holder(tmp_path):
    program = (
        "import pathlib, sys, time\n"
        "from qkjax.runs.directory import RunDirectory\n"
        "with RunDirectory(pathlib.Path(sys.argv[1])).lock():\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(errors.UsageError, match=f"pid {holder.pid} "),
            RunDirectory(tmp_path).lock(),
        ):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    assert (tmp_path / "run.lock").exists()
    with RunDirectory(tmp_path).lock():
        pass


# ------------------------------------------------------------------------------------- files


def test_write_json_makes_plain_numbers_in_the_given_order(tmp_path):
    path = tmp_path / "value.json"
    value = {
        "z": (1, 2.5),
        "a": float("nan"),
        "inf": [np.float32("-inf")],
        "f32": np.float32(0.1),
        "f64": np.float64(0.1) * 3,
        "array": np.array([7], np.int64),
        "wide": np.array(np.pi),
        "bool": np.bool_(True),
        "none": None,
    }
    files.write_json(path, value)
    text = path.read_text()
    assert text.endswith("}\n")
    assert list(json.loads(text)) == list(value)
    assert json.loads(text) == {
        "z": [1, 2.5],
        "a": None,
        "inf": [None],
        "f32": 0.1,
        "f64": 0.30000000000000004,
        "array": 7,
        "wide": 3.141592653589793,
        "bool": True,
        "none": None,
    }
    assert [file.name for file in tmp_path.iterdir()] == ["value.json"]


@pytest.mark.parametrize("value", [object(), np.zeros(2), {1, 2}, np.array("a")])
def test_plain_refuses_what_json_cannot_hold(value):
    with pytest.raises(TypeError, match="neither a number nor a container"):
        files.plain({"key": value})


def test_every_float32_reads_back_to_itself_in_few_digits():
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32)
    for value in bits.view(np.float32):
        written = files.plain(value)
        if not np.isfinite(value):
            assert written is None
            continue
        text = json.dumps(written)
        assert np.float32(json.loads(text)) == value
        digits = text.split("e")[0].replace(".", "").lstrip("-0").rstrip("0")
        assert len(digits) <= 9, text


def test_bfloat16_and_float16_keep_their_value():
    import ml_dtypes

    for dtype in (ml_dtypes.bfloat16, np.float16):
        value = np.asarray(0.1, dtype)
        assert np.asarray(files.plain(value), np.float32).astype(dtype) == value


@needs_dev_full
def test_full_disk_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "value.json"
    files.write_json(path, {"old": 1})
    with (
        limits.file_size(4096),
        pytest.raises(errors.StorageError, match=r"value\.json: .*File too large.* Make room"),
    ):
        files.write_json(path, {"new": list(range(10_000))})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["value.json"]


def test_a_link_in_the_way_is_never_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in (".value.json.tmp", "value.json"):
        (tmp_path / name).symlink_to(victim)
    files.write_json(tmp_path / "value.json", {"new": 1})
    assert victim.read_text() == "precious"
    assert json.loads((tmp_path / "value.json").read_text()) == {"new": 1}
    assert not (tmp_path / "value.json").is_symlink()


def test_a_link_in_the_place_of_a_lock_is_refused_and_of_rows_replaced(tmp_path):
    """Both are written in place: a target would be cut, or rows appended to it."""
    victim = tmp_path / "victim"
    victim.touch()
    (tmp_path / "run.lock").symlink_to(victim)
    (tmp_path / "metrics.jsonl").symlink_to(victim)
    where = r"cannot be read or written \(a link is in its place\)\. Remove the link\."
    with (
        pytest.raises(errors.StorageError, match=rf"run\.lock: {where}"),
        RunDirectory(tmp_path).lock(),
    ):
        pass
    writer = writers.JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write_scalars(1, {"train/loss": 2.0})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_bytes()
    assert victim.read_bytes() == b""


def test_the_look_whether_a_directory_can_be_written_follows_no_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f".write_test.{os.getpid()}").symlink_to(victim)
    run_directory.make_workdir(tmp_path)
    assert victim.read_text() == "precious"


def test_the_holder_of_the_lock_removes_what_killed_writers_left(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path)

    def killed(source, target):
        raise KeyboardInterrupt

    for path in (directory.summary, directory.spectra(3)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            patch.setattr(pathlib.Path, "unlink", lambda *_, **__: None)
            with pytest.raises(KeyboardInterrupt):
                files.replace(path, b"half")
    (tmp_path / ".mine.tmp").touch()
    with directory.lock(shared=True):
        assert len(list(tmp_path.rglob(".*.tmp"))) == 3
    with directory.lock():
        assert [path.name for path in tmp_path.rglob(".*.tmp")] == [".mine.tmp"]


def test_file_is_replaced_and_synced_never_written_in_place(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    files.write_json(path, {"old": 1})
    synced = []
    real_fsync, real_replace = os.fsync, os.replace

    def replace(source, target):
        assert json.loads(path.read_text()) == {"old": 1}
        assert json.loads(pathlib.Path(source).read_text()) == {"new": 2}
        assert synced, "the new content must be on the disk before it gets the name"
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), real_fsync(fd)))
    monkeypatch.setattr(os, "replace", replace)
    files.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"new": 2}
    assert len(synced) == 2  # the file and its directory


def test_summary_is_none_until_written_and_refused_when_damaged(tmp_path):
    assert RunDirectory(tmp_path).read_summary() is None
    RunDirectory(tmp_path).write_summary({**SUMMARY, "val/loss": float("nan")})
    assert RunDirectory(tmp_path).read_summary() == {**SUMMARY, "val/loss": None}
    deep = "[" * 100_000
    changed = [json.dumps({**SUMMARY, **change}) for change in WRONG]
    for damage in ('{"step": 3', "[1]", "\0\0", "{}", deep, '{"step": NaN}', *changed):
        (tmp_path / "summary.json").write_text(damage)
        with pytest.raises(errors.UsageError, match=r"summary\.json: damaged"):
            RunDirectory(tmp_path).read_summary()


# ------------------------------------------------------------------------------ metrics.jsonl


def test_read_metrics_returns_rows_and_skips_a_torn_last_line(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "val/loss": null}\n{"step": 1}\n')
    assert RunDirectory(tmp_path).read_metrics() == [{"step": 0, "val/loss": None}, {"step": 1}]
    assert not caplog.records
    for torn in ('{"step": 2, "tra', '{"step": 2, "tra\n', "\0\0\0\n", "17\n"):
        path.write_text('{"step": 0}\n{"step": 1}\n' + torn)
        caplog.clear()
        assert RunDirectory(tmp_path).read_metrics() == [{"step": 0}, {"step": 1}]
        assert "metrics.jsonl:3: a torn last line is skipped" in caplog.text


@pytest.mark.parametrize(
    ("lines", "where"),
    [
        (['{"step": 0}', '{"step": 1, "tra', '{"step": 2}'], "2: damaged"),
        (['{"step": 0}', "", '{"step": 2}'], "2: damaged"),
        (['{"loss": 0}', '{"step": 2}'], "1: damaged"),
        (['{"step": 0}', '{"step": 1, "val/loss": "2.5"}'], "2: damaged .val/loss is '2.5'"),
        (['{"step": true}', '{"step": 2}'], "1: damaged"),
        (['{"step": 5}', '{"step": 5}'], "2: step 5 follows step 5"),
        (['{"step": 5}', '{"step": 4}', '{"step": 6}'], "2: step 4 follows step 5"),
    ],
)
def test_read_metrics_names_the_line_that_is_damaged(tmp_path, lines, where):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(errors.UsageError, match=rf"metrics\.jsonl:{where}"):
        RunDirectory(tmp_path).read_metrics()


def test_read_metrics_of_a_missing_file(tmp_path):
    with pytest.raises(errors.UsageError, match="no such file"):
        RunDirectory(tmp_path).read_metrics()


@pytest.mark.process
def test_reading_a_run_needs_no_jax():
    program = "import sys; from qkjax.runs import directory; print('jax' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert shown.stdout == b"False\n"


# ----------------------------------------------------------------------------- config.json


def settle(workdir, config, fingerprint, allowed=()):
    """What a run does with its config, in one call."""
    changes = RunDirectory(workdir).config_changes(config, fingerprint, allowed)
    RunDirectory(workdir).record_config(config, fingerprint, changes)
    return changes


def test_first_use_records_config_and_dataset(tmp_path):
    config = tiny()
    assert RunDirectory(tmp_path).read_config() is None
    assert settle(tmp_path, config, "aaa") == []
    assert RunDirectory(tmp_path).read_config() == config
    record = json.loads((tmp_path / "environment.json").read_text())
    assert record["dataset_fingerprint"] == "aaa"
    assert settle(tmp_path, config, "aaa") == []


def test_data_dir_and_terminal_may_change_silently(tmp_path):
    config = tiny()
    settle(tmp_path, config, "aaa")
    moved = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, dir="/elsewhere"),
        log=dataclasses.replace(config.log, every_seconds=60.0),
    )
    assert settle(tmp_path, moved, "aaa") == []
    assert RunDirectory(tmp_path).read_config() == moved


def test_changed_fields_are_refused_in_one_line(tmp_path):
    config = tiny()
    settle(tmp_path, config, "aaa")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    optimizer = dataclasses.replace(config.optimizer, learning_rate=0.5)
    changed = tiny(muon=dataclasses.replace(config.muon, nesterov=False), optimizer=optimizer)
    with pytest.raises(errors.UsageError) as caught:
        settle(tmp_path, changed, "aaa", ["muon.nesterov"])
    message = str(caught.value)
    assert message.startswith(
        f"{tmp_path / 'config.json'}: this run started with other settings: "
        "optimizer.learning_rate: old 0.012, new 0.5. Use the old ones"  # the other is allowed
    )
    assert "--allow_config_change=muon.nesterov,optimizer.learning_rate " in message
    assert "\n" not in message
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_what_no_checkpoint_survives_is_not_offered_and_cannot_be_allowed(tmp_path):
    settle(tmp_path, tiny(), "aaa")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(errors.UsageError) as caught:
        settle(tmp_path, tiny(seed=43), "bbb", ["seed", "dataset"])
    assert 'seed: old 42, new 43; dataset: old "aaa", new "bbb". Use' in str(caught.value)
    assert "another --workdir: no checkpoint can resume with another seed, dataset." in str(
        caught.value
    )
    assert "--allow_config_change" not in str(caught.value)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert config_lib.FIXED_FIELDS == (
        "seed",
        "model.num_layers",
        "model.d_model",
        "model.num_heads",
        "model.num_kv_heads",
        "model.head_dim",
        "model.vocab_size",
        "model.sequence_length",
        "model.mlp",
        "model.d_ff",
        "optimizer.name",
        "train.tokens_per_step",
        "train.sequences_per_step",
        "determinism.gpu",
    )


# A field in this list cannot change a result: an addition is a claim to think about.
FREE = ("checkpoint.keep_all", "data.dir", "log.every_seconds", "profile.steps")


@pytest.mark.parametrize("field", run_directory.flatten(tiny().to_dict()))
def test_every_field_that_can_change_a_result_is_compared(tmp_path, field):
    config = tiny()
    settle(tmp_path, config, "aaa")
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    *sections, name = field.split(".")
    holder = stored
    for section in sections:
        holder = holder[section]
    holder[name] = "another"
    path.write_text(json.dumps(stored))
    if field in FREE:
        assert settle(tmp_path, config, "aaa") == []
    else:
        with pytest.raises(errors.UsageError, match=rf": {field}: old \"another\", new "):
            settle(tmp_path, config, "aaa")


def test_allowed_changes_are_recorded_and_become_the_config(tmp_path):
    config = tiny()
    settle(tmp_path, config, "aaa")
    allowed = ["muon.nesterov", "model.norm_eps", "eval.tokens"]
    muon = dataclasses.replace(config.muon, nesterov=False)
    model = dataclasses.replace(config.model, norm_eps=0.5)
    first = settle(tmp_path, tiny(muon=muon, model=model), "aaa", allowed)
    assert first == [
        {"field": "model.norm_eps", "old": config.model.norm_eps, "new": 0.5},
        {"field": "muon.nesterov", "old": True, "new": False},
    ]
    again = settle(tmp_path, tiny(muon=muon), "aaa", allowed)
    assert RunDirectory(tmp_path).read_config() == tiny(muon=muon)
    for _ in range(2):
        record = json.loads((tmp_path / "environment.json").read_text())
        changes = record["allowed_config_changes"]
        assert [change.pop("time")[:2] for change in changes] == ["20"] * 3
        assert changes == first + again
        RunDirectory(tmp_path).write_environment("aaa", [])  # keeps them


def test_unknown_allowed_field_is_refused_with_a_suggestion(tmp_path):
    with pytest.raises(errors.UsageError, match=r"unknown field 'train\.token'.*'train\.tokens'"):
        settle(tmp_path, tiny(), "aaa", ["train.token"])


def test_config_of_another_version_is_a_difference_not_a_crash(tmp_path):
    settle(tmp_path, tiny(), "aaa")
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    del stored["model"]["unroll"]
    stored["model"]["window"] = 128
    path.write_text(json.dumps(stored))
    with pytest.raises(errors.UsageError) as caught:
        settle(tmp_path, tiny(), "aaa")
    differences = "model.window: old 128, new (absent); model.unroll: old (absent), new 0. Use the"
    assert differences in str(caught.value)
    with pytest.raises(
        errors.UsageError, match=r"config\.json: model\.unroll is missing; .*window: no such field"
    ):
        RunDirectory(tmp_path).read_config()


@pytest.mark.parametrize("name", ["config.json", "environment.json"])
def test_damaged_record_is_refused(tmp_path, name):
    settle(tmp_path, tiny(), "aaa")
    (tmp_path / name).write_text('{"seed": 4')
    with pytest.raises(errors.UsageError, match=rf"{name}: damaged"):
        settle(tmp_path, tiny(), "aaa")


def test_lost_environment_is_written_anew_with_a_warning(tmp_path, caplog):
    settle(tmp_path, tiny(), "aaa")
    (tmp_path / "environment.json").unlink()
    assert settle(tmp_path, tiny(), "bbb") == []
    assert "does not name the dataset" in caplog.text
    with pytest.raises(errors.UsageError, match="dataset"):
        settle(tmp_path, tiny(), "aaa")


# ------------------------------------------------------------------------- environment.json


def test_environment_keeps_every_start(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    settle(tmp_path, tiny(), "aaa")
    RunDirectory(tmp_path).write_environment("aaa", ["main", "--workdir=x"])
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "1")
    RunDirectory(tmp_path).write_environment("aaa", ["main", "--workdir=y"])
    record = json.loads((tmp_path / "environment.json").read_text())
    first, second = record["starts"]
    assert record["dataset_fingerprint"] == "aaa"
    assert first["command"] == ["main", "--workdir=x"]
    assert set(first) == set(record) - {"dataset_fingerprint", "starts"} - {
        "allowed_config_changes"
    }
    assert first["versions"]["jax"] and first["versions"]["orbax-checkpoint"]
    assert first["devices"]["platform"] == "cpu" and first["devices"]["count"] >= 1
    assert first["jax_threefry_partitionable"] is True
    assert "JAX_ENABLE_COMPILATION_CACHE" not in first["variables"]
    assert set(second) == {"time", "command", "devices", "variables"}  # what changed, and the rest
    assert second["variables"]["JAX_ENABLE_COMPILATION_CACHE"] == "1"
    assert record["command"] == ["main", "--workdir=y"]
    assert record["variables"] == second["variables"]


def test_environment_has_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "swordfish1")
    monkeypatch.setenv("WANDB_API_KEY", "swordfish2")
    monkeypatch.setenv("JAX_SERVICE_TOKEN", "swordfish3")
    monkeypatch.setenv("TPU_NAME", "visible")
    RunDirectory(tmp_path).write_environment("aaa", ["main", "--api_key=swordfish4"])
    text = (tmp_path / "environment.json").read_text()
    assert "swordfish" not in text
    assert "WANDB" not in text
    assert "visible" in text


@pytest.mark.parametrize(
    ("argument", "masked"),
    [
        ("--hub_token=abc", "--hub_token=***"),
        ("--config.wandb.api_key=abc=def", "--config.wandb.api_key=***"),
        ("HF_TOKEN=abc", "HF_TOKEN=***"),
        ("key=abc", "key=***"),
        ("--PASSWORD=abc", "--PASSWORD=***"),
        ("--model=hf_abcdEFGH1234", "--model=***"),
        ("--note=ghp_abcdEFGH1234", "--note=***"),
        ("--note=glpat-abcdEFGH1234", "--note=***"),
        ("--note=xoxb-1234-abcdEFGH", "--note=***"),
        ("--note=AKIAABCDEFGHIJKLMNOP", "--note=***"),
        ("--note=eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0", "--note=***"),
        ("https://host/x?sv=1&sig=abc%3D&se=2", "https://host/x?sv=1&sig=***&se=2"),
        ("https://me:abc@host/x", "https://me:***@host/x"),
        ("https://abcdefghij0123456789@host/x", "https://***@host/x"),
        ("https://me@host/x", "https://me@host/x"),
        ("https://host/x?X-Amz-Signature=abc&n=1", "https://host/x?X-Amz-Signature=***&n=1"),
        ("https://host/x?X-Goog-Credential=abc", "https://host/x?X-Goog-Credential=***"),
        ("https://host/#access_token=abc", "https://host/#access_token=***"),
        ("--a=Protocol=https;AccountKey=abc=;B=c", "--a=Protocol=https;AccountKey=***;B=c"),
        ("--header=Authorization: Bearer abcdEFGH1234", "--header=Authorization: Bearer ***"),
        ('--a={"hub_token": "abc", "b": 1}', '--a={"hub_token": "***", "b": 1}'),
        ("--note=npm_abcdEFGH1234", "--note=***"),
        ("--note=sk_live_abcdEFGH1234", "--note=***"),
        ("--note=xapp-1-abcdEFGH1234", "--note=***"),
        ("--note=pypi-AgEIabcdEFGH", "--note=***"),
        ("--note=glrt-abcdEFGH1234", "--note=***"),
        (f"--note=AIza{'aB3' * 12}", "--note=***"),
        (f"--note=ya29.{'aB3' * 12}", "--note=***"),
        (f"--note=SG.{'aB3' * 8}.{'aB3' * 8}", "--note=***"),
        ("--note=-----BEGIN PRIVATE KEY-----\nabc", "--note=-----BEGIN PRIVATE KEY-----***"),
        ("--passphrase=abc", "--passphrase=***"),
        ("--aws_access_key_id=abc", "--aws_access_key_id=***"),
        ("--tokenizer=train:300", "--tokenizer=train:300"),
        ("--train_tokens=5120", "--train_tokens=5120"),
        ("--source=hf:glove-wiki-gigaword", "--source=hf:glove-wiki-gigaword"),
        ("--config.data.dir=data/monkey=1", "--config.data.dir=data/monkey=1"),
        ("--source=https://host/x?token=abc&n=1", "--source=https://host/x?token=***&n=1"),
    ],
)
def test_secrets_are_masked(argument, masked):
    assert environment.mask_secrets(["main", argument]) == ["main", masked]


def test_secret_in_the_next_argument_is_masked():
    given = ["main", "--hub_token", "abc", "--seed", "1", "--secret", "--seed=2"]
    assert environment.mask_secrets(given) == [
        "main",
        "--hub_token",
        "***",
        "--seed",
        "1",
        "--secret",
        "--seed=2",
    ]


@pytest.mark.parametrize(
    "argument",
    [
        "--config.train.tokens=8192",
        "--config.train.tokens_per_step=4096",
        "--tokenizer=hf:HuggingFaceTB/SmolLM2-135M",
        "--source=hf:a/b",
        "--config=configs/muon_noqk.py:tiny",
        "--workdir=runs/monkey",
        "--keys=2",
    ],
)
def test_what_is_no_secret_stays(argument):
    assert environment.mask_secrets([argument]) == [argument]


@pytest.mark.process
def test_git_state_of_a_checkout_and_of_none(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        git("init")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "x")
    sha = git("rev-parse", "HEAD")
    assert environment.git_state(tmp_path) == {"sha": sha, "dirty": False}
    (tmp_path / "file").write_text("2")
    assert environment.git_state(tmp_path) == {"sha": sha, "dirty": True}
    with monkeypatch.context() as inside_a_hook:
        inside_a_hook.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
        assert environment.git_state(tmp_path) == {"sha": sha, "dirty": True}
    nowhere = {"sha": None, "dirty": None}
    (tmp_path / "site-packages").mkdir()  # lies in a repository that is not its own
    assert environment.git_state(tmp_path / "site-packages") == nowhere
    assert environment.git_state(tmp_path / "missing") == nowhere


def test_git_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.git_state(tmp_path) == {"sha": None, "dirty": None}


def test_a_run_of_this_checkout_names_its_commit():
    root = pathlib.Path(__file__).resolve().parents[1]
    found = environment.describe(())["git"]
    assert found == environment.git_state(root)
    assert found["sha"] or not (root / ".git").exists()


def test_another_version_of_a_library_is_said_at_resume(tmp_path, caplog):
    RunDirectory(tmp_path).write_environment("f" * 64)
    record = json.loads((tmp_path / "environment.json").read_text())
    record["versions"]["jax"] = "0.0.1"
    (tmp_path / "environment.json").write_text(json.dumps(record))
    with caplog.at_level("WARNING"):
        RunDirectory(tmp_path).write_environment("f" * 64)
    assert "started with jax 0.0.1" in caplog.text
    assert "started with flax" not in caplog.text


# ------------------------------------------------------------------------------- digests of a run


def test_a_sealed_file_is_read_as_written_and_refused_when_edited(tmp_path):
    path = tmp_path / "value.json"
    files.write_sealed(path, {"a": np.float32(0.1), "b": [1, {"ü": None}]})
    assert files.read_object(path, "Fix.") == {"a": 0.1, "b": [1, {"ü": None}]}
    text = path.read_text()
    path.write_text(json.dumps(dict(reversed(json.loads(text).items()))))  # other bytes, no other
    assert files.read_object(path, "Fix.")["a"] == 0.1
    for old, new in (("0.1", "0.2"), ("null", "0"), (': "', ': "0'), ("[", "[2,")):
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(errors.UsageError, match=r"value\.json: damaged \(its values have sha"):
            files.read_object(path, "Fix.")


def test_a_number_beyond_the_floats_is_refused(tmp_path):
    (tmp_path / "value.json").write_text('{"a": 1e999}')
    with pytest.raises(errors.UsageError, match="1e999, which is not a finite number"):
        files.read_object(tmp_path / "value.json", "Fix.")


@pytest.fixture
def ended(tmp_path) -> RunDirectory:
    """A finished run of three steps with two evaluations."""
    run = RunDirectory(tmp_path / "run")
    run.record_config(tiny(), "f" * 64)
    lines = [json.dumps({"step": step, "tokens": step, "val/loss": 1.5}) for step in range(4)]
    run.metrics.write_text("\n".join(lines) + "\n")
    for step in (0, 3):
        run.write_evaluation(step, {"aa": [step]}, {"loss_sum": [1.5], "count": [1]})
    run.write_summary(SUMMARY)
    return run


def edit(path: pathlib.Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: edit(run.metrics, "1.5", "1.25"), "metrics.jsonl: has sha256"),
        (lambda run: edit(run.environment, "ffff", "0000"), "environment.json: has sha256"),
        (lambda run: edit(run.config, '"seed": 42', '"seed": 43'), "config.json: has sha256"),
        (lambda run: edit(run.summary, '"seed": 42', '"seed": 43'), "summary.json: damaged"),
        (lambda run: run.summary.write_text("{}"), "summary.json: damaged (it lacks arm"),
        (lambda run: run.spectra(0).unlink(), "step_00000000.npz: missing, summary.json lists it"),
        (
            lambda run: run.spectra(0).write_bytes(run.spectra(3).read_bytes()),
            "spectra/step_00000000.npz: has sha256",
        ),
    ],
)
def test_a_finished_run_knows_its_files(ended, damage, words):
    ended.check_files()
    assert ended.read_summary() == SUMMARY
    damage(ended)
    with pytest.raises(errors.UsageError) as caught:
        ended.check_files()
    assert words in str(caught.value)


def test_a_summary_of_another_run_is_refused(ended, tmp_path):
    other = RunDirectory(tmp_path / "other")
    other.record_config(tiny(seed=1), "f" * 64)
    other.write_summary(SUMMARY)
    ended.summary.write_bytes(other.summary.read_bytes())
    with pytest.raises(errors.UsageError, match=r"config\.json: has sha256"):
        ended.check_files()


def test_what_lies_behind_a_checkpoint_is_compared_at_a_resume(ended):
    meta = {"step": 3, "record": ended.record_up_to(3)}
    ended.check_record(meta)
    rows = ended.metrics.read_text()
    edit(ended.metrics, '{"step": 3,', '{"step": 3, "pr/key": 2.0,')  # an evaluation made up for
    with open(ended.metrics, "a") as file:
        file.write('{"step": 4}\n')  # what a resume cuts
    ended.check_record(meta)
    for old, new in (('"step": 3, "tokens": 3', '"step": 3, "tokens": 4'), ("1.5", "1.25")):
        ended.metrics.write_text(rows.replace(old, new, 1))
        with pytest.raises(errors.UsageError, match=r"metrics\.jsonl: .* are not those that the"):
            ended.check_record(meta)
    ended.metrics.write_text(rows)
    ended.write_evaluation(0, {"aa": [7]}, {"loss_sum": [1.5], "count": [1]})
    with pytest.raises(errors.UsageError, match=r"step_00000000\.npz: has sha256"):
        ended.check_record(meta)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_a_checkpoint_that_names_an_impossible_time_is_refused(tmp_path, seconds):
    config = tiny()
    meta = {
        "step": 3,
        "params_sha256": "0" * 64,
        "config": files.plain(config.to_dict()),
        "data_order": DATA_ORDER,
        "dataset_fingerprint": "abc",
        "wall_seconds": 1.0,
    }
    RunDirectory(tmp_path).check_checkpoint(meta, config, "abc")
    for field in DATA_ORDER:
        order = {name: value for name, value in DATA_ORDER.items() if name != field}
        with pytest.raises(errors.UsageError, match=rf"3: damaged \(data_order.*lacks.*{field}"):
            RunDirectory(tmp_path).check_checkpoint({**meta, "data_order": order}, config, "abc")
    with pytest.raises(errors.UsageError, match=rf"3: damaged \(wall_seconds is {seconds}\)"):
        RunDirectory(tmp_path).check_checkpoint({**meta, "wall_seconds": seconds}, config, "abc")
