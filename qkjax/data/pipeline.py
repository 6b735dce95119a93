"""From ArrayRecord shards to batches of token ids on the host: training order and validation.

The training order is a pure function of (dataset, seed, step): a global shuffle of all records,
another for every epoch, cut into batches straight across epoch borders. It does not depend on the
number of processes, on threads, on resumes, on the arm or on the place of any file. Every id is
checked against the vocabulary here, on the host: on devices a wrong one would be clamped silently.
"""

import bisect
import hashlib
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import numpy as np
from array_record.python import array_record_module

from qkjax import errors
from qkjax.data import manifest as manifest_lib
from qkjax.data import shards

PIPELINE_VERSION = 1  # raise it with any change of the order, so that old runs refuse to resume
_REBUILD = (
    "Restore the shard, or rebuild the dataset with `qkjax prepare`; "
    "`qkjax check` checks every file."
)
_READER_OPTIONS = "readahead_buffer_size:0"  # records are read one by one, anywhere
_READER_BUFFER_BYTES = 32768
# A batch takes 1-2 ms to read: two threads stay ahead of any device, few batches wait in memory.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


class Batch(NamedTuple):
    """One process's part of the batch of one training step."""

    tokens: np.ndarray  # int32 [B_local, T+1]
    record_ids: np.ndarray  # int64 [B_local], positions in the training split
    epoch: int  # passes over the split completed before the global batch's first record


class ValidationBatch(NamedTuple):
    """One process's part of a batch of the validation split, in its order."""

    tokens: np.ndarray  # int32 [B_local, T+1], zeros in padded rows
    mask: np.ndarray  # bool [B_local], False in padded rows


class TrainLoader:
    """Iterates over the training batches from a step on, for ever."""

    def __init__(
        self,
        directory: str | pathlib.Path,
        manifest: manifest_lib.Manifest,
        *,
        seed: int,
        sequences_per_step: int,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Opens the shards and goes to `start_step` by arithmetic.

        Args:
            directory: of the dataset.
            manifest: of the same dataset.
            seed: of the run; the order's own key is derived from it.
            sequences_per_step: records of the global batch.
            start_step: index of the first batch = updates done so far.
            process_index, process_count: this process takes every process_count-th record.
        Raises:
            UsageError: shards that are missing or damaged, or a batch that the processes cannot
                share equally; while iterating, also damaged records and ids outside the vocabulary.
        """
        self._local_sequences = _share("train.tokens_per_step", sequences_per_step, process_count)
        self._shards = _Shards(pathlib.Path(directory), manifest, "train")
        self._sequences_per_step = sequences_per_step
        self._step = start_step
        dataset = (
            grain.MapDataset.source(self._shards)
            .shuffle(seed=data_order_key(seed))
            .repeat()
            .slice(slice(process_index, None, process_count))
            .batch(self._local_sequences, drop_remainder=True)
        )
        self._batches = iter(dataset.to_iter_dataset(_READ_OPTIONS))
        self._batches.set_state({"next_index": start_step})

    @property
    def step(self) -> int:
        """Index of the batch that comes next."""
        return self._step

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        tokens, record_ids = next(self._batches)
        epoch = self._step * self._sequences_per_step // len(self._shards)
        self._step += 1
        return Batch(tokens, record_ids, epoch)

    def close(self) -> None:
        """Stops the reading threads and closes the shards."""
        self._batches.close()
        self._shards.close()


def data_order_key(seed: int) -> int:
    """The 32-bit key of the data order, derived from a run's seed by name.

    Initialisation derives its own key, so the two are independent. Hashing also keeps neighbouring
    seeds apart: Grain shuffles epoch e with key + e, and seed 43 must not replay seed 42's epoch 1.
    """
    digest = hashlib.sha256(f"data order/{seed}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def fingerprint(
    manifest: manifest_lib.Manifest, seed: int, sequences_per_step: int
) -> dict[str, Any]:
    """All that the content of batch k depends on, for checkpoints. JSON-able.

    Grain's own state is only an index, which would resume with other data without an error.
    """
    return {
        "pipeline_version": PIPELINE_VERSION,
        "dataset": manifest.fingerprint,
        "seed": seed,
        "sequences_per_step": sequences_per_step,
        "sequence_length": manifest.sequence_length,
    }


def check_fingerprint(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuses to resume with other batches than those the checkpoint was trained on.

    Raises:
        UsageError: lists every field that differs, with both values.
    """
    different = [
        f"{name} {saved.get(name)} (saved) against {current.get(name)}"
        for name in dict.fromkeys((*saved, *current))
        if saved.get(name) != current.get(name)
    ]
    if different:
        raise errors.UsageError(
            f"data order: differs from the checkpoint's: {', '.join(different)}. "
            "Resume with the dataset and the settings of its start, or use a new --workdir."
        )


def num_validation_sequences(manifest: manifest_lib.Manifest, num_tokens: int) -> int:
    """How many sequences `read_validation` reads: num_tokens // T, at least 1, at most all."""
    available = manifest.splits["validation"].num_sequences
    wanted = num_tokens // manifest.sequence_length if num_tokens else available
    return min(max(wanted, 1), available)


def read_validation(
    directory: str | pathlib.Path,
    manifest: manifest_lib.Manifest,
    *,
    num_tokens: int,
    sequences_per_batch: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[ValidationBatch]:
    """Yields the first sequences of the validation split, in order, in batches of one size.

    Args:
        directory, manifest: of the dataset.
        num_tokens: predicted tokens to read, see `num_validation_sequences`; 0 reads all.
        sequences_per_batch: rows of the global batch; the last one is padded to it.
        process_index, process_count: process i has the i-th block of rows of every batch.
    Raises:
        UsageError: as `TrainLoader`; and shards of other bytes than the manifest's, because their
            losses could not be compared with anything.
    """
    rows = _share("sequences_per_batch", sequences_per_batch, process_count)
    total = num_validation_sequences(manifest, num_tokens)
    shards = _Shards(pathlib.Path(directory), manifest, "validation")
    manifest_lib.verify_split(manifest, directory, "validation")
    try:
        for first in range(process_index * rows, process_index * rows + total, sequences_per_batch):
            ids = range(first, min(first + rows, total))
            tokens = np.zeros((rows, manifest.sequence_length + 1), np.int32)
            for row, record_id in enumerate(ids):
                tokens[row], _ = shards[record_id]
            yield ValidationBatch(tokens, np.arange(rows) < len(ids))
    finally:
        shards.close()


def _share(field: str, sequences: int, process_count: int) -> int:
    if sequences < 1 or sequences % process_count:
        raise errors.UsageError(
            f"{field}: {sequences} sequences a batch cannot be shared equally by "
            f"{process_count} processes. Use a multiple of {process_count} sequences."
        )
    return sequences // process_count


class _Shards:
    """The records of one split by position, decoded and checked. Reading is thread-safe."""

    def __init__(
        self, directory: pathlib.Path, manifest: manifest_lib.Manifest, split: str
    ) -> None:
        manifest_lib.verify_files(manifest, directory)
        shards = manifest.splits[split].shards
        self._manifest = manifest
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._paths = [directory / shard.file for shard in shards]
        self._ends = list(itertools.accumulate(shard.num_records for shard in shards))
        self._readers: list[array_record_module.ArrayRecordReader] = []
        for path, shard in zip(self._paths, shards, strict=True):
            self._readers.append(_open(path, shard.num_records))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, record_id: int) -> tuple[np.ndarray, np.int64]:
        """Token ids int32 [T+1] of a record, and its position in the split."""
        shard = bisect.bisect_right(self._ends, record_id)
        number = int(record_id) - (self._ends[shard - 1] if shard else 0)
        try:
            (record,) = self._readers[shard].read([number])
        except RuntimeError as error:
            raise self._error(shard, number, f"unreadable ({errors.one_line(error)})") from None
        return self._decode(record, shard, number), np.int64(record_id)

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def _decode(self, record: bytes, shard: int, number: int) -> np.ndarray:
        if len(record) != self._manifest.record_bytes:
            length, dtype = self._manifest.sequence_length, self._manifest.dtype
            raise self._error(
                shard,
                number,
                f"expected {self._manifest.record_bytes} bytes ({length}+1 ids of {dtype}), "
                f"found {len(record)}",
            )
        ids = np.frombuffer(record, self._dtype)
        vocab_size = self._manifest.tokenizer.vocab_size
        if int(ids.max()) >= vocab_size:  # unsigned: nothing is below 0
            position = int(np.argmax(ids >= vocab_size))
            raise self._error(
                shard,
                number,
                f"position {position}: expected token ids below the vocabulary's {vocab_size}, "
                f"found {ids[position]}",
            )
        return ids.astype(np.int32)

    def _error(self, shard: int, number: int, problem: str) -> errors.UsageError:
        return errors.UsageError(f"{self._paths[shard]} record {number}: {problem}. {_REBUILD}")


def _open(path: pathlib.Path, num_records: int) -> array_record_module.ArrayRecordReader:
    shards.check_threads()
    try:
        reader = array_record_module.ArrayRecordReader(
            str(path), options=_READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER_BYTES
        )
        found = reader.num_records()
        if not reader.ok():  # opened lazily: the reason comes with the first read
            reader.read([0])
    except RuntimeError as error:
        raise errors.UsageError(
            f"{path}: not a readable ArrayRecord ({errors.one_line(error)}). {_REBUILD}"
        ) from None
    if found != num_records:
        raise errors.UsageError(
            f"{path}: expected {num_records} records, found {found}. {_REBUILD}"
        )
    return reader
