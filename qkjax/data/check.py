"""Proves that a dataset is what its manifest says, and that nothing held out is trained on."""

import pathlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qkjax import errors, files
from qkjax.data import holdout, origins, overlap, shards, sources
from qkjax.data import manifest as manifest_lib
from qkjax.data import tokenizer as tokenizer_lib

_REBUILD = "Rebuild the dataset with `qkjax prepare`."


@dataclass(frozen=True)
class Documents:
    """The table of a split's documents: uint64 and int64 [documents]."""

    hash64: np.ndarray
    first_token: np.ndarray
    length: np.ndarray


@dataclass(frozen=True)
class Report:
    """What was found sound: the manifest, how many documents were decoded, what is not listed."""

    manifest: manifest_lib.Manifest
    decoded: dict[str, int]
    extra_files: list[str]


def check(directory: str | pathlib.Path, *, progress: Callable[[str], None] = print) -> Report:
    """Checks every promise of a dataset directory, reading all of it.

    Sizes and digests; record counts and lengths; ids below the vocabulary; neighbouring records
    sharing one token; the tokenizer; and the hold-out: every document is decoded from the shards,
    its hash compared with its table, and no validation document may occur in training. Only the
    last document of a split, cut where the stream ends, cannot be decoded.

    Raises:
        UsageError: names the file, record or document.
    """
    folder = pathlib.Path(directory)
    manifest = manifest_lib.load(folder)
    progress(f"{folder}: digests")
    extra = manifest_lib.verify_digests(manifest, folder)
    tokenizer = tokenizer_lib.of_dataset(manifest, folder)
    tables = {name: _load_documents(manifest, folder, name) for name in manifest.splits}
    _check_tables(manifest, folder, tables)
    held_out = {int(h): k for k, h in enumerate(tables["validation"].hash64)}
    decoded = {}
    for name in manifest.splits:
        progress(f"{folder}: {name}, {manifest.splits[name].num_tokens:,} tokens")
        checker = _SplitChecker(manifest, folder, name, tokenizer, tables[name], held_out)
        decoded[name] = checker.run()
    return Report(manifest, decoded, extra)


def check_text(
    manifest: manifest_lib.Manifest,
    folder: pathlib.Path,
    opened: Sequence[sources.Source],
    *,
    rehash: bool = False,
) -> list[str]:
    """Compares the sources as they are now with the text that a dataset was made from.

    Args:
        opened: the sources of the manifest, in its order; they use the ledger of `folder` then.
        rehash: read every file again, also those that look as they did.
    Returns: a line for everything that cannot be proven.
    Raises:
        UsageError: names the first file whose content has changed.
    """
    ledger = origins.Ledger(folder / origins.FILE_NAME)
    unproven, changed = [], []
    for source, record in zip(opened, manifest.sources, strict=True):
        source.ledger = ledger
        if source.files and not record["read_from"].keys() >= {"files_read", "sha256"}:
            unproven.append(f"{source.name}: recorded without digests, compared by size only")
        elif not source.files and "revision" in record["read_from"]:
            unproven.append(f"{source.name}: on the hub, identified only by its commit")
        changed += source.changed(record["read_from"], rehash=rehash)
    folder_of_benchmarks = manifest.request.get("benchmark_dir")
    if folder_of_benchmarks:
        changed += map(str, overlap.changed_files(folder_of_benchmarks, manifest.overlap))
    if changed:
        raise errors.UsageError(
            f"{changed[0]}: is not what {folder} was made from any more. Restore it, or make the "
            "dataset again with another --out."
        )
    return unproven


def check_sources(directory: str | pathlib.Path) -> list[str]:
    """Hashes all that a dataset was read from; a line for everything that cannot be proven.

    Raises:
        UsageError: a source cannot be opened, or is not what the dataset was made from.
    """
    folder = pathlib.Path(directory)
    manifest = manifest_lib.load(folder)
    opened = [sources.open_source(str(record["name"])) for record in manifest.sources]
    return check_text(manifest, folder, opened, rehash=True)


def summary(report: Report) -> str:
    """The report as lines for a terminal."""
    manifest = report.manifest
    lines = [
        f"{manifest.name}: sound, fingerprint {manifest.fingerprint}",
        f"  {manifest.tokenizer.vocab_size} tokens in the vocabulary, records of "
        f"{manifest.sequence_length}+1 ids, {manifest.dtype}, end-of-text "
        f"{'after every document' if manifest.end_of_text else 'nowhere'}",
    ]
    for name, split in manifest.splits.items():
        lines.append(
            f"  {name}: {split.num_sequences:,} records, {split.num_tokens:,} tokens, "
            f"{manifest.documents[name].num_documents:,} documents "
            f"({report.decoded[name]:,} decoded), {len(split.shards)} shards"
        )
    lines.append(
        f"  0 of {manifest.documents['validation'].num_documents:,} validation documents occur "
        "in training"
    )
    for name, counts in manifest.overlap.items():
        if isinstance(counts, dict):
            dropped = ", dropped" if manifest.overlap["documents_dropped"] else ""
            lines.append(
                f"  {counts['training_documents']:,} training documents share a 13-gram with "
                f"{name}{dropped} (as counted when the dataset was made)"
            )
    if report.extra_files:
        lines.append(f"  not listed, so nothing reads them: {', '.join(report.extra_files)}")
    return "\n".join(lines)


def _load_documents(manifest: manifest_lib.Manifest, folder: pathlib.Path, split: str) -> Documents:
    record = manifest.documents.get(split)
    if record is None:
        raise errors.UsageError(
            f"{folder / manifest_lib.FILE_NAME}: the field documents.{split} is missing. {_REBUILD}"
        )
    path = folder / record.file
    arrays = files.read_arrays(path, _REBUILD, names=("hash64", "first_token", "length"))
    table = Documents(arrays["hash64"], arrays["first_token"], arrays["length"])
    for name, dtype in (("hash64", np.uint64), ("first_token", np.int64), ("length", np.int64)):
        array = getattr(table, name)
        if array.dtype != dtype or array.shape != (record.num_documents,):
            raise errors.UsageError(
                f"{path}: {name}: expected {record.num_documents} of {np.dtype(dtype)}, found "
                f"{array.shape} of {array.dtype}. {_REBUILD}"
            )
    return table


def _check_tables(
    manifest: manifest_lib.Manifest, folder: pathlib.Path, tables: dict[str, Documents]
) -> None:
    """The documents of a split fill its stream without gaps, on the right side of the rule."""
    for name, table in tables.items():
        path = folder / manifest.documents[name].file
        ends = table.first_token + table.length + int(manifest.end_of_text)
        starts = np.concatenate([[0], ends[:-1]])
        wrong = np.flatnonzero((table.first_token != starts) | (table.length < 0))
        if wrong.size:
            k = int(wrong[0])
            raise errors.UsageError(
                f"{path} document {k}: expected to start at token {starts[k]}, found "
                f"{table.first_token[k]}. {_REBUILD}"
            )
        stream = manifest.splits[name].num_tokens + 1
        if not ends.size or ends[-1] < stream or starts[-1] >= stream:
            raise errors.UsageError(
                f"{path}: its documents end at token {ends[-1] if ends.size else 0}, expected only "
                f"the last to reach the end of the stream, {stream}. {_REBUILD}"
            )
        for k, document_hash in enumerate(table.hash64):
            if holdout.in_pool(int(document_hash)) != (name == "validation"):
                raise errors.UsageError(
                    f"{path} document {k}: its hash {int(document_hash):016x} does not belong to "
                    f"the {name} split. {_REBUILD}"
                )


class _SplitChecker:
    """Reads the shards of one split once; memory holds a shard and the document it ends in."""

    def __init__(
        self,
        manifest: manifest_lib.Manifest,
        folder: pathlib.Path,
        split: str,
        tokenizer: tokenizer_lib.Tokenizer,
        table: Documents,
        held_out: dict[int, int],
    ) -> None:
        self._manifest = manifest
        self._folder = folder
        self._split = split
        self._tokenizer = tokenizer
        self._table = table
        self._held_out = held_out  # hash64 -> number of the validation document

    def run(self) -> int:
        """Returns how many documents were decoded and found as their table says."""
        document = first = 0
        pending = np.zeros(0, np.uint32)  # the stream from token `first` on
        num_documents = len(self._table.length)
        for tokens in self._stream():
            pending = np.concatenate([pending, tokens])
            stop = document
            while stop < num_documents and self._end(stop) <= first + len(pending):
                stop += 1
            spans = [
                pending[self._table.first_token[k] - first : self._end(k) - first]
                for k in range(document, stop)
            ]
            self._check_documents(document, spans)
            if stop > document:
                pending = pending[self._end(stop - 1) - first :]
                first = self._end(stop - 1)
            document = stop
        if document < num_documents:
            self._check_cut(document, pending)
        return document

    def _end(self, k: int) -> int:
        text_end = int(self._table.first_token[k] + self._table.length[k])
        return text_end + int(self._manifest.end_of_text)

    def _stream(self) -> Iterator[np.ndarray]:
        """The tokens of the split, shard by shard, every one once."""
        last: int | None = None
        for file, ids in shards.read_records(self._manifest, self._folder, self._split):
            self._check_ids(file, ids)
            before = np.concatenate([[ids[0, 0] if last is None else last], ids[:-1, -1]])
            torn = np.flatnonzero(ids[:, 0] != before)
            if torn.size:
                i = int(torn[0])
                raise errors.UsageError(
                    f"{self._folder / file} record {i}: expected its first token to be the last of "
                    f"the record before, {before[i]}, found {ids[i, 0]}. {_REBUILD}"
                )
            last = int(ids[-1, -1])
            yield ids[:, :-1].reshape(-1).astype(np.uint32)
        yield np.array([last], np.uint32)

    def _check_ids(self, file: str, ids: np.ndarray) -> None:
        vocab_size = self._manifest.tokenizer.vocab_size
        if int(ids.max()) >= vocab_size:
            i, position = np.argwhere(ids >= vocab_size)[0]
            raise errors.UsageError(
                f"{self._folder / file} record {i} position {position}: token id "
                f"{ids[i, position]}, expected below {vocab_size}. {_REBUILD}"
            )

    def _check_documents(self, number: int, spans: list[np.ndarray]) -> None:
        """Compares documents `number`, number + 1, ... with their table."""
        eos_id = self._tokenizer.eos_id
        cut = len(spans) and int(self._manifest.end_of_text)
        texts = self._tokenizer.decode_batch([span[: len(span) - cut] for span in spans])
        for k, (span, text) in enumerate(zip(spans, texts, strict=True), start=number):
            ended = not cut or span[-1] == eos_id
            if not ended or holdout.hash64(holdout.normalise(text)) != self._table.hash64[k]:
                raise self._changed(k, span)

    def _check_cut(self, k: int, span: np.ndarray) -> None:
        """The last document: its end is missing, so no other document may end in it either."""
        if self._manifest.end_of_text and np.any(span == self._tokenizer.eos_id):
            raise self._changed(k, span)

    def _changed(self, k: int, span: np.ndarray) -> errors.UsageError:
        """What to say of a document that is not the recorded one, or of those in its place."""
        eos_id = self._tokenizer.eos_id
        pieces = np.split(span, np.flatnonzero(span == eos_id) + 1)
        self._refuse_held_out(
            k, self._tokenizer.decode_batch([piece[piece != eos_id] for piece in pieces])
        )
        return errors.UsageError(
            f"{self._where(k)}: its text is not the one that its table was made from. {_REBUILD}"
        )

    def _refuse_held_out(self, k: int, texts: list[str]) -> None:
        if self._split == "validation":
            return
        for text in texts:
            held_out = self._held_out.get(holdout.hash64(holdout.normalise(text)))
            if held_out is not None:
                raise errors.UsageError(
                    f"{self._where(k)}: is validation document {held_out}, expected no validation "
                    f"document in {self._split}: {' '.join(text.split())[:60]!r}. {_REBUILD}"
                )

    def _where(self, k: int) -> str:
        """The shard, record and number of document k."""
        record = int(self._table.first_token[k]) // self._manifest.sequence_length
        for shard in self._manifest.splits[self._split].shards:
            if record < shard.num_records:
                return f"{self._folder / shard.file} record {record}, document {k}"
            record -= shard.num_records
        return f"{self._folder}: {self._split} document {k}"
