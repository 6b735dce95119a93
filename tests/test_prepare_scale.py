"""Preparing with worker processes: the same bytes for any number, after any kill."""

import dataclasses
import json
import lzma
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from qkjax import errors
from qkjax.data import check, encoding, holdout, prepare, reading, request, shards, sources, staging
from qkjax.data import manifest as manifest_lib
from qkjax.data import tokenizer as tokenizer_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
T = 64


def _quiet(line):
    pass


def _files(out):
    return {p.name: p.read_bytes() for p in out.iterdir() if not p.name.startswith(".")}


def _documents(count, seed):
    chooser = random.Random(seed)
    words = ["".join(chooser.choices("abcdefghij", k=5)) for _ in range(400)]
    return [" ".join(chooser.choices(words, k=chooser.randint(5, 150))) for _ in range(count)]


def _write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    """Two sources 70/30 with copies, empty documents and bad lines; what they make, unbroken."""
    folder = tmp_path_factory.mktemp("mix")
    texts = _documents(900, 1)
    held_out = next(t for t in texts if holdout.in_pool(holdout.hash64(holdout.normalise(t))))
    texts[400:400] = ["", held_out.upper(), "  ", held_out.replace(" ", "\n"), held_out]
    paths = [
        _write_jsonl(folder / "a.jsonl", texts),
        _write_jsonl(folder / "b.jsonl", _documents(900, 2)),
    ]
    with paths[0].open("a") as file:
        file.write("{\n")
    wanted = prepare.Request(
        sources=tuple(f"jsonl:{path}" for path in paths),
        weights=(0.7, 0.3),
        tokenizer="train:400",
        sequence_length=T,
        validation_tokens=2_000,
        max_bad_lines=1,
        decontaminate=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "RECORDS_PER_SHARD", 128)
        prepare.prepare(wanted, folder / "unbroken" / "data", progress=_quiet)
    return wanted, folder / "unbroken" / "data"


def test_the_number_of_workers_does_not_show(mix, tmp_path, monkeypatch):
    wanted, unbroken = mix
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", 128)
    made = prepare.prepare(wanted, tmp_path / "data", workers=3, progress=_quiet)
    assert _files(tmp_path / "data") == _files(unbroken)
    assert made.dropped["duplicates_of_validation"] == 3 and made.dropped["empty"] == 2
    assert made.dropped["bad_lines"] == 1 and len(made.splits["train"].shards) > 6
    shares = [source["tokens"] for source in made.sources]
    assert abs(shares[0] / sum(shares) - 0.7) < 0.005
    check.check(tmp_path / "data", progress=_quiet)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("shard", [1, 30])
def test_a_stopped_run_goes_on_without_redoing_finished_shards(mix, tmp_path, monkeypatch, shard):
    """Stopped right behind a finished shard, and once more later; every count is right again."""
    wanted, unbroken = mix
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", 128)
    monkeypatch.setattr(reading, "_CHUNK_CHARACTERS", 2_000)
    out = tmp_path / "data"
    encode, save = tokenizer_lib.Tokenizer.encode_batch, staging.save_journal
    encoded = [0]

    def count(tokenizer, texts):
        encoded[0] += len(texts)
        return encode(tokenizer, texts)

    def stop(work, content):
        save(work, content)
        if len(content.get("train", {}).get("writer", {}).get("shards", [])) == shard:
            raise _Killed

    monkeypatch.setattr(tokenizer_lib.Tokenizer, "encode_batch", count)
    with monkeypatch.context() as patch:
        patch.setattr(staging, "save_journal", stop)
        with pytest.raises(_Killed):
            prepare.prepare(wanted, out, progress=_quiet)
    finished = {p.name: p.stat().st_mtime_ns for p in out.glob(".unfinished/train-*.unfinished")}
    assert f"train-{shard - 1:05d}.unfinished" in finished
    encoded[0], lines = 0, []
    monkeypatch.setattr("qkjax.data.tokenizer.train", None)  # the tokenizer already exists
    made = prepare.prepare(wanted, out, progress=lines.append)
    assert _files(out) == _files(unbroken)
    assert any(f"resuming after {shard} finished shards" in line for line in lines)
    for number, done in enumerate(made.splits["train"].shards[:shard]):
        written = (out / done.file).stat().st_mtime_ns
        assert written == finished[f"train-{number:05d}.unfinished"]
    documents = sum(source["documents"] for source in made.sources)
    assert encoded[0] < documents * (1 - shard / len(made.splits["train"].shards)) + 60


def test_what_another_command_left_is_not_used(mix, tmp_path, monkeypatch):
    wanted, unbroken = mix
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", 128)
    out = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(prepare.Job, "_train", lambda *arguments: 1 / 0)  # no training shard yet
        for changes in ({"weights": (0.5, 0.5)}, {"sequence_length": 32}):
            with pytest.raises(ZeroDivisionError):
                prepare.prepare(dataclasses.replace(wanted, **changes), out, progress=_quiet)
    with monkeypatch.context() as patch:
        patch.setattr(staging, "save_journal", lambda *arguments: 1 / 0)
        patch.setattr(prepare.staging, "discard", lambda folder: None)
        with pytest.raises(ZeroDivisionError):
            prepare.prepare(wanted, out, progress=_quiet)
    left = {path.name for path in (out / ".unfinished").iterdir()}
    assert left == {"tokenizer.json", "sources.jsonl"}
    prepare.prepare(wanted, out, progress=_quiet)
    assert _files(out) == _files(unbroken)


def test_finished_shards_of_another_command_are_not_thrown_away(mix, tmp_path, monkeypatch):
    wanted, unbroken = mix
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", 128)
    out = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(prepare.Job, "_overlap", lambda *arguments: 1 / 0)  # all but finished
        with pytest.raises(ZeroDivisionError):
            prepare.prepare(wanted, out, progress=_quiet)
    kept = _files(out / ".unfinished")
    assert len(kept) > 6
    other = dataclasses.replace(wanted, weights=(0.5, 0.5))
    with pytest.raises(errors.UsageError, match=r"unfinished: has \d+ finished training shards of"):
        prepare.prepare(other, out, progress=_quiet)
    assert _files(out / ".unfinished") == kept
    lines = []
    prepare.prepare(wanted, out, progress=lines.append)
    assert any("resuming after" in line for line in lines)
    assert _files(out) == _files(unbroken)


def test_a_finished_shard_that_has_changed_is_refused(mix, tmp_path, monkeypatch):
    wanted, _ = mix
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", 128)
    out = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(prepare.Job, "_overlap", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare.prepare(wanted, out, progress=_quiet)
    for split in ("train", "validation"):
        path = next(iter((out / ".unfinished").glob(f"{split}-00000-of-*")))
        data = path.read_bytes()
        path.write_bytes(data[:-1] + b"\x07")
        with pytest.raises(errors.StorageError, match="expected the file with sha256"):
            prepare.prepare(wanted, out, progress=_quiet)
        (path if path.exists() else out / ".unfinished" / f"{split}-00000.unfinished").write_bytes(
            data
        )
    prepare.prepare(wanted, out, progress=_quiet)
    check.check(out, progress=_quiet)


def _children(pid):
    return [
        int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ]


def _alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait(condition):
    for _ in range(2400):
        if condition():
            return
        time.sleep(0.025)
    raise AssertionError("waited for a minute")


COMMAND = """
import runpy, signal, sys
from qkjax.data import shards
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
shards.RECORDS_PER_SHARD = 128
sys.argv = ["tools/prepare_data.py", *sys.argv[1:]]
runpy.run_path("tools/prepare_data.py", run_name="__main__")
"""


def _start(wanted, out):
    flags = [f"--source={source}" for source in wanted.sources]
    flags += [f"--weight={weight}" for weight in wanted.weights]
    flags += [
        f"--{name}={getattr(wanted, name)}"
        for name in (
            "tokenizer",
            "sequence_length",
            "validation_tokens",
            "max_bad_lines",
            "decontaminate",
        )
    ]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *flags, f"--out={out}", "--workers=2"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.process
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_command_leaves_no_children_and_the_next_goes_on(mix, tmp_path, signum):
    wanted, unbroken = mix
    out = tmp_path / "data"
    process = _start(wanted, out)
    _wait(lambda: (out / ".unfinished" / "train-00001.unfinished").exists() or process.poll())
    children = _children(process.pid)
    assert len(children) >= 2  # the workers, and the tracker of multiprocessing
    if signum == signal.SIGINT:  # a terminal sends Ctrl-C to the workers too
        os.killpg(process.pid, signum)
        assert process.stderr.read() == "ERROR: stopped by SIGINT\n"
    else:
        process.send_signal(signum)
    assert process.wait() == (130 if signum == signal.SIGINT else -signum)
    _wait(lambda: not any(map(_alive, children)))
    assert not (out / "dataset.json").exists()
    process = _start(wanted, out)
    assert process.wait() == 0, process.stderr.read()
    assert _files(out) == _files(unbroken)


@pytest.mark.parametrize("when", ["at work", "idle"])
def test_a_worker_that_dies_is_an_error(mix, when):
    tokenizer = tokenizer_lib.train(_documents(50, 3), 300)
    encoder = encoding.open_encoder(tokenizer, 2)
    try:
        if when == "at work":
            text = " ".join(_documents(2000, 4))
            waiting = [
                encoder.submit(encoding.Task([text] * 40, encoding.TRAIN, None)) for _ in "12"
            ]
        for worker in encoder._workers:
            os.kill(worker.process.pid, signal.SIGKILL)
        if when == "idle":
            waiting = [encoder.submit(encoding.Task(["x"], encoding.TRAIN, None))]
        with pytest.raises(
            errors.QkjaxError, match=r"--workers: .* died \(exit code -9\).*resumes"
        ):
            for future in waiting:
                future.result(timeout=60)
    finally:
        encoder.close()


def test_a_fault_in_a_worker_is_shown_here():
    encoder = encoding.open_encoder(tokenizer_lib.train(_documents(50, 3), 300), 2)
    try:
        with pytest.raises(RuntimeError, match=r"FileNotFoundError.*nowhere"):
            encoder.submit(encoding.Task(["x " * 20], encoding.TRAIN, "/nowhere")).result()
        done = encoder.submit(encoding.Task(["", "x y"], encoding.TRAIN, None)).result()
        assert done.kinds.tolist() == [encoding.EMPTY, encoding.TRAIN]
    finally:
        encoder.close()


def test_an_error_behind_what_is_needed_is_not_met(mix, tmp_path, monkeypatch):
    """How far documents are read ahead must not decide whether a command succeeds."""
    monkeypatch.setattr(reading, "_CHUNK_CHARACTERS", 1 << 30)
    texts = _documents(900, 1)
    path = _write_jsonl(tmp_path / "a.jsonl", texts)
    with path.open("a") as file:
        file.write("{\n")
    alone = prepare.Request(
        sources=(f"jsonl:{path}",),
        tokenizer=str(mix[1] / "tokenizer.json"),
        sequence_length=T,
        validation_tokens=500,
        train_tokens=2_000,
    )
    assert prepare.prepare(alone, tmp_path / "some", progress=_quiet).dropped["bad_lines"] == 0
    with pytest.raises(errors.UsageError, match=r"a\.jsonl:901: not valid JSON"):
        prepare.prepare(
            dataclasses.replace(alone, train_tokens=None), tmp_path / "all", progress=_quiet
        )
    assert not (tmp_path / "all").exists()


def test_ids_above_65535_survive(tmp_path):
    """A vocabulary that needs uint32, whose upper ids really occur."""
    content = json.loads(tokenizer_lib.train(_documents(300, 5), 400).content)
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {
        token: number if token == "<|endoftext|>" else number + 70_000
        for token, number in vocabulary.items()
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    path = _write_jsonl(tmp_path / "a.jsonl", _documents(300, 5))
    wanted = prepare.Request(
        sources=(f"jsonl:{path}",),
        tokenizer=str(tmp_path / "tokenizer.json"),
        sequence_length=T,
        validation_tokens=300,
    )
    made = prepare.prepare(wanted, tmp_path / "out", workers=2, progress=_quiet)
    assert made.dtype == "uint32" and made.tokenizer.vocab_size == 70_400
    records = np.concatenate([i for _, i in shards.read_records(made, tmp_path / "out", "train")])
    assert set(np.unique(records[records < 70_000])) == {0} and records.max() > 70_256
    check.check(tmp_path / "out", progress=_quiet)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_source_starts_at_any_document(tmp_path, kind):
    import pyarrow as pa
    import pyarrow.parquet

    for name, texts in (("a", _documents(300, 6)), ("b", []), ("c", _documents(5, 7))):
        if kind == "parquet":
            table = pa.table({"text": pa.array(texts, pa.string())})
            pa.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=70)
        elif texts:
            _write_jsonl(tmp_path / f"{name}.jsonl", texts)
    source = sources.open_source(f"{kind}:{tmp_path}/*.{kind}")
    documents = list(source.documents())
    assert len(documents) == 305
    for start in (0, 1, 69, 70, 71, 139, 299, 300, 301, 304, 305):
        assert list(source.documents(start)) == documents[start:], start
        assert start in (0, 305) or 0 <= source.fraction <= 1


def test_presets_are_the_study_and_explicit_options_win():
    study = request.preset("study")
    assert study.sources == (
        "hf:HuggingFaceTB/smollm-corpus:fineweb-edu-dedup",
        "hf:HuggingFaceTB/smollm-corpus:cosmopedia-v2",
    )
    assert (study.weights, study.tokenizer) == ((0.7, 0.3), "hf:HuggingFaceTB/SmolLM2-135M")
    assert (study.train_tokens, study.validation_tokens) == (300_000_000, 5_000_000)
    assert (study.sequence_length, study.end_of_text) == (2048, True)
    assert request.preset("pilot") == dataclasses.replace(study, train_tokens=25_000_000)
    changed = request.preset("study", end_of_text=False, train_tokens=5)
    assert changed == dataclasses.replace(study, end_of_text=False, train_tokens=5)
    own = request.preset("pilot", sources=("text:x",))
    assert (own.sources, own.weights, own.train_tokens) == (("text:x",), (1.0,), 25_000_000)
    with pytest.raises(errors.UsageError, match=r"unknown preset\. Known are: study, pilot"):
        request.preset("large")


@pytest.mark.process
def test_the_command_line_overrides_a_preset(tmp_path):
    """Flags that are not given must not hide the preset's values behind their defaults."""
    path = _write_jsonl(tmp_path / "a.jsonl", _documents(60, 8))
    done = subprocess.run(
        [
            sys.executable,
            "tools/prepare_data.py",
            "--preset=pilot",
            f"--source=jsonl:{path}",
            "--tokenizer=train:300",
            "--sequence_length=16",
            "--validation_tokens=20",
            "--workers=1",
            f"--out={tmp_path / 'out'}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "--train_tokens: 25000000 in whole records need 25000001" in done.stderr


def test_an_older_dataset_without_the_newer_options_is_still_ours(mix, tmp_path):
    wanted, unbroken = mix
    content = json.loads((unbroken / "dataset.json").read_text())
    plain = {**wanted.plain(), "decontaminate": False}
    for newer in ("benchmark_dir", "decontaminate"):
        del plain[newer]
    content["request"] = plain
    del content["overlap"]
    for file in unbroken.iterdir():
        if not file.name.startswith("."):
            (tmp_path / file.name).hardlink_to(file)
    (tmp_path / "dataset.json").unlink()
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    again = dataclasses.replace(wanted, decontaminate=False)
    assert prepare.prepare(again, tmp_path, progress=_quiet) == manifest_lib.load(tmp_path)
    with pytest.raises(errors.UsageError, match="decontaminate: expected True, found False"):
        prepare.prepare(wanted, tmp_path, progress=_quiet)


def test_a_real_mix_with_the_smollm2_tokenizer(tmp_path, shared):
    data = shared / "data"
    paths = []
    for name, count in (("edu_openstax", 60), ("synth_library_of_phi", 200)):
        with lzma.open(data / f"{name}.train.jsonl.xz", "rt") as file:
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(next(file) for _ in range(count)))
            paths.append(path)
    wanted = prepare.Request(
        sources=tuple(f"jsonl:{path}" for path in paths),
        weights=(0.7, 0.3),
        tokenizer=str(data / "tokenizer_smollm2" / "tokenizer.json"),
        sequence_length=2048,
        validation_tokens=2048,
        benchmark_dir=str(data / "lambada"),
    )
    made = [
        prepare.prepare(wanted, tmp_path / str(workers), workers=workers, progress=_quiet)
        for workers in (1, 2)
    ]
    tokens = [source["tokens"] for source in made[0].sources]
    with np.load(tmp_path / "1" / "documents-train.npz") as table:
        longest = int(table["length"].max()) + 1
    assert abs(tokens[0] - 0.7 * sum(tokens)) <= max(0.005 * sum(tokens), longest)
    overlaps = made[0].overlap
    assert overlaps["lambada"]["training_documents"] == 0 and overlaps["hellaswag"] is None
    assert made[0].fingerprint == made[1].fingerprint and overlaps == made[1].overlap
