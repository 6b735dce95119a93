"""tools/check_data.py: what is wrong with a dataset is found and named."""

import dataclasses
import json
import pathlib
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
from array_record.python import array_record_module

from qkjax import errors, files
from qkjax.data import check, prepare, shards
from qkjax.data import manifest as manifest_lib
from qkjax.data import tokenizer as tokenizer_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
T = 16
VOCABULARY = 290


def _quiet(line):
    pass


@pytest.fixture(scope="module", params=[True, False], ids=["end_of_text", "no_end_of_text"])
def sound(request, tmp_path_factory):
    """A sound dataset of several shards; tests damage copies of it."""
    folder = tmp_path_factory.mktemp("sound")
    chooser = random.Random(0)
    words = ["alpha", "Beta", "gamma", "délta", "epsilon", "zeta", "eta", "theta"]
    with (folder / "corpus.jsonl").open("w") as file:
        for i in range(300):
            text = f"Document {i} {' '.join(chooser.choices(words, k=chooser.randint(5, 40)))}"
            file.write(json.dumps({"text": text}) + "\n")
    wanted = prepare.Request(
        sources=(f"jsonl:{folder}/corpus.jsonl",),
        tokenizer=f"train:{VOCABULARY}",
        sequence_length=T,
        validation_tokens=100,
        end_of_text=request.param,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "RECORDS_PER_SHARD", 64)
        prepare.prepare(wanted, folder / "data", progress=_quiet)
    return folder / "data"


@pytest.fixture
def dataset(sound, tmp_path):
    return pathlib.Path(shutil.copytree(sound, tmp_path / "data"))


def _refusal(folder):
    with pytest.raises(errors.UsageError) as caught:
        check.check(folder, progress=_quiet)
    assert "\n" not in str(caught.value) and "`qkjax prepare`" in str(caught.value)
    return str(caught.value)


def _records(folder, split="train"):
    manifest = manifest_lib.load(folder)
    return np.concatenate([ids for _, ids in shards.read_records(manifest, folder, split)]).copy()


def _stream(folder, split="train"):
    records = _records(folder, split)
    return np.concatenate([records[:, :-1].reshape(-1), records[-1, -1:]])


def _rewrite(folder, records, split="train"):
    """Puts other records into the shards and makes every digest and size right again."""
    manifest = manifest_lib.load(folder)
    written, start = [], 0
    for shard in manifest.splits[split].shards:
        path = folder / shard.file
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for record in records[start : start + shard.num_records]:
            writer.write(record.astype(manifest.dtype).tobytes())
        writer.close()
        start += shard.num_records
        written.append(
            dataclasses.replace(shard, sha256=files.sha256(path), num_bytes=path.stat().st_size)
        )
    changed = dataclasses.replace(manifest.splits[split], shards=tuple(written))
    manifest_lib.write(
        dataclasses.replace(manifest, splits={**manifest.splits, split: changed}), folder
    )


def _rewrite_stream(folder, stream):
    count = (len(stream) - 1) // T
    _rewrite(folder, np.array([stream[i * T : i * T + T + 1] for i in range(count)]))


def _table(folder, split):
    with np.load(folder / f"documents-{split}.npz") as arrays:
        return dict(arrays)


def _rewrite_table(folder, split, table):
    path = folder / f"documents-{split}.npz"
    np.savez(path, **table)
    manifest = manifest_lib.load(folder)
    record = manifest_lib.DocumentsRecord(path.name, files.sha256(path), len(table["hash64"]))
    manifest_lib.write(
        dataclasses.replace(manifest, documents={**manifest.documents, split: record}), folder
    )


def _where(folder, k):
    """The shard and record in which training document k starts, and its number."""
    record = int(_table(folder, "train")["first_token"][k]) // T
    for shard in manifest_lib.load(folder).splits["train"].shards:
        if record < shard.num_records:
            return f"{folder / shard.file} record {record}, document {k}: "
        record -= shard.num_records
    raise AssertionError


@pytest.mark.process
def test_a_sound_dataset_passes_through_the_command(dataset):
    shutil.copy(dataset / "validation-00000-of-00001.array_record", dataset / "x.array_record")
    done = subprocess.run(
        [sys.executable, "tools/check_data.py", str(dataset)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    manifest = manifest_lib.load(dataset)
    assert f"data: sound, fingerprint {manifest.fingerprint}" in done.stdout
    documents = manifest.documents["train"].num_documents
    assert f"{documents} documents ({documents - 1} decoded)" in done.stdout
    assert "validation documents occur in training" in done.stdout
    assert "nothing reads them: x.array_record" in done.stdout


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "DIR: missing"),
        (["a", "b"], "b: an unexpected argument"),
        (["nowhere"], "nowhere/dataset"),
    ],
)
def test_the_command_takes_one_directory(arguments, message):
    done = subprocess.run(
        [sys.executable, "tools/check_data.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith(f"ERROR: {message}")


@pytest.mark.process
def test_a_damaged_dataset_is_one_line_and_exit_2(dataset):
    path = next(dataset.glob("train-00001-of-*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    done = subprocess.run(
        [sys.executable, "tools/check_data.py", str(dataset)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"ERROR: {path}: expected sha256 ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("case", ["as it is", "other case and white space"])
def test_a_validation_document_put_into_training_is_named(dataset, case):
    stream, table = _stream(dataset), _table(dataset, "train")
    held_out = _table(dataset, "validation")
    start, length = int(held_out["first_token"][1]), int(held_out["length"][1])
    ids = _stream(dataset, "validation")[start : start + length]
    tokenizer = tokenizer_lib.of_dataset(manifest_lib.load(dataset), dataset)
    text = tokenizer.decode(ids)
    if case != "as it is":
        ids = tokenizer.encode_batch([text.upper().replace(" ", "\n\n")])[0]
    # It takes the place of training document 40; what follows moves, and the table with it.
    k = 40
    first, old = int(table["first_token"][k]), int(table["length"][k])
    changed = np.concatenate([stream[:first], ids, stream[first + old :], stream])[: len(stream)]
    table["length"][k] = len(ids)
    table["first_token"][k + 1 :] += len(ids) - old
    table["length"][-1] += len(stream)  # the last document is cut wherever the stream ends
    inside = table["first_token"] < len(stream)
    _rewrite_stream(dataset, changed)
    _rewrite_table(dataset, "train", {name: array[inside] for name, array in table.items()})
    message = _refusal(dataset)
    assert message.startswith(f"{_where(dataset, k)}is validation document 1, expected no")
    assert " ".join(text.upper().split())[:20] in message.upper()


def test_a_validation_document_between_end_of_text_tokens_is_named(dataset):
    """Pasted over training tokens without touching the table of documents."""
    if not manifest_lib.load(dataset).end_of_text:
        pytest.skip("without end-of-text a pasted document shows as a changed text only")
    stream, held_out = _stream(dataset), _table(dataset, "validation")
    lengths = _table(dataset, "train")["length"]
    document = int(np.argmin(held_out["length"][:-1]))
    start, length = int(held_out["first_token"][document]), int(held_out["length"][document])
    k = int(np.argmax(lengths[10:] > length + 10)) + 10
    paste = int(_table(dataset, "train")["first_token"][k]) + 5
    ids = _stream(dataset, "validation")[start : start + length]
    stream[paste : paste + length + 2] = [0, *ids, 0]
    _rewrite_stream(dataset, stream)
    assert _refusal(dataset).startswith(f"{_where(dataset, k)}is validation document {document},")


def test_a_changed_training_text_is_named(dataset):
    stream = _stream(dataset)
    first = int(_table(dataset, "train")["first_token"][25])
    stream[first + 3] = 1 + stream[first + 3] % 200
    _rewrite_stream(dataset, stream)
    assert _refusal(dataset).startswith(f"{_where(dataset, 25)}its text is not the one")


def test_a_document_without_its_end_of_text_is_named(dataset):
    if not manifest_lib.load(dataset).end_of_text:
        pytest.skip("this dataset has no end-of-text")
    stream = _stream(dataset)
    stream[int(_table(dataset, "train")["first_token"][26]) - 1] = 50
    _rewrite_stream(dataset, stream)
    assert _refusal(dataset).startswith(f"{_where(dataset, 25)}its text is not the one")


def test_a_validation_hash_in_the_table_of_training_is_named(dataset):
    table = _table(dataset, "train")
    table["hash64"][7] = _table(dataset, "validation")["hash64"][0]
    _rewrite_table(dataset, "train", table)
    assert "documents-train.npz document 7: its hash" in _refusal(dataset)


@pytest.mark.parametrize(
    ("field", "message"),
    [("first_token", "document 9: expected to start at"), ("length", "document 10: expected to")],
)
def test_a_gap_between_documents_is_named(dataset, field, message):
    table = _table(dataset, "train")
    table[field][9] += 1
    _rewrite_table(dataset, "train", table)
    assert message in _refusal(dataset)


@pytest.mark.parametrize("fewer", [True, False])
def test_documents_that_do_not_fill_the_stream_are_named(dataset, fewer):
    table = _table(dataset, "train")
    if fewer:
        table = {name: array[:-3] for name, array in table.items()}
    else:
        end = (
            table["first_token"][-1] + table["length"][-1] + manifest_lib.load(dataset).end_of_text
        )
        more = {"hash64": table["hash64"][0], "first_token": end, "length": 5}
        table = {
            name: np.append(array, array.dtype.type(more[name])) for name, array in table.items()
        }
    _rewrite_table(dataset, "train", table)
    assert "documents-train.npz: its documents end at token" in _refusal(dataset)


def test_one_document_cannot_stand_for_many(dataset):
    """A table that calls the rest of the stream one long, cut document hides nothing."""
    if not manifest_lib.load(dataset).end_of_text:
        pytest.skip("without end-of-text the stream has no mark of a document's end")
    table = {name: array[:30] for name, array in _table(dataset, "train").items()}
    table["length"][-1] = len(_stream(dataset))
    _rewrite_table(dataset, "train", table)
    assert _refusal(dataset).startswith(f"{_where(dataset, 29)}its text is not the one")


def test_a_table_that_is_no_table_is_named(dataset):
    table = _table(dataset, "train")
    _rewrite_table(dataset, "train", {**table, "length": table["length"].astype(np.int32)})
    assert "documents-train.npz: length: expected" in _refusal(dataset)
    path = dataset / "documents-train.npz"
    path.write_bytes(b"nothing")
    manifest = manifest_lib.load(dataset)
    record = dataclasses.replace(manifest.documents["train"], sha256=files.sha256(path))
    manifest_lib.write(
        dataclasses.replace(manifest, documents={**manifest.documents, "train": record}), dataset
    )
    assert "documents-train.npz: damaged (ValueError" in _refusal(dataset)


def test_a_token_outside_the_vocabulary_is_named(dataset):
    records = _records(dataset)
    records[70, 5] = VOCABULARY
    _rewrite(dataset, records)
    message = _refusal(dataset)
    assert "train-00001-of-" in message
    assert "record 6 position 5: token id 290, expected below 290" in message


@pytest.mark.parametrize("record", [64, 70])
def test_records_that_do_not_follow_each_other_are_named(dataset, record):
    records = _records(dataset)
    records[record, 0] = 1 + records[record, 0] % 200
    _rewrite(dataset, records)
    message = _refusal(dataset)
    assert "train-00001-of-" in message
    assert f"record {record - 64}: expected its first token to be the last of" in message


def test_swapped_shards_are_found(dataset):
    manifest = manifest_lib.load(dataset)
    first, second, *rest = manifest.splits["train"].shards
    split = dataclasses.replace(manifest.splits["train"], shards=(second, first, *rest))
    manifest_lib.write(
        dataclasses.replace(manifest, splits={**manifest.splits, "train": split}), dataset
    )
    assert f"{dataset / second.file} record 0, document 0: its text is not" in _refusal(dataset)


def test_another_number_or_length_of_records_is_named(dataset):
    records = _records(dataset, "validation")
    _rewrite(dataset, records[:-1], "validation")
    assert f"expected {len(records)} records, found {len(records) - 1}" in _refusal(dataset)
    _rewrite(dataset, records[:, :-1], "validation")
    assert "record 0: expected 34 bytes (16+1 ids of uint16), found 32" in _refusal(dataset)
    _rewrite(dataset, records, "validation")
    check.check(dataset, progress=_quiet)


def test_a_shard_that_is_no_array_record_is_named(dataset):
    manifest = manifest_lib.load(dataset)
    shard = manifest.splits["validation"].shards[0]
    path = dataset / shard.file
    path.write_bytes(b"x" * 100)
    changed = dataclasses.replace(shard, num_bytes=100, sha256=files.sha256(path))
    split = dataclasses.replace(manifest.splits["validation"], shards=(changed,))
    manifest_lib.write(
        dataclasses.replace(manifest, splits={**manifest.splits, "validation": split}), dataset
    )
    assert f"{path}: not a readable ArrayRecord" in _refusal(dataset)


def test_another_tokenizer_is_named(dataset):
    path = dataset / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n")
    assert f"{path}: expected sha256" in _refusal(dataset)
    with pytest.raises(errors.UsageError, match="not the tokenizer that made the dataset"):
        tokenizer_lib.of_dataset(manifest_lib.load(dataset), dataset)
    manifest = manifest_lib.load(dataset)
    record = dataclasses.replace(
        manifest.tokenizer, sha256=files.sha256(path), vocab_size=VOCABULARY + 1
    )
    manifest_lib.write(dataclasses.replace(manifest, tokenizer=record), dataset)
    assert "has 290 tokens with end-of-text 0, dataset.json says 291 with 0" in _refusal(dataset)
