"""dataset.json: what is refused, what the fingerprint depends on, what verification finds."""

import dataclasses
import json
import os

import pytest

from qkjax import errors, files
from qkjax.data import manifest as manifest_lib


def _shard(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return manifest_lib.Shard(name, files.sha256(path), len(content), 2)


@pytest.fixture
def folder(tmp_path):
    """A dataset directory whose shards are any bytes: the manifest never opens them."""
    splits = {
        split: manifest_lib.Split(
            2 * count,
            2 * count * 16,
            tuple(
                _shard(tmp_path, f"{split}-{i}.array_record", f"{split}{i}".ljust(99).encode())
                for i in range(count)
            ),
        )
        for split, count in (("train", 3), ("validation", 1))
    }
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "documents-train.npz").write_bytes(b"table")
    digest = files.sha256
    manifest = manifest_lib.Manifest(
        name="small",
        sequence_length=16,
        dtype="uint16",
        end_of_text=True,
        tokenizer=manifest_lib.TokenizerRecord(
            "tokenizer.json", digest(tmp_path / "tokenizer.json"), 300, 0
        ),
        sources=(
            {"name": "docstrings", "weight": 1.0, "documents": 9, "tokens": 97, "read_from": {}},
        ),
        split={"rule": "sha256 of normalised text"},
        dropped={"empty": 0},
        splits=splits,
        documents={
            "train": manifest_lib.DocumentsRecord(
                "documents-train.npz", digest(tmp_path / "documents-train.npz"), 9
            )
        },
        request={"tokenizer": "train:300"},
    )
    manifest_lib.write(manifest, tmp_path)
    return tmp_path


def _edit(folder, edit):
    path = folder / "dataset.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_what_is_written_is_what_is_loaded(folder):
    manifest = manifest_lib.load(folder)
    assert manifest.splits["train"].num_tokens == 96
    assert manifest.tokenizer.vocab_size == 300
    assert manifest.record_bytes == 34
    manifest_lib.write(manifest, folder)
    assert manifest_lib.load(folder) == manifest
    assert not [name for name in os.listdir(folder) if name.startswith(".")]
    content = json.loads((folder / "dataset.json").read_text())
    assert content["format_version"] == 1
    assert set(content["splits"]["train"]["shards"][0]) == {
        "file",
        "sha256",
        "num_bytes",
        "num_records",
    }


def test_a_failed_write_leaves_the_old_manifest(folder, monkeypatch):
    before = (folder / "dataset.json").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    changed = dataclasses.replace(manifest_lib.load(folder), name="other")
    with pytest.raises(errors.StorageError, match="No space left"):
        manifest_lib.write(changed, folder)
    assert (folder / "dataset.json").read_bytes() == before


@pytest.mark.parametrize("missing", ["directory", "file"])
def test_a_directory_without_a_manifest_is_no_dataset(tmp_path, missing):
    folder = tmp_path / "nowhere" if missing == "directory" else tmp_path
    with pytest.raises(errors.UsageError, match=r"dataset.json: missing.*`qkjax prepare`"):
        manifest_lib.load(folder)


@pytest.mark.parametrize("content", ["", "{", '{"format_version": 1', "\x80"])
def test_a_manifest_that_is_not_json_is_refused(folder, content):
    (folder / "dataset.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(errors.UsageError, match=r"dataset.json: damaged .*`qkjax prepare`"):
        manifest_lib.load(folder)


def _set(*keys, value):
    def edit(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return edit


def _drop(*keys):
    def edit(content):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set("format_version", value=2), "format_version: expected 1, found 2"),
        (_drop("sequence_length"), "the field sequence_length is missing"),
        (_drop("splits", "validation"), "the field splits.validation is missing"),
        (_drop("splits", "train", "shards", 1, "sha256"), r"splits.train.shards\[1\].sha256 is"),
        (_drop("tokenizer", "eos_id"), "the field tokenizer.eos_id is missing"),
        (_set("sequence_length", value="16"), "sequence_length: expected int, found '16'"),
        (_set("sequence_length", value=True), "sequence_length: expected int, found True"),
        (_set("sources", 0, value=7), r"sources\[0\]: expected an object, found int"),
        (_drop("sources", 0, "read_from"), r"the field sources\[0\]\.read_from is missing"),
        (
            _set("sources", 0, "read_from", value={"files_read": "1"}),
            r"sources\[0\]\.read_from\.files_read: expected int, found '1'",
        ),
        (
            _set("sources", 0, "weight", value="1"),
            r"sources\[0\]\.weight: expected float, found '1'",
        ),
        (_set("sources", 0, "documents", value=1.5), r"\.documents: expected int, found 1\.5"),
        (_set("sources", 0, "tokens", value=-1), r"\.tokens: expected 0 or more, found -1"),
        (_set("end_of_text", value=1), "end_of_text: expected bool, found 1"),
        (_set("splits", "train", "shards", 0, value=3), r"shards\[0\]: expected an object"),
        (_set("dtype", value="int16"), "dtype: expected uint16 or uint32, found int16"),
        (_set("tokenizer", "vocab_size", value=70000), "70000 ids do not fit uint16"),
        (_set("tokenizer", "eos_id", value=300), "eos_id: expected below 300, found 300"),
        (_set("splits", "train", "num_sequences", value=5), "expected the 6 records .* found 5"),
        (_set("splits", "train", "num_tokens", value=95), r"expected 6 \* 16, found 95"),
        (_set("splits", "train", "shards", value=[]), "num_sequences: expected the 0 records"),
        (_set("tokenizer", "file", value="../x"), "expected a plain name, found '../x'"),
        (_set("splits", "train", "shards", 0, "file", value="/etc/x"), "found '/etc/x'"),
        (_set("documents", "train", "file", value="tokenizer.json"), "is listed twice"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(folder, edit, message):
    _edit(folder, edit)
    with pytest.raises(errors.UsageError, match=message) as caught:
        manifest_lib.load(folder)
    assert str(folder / "dataset.json") in str(caught.value)
    assert "`qkjax prepare`" in str(caught.value)


def test_the_fingerprint_is_of_what_training_reads(folder):
    manifest = manifest_lib.load(folder)
    same = dataclasses.replace(manifest, name="x", sources=(), dropped={}, request={}, documents={})
    assert same.fingerprint == manifest.fingerprint
    other_shard = dataclasses.replace(manifest.splits["train"].shards[0], sha256="0" * 64)
    other_split = dataclasses.replace(
        manifest.splits["train"], shards=(other_shard, *manifest.splits["train"].shards[1:])
    )
    different = [
        dataclasses.replace(manifest, **change)
        for change in (
            {"dtype": "uint32"},
            {"sequence_length": 17},
            {"end_of_text": False},
            {"tokenizer": dataclasses.replace(manifest.tokenizer, eos_id=1)},
            {"splits": {**manifest.splits, "train": other_split}},
        )
    ]
    assert len({manifest.fingerprint, *(m.fingerprint for m in different)}) == 6


def test_all_missing_shards_are_listed(folder):
    for name in ("train-0.array_record", "train-2.array_record"):
        (folder / name).unlink()
    with pytest.raises(errors.UsageError, match="2 of 4 shards are missing") as caught:
        manifest_lib.verify_files(manifest_lib.load(folder), folder)
    assert "train-0.array_record, train-2.array_record" in str(caught.value)


@pytest.mark.parametrize(("size", "problem"), [(98, "truncated"), (100, "too long")])
def test_a_shard_of_another_size_is_named(folder, size, problem):
    os.truncate(folder / "validation-0.array_record", size)
    with pytest.raises(
        errors.UsageError, match=f"validation-0.array_record: {problem}.*99 bytes, found {size}"
    ):
        manifest_lib.verify_files(manifest_lib.load(folder), folder)


def test_extra_shards_are_noted_and_nothing_else(folder):
    (folder / "train-9.array_record").write_bytes(b"x")
    assert manifest_lib.verify_files(manifest_lib.load(folder), folder) == ["train-9.array_record"]


@pytest.mark.parametrize(
    "name", ["train-1.array_record", "validation-0.array_record", "tokenizer.json"]
)
def test_a_changed_byte_is_found(folder, name):
    manifest = manifest_lib.load(folder)
    manifest_lib.verify_digests(manifest, folder)
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(errors.UsageError, match=f"{name}: expected sha256 .* found"):
        manifest_lib.verify_digests(manifest, folder)


def test_a_shard_that_is_a_link_out_of_the_directory_is_refused(folder, tmp_path_factory):
    path, other = folder / "train-1.array_record", tmp_path_factory.mktemp("x") / "shard"
    path.rename(other)
    path.symlink_to(other)
    with pytest.raises(errors.UsageError, match=rf"^{path}: is a link to {other}, expected a file"):
        manifest_lib.verify_files(manifest_lib.load(folder), folder)
    path.unlink()
    other.rename(folder / "elsewhere")
    path.symlink_to("elsewhere")  # within the directory a link is as good as a file
    linked = tmp_path_factory.mktemp("y") / "link"
    linked.symlink_to(folder)
    manifest_lib.verify_digests(manifest_lib.load(linked), linked)


def test_one_shard_in_two_splits_is_refused(folder):
    def copy_validation(content):
        shard = content["splits"]["validation"]["shards"][0]
        content["splits"]["train"]["shards"][1] |= {"sha256": shard["sha256"]}

    _edit(folder, copy_validation)
    with pytest.raises(
        errors.UsageError, match=r"validation-0.*: the same shard is in train and in validation"
    ):
        manifest_lib.load(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "documents-train.npz"])
def test_a_missing_companion_file_is_found(folder, name):
    (folder / name).unlink()
    with pytest.raises(errors.UsageError, match=f"{name}: missing"):
        manifest_lib.verify_digests(manifest_lib.load(folder), folder)
