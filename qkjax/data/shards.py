"""Token streams on disk: records of T+1 ids in ArrayRecord shards, and the table of documents.

Record i of a split is stream[i*T : i*T + T + 1], so neighbours share one token and every position
is predicted once; the tail that fills no record is dropped.
"""

import base64
import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_record.python import array_record_module

from qkjax import errors, files
from qkjax.data import manifest as manifest_lib

RECORDS_PER_SHARD = 1024
# ArrayRecord starts this many with its first reader. Where they do not all start, for a limit of
# memory or of processes, it waits for the missing ones for ever and cannot be interrupted.
_POOL_THREADS = 64
# Measured: a group of one makes a record readable alone, as the global shuffle needs.
_WRITER_OPTIONS = "group_size:1"
# What a dataset's files are called, dataset.json aside: as the code here and `job` names them.
FILE_NAMES = re.compile(r"tokenizer\.json|documents-\w+\.npz|\w+-\d{5,}-of-\d{5,}\.array_record")
_SHARD_NAME = "{split}-{index:05d}-of-{count:05d}.array_record"
_ROW = np.dtype(
    [("hash64", "<u8"), ("first", "<i8"), ("length", "<i8"), ("end", "<i8"), ("source", "<u2")]
)


@dataclass(frozen=True)
class WrittenSplit:
    """What SplitWriter made: the manifest's entries, and documents and tokens by source."""

    split: manifest_lib.Split
    documents: manifest_lib.DocumentsRecord
    documents_by_source: list[int]
    tokens_by_source: list[int]

    @classmethod
    def from_plain(cls, content: dict[str, Any]) -> "WrittenSplit":
        """What `dataclasses.asdict` made of one, perhaps by way of JSON."""
        split = content["split"]
        written = tuple(manifest_lib.Shard(**shard) for shard in split["shards"])
        return cls(
            manifest_lib.Split(split["num_sequences"], split["num_tokens"], written),
            manifest_lib.DocumentsRecord(**content["documents"]),
            content["documents_by_source"],
            content["tokens_by_source"],
        )


class SplitWriter:
    """Writes one split into `directory`; memory holds one document and the rows of one shard."""

    def __init__(
        self,
        directory: pathlib.Path,
        split: str,
        *,
        sequence_length: int,
        vocab_size: int,
        num_sources: int,
        max_sequences: int | None,
        on_shard: Callable[[], None] = lambda: None,
    ) -> None:
        """Args:
        sequence_length: T; records have T+1 ids.
        vocab_size: decides uint16 or uint32; an id outside it is refused.
        num_sources: how many sources `add` may name.
        max_sequences: stops there, in the middle of a document if need be; None: no end.
        on_shard: is called whenever a shard is finished; `state` is whole then.
        """
        self._directory = directory
        self._split = split
        self._length = sequence_length
        self._vocab_size = vocab_size
        self._dtype = np.dtype(token_dtype(vocab_size)).newbyteorder("<")
        self._max_sequences = max_sequences
        self._writer: array_record_module.ArrayRecordWriter | None = None
        self._open_records = 0  # of the shard that is being written
        self._finished: list[manifest_lib.Shard] = []
        self._pending: list[np.ndarray] = []
        self._num_pending = 0
        self.num_sequences = 0
        self.num_tokens = 0  # of the stream, the tail included
        self._rows: list[tuple[int, int, int, int, int]] = []  # not yet in the file of rows
        self._num_rows = 0
        self._rows_digest = hashlib.sha256()  # of the file of rows
        self._rows_path = directory / f"{split}-documents.unfinished"
        self._num_sources = num_sources
        self._on_shard = on_shard

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
        Raises:
            UsageError: an id outside the vocabulary.
        """
        if ids.size and int(ids.max()) >= self._vocab_size:
            raise errors.UsageError(
                f"tokenizer: made the id {int(ids.max())}, expected below {self._vocab_size}. "
                "Its tokenizer.json contradicts itself: use another one."
            )
        first = self.num_tokens
        self.num_tokens += len(ids)
        self._rows.append((document_hash, first, num_text, self.num_tokens, source))
        self._pending.append(ids)
        self._num_pending += len(ids)
        if self._num_pending > self._length:
            self._write_records()

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to resume after the finished shards, JSON-able."""
        self._flush_rows()
        carry = np.concatenate([*self._pending, np.zeros(0, np.uint32)]).astype("<u4")
        return {
            "shards": [dataclasses.asdict(shard) for shard in self._finished],
            "num_tokens": self.num_tokens,
            "num_rows": self._num_rows,
            "rows_sha256": self._rows_digest.hexdigest(),
            "carry": base64.b64encode(carry.tobytes()).decode(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Resumes from `state`, right after construction in the same directory.

        Raises:
            StorageError: a finished shard is not the one that was written.
        """
        for number, shard in enumerate(state["shards"]):
            self._finished.append(manifest_lib.Shard(**shard))
            path = self._staged_path(number)
            if not path.exists():  # it had its final name already
                for named in self._directory.glob(f"{self._split}-{number:05d}-of-*"):
                    files.move(named, path)
            check_finished(path, shard["sha256"])
        self.num_sequences = sum(shard.num_records for shard in self._finished)
        self.num_tokens = state["num_tokens"]
        self._num_rows = state["num_rows"]
        num_bytes = self._num_rows * _ROW.itemsize
        if self._rows_path.exists():
            with open(self._rows_path, "rb") as file:
                self._rows_digest.update(file.read(num_bytes))
        if self._rows_digest.hexdigest() != state["rows_sha256"]:
            raise _not_as_finished(self._rows_path, state["rows_sha256"])
        os.truncate(self._rows_path, num_bytes)
        self._pending = [np.frombuffer(base64.b64decode(state["carry"]), "<u4").astype(np.uint32)]
        self._num_pending = len(self._pending[0])
        if self._num_pending > self._length:
            self._write_records()

    def close(self) -> WrittenSplit:
        """Finishes the shards, checks and renames them, writes the table of documents.

        Raises:
            StorageError: a shard does not read back as it was written.
        """
        if self._writer is not None:
            self._close_shard()
        count = len(self._finished)
        renamed = []
        for index, shard in enumerate(self._finished):
            name = _SHARD_NAME.format(split=self._split, index=index, count=count)
            files.move(self._staged_path(index), self._directory / name)
            renamed.append(dataclasses.replace(shard, file=name))
        return self._describe(tuple(renamed))

    def _describe(self, shards: tuple[manifest_lib.Shard, ...]) -> WrittenSplit:
        self._flush_rows()
        kept = self.num_sequences * self._length + 1 if self.num_sequences else 0
        rows = np.fromfile(self._rows_path, _ROW)
        rows = rows[rows["first"] < kept]  # the dropped tail is not part of the dataset
        tokens = np.minimum(rows["end"], kept) - rows["first"]
        path = self._directory / f"documents-{self._split}.npz"
        table = {
            "hash64": rows["hash64"].astype(np.uint64),
            "first_token": rows["first"].astype(np.int64),
            "length": rows["length"].astype(np.int64),
        }
        files.write_arrays(path, table)
        by_source = range(self._num_sources)
        return WrittenSplit(
            split=manifest_lib.Split(self.num_sequences, self.num_sequences * self._length, shards),
            documents=manifest_lib.DocumentsRecord(path.name, files.sha256(path), len(rows)),
            documents_by_source=[int((rows["source"] == s).sum()) for s in by_source],
            tokens_by_source=[int(tokens[rows["source"] == s].sum()) for s in by_source],
        )

    def _flush_rows(self) -> None:
        with open(self._rows_path, "ab" if self._num_rows else "wb") as file:
            rows = np.array(self._rows, _ROW).tobytes()
            file.write(rows)
            files.sync(file)
        self._rows_digest.update(rows)
        self._num_rows += len(self._rows)
        self._rows = []

    def _write_records(self) -> None:
        ids = np.concatenate(self._pending)
        start = 0
        while len(ids) - start > self._length and not self.full:
            self._write_record(ids[start : start + self._length + 1])
            start += self._length
            if self._open_records == RECORDS_PER_SHARD:
                self._pending = [ids[start:]]  # the state describes what follows this shard
                self._close_shard()
                self._on_shard()
        self._pending = [ids[start:]]
        self._num_pending = len(ids) - start

    def _write_record(self, ids: np.ndarray) -> None:
        try:
            if self._writer is None:
                path = self._staged_path(len(self._finished))
                self._writer = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)
            self._writer.write(ids.astype(self._dtype).tobytes())
        except RuntimeError as error:
            raise self._storage_error(error) from None
        self._open_records += 1
        self.num_sequences += 1

    def _close_shard(self) -> None:
        assert self._writer is not None
        path = self._staged_path(len(self._finished))
        try:
            self._writer.close()
            self._writer = None
            files.sync_path(path)
            check_threads()
            reader = array_record_module.ArrayRecordReader(str(path))
            found = reader.num_records()
            reader.close()
        except RuntimeError as error:
            raise self._storage_error(error) from None
        if found != self._open_records:
            raise errors.StorageError(
                f"{path}: {self._open_records} records were written, {found} read back. "
                "Check the disk."
            )
        self._finished.append(
            manifest_lib.Shard(path.name, files.sha256(path), path.stat().st_size, found)
        )
        self._open_records = 0

    def _staged_path(self, index: int) -> pathlib.Path:
        return self._directory / f"{self._split}-{index:05d}.unfinished"

    def _storage_error(self, error: Exception) -> errors.StorageError:
        reason = errors.one_line(error)
        is_full = any(os.strerror(code) in str(error) for code in files.NO_SPACE)
        fix = "Make room on the disk" if is_full else "Check the path and its file system"
        return errors.StorageError(
            f"{self._directory}: cannot write a shard ({reason}). {fix}, or name another --out."
        )


def token_dtype(vocab_size: int) -> str:
    """The smallest of uint16 and uint32 that holds every id below vocab_size."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@functools.cache
def check_threads() -> None:
    """Call before the first reader of shards: starts as many threads as it will, for a moment.

    Raises:
        OutOfMemoryError: they do not all start.
    """
    end = threading.Event()
    threads = [threading.Thread(target=end.wait, daemon=True) for _ in range(_POOL_THREADS)]
    started: list[threading.Thread] = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
    except (RuntimeError, MemoryError) as error:
        raise errors.OutOfMemoryError(
            f"ulimit: {len(started)} of the {_POOL_THREADS} threads that read shards could be "
            f"started ({errors.one_line(error)}). Raise the limit of memory (ulimit -v) or of "
            "processes (ulimit -u)."
        ) from None
    finally:
        end.set()
        for thread in started:
            thread.join()


def check_finished(path: pathlib.Path, sha256: str) -> None:
    """Refuses to resume after a file that is not the one that was finished.

    Raises:
        StorageError: names the file, or its absence.
    """
    if not path.exists() or files.sha256(path) != sha256:
        raise _not_as_finished(path, sha256)


def _not_as_finished(path: pathlib.Path, sha256: str) -> errors.StorageError:
    return errors.StorageError(
        f"{path}: expected the file with sha256 {sha256}, which an interrupted command finished. "
        f"Remove {path.parent} and run the command again."
    )


def read_records(
    manifest: manifest_lib.Manifest, directory: pathlib.Path, split: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (shard file, ids [n, T+1]) of every shard of a split, in order.

    Raises:
        UsageError: names the shard where it does not open, has another number of records than the
            manifest says, or a record of another size.
    """
    for shard in manifest.splits[split].shards:
        path = directory / shard.file
        check_threads()
        try:
            reader = array_record_module.ArrayRecordReader(str(path))
            found = reader.num_records()
            records = reader.read_all() if found == shard.num_records else []
            reader.close()
        except RuntimeError as error:
            raise errors.UsageError(
                f"{path}: not a readable ArrayRecord ({errors.one_line(error)})."
                " Rebuild the dataset with `qkjax prepare`."
            ) from None
        if found != shard.num_records:
            raise errors.UsageError(
                f"{path}: expected {shard.num_records} records, found {found}. "
                "Rebuild the dataset with `qkjax prepare`."
            )
        for number, record in enumerate(records):
            if len(record) != manifest.record_bytes:
                raise errors.UsageError(
                    f"{path} record {number}: expected {manifest.record_bytes} bytes "
                    f"({manifest.sequence_length}+1 ids of {manifest.dtype}), found {len(record)}. "
                    "Rebuild the dataset with `qkjax prepare`."
                )
        dtype = np.dtype(manifest.dtype).newbyteorder("<")
        ids = np.frombuffer(b"".join(records), dtype)
        yield shard.file, ids.reshape(-1, manifest.sequence_length + 1)
