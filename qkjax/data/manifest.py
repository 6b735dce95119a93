"""dataset.json: what the shards of a dataset are, and the proof that they are still the same.

A dataset directory holds tokenizer.json, the shards of its splits, one table of documents per
split, and dataset.json, which is written last: a directory without it is not a dataset.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from qkjax import errors, files

FILE_NAME = "dataset.json"
FORMAT_VERSION = 1
SPLITS = ("train", "validation")
ITEM_BYTES = {"uint16": 2, "uint32": 4}
REBUILD = "Rebuild it with `qkjax prepare` into a new directory."


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file: its name in the dataset directory, digest, size and record count."""

    file: str
    sha256: str
    num_bytes: int
    num_records: int


@dataclasses.dataclass(frozen=True)
class Split:
    """One token stream: num_sequences records of T+1 ids, num_tokens = num_sequences * T."""

    num_sequences: int
    num_tokens: int
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that made the ids: all of them are below vocab_size."""

    file: str
    sha256: str
    vocab_size: int
    eos_id: int


@dataclasses.dataclass(frozen=True)
class DocumentsRecord:
    """The table of a split's documents (npz: hash64, first_token, length), for `qkjax check`."""

    file: str
    sha256: str
    num_documents: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of dataset.json.

    `sources`: per source its name, weight, training documents and tokens, and what it was read
    from. `split`: the rule that chose the validation documents. `dropped`: how many documents
    were left out, by reason. `overlap`: 13-grams that training documents share with validation
    and benchmarks ({} where they were not counted). `request`: the options of the command.
    """

    name: str
    sequence_length: int
    dtype: str
    end_of_text: bool
    tokenizer: TokenizerRecord
    sources: tuple[dict[str, Any], ...]
    split: dict[str, Any]
    dropped: dict[str, int]
    splits: dict[str, Split]
    documents: dict[str, DocumentsRecord] = dataclasses.field(default_factory=dict)
    overlap: dict[str, Any] = dataclasses.field(default_factory=dict)
    request: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """sha256 hex of what training reads: the name, the sources and the paths stay out of it."""
        content = _as_json(self)
        keys = ("splits", "tokenizer", "dtype", "sequence_length", "end_of_text")
        canonical = json.dumps(
            {key: content[key] for key in keys}, sort_keys=True, separators=(",", ":")
        )
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def digests(self) -> dict[str, str]:
        """sha256 hex of every file but dataset.json, by name."""
        found = {self.tokenizer.file: self.tokenizer.sha256}
        found |= {record.file: record.sha256 for record in self.documents.values()}
        shards = [shard for split in self.splits.values() for shard in split.shards]
        return found | {shard.file: shard.sha256 for shard in shards}

    @property
    def record_bytes(self) -> int:
        """Bytes of one record: T+1 ids."""
        return (self.sequence_length + 1) * ITEM_BYTES[self.dtype]


def load(directory: str | pathlib.Path) -> Manifest:
    """Reads and checks dataset.json of `directory`; the shards themselves are not opened.

    Raises:
        UsageError: it is missing, not JSON, of another format_version, lacks a field or contradicts
            itself; the message names the file and how to rebuild it.
    """
    path = pathlib.Path(directory) / FILE_NAME
    content = files.read_object(path, REBUILD)
    if content is None:
        raise errors.UsageError(
            f"{path}: missing, so {path.parent} is not a finished dataset. {REBUILD}"
        )
    return _checked(content, str(path))


def parse(data: bytes, where: str) -> Manifest:
    """As `load`, of the bytes of a dataset.json that lies elsewhere.

    Args:
        where: its address, for messages.
    Raises:
        UsageError: as `load`.
    """
    content = files.parse_json(data, where, REBUILD)
    if not isinstance(content, dict):
        raise files.damaged(where, "it is not a JSON object", REBUILD)
    return _checked(content, where)


def _checked(content: dict[str, Any], where: str) -> Manifest:
    reader = _Reader(where)
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise reader.error(f"format_version: expected {FORMAT_VERSION}, found {version}")
    result = reader.manifest(content)
    reader.check(result)
    return result


def write(manifest: Manifest, directory: str | pathlib.Path) -> None:
    """Writes dataset.json atomically: it is either absent or whole.

    Raises:
        StorageError: the disk failed.
    """
    text = json.dumps(_as_json(manifest), indent=1, ensure_ascii=False)
    files.replace(pathlib.Path(directory, FILE_NAME), f"{text}\n".encode())


def verify_files(manifest: Manifest, directory: str | pathlib.Path) -> list[str]:
    """Checks that every listed shard exists with its recorded size, without reading it.

    Returns the names of *.array_record files that the manifest does not list: nothing reads them.
    Raises:
        UsageError: lists all missing shards, or names the first of another size, or the first that
            is a link to a place outside the directory.
    """
    folder = pathlib.Path(directory)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    missing = [shard.file for shard in shards if not (folder / shard.file).is_file()]
    if missing:
        raise errors.UsageError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing)}. "
            f"Restore them, or rebuild the dataset with `qkjax prepare`."
        )
    inside = folder.resolve()
    for shard in shards:
        target = (folder / shard.file).resolve()
        if target.parent != inside:
            raise errors.UsageError(
                f"{folder / shard.file}: is a link to {target}, expected a file of the dataset's "
                "own directory. Copy the shard in its place."
            )
        size = (folder / shard.file).stat().st_size
        if size != shard.num_bytes:
            problem = "truncated" if size < shard.num_bytes else "too long"
            raise errors.UsageError(
                f"{folder / shard.file}: {problem}, expected {shard.num_bytes} bytes, "
                f"found {size}. {REBUILD}"
            )
    listed = {shard.file for shard in shards}
    return sorted(p.name for p in folder.glob("*.array_record") if p.name not in listed)


def verify_digests(
    manifest: Manifest, directory: str | pathlib.Path, *, tables: bool = True
) -> list[str]:
    """Checks the sha256 of every shard, of the tokenizer and of the document tables.

    Args:
        tables: also the document tables, which training does not read.
    Returns: as `verify_files`, which it calls first.
    Raises:
        UsageError: names the first file that is missing or differs.
    """
    foreign = verify_files(manifest, directory)
    expected = {manifest.tokenizer.file: manifest.tokenizer.sha256}
    if tables:
        expected |= {record.file: record.sha256 for record in manifest.documents.values()}
    for split in manifest.splits:
        verify_split(manifest, directory, split)
    _compare(pathlib.Path(directory), expected)
    return foreign


def verify_split(manifest: Manifest, directory: str | pathlib.Path, split: str) -> None:
    """Checks the sha256 of every shard of one split.

    Raises:
        UsageError: names the first shard that differs.
    """
    shards = manifest.splits[split].shards
    _compare(pathlib.Path(directory), {shard.file: shard.sha256 for shard in shards})


def _compare(folder: pathlib.Path, expected: dict[str, str]) -> None:
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file():
            raise errors.UsageError(f"{path}: missing. {REBUILD}")
        found = files.sha256(path)
        if found != digest:
            raise errors.UsageError(f"{path}: expected sha256 {digest}, found {found}. {REBUILD}")


def _as_json(manifest: Manifest) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(manifest)}


class _Reader:
    """Turns the parsed JSON into a Manifest; every complaint names the file and the field."""

    def __init__(self, where: str) -> None:
        self._where = where

    def error(self, problem: str) -> errors.UsageError:
        return errors.UsageError(f"{self._where}: {problem}. {REBUILD}")

    def manifest(self, content: dict[str, Any]) -> Manifest:
        splits = self._get(content, "splits", dict)
        documents = self._get(content, "documents", dict)
        return Manifest(
            name=self._get(content, "name", str),
            sequence_length=self._get(content, "sequence_length", int),
            dtype=self._get(content, "dtype", str),
            end_of_text=self._get(content, "end_of_text", bool),
            tokenizer=self._record(
                TokenizerRecord, self._get(content, "tokenizer", dict), "tokenizer"
            ),
            sources=tuple(
                self._source(source, f"sources[{i}]")
                for i, source in enumerate(self._get(content, "sources", list))
            ),
            split=self._get(content, "split", dict),
            dropped=self._get(content, "dropped", dict),
            splits={
                name: self._split(self._get(splits, name, dict, "splits"), f"splits.{name}")
                for name in (*SPLITS, *(name for name in splits if name not in SPLITS))
            },
            documents={
                name: self._record(
                    DocumentsRecord,
                    self._get(documents, name, dict, "documents"),
                    f"documents.{name}",
                )
                for name in documents
            },
            overlap=self._overlap(self._get({"overlap": {}, **content}, "overlap", dict)),
            request=self._request(self._get(content, "request", dict)),
        )

    def check(self, manifest: Manifest) -> None:
        if manifest.dtype not in ITEM_BYTES:
            raise self.error(f"dtype: expected uint16 or uint32, found {manifest.dtype}")
        if manifest.sequence_length < 1:
            raise self.error(
                f"sequence_length: expected at least 1, found {manifest.sequence_length}"
            )
        tokenizer = manifest.tokenizer
        if not 0 < tokenizer.vocab_size <= 1 << 8 * ITEM_BYTES[manifest.dtype]:
            raise self.error(
                f"tokenizer.vocab_size: {tokenizer.vocab_size} ids do not fit {manifest.dtype}"
            )
        if not 0 <= tokenizer.eos_id < tokenizer.vocab_size:
            raise self.error(
                f"tokenizer.eos_id: expected below {tokenizer.vocab_size}, found {tokenizer.eos_id}"
            )
        names = [tokenizer.file, *(record.file for record in manifest.documents.values())]
        for name, split in manifest.splits.items():
            names += [shard.file for shard in split.shards]
            records = sum(shard.num_records for shard in split.shards)
            if split.num_sequences != records or split.num_sequences < 1:
                raise self.error(
                    f"splits.{name}.num_sequences: expected the {records} records of its shards "
                    f"(at least one), found {split.num_sequences}"
                )
            if split.num_tokens != records * manifest.sequence_length:
                raise self.error(
                    f"splits.{name}.num_tokens: expected {records} * {manifest.sequence_length}, "
                    f"found {split.num_tokens}"
                )
        self._check_names(names)
        self._check_splits(manifest)
        read = [source["name"] for source in manifest.sources]
        if "sources" in manifest.request and manifest.request["sources"] != read:
            raise self.error(
                f"sources: expected those of request, {manifest.request['sources']!r:.80}, "
                f"found {read!r:.80}"
            )

    def _check_splits(self, manifest: Manifest) -> None:
        """No content belongs to two splits: its validation would have been trained on."""
        places: dict[str, str] = {}
        for name, split in manifest.splits.items():
            for shard in split.shards:
                place = places.setdefault(shard.sha256, name)
                if place != name:
                    raise self.error(f"{shard.file}: the same shard is in {place} and in {name}")

    def _check_names(self, names: list[str]) -> None:
        for file in names:
            # A dataset reads nothing outside its own directory, even if its manifest says so.
            if file in ("", ".", "..") or "/" in file or not file.isprintable():
                raise self.error(f"file: expected a plain name, found {file!r}")
            if names.count(file) > 1:
                raise self.error(f"file: {file} is listed twice")

    def _source(self, content: Any, where: str) -> dict[str, Any]:
        if not isinstance(content, dict):
            raise self.error(f"{where}: expected an object, found {type(content).__name__}")
        self._get(content, "name", str, where)
        for field, kind in {"weight": float, "documents": int, "tokens": int}.items():
            if self._get(content, field, kind, where) < 0:
                raise self.error(f"{where}.{field}: expected 0 or more, found {content[field]}")
        read_from = self._get(content, "read_from", dict, where)
        for field, kind in {"files_read": int, "sha256": str}.items():
            if field in read_from:  # older datasets lack them
                self._get(read_from, field, kind, f"{where}.read_from")
        return content

    def _request(self, content: dict[str, Any]) -> dict[str, Any]:
        if "benchmark_dir" in content:
            self._get(content, "benchmark_dir", str, "request")
        return content

    def _overlap(self, content: dict[str, Any]) -> dict[str, Any]:
        if content:  # older datasets have none
            self._get(content, "documents_dropped", bool, "overlap")
        for name, counts in content.items():
            where = f"overlap.{name}"
            if not isinstance(counts, dict):
                continue
            for field in ("ngrams", "training_documents", "training_ngrams"):
                self._get(counts, field, int, where)
            if "sha256" in counts:
                digests = self._get(counts, "sha256", list, where)
                if len(self._get(counts, "files", list, where)) != len(digests):
                    raise self.error(
                        f"{where}.sha256: expected one per file, found {digests!r:.80}"
                    )
        return content

    def _split(self, content: dict[str, Any], where: str) -> Split:
        shards = self._get(content, "shards", list, where)
        return Split(
            num_sequences=self._get(content, "num_sequences", int, where),
            num_tokens=self._get(content, "num_tokens", int, where),
            shards=tuple(
                self._record(Shard, shard, f"{where}.shards[{i}]") for i, shard in enumerate(shards)
            ),
        )

    def _record(self, kind: type, content: Any, where: str) -> Any:
        if not isinstance(content, dict):
            raise self.error(f"{where}: expected an object, found {type(content).__name__}")
        values = {
            field.name: self._get(content, field.name, field.type, where)
            for field in dataclasses.fields(kind)
        }
        return kind(**values)

    def _get(self, content: dict[str, Any], key: str, kind: Any, where: str = "") -> Any:
        name = f"{where}.{key}" if where else key
        if key not in content:
            raise self.error(f"the field {name} is missing")
        value = content[key]
        # bool is a subclass of int: a true is no count.
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(f"{name}: expected {kind.__name__}, found {value!r}")
        return value
