"""A dataset's sources are known by content: what was rewritten since is refused, by name."""

import dataclasses
import gzip
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest

from qkjax import errors
from qkjax.data import check, docstrings, origins, prepare, reading, shards, sources, staging
from qkjax.data import manifest as manifest_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
REQUEST = prepare.Request(
    sources=("unset",), tokenizer="train:270", sequence_length=16, validation_tokens=300
)


def _texts(seed, count=300):
    chooser = random.Random(seed)
    words = ["alpha", "gamma", "delta", "theta", "kappa"]  # all of one length
    return [f"{i:03d} " + " ".join(chooser.choices(words, k=20)) for i in range(count)]


def _content(kind, seed):
    """A file of one kind; those of two seeds have the same number of bytes."""
    texts = _texts(seed)
    if kind == "parquet":
        sink = pa.BufferOutputStream()
        table = pa.table({"text": texts})
        pa.parquet.write_table(table, sink, compression="none", use_dictionary=False)
        return sink.getvalue().to_pybytes()
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    return gzip.compress(data, 0, mtime=0) if kind == "jsonl.gz" else data


def _rewrite(path, content):
    """Other bytes in place: the same size, inode and time of change."""
    before = path.stat()
    assert len(content) == before.st_size
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _quiet(line):
    pass


def _prepare(out, *paths, progress=_quiet, workers=1, **changes):
    specs = tuple(f"{p.suffixes[0][1:].replace('txt', 'text')}:{p}" for p in paths)
    request = dataclasses.replace(REQUEST, **{"sources": specs, "weights": (), **changes})
    return prepare.prepare(request, out, workers=workers, progress=progress)


def _files(out):
    return {p.name: p.read_bytes() for p in out.iterdir() if not p.name.startswith(".")}


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_text_that_was_rewritten_behind_a_finished_dataset_is_refused(tmp_path, kind):
    path, out = tmp_path / f"a.{kind}", tmp_path / "out"
    path.write_bytes(_content(kind, 1))
    made = _prepare(out, path)
    before = _files(out)
    _rewrite(path, _content(kind, 2))
    with pytest.raises(errors.UsageError, match=rf"^{path}: is not what {out} was made from"):
        _prepare(out, path)
    _rewrite(path, _content(kind, 1))
    assert _prepare(out, path) == made
    assert _files(out) == before


def test_a_copy_or_another_date_is_the_same_text(tmp_path):
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_bytes(_content("jsonl", 1))
    made = _prepare(out, path)
    os.utime(path)
    assert _prepare(out, path) == made
    shutil.copy(path, tmp_path / "copy")
    os.replace(tmp_path / "copy", path)
    assert _prepare(out, path) == made
    entry, status = json.loads((out / "sources.jsonl").read_text()), path.stat()
    entry |= {name: getattr(status, f"st_{name}") for name in ("mtime_ns", "ctime_ns")}
    entry["inode"] = status.st_ino
    assert origins.Entry(**entry).is_unchanged()
    torn = [json.dumps(entry | wrong) for wrong in ({"sha256": 5}, {"path": 1}, {"more": 1})]
    for lines in ("{}\n[1\nnull\n", "", "[" * 100_000, *torn):  # it only saves hashing
        (out / "sources.jsonl").write_text(lines)
        assert _prepare(out, path) == made
    _rewrite(path, _content("jsonl", 2))
    with pytest.raises(errors.UsageError, match="is not what"):
        _prepare(out, path)


class _Killed(Exception):
    pass


def _stop_behind(monkeypatch, out, path, shard):
    save = staging.save_journal

    def stop(work, content):
        save(work, content)
        if "validation" in content and staging.finished_shards(content) == shard:
            raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(staging, "save_journal", stop)
        with pytest.raises(_Killed):
            _prepare(out, path)


def test_text_that_was_rewritten_between_a_kill_and_the_next_start_is_refused(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", 64)
    path, out = tmp_path / "a.jsonl", tmp_path / "data"
    path.write_bytes(_content("jsonl", 1))
    _prepare(tmp_path / "unbroken" / "data", path)
    _stop_behind(monkeypatch, out, path, 2)
    kept = _files(out / ".unfinished")
    _rewrite(path, _content("jsonl", 2))
    for _ in "12":
        with pytest.raises(
            errors.UsageError, match=rf"^{path}: was changed .* 2 finished training"
        ):
            _prepare(out, path)
        assert _files(out / ".unfinished").keys() == kept.keys()
    _rewrite(path, _content("jsonl", 1))
    lines = []
    _prepare(out, path, progress=lines.append)
    assert any("resuming after 2 finished shards" in line for line in lines)
    assert _files(out) | {"sources.jsonl": b""} == _files(tmp_path / "unbroken" / "data") | {
        "sources.jsonl": b""
    }


def test_where_no_shard_is_finished_it_starts_again_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", 64)
    path, out = tmp_path / "a.jsonl", tmp_path / "data"
    path.write_bytes(_content("jsonl", 1))
    _stop_behind(monkeypatch, out, path, 0)
    _rewrite(path, _content("jsonl", 2))
    lines = []
    _prepare(out, path, progress=lines.append)
    assert lines[0] == f"{path}: was changed since; starting again"
    assert _files(out) == _files_of_fresh(tmp_path / "fresh" / "data", path)


def _files_of_fresh(out, path):
    _prepare(out, path)
    return _files(out)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(_content(kind, 1))
    documents = sources.open_source(f"{kind}:{path}").documents()
    next(documents)
    _rewrite(path, _content(kind, 1))
    next(documents)
    _rewrite(path, _content(kind, 2))
    with pytest.raises(errors.UsageError, match=rf"^{path}: was changed while text was read"):
        list(documents)


def test_a_file_that_no_document_was_taken_from_is_not_part_of_it(tmp_path, monkeypatch):
    """How far ahead text is read does not show, and what was not read may change."""
    monkeypatch.setattr(reading, "_CHUNK_CHARACTERS", 20_000)
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        (tmp_path / f"{name}.jsonl").write_bytes(_content("jsonl", seed))
    _prepare(tmp_path / "first", tmp_path / "a.jsonl")
    options = {"train_tokens": 2_000, "tokenizer": str(tmp_path / "first" / "tokenizer.json")}
    made = []
    for workers in (1, 3):
        out = tmp_path / str(workers) / "data"
        made.append(_prepare(out, tmp_path / "*.jsonl", workers=workers, **options))
    assert made[0].sources[0]["read_from"]["files_read"] == 1
    assert made[0].sources[0]["read_from"]["files"] == 3
    assert _files(tmp_path / "1" / "data") == _files(out)
    _rewrite(tmp_path / "c.jsonl", _content("jsonl", 4))
    _prepare(out, tmp_path / "*.jsonl", **options)
    _rewrite(tmp_path / "a.jsonl", _content("jsonl", 4))
    with pytest.raises(errors.UsageError, match=rf"^{tmp_path}/a\.jsonl: is not what"):
        _prepare(out, tmp_path / "*.jsonl", **options)


def test_other_docstrings_behind_the_same_versions_are_refused(tmp_path, monkeypatch):
    texts = [(f"m{i}", text) for i, text in enumerate(_texts(1))]
    monkeypatch.setattr(docstrings, "documents", lambda: iter(texts))
    out = tmp_path / "out"
    prepare.prepare(dataclasses.replace(REQUEST, sources=("docstrings",)), out, progress=_quiet)
    prepare.prepare(dataclasses.replace(REQUEST, sources=("docstrings",)), out, progress=_quiet)
    texts[5] = ("m5", texts[5][1].upper())
    with pytest.raises(errors.UsageError, match=r"^docstrings: is not what"):
        prepare.prepare(dataclasses.replace(REQUEST, sources=("docstrings",)), out, progress=_quiet)


def test_benchmark_files_are_known_by_content_too(tmp_path):
    path, out, benchmarks = tmp_path / "a.jsonl", tmp_path / "out", tmp_path / "benchmarks"
    path.write_bytes(_content("jsonl", 1))
    benchmarks.mkdir()
    lambada = benchmarks / "lambada_test.jsonl"
    lambada.write_bytes(_content("jsonl", 5))
    options = {"benchmark_dir": str(benchmarks)}
    made = _prepare(out, path, **options)
    assert _prepare(out, path, **options) == made
    _rewrite(lambada, _content("jsonl", 6))
    with pytest.raises(errors.UsageError, match=rf"^{lambada}: is not what {out} was made from"):
        _prepare(out, path, **options)
    _rewrite(lambada, _content("jsonl", 5))
    (benchmarks / "hellaswag.jsonl").write_bytes(_content("jsonl", 5))
    with pytest.raises(errors.UsageError, match=r"hellaswag\.jsonl: is not what"):
        _prepare(out, path, **options)


def _edit(out, edit):
    path = out / "dataset.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_a_dataset_from_before_digests_were_kept_is_accepted_and_said_so(tmp_path):
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_bytes(_content("jsonl", 1))
    _prepare(out, path)

    def forget(content):
        for key in ("files_read", "sha256"):
            del content["sources"][0]["read_from"][key]

    _edit(out, forget)
    lines = []
    _prepare(out, path, progress=lines.append)
    assert lines[0] == f"jsonl:{path}: recorded without digests, compared by size only"
    assert lines[1].endswith("already complete, nothing to do")


def _check_data(*arguments):
    return subprocess.run(
        [sys.executable, "tools/check_data.py", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.process
def test_check_data_hashes_every_source_when_asked(tmp_path):
    """Also where size, inode and dates were all made to look the same."""
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_bytes(_content("jsonl", 1))
    _prepare(out, path)
    done = _check_data("--sources", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("sources: hashed again, unchanged since the dataset was made\n")
    _rewrite(path, _content("jsonl", 2))
    entry = json.loads((out / "sources.jsonl").read_text())
    status = path.stat()
    entry |= {"mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
    (out / "sources.jsonl").write_text(json.dumps(entry) + "\n")
    assert origins.Entry(**entry).is_unchanged()
    check.check(out, progress=_quiet)
    done = _check_data("--sources", out)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"ERROR: {path}: is not what {out} was made from")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "held-out.npy", "ngrams.npy", "train-documents.unfinished"]
)
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_what_an_interrupted_command_finished_is_proven(tmp_path, monkeypatch, name, damage):
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", 64)
    path, out = tmp_path / "a.jsonl", tmp_path / "data"
    path.write_bytes(_content("jsonl", 1))
    _stop_behind(monkeypatch, out, path, 2)
    finished = out / ".unfinished" / name
    good = finished.read_bytes()
    finished.write_bytes({"flipped": bytes([good[0] ^ 1]) + good[1:]}.get(damage, good[:-1]))
    if damage == "gone":
        finished.unlink()
    with pytest.raises(errors.StorageError, match=rf"^{finished}: expected the file with sha256"):
        _prepare(out, path)
    finished.write_bytes(good)
    _prepare(out, path)
    check.check(out, progress=_quiet)


@pytest.mark.parametrize("names", [["../victim"], "x", [3], None])
def test_a_list_of_moves_that_names_other_places_is_refused(tmp_path, names):
    path, out = tmp_path / "a.jsonl", tmp_path / "data"
    path.write_bytes(_content("jsonl", 1))
    (out / ".unfinished").mkdir(parents=True)
    (tmp_path / "victim").write_text("mine")
    (out / ".unfinished" / "moved.json").write_text(json.dumps({"names": names}))
    with pytest.raises(errors.UsageError, match=r"moved\.json: damaged .*Remove .* to start again"):
        _prepare(out, path)
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize("kind", ["folder", "file", "directory"])
def test_links_and_directories_in_the_work_folder_are_left_alone(tmp_path, kind):
    path, out, other = tmp_path / "a.jsonl", tmp_path / "data", tmp_path / "other"
    path.write_bytes(_content("jsonl", 1))
    other.mkdir()
    (other / "thesis.txt").write_text("my only copy")
    out.mkdir()
    work = out / ".unfinished"
    if kind == "folder":
        work.symlink_to(other)
    else:
        work.mkdir()
        if kind == "file":
            (work / "train-00000.unfinished").symlink_to(other / "thesis.txt")
        else:
            shutil.copytree(other, work / "mine")
    with pytest.raises(errors.UsageError, match=rf"^{work}: is a link, or holds .*nothing was"):
        _prepare(out, path)
    assert (other / "thesis.txt").read_text() == "my only copy" and work.exists()


def test_a_journal_that_is_not_its_own_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", 64)
    path, out = tmp_path / "a.jsonl", tmp_path / "data"
    path.write_bytes(_content("jsonl", 1))
    _stop_behind(monkeypatch, out, path, 2)
    journal = out / ".unfinished" / "journal.json"
    good = journal.read_text()
    wrong = json.loads(good)
    wrong["train"]["documents"] = [1]
    for content in (json.dumps(wrong), good[:-9], "[]", "{}", "[" * 100_000):
        journal.write_text(content)
        with pytest.raises(errors.UsageError, match=r"journal\.json: damaged .*Remove .* to start"):
            _prepare(out, path)
    journal.write_text(good)
    _prepare(out, path)
    manifest_lib.verify_digests(manifest_lib.load(out), out)
