"""Token streams on disk: records of T+1 ids in ArrayRecord shards, and the table of documents.

Record i of a split is stream[i*T : i*T + T + 1], so neighbours share one token and every position
is predicted once; the tail that fills no record is dropped.
"""

import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from qkjax import errors
from qkjax.data import manifest as manifest_lib

RECORDS_PER_SHARD = 1024
# Measured: a group of one makes a record readable alone, as the global shuffle needs.
_WRITER_OPTIONS = "group_size:1"
_SHARD_NAME = "{split}-{index:05d}-of-{count:05d}.array_record"


@dataclass(frozen=True)
class WrittenSplit:
    """What SplitWriter made: the manifest's entries, and documents and tokens by source."""

    split: manifest_lib.Split
    documents: manifest_lib.DocumentsRecord
    documents_by_source: list[int]
    tokens_by_source: list[int]


class SplitWriter:
    """Writes one split into `directory`; memory holds one record and the table of documents."""

    def __init__(
        self,
        directory: Path,
        split: str,
        *,
        sequence_length: int,
        vocab_size: int,
        num_sources: int,
        max_sequences: int | None,
    ) -> None:
        """Args:
        sequence_length: T; records have T+1 ids.
        vocab_size: decides uint16 or uint32; an id outside it is refused.
        num_sources: how many sources `add` may name.
        max_sequences: stops there, in the middle of a document if need be; None: no end.
        """
        self._directory = directory
        self._split = split
        self._length = sequence_length
        self._vocab_size = vocab_size
        self._dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
        self._max_sequences = max_sequences
        self._writer: array_record_module.ArrayRecordWriter | None = None
        self._records: list[int] = []  # per shard
        self._pending: list[np.ndarray] = []
        self._num_pending = 0
        self.num_sequences = 0
        self.num_tokens = 0  # of the stream, the tail included
        self._hashes = array("Q")
        self._first_tokens = array("q")
        self._lengths = array("q")
        self._sources = array("H")
        self._ends = array("q")
        self._num_sources = num_sources

    @property
    def full(self) -> bool:
        """True when max_sequences are written."""
        return self.num_sequences == self._max_sequences

    @property
    def max_tokens(self) -> int | None:
        """Predicted tokens when full; None where there is no end."""
        return None if self._max_sequences is None else self._max_sequences * self._length

    def add(self, ids: np.ndarray, *, num_text: int, document_hash: int, source: int) -> None:
        """Appends a document.

        Args:
            ids: [length] token ids, end-of-text included where the dataset has it.
            num_text: how many of them are the document's text.
            document_hash: hash64 of its normalised text.
            source: the number of its source.
        Raises: UsageError for an id outside the vocabulary.
        """
        if ids.size and int(ids.max()) >= self._vocab_size:
            raise errors.UsageError(
                f"tokenizer: made the id {int(ids.max())}, expected below {self._vocab_size}. "
                "The tokenizer.json is damaged: bring it again."
            )
        self._hashes.append(document_hash)
        self._first_tokens.append(self.num_tokens)
        self._lengths.append(num_text)
        self._sources.append(source)
        self.num_tokens += len(ids)
        self._ends.append(self.num_tokens)
        self._pending.append(ids)
        self._num_pending += len(ids)
        if self._num_pending > self._length:
            self._write_records()

    def close(self) -> WrittenSplit:
        """Finishes the shards, checks and renames them, writes the table of documents.

        Raises: StorageError where a shard does not read back as it was written.
        """
        self._close_shard()
        count = len(self._records)
        shards = []
        for index, num_records in enumerate(self._records):
            path = self._directory / _SHARD_NAME.format(split=self._split, index=index, count=count)
            os.replace(self._staged_path(index), path)
            shards.append(
                manifest_lib.Shard(
                    file=path.name,
                    sha256=manifest_lib.file_sha256(path),
                    num_bytes=path.stat().st_size,
                    num_records=num_records,
                )
            )
        return self._describe(tuple(shards))

    def _describe(self, shards: tuple[manifest_lib.Shard, ...]) -> WrittenSplit:
        kept = self.num_sequences * self._length + 1 if self.num_sequences else 0
        first = np.array(self._first_tokens, np.int64)
        inside = first < kept  # documents of the dropped tail are not part of the dataset
        sources = np.array(self._sources, np.int64)[inside]
        tokens = np.minimum(np.array(self._ends, np.int64)[inside], kept) - first[inside]
        path = self._directory / f"documents-{self._split}.npz"
        with open(path, "wb") as file:
            np.savez(
                file,
                hash64=np.array(self._hashes, np.uint64)[inside],
                first_token=first[inside],
                length=np.array(self._lengths, np.int64)[inside],
            )
            file.flush()
            os.fsync(file.fileno())
        by_source = range(self._num_sources)
        return WrittenSplit(
            split=manifest_lib.Split(self.num_sequences, self.num_sequences * self._length, shards),
            documents=manifest_lib.DocumentsRecord(
                path.name, manifest_lib.file_sha256(path), int(inside.sum())
            ),
            documents_by_source=[int((sources == s).sum()) for s in by_source],
            tokens_by_source=[int(tokens[sources == s].sum()) for s in by_source],
        )

    def _write_records(self) -> None:
        ids = np.concatenate(self._pending)
        start = 0
        while len(ids) - start > self._length and not self.full:
            self._write_record(ids[start : start + self._length + 1])
            start += self._length
        self._pending = [ids[start:]]
        self._num_pending = len(ids) - start

    def _write_record(self, ids: np.ndarray) -> None:
        if self._records and self._records[-1] == RECORDS_PER_SHARD:
            self._close_shard()
        try:
            if self._writer is None:
                self._records.append(0)
                path = self._staged_path(len(self._records) - 1)
                self._writer = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)
            self._writer.write(ids.astype(self._dtype).tobytes())
        except RuntimeError as error:
            raise self._storage_error(error) from None
        self._records[-1] += 1
        self.num_sequences += 1

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        index = len(self._records) - 1
        path = self._staged_path(index)
        try:
            self._writer.close()
            self._writer = None
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            reader = array_record_module.ArrayRecordReader(str(path))
            found = reader.num_records()
            reader.close()
        except RuntimeError as error:
            raise self._storage_error(error) from None
        if found != self._records[index]:
            raise errors.StorageError(
                f"{path}: {self._records[index]} records were written, {found} read back. "
                "Check the disk."
            )

    def _staged_path(self, index: int) -> Path:
        return self._directory / f"{self._split}-{index:05d}.unfinished"

    def _storage_error(self, error: Exception) -> errors.StorageError:
        return errors.StorageError(
            f"{self._directory}: cannot write a shard ({' '.join(str(error).split())}). "
            "Free disk space, or name another --out."
        )


def token_dtype(vocab_size: int) -> str:
    """The smallest of uint16 and uint32 that holds every id below vocab_size."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_records(
    manifest: manifest_lib.Manifest, directory: Path, split: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (shard file, ids [n, T+1]) of every shard of a split, in order.

    Raises: UsageError that names the shard where it does not open, has another number of records
    than the manifest says, or a record of another size.
    """
    for shard in manifest.splits[split].shards:
        path = directory / shard.file
        try:
            reader = array_record_module.ArrayRecordReader(str(path))
            found = reader.num_records()
            records = reader.read_all() if found == shard.num_records else []
            reader.close()
        except RuntimeError as error:
            raise errors.UsageError(
                f"{path}: not a readable ArrayRecord ({' '.join(str(error).split()) or 'damaged'})."
                " Rebuild the dataset with tools/prepare_data.py."
            ) from None
        if found != shard.num_records:
            raise errors.UsageError(
                f"{path}: expected {shard.num_records} records, found {found}. "
                "Rebuild the dataset with tools/prepare_data.py."
            )
        for number, record in enumerate(records):
            if len(record) != manifest.record_bytes:
                raise errors.UsageError(
                    f"{path} record {number}: expected {manifest.record_bytes} bytes "
                    f"({manifest.sequence_length}+1 ids of {manifest.dtype}), found {len(record)}. "
                    "Rebuild the dataset with tools/prepare_data.py."
                )
        dtype = np.dtype(manifest.dtype).newbyteorder("<")
        ids = np.frombuffer(b"".join(records), dtype)
        yield shard.file, ids.reshape(-1, manifest.sequence_length + 1)
