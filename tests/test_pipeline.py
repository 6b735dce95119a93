"""The order of training batches, the validation reader, and what both refuse."""

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
from array_record.python import array_record_module

from qkjax import errors, files
from qkjax.data import manifest as manifest_lib
from qkjax.data import pipeline

T = 8
VOCABULARY = 500
GOLDEN_KEY = 2623883798
GOLDEN_FIRST = [167, 949, 20, 374, 564, 350, 524, 212, 152, 546, 641, 919, 236, 134, 457, 629]
GOLDEN_SECOND_EPOCH = [613, 658, 193, 272]


def _write_shard(path, records):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return manifest_lib.Shard(
        file=path.name,
        sha256=files.sha256(path),
        num_bytes=path.stat().st_size,
        num_records=len(records),
    )


def _ids(split, record_id, vocab_size=VOCABULARY):
    """Record `record_id` of a split: it can be told from every other by its content."""
    base = record_id * 7 + (3 if split == "validation" else 0)
    return (base + np.arange(T + 1) * 13) % vocab_size


def _write_dataset(directory, *, train=(10, 7, 4), validation=(3, 2), vocab_size=VOCABULARY):
    """A dataset of small shards; `train` and `validation` are their record counts."""
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    directory.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, counts in (("train", train), ("validation", validation)):
        shards, first = [], 0
        for index, count in enumerate(counts):
            records = [
                _ids(split, first + k, vocab_size).astype(dtype).tobytes() for k in range(count)
            ]
            path = directory / f"{split}-{index:05d}-of-{len(counts):05d}.array_record"
            shards.append(_write_shard(path, records))
            first += count
        splits[split] = manifest_lib.Split(first, first * T, tuple(shards))
    manifest = manifest_lib.Manifest(
        name="small",
        sequence_length=T,
        dtype="uint16" if dtype.itemsize == 2 else "uint32",
        end_of_text=True,
        tokenizer=manifest_lib.TokenizerRecord("tokenizer.json", "0" * 64, vocab_size, 0),
        sources=(),
        split={},
        dropped={},
        splits=splits,
    )
    manifest_lib.write(manifest, directory)
    return manifest_lib.load(directory)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dataset")
    return directory, _write_dataset(directory)


@pytest.fixture
def copy(dataset, tmp_path):
    """A dataset to damage."""
    directory = tmp_path / "copy"
    shutil.copytree(dataset[0], directory)
    return directory, dataset[1]


def _batches(dataset, count, **options):
    loader = pipeline.TrainLoader(*dataset, **{"seed": 1, "sequences_per_step": 4, **options})
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


def _order(dataset, count, **options):
    return [batch.record_ids.tolist() for batch in _batches(dataset, count, **options)]


def _flat_order(dataset, count, **options):
    return list(itertools.chain.from_iterable(_order(dataset, count, **options)))


def _replace_record(directory, manifest, split, shard_index, number, record):
    """Rewrites one record of a shard; the returned manifest knows the new file."""
    shards = list(manifest.splits[split].shards)
    path = directory / shards[shard_index].file
    reader = array_record_module.ArrayRecordReader(str(path))
    records = reader.read_all()
    reader.close()
    records[number] = record
    shards[shard_index] = _write_shard(path, records)
    changed = dataclasses.replace(manifest.splits[split], shards=tuple(shards))
    return dataclasses.replace(manifest, splits={**manifest.splits, split: changed})


# --- the training order ---


def test_batches_hold_the_records_they_name(dataset):
    for batch in _batches(dataset, 12):
        assert batch.tokens.dtype == np.int32 and batch.tokens.shape == (4, T + 1)
        assert batch.record_ids.dtype == np.int64
        for tokens, record_id in zip(batch.tokens, batch.record_ids, strict=True):
            np.testing.assert_array_equal(tokens, _ids("train", int(record_id)))


def test_every_epoch_has_every_record_once_in_a_fresh_order(dataset):
    ids = np.concatenate([batch.record_ids for batch in _batches(dataset, 63)])
    epochs = ids.reshape(12, 21)  # 63 batches of 4 = 12 epochs of 21 records, across their borders
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(21))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 12
    assert epochs[0].tolist() != list(range(21))


def test_the_epoch_is_that_of_the_first_record(dataset):
    epochs = [batch.epoch for batch in _batches(dataset, 12)]
    assert epochs == [first // 21 for first in range(0, 48, 4)]
    assert [batch.epoch for batch in _batches(dataset, 2, start_step=10)] == epochs[10:]
    halves = _batches(dataset, 12, process_index=1, process_count=2)
    assert [batch.epoch for batch in halves] == epochs


def test_a_resumed_loader_goes_on_with_the_same_batches(dataset):
    unbroken = _order(dataset, 24)
    for start in range(24):  # 5.25 steps an epoch: before, at and after its borders
        assert _order(dataset, 3, start_step=start)[: 24 - start] == unbroken[start : start + 3]
    loader = pipeline.TrainLoader(*dataset, seed=1, sequences_per_step=4, start_step=7)
    next(loader)
    assert loader.step == 8
    loader.close()


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_same_global_batches(dataset, process_count):
    parts = [
        _order(dataset, 12, process_index=i, process_count=process_count, start_step=3)
        for i in range(process_count)
    ]
    whole = _order(dataset, 12, start_step=3)
    for step, expected in enumerate(whole):
        shared = [part[step] for part in parts]
        assert [len(part) for part in shared] == [4 // process_count] * process_count
        assert sorted(itertools.chain.from_iterable(shared)) == sorted(expected)


def test_the_order_depends_on_the_seed_and_on_nothing_else(dataset, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(dataset[0], moved)
    assert _order((moved, dataset[1]), 6) == _order(dataset, 6)
    assert _order(dataset, 6, seed=2) != _order(dataset, 6, seed=1)
    assert _flat_order(dataset, 24, sequences_per_step=1) == _flat_order(dataset, 6)
    # Seed 2 is not seed 1 an epoch later, as bare keys would make it.
    second_epoch = _flat_order(dataset, 42, sequences_per_step=1)[21:]
    assert _flat_order(dataset, 21, sequences_per_step=1, seed=2) != second_epoch


def test_the_order_of_a_seed_is_frozen(tmp_path):
    """Golden: another Grain must not silently reorder the data of runs that are under way.

    If this fails after an upgrade, the shuffle has changed: raise PIPELINE_VERSION and freeze the
    new indices, or keep the old version.
    """
    manifest = _write_dataset(tmp_path / "d", train=(600, 400))
    assert pipeline.data_order_key(42) == GOLDEN_KEY
    assert _flat_order((tmp_path / "d", manifest), 4, seed=42) == GOLDEN_FIRST
    later = _order((tmp_path / "d", manifest), 1, seed=42, start_step=250)
    assert later == [GOLDEN_SECOND_EPOCH]


def test_a_split_smaller_than_a_batch_repeats(tmp_path):
    manifest = _write_dataset(tmp_path / "d", train=(3,))
    batches = _batches((tmp_path / "d", manifest), 3)
    ids = np.concatenate([batch.record_ids for batch in batches]).reshape(4, 3)
    assert np.array_equal(np.sort(ids), [[0, 1, 2]] * 4)
    assert [batch.epoch for batch in batches] == [0, 1, 2]


def test_uint32_ids_survive(tmp_path):
    manifest = _write_dataset(tmp_path / "d", train=(5,), vocab_size=70_000)
    path = tmp_path / "d"
    large = np.full(T + 1, 69_999, "<u4")
    manifest = _replace_record(path, manifest, "train", 0, 2, large.tobytes())
    assert manifest.dtype == "uint32"
    (batch,) = _batches((path, manifest), 1, sequences_per_step=5)
    row = batch.record_ids.tolist().index(2)
    np.testing.assert_array_equal(batch.tokens[row], large)


# --- the fingerprint ---


def test_the_fingerprint_names_all_that_a_batch_depends_on(dataset):
    assert pipeline.fingerprint(dataset[1], seed=5, sequences_per_step=4) == {
        "pipeline_version": pipeline.PIPELINE_VERSION,
        "dataset": dataset[1].fingerprint,
        "seed": 5,
        "sequences_per_step": 4,
        "sequence_length": T,
    }


def test_another_fingerprint_is_refused_with_both_values(dataset):
    saved = pipeline.fingerprint(dataset[1], 5, 4)
    pipeline.check_fingerprint(saved, pipeline.fingerprint(dataset[1], 5, 4))
    with pytest.raises(errors.UsageError, match=r"seed 5 \(saved\) against 6") as caught:
        pipeline.check_fingerprint(saved, pipeline.fingerprint(dataset[1], 6, 8))
    assert "sequences_per_step 4 (saved) against 8" in str(caught.value)
    assert "dataset" not in str(caught.value).split("Resume")[0]
    older = {name: value for name, value in saved.items() if name != "pipeline_version"}
    with pytest.raises(errors.UsageError, match=r"pipeline_version None \(saved\) against 1"):
        pipeline.check_fingerprint(older, saved)


# --- the validation reader ---


def _validation(dataset, **options):
    return list(
        pipeline.read_validation(*dataset, **{"num_tokens": 0, "sequences_per_batch": 2, **options})
    )


def test_another_validation_shard_of_the_same_size_is_refused(copy):
    directory, manifest = copy
    path = directory / manifest.splits["validation"].shards[-1].file
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    batches = pipeline.read_validation(directory, manifest, num_tokens=0, sequences_per_batch=2)
    with pytest.raises(errors.UsageError, match=rf"^{path}: expected sha256 \w+, found"):
        next(batches)


def test_validation_is_read_in_order_and_padded(dataset):
    batches = _validation(dataset)
    assert [batch.mask.tolist() for batch in batches] == [[True, True]] * 2 + [[True, False]]
    tokens = np.concatenate([batch.tokens for batch in batches])
    assert tokens.dtype == np.int32 and tokens.shape == (6, T + 1)
    for record_id in range(5):
        np.testing.assert_array_equal(tokens[record_id], _ids("validation", record_id))
    assert not tokens[5].any()
    for once, again in zip(batches, _validation(dataset), strict=True):
        np.testing.assert_array_equal(once.tokens, again.tokens)


@pytest.mark.parametrize(
    "num_tokens, sequences",
    [(0, 5), (1, 1), (T, 1), (2 * T - 1, 1), (2 * T, 2), (3 * T, 3), (10**9, 5)],
)
def test_validation_reads_the_first_sequences(dataset, num_tokens, sequences):
    assert pipeline.num_validation_sequences(dataset[1], num_tokens) == sequences
    batches = _validation(dataset, num_tokens=num_tokens)
    assert sum(batch.mask.sum() for batch in batches) == sequences
    assert len(batches) == -(-sequences // 2)
    np.testing.assert_array_equal(batches[0].tokens[0], _ids("validation", 0))


def test_processes_read_blocks_of_rows_of_the_same_validation_batches(dataset):
    whole = _validation(dataset, sequences_per_batch=4)
    parts = [
        _validation(dataset, sequences_per_batch=4, process_index=i, process_count=2)
        for i in range(2)
    ]
    for step, expected in enumerate(whole):
        np.testing.assert_array_equal(
            np.concatenate([part[step].tokens for part in parts]), expected.tokens
        )
        np.testing.assert_array_equal(
            np.concatenate([part[step].mask for part in parts]), expected.mask
        )
    assert [len(part) for part in parts] == [len(whole)] * 2


# --- faults ---


def test_an_id_outside_the_vocabulary_is_refused(copy):
    directory, manifest = copy
    ids = _ids("train", 12).astype("<u2")
    ids[3] = VOCABULARY
    manifest = _replace_record(directory, manifest, "train", 1, 2, ids.tobytes())
    with pytest.raises(errors.UsageError) as caught:
        _batches((directory, manifest), 6)
    assert str(caught.value).startswith(
        f"{directory}/train-00001-of-00003.array_record record 2: position 3: "
        "expected token ids below the vocabulary's 500, found 500. Restore the shard"
    )


def test_a_negative_id_is_refused(copy):
    directory, manifest = copy
    ids = np.full(T + 1, -100, "<i2")
    manifest = _replace_record(directory, manifest, "validation", 0, 1, ids.tobytes())
    with pytest.raises(errors.UsageError, match=r"record 1: position 0: .* found 65436"):
        _validation((directory, manifest))


def test_a_record_of_another_dtype_or_length_is_refused(copy):
    directory, manifest = copy
    wrong = dataclasses.replace(manifest, dtype="uint32")
    expected = r"expected 36 bytes \(8\+1 ids of uint32\), found 18"
    with pytest.raises(errors.UsageError, match=expected):
        _batches((directory, wrong), 1)
    wrong = dataclasses.replace(manifest, sequence_length=16)
    with pytest.raises(errors.UsageError, match=r"\.array_record record 0: expected 34 bytes"):
        _validation((directory, wrong))


def test_a_damaged_record_is_refused_with_path_and_remedy(copy):
    directory, manifest = copy
    path = directory / manifest.splits["train"].shards[1].file
    content = bytearray(path.read_bytes())
    content[content.index(_ids("train", 12).astype("<u2").tobytes()) + 4] ^= 1
    path.write_bytes(content)
    with pytest.raises(errors.UsageError, match=r"record 2: unreadable \(.+\)\. Restore") as caught:
        _batches((directory, manifest), 6)
    assert str(caught.value).startswith(str(path))
    assert "`qkjax prepare`" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_truncated_shards_are_refused_at_the_start(copy):
    directory, manifest = copy
    names = [shard.file for shard in manifest.splits["train"].shards]
    (directory / names[0]).unlink()
    (directory / names[2]).unlink()
    with pytest.raises(errors.UsageError, match=f"{names[0]}, {names[2]}"):
        pipeline.TrainLoader(directory, manifest, seed=1, sequences_per_step=4)
    with pytest.raises(errors.UsageError, match=f"{names[0]}, {names[2]}"):
        _validation((directory, manifest))


@pytest.mark.parametrize("kept", [0.5, 0.999])
def test_a_truncated_shard_is_refused_at_the_start(copy, kept):
    directory, manifest = copy
    path = directory / manifest.splits["train"].shards[1].file
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(errors.UsageError, match=f"{path.name}: truncated"):
        pipeline.TrainLoader(directory, manifest, seed=1, sequences_per_step=4)


def test_a_file_that_is_no_array_record_is_refused_at_the_start(copy):
    directory, manifest = copy
    path = directory / manifest.splits["train"].shards[1].file
    path.write_bytes(b"text\n" * (path.stat().st_size // 5) + b"." * (path.stat().st_size % 5))
    with pytest.raises(errors.UsageError, match=rf"{path.name}: not a readable ArrayRecord \(.+\)"):
        pipeline.TrainLoader(directory, manifest, seed=1, sequences_per_step=4)


def test_a_shard_with_another_number_of_records_is_refused(copy):
    directory, manifest = copy
    shards = manifest.splits["train"].shards
    swapped = (dataclasses.replace(shards[0], num_records=9), *shards[1:])
    changed = dataclasses.replace(manifest.splits["train"], shards=swapped)
    wrong = dataclasses.replace(manifest, splits={**manifest.splits, "train": changed})
    with pytest.raises(errors.UsageError, match="expected 9 records, found 10"):
        pipeline.TrainLoader(directory, wrong, seed=1, sequences_per_step=4)


def test_foreign_shards_are_not_read(copy):
    directory, manifest = copy
    order = _order(copy, 6)
    shutil.copy(directory / manifest.splits["train"].shards[0].file, directory / "x.array_record")
    assert _order(copy, 6) == order


def test_a_batch_that_processes_cannot_share_is_refused(dataset):
    with pytest.raises(errors.UsageError, match=r"train\.tokens_per_step: 4 .* by 3 processes"):
        pipeline.TrainLoader(*dataset, seed=1, sequences_per_step=4, process_count=3)
    with pytest.raises(errors.UsageError, match=r"sequences_per_batch: 5 .* by 2 processes"):
        _validation(dataset, sequences_per_batch=5, process_count=2)
