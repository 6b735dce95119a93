"""Text documents by name: from files, from the Hugging Face hub, from TFDS, from docstrings.

A source yields its documents in the same order every time it is asked, each with its position
(file and line or row), so that a broken one can be found.
"""

import contextlib
import glob
import gzip
import hashlib
import itertools
import json
import lzma
import os
import pathlib
import sys
import zlib
from collections.abc import Iterator
from typing import IO, Any

from qkjax import errors
from qkjax import files as files_lib
from qkjax.data import docstrings, hub, tfds_text
from qkjax.data.documents import Document, FileSource, Source

KINDS = (
    "docstrings",
    "hf:DATASET[:CONFIG][:SPLIT][:COLUMN]",
    "jsonl:GLOB[:FIELD]",
    "parquet:GLOB[:COLUMN]",
    "text:GLOB",
    "tfds:NAME[:SPLIT][:FEATURE]",
)
_PACKED = (".gz", ".xz", ".lzma", ".zst", ".zstd")
_REFUSED_SUFFIXES = {".bz2", ".zip", ".7z", ".tar", ".lz4"}
_PARQUET_BATCH_ROWS = 256
_COUNT_LINES = 64
_ZSTD_BYTES = 1 << 16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BAD_LINE_REMEDY = "Fix it, or skip bad lines with --max_bad_lines=N"


class _ZstdProblem(Exception):
    """What the library, which is imported where it is needed, cannot unpack."""


def open_source(spec: str, *, max_bad_lines: int = 0) -> Source:
    """The source that `spec` names; its files must exist.

    Args:
        spec: one of KINDS. GLOB and FIELD are split at the last ':' that no '/' follows.
        max_bad_lines: how many bad jsonl lines a pass may skip before it stops.
    Raises:
        UsageError: an unknown kind, a GLOB that matches nothing, an archive.
    """
    kind, _, rest = spec.partition(":")
    if kind == "docstrings":
        if rest:
            raise errors.UsageError(
                f"--source={spec}: docstrings takes no argument, found {rest!r}. "
                "Write --source=docstrings."
            )
        return _Docstrings(spec)
    if kind == "hf" and rest:
        return hub.HubDataset(spec, rest)
    if kind == "tfds" and rest:
        return tfds_text.TfdsText(spec, rest)
    if kind not in ("jsonl", "parquet", "text") or not rest:
        raise errors.UsageError(f"--source={spec}: unknown source. Known are: {', '.join(KINDS)}.")
    if kind == "text":
        return _Text(spec, _files(spec, rest))
    pattern, column = (rest, "text") if pathlib.Path(rest).is_file() else _split_column(rest)
    files = _files(spec, pattern)
    if kind == "parquet":
        return _Parquet(spec, files, column)
    return _JsonLines(spec, files, column, max_bad_lines)


def _split_column(rest: str) -> tuple[str, str]:
    pattern, colon, column = rest.rpartition(":")
    if colon and column and pattern and "/" not in column:
        return pattern, column
    return rest.removesuffix(":"), "text"


def _files(spec: str, pattern: str) -> list[pathlib.Path]:
    # Sorted as strings: the order of documents must not depend on the file system. A file that is
    # reached by several names (links) is read once, by the first of them.
    found = [pathlib.Path(name) for name in sorted(_matches(pattern))]
    by_inode: dict[tuple[int, int], pathlib.Path] = {}
    for path in found:
        if path.is_file():
            status = path.stat()
            by_inode.setdefault((status.st_dev, status.st_ino), path)
    files = list(by_inode.values())
    if not files:
        raise errors.UsageError(
            f"--source={spec}: no file matches {pattern!r}. Check the path; quote globs."
        )
    for path in files:
        if path.suffix.lower() in _REFUSED_SUFFIXES:
            raise errors.UsageError(
                f"{path}: {path.suffix} is not read, only plain, {', '.join(_PACKED)}. Unpack it."
            )
        if not str(path).isascii() and _shown(path) != str(path):
            if sys.getfilesystemencoding() != "utf-8":
                raise errors.UsageError(
                    f"{_shown(path)}: Python cannot read this name in this locale "
                    f"({sys.getfilesystemencoding()}). Set PYTHONUTF8=1."
                )
            raise errors.UsageError(
                f"{_shown(path)}: the name is not valid UTF-8, and dataset.json has to hold it. "
                "Rename the file."
            )
    return files


def _matches(pattern: str) -> list[str]:
    """Files that `pattern` matches; a name that exists is not a pattern."""
    path = pathlib.Path(pattern)
    if path.exists():
        return [pattern]
    parts = path.parts
    literal = max(k for k in range(len(parts)) if pathlib.Path(*parts[:k]).is_dir())
    folder = glob.escape(str(pathlib.Path(*parts[:literal]))) if literal else ""
    return glob.glob(os.path.join(folder, *parts[literal:]), recursive=True)


def _shown(path: pathlib.Path) -> str:
    """The path as text that any terminal and file can hold."""
    return os.fsencode(path).decode(errors="backslashreplace")


class _Docstrings(Source):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._versions = docstrings.versions()
        self._documents: list[Document] = []
        self._sha256 = ""

    def documents(self, start: int = 0) -> Iterator[Document]:
        found = self._all()
        for number, document in enumerate(found[start:], start=start):
            self.fraction = number / len(found)
            yield document

    def describe(self) -> dict[str, Any]:
        return {"versions": self._versions}

    def content(self, files_read: int) -> dict[str, Any]:
        self._all()
        return {"sha256": self._sha256}

    def changed(self, content: dict[str, Any], *, rehash: bool = False) -> list[str]:
        if "sha256" not in content or content["sha256"] == self.content(0)["sha256"]:
            return []
        return [self.name]

    def _all(self) -> list[Document]:
        if not self._documents:  # 14 MB, and several seconds of parsing
            self._documents = [Document(text, name) for name, text in docstrings.documents()]
            digest = hashlib.sha256()
            for document in self._documents:
                digest.update(f"{len(document.text)}\n{document.text}".encode())
            self._sha256 = digest.hexdigest()
        return self._documents


class _LineSource(FileSource):
    """Files of lines, plain or compressed."""

    def _lines(self, path: pathlib.Path) -> Iterator[bytes]:
        """The lines; a damaged archive is named with the last good line."""
        number = 0
        try:
            with open(path, "rb") as raw, _unpacked(path, raw) as file:
                for line in file:
                    number += 1
                    if number % _COUNT_LINES == 0:
                        self._count(path, raw.tell())
                    yield line
        except EOFError as error:
            raise errors.UsageError(
                f"{path}: truncated after line {number} ({error}). Download it again."
            ) from None
        except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, _ZstdProblem) as error:
            raise errors.UsageError(
                f"{path}: cannot be unpacked as {path.suffix} after line {number} ({error}). "
                "Check how it was packed, or download it again."
            ) from None
        except OSError as error:
            raise files_lib.storage_error(path, error) from error


class _Text(_LineSource):
    """Every file is one document."""

    def _read(self, path: pathlib.Path) -> Iterator[Document]:
        data = b"".join(self._lines(path)).removeprefix(_BYTE_ORDER_MARK)
        if b"\0" in data:
            line = data.count(b"\n", 0, data.index(b"\0")) + 1
            raise errors.UsageError(
                f"{path}:{line}: a NUL byte, so this is binary or UTF-16, expected UTF-8 text. "
                "Convert the file or leave it out."
            )
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise errors.UsageError(
                f"{path}:{line}: not valid UTF-8 (byte 0x{data[error.start]:02x}). "
                "Convert the file to UTF-8 or leave it out."
            ) from None
        yield Document(text, str(path))


class _JsonLines(_LineSource):
    """Every line is a JSON object with the text in one field."""

    def __init__(
        self, name: str, files: list[pathlib.Path], field: str, max_bad_lines: int
    ) -> None:
        super().__init__(name, files)
        self.field = field
        self._max_bad_lines = max_bad_lines

    def _read(self, path: pathlib.Path) -> Iterator[Document]:
        number = 0
        for number, line in enumerate(self._lines(path), start=1):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if not line.strip():
                continue
            try:
                text = self._text(line)
            except ValueError as error:
                self._skip(f"{path}:{number}: {error}")
            else:
                yield Document(text, f"{path}:{number}")
        if not number:
            raise errors.UsageError(f"{path}: empty, expected JSON lines. Leave the file out.")

    def _text(self, line: bytes) -> str:
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"not valid UTF-8 (byte {error.start + 1} of the line)") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"not valid JSON ({error})") from None
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, found {type(value).__name__}")
        if self.field not in value:
            known = ", ".join(sorted(value)[:8]) or "none"
            raise ValueError(
                f"no field {self.field!r}, found {known} (the field is named after the files: "
                "jsonl:GLOB:FIELD)"
            )
        text = value[self.field]
        if not isinstance(text, str):
            raise ValueError(f"field {self.field!r}: expected text, found {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"field {self.field!r} holds a lone surrogate") from None
        return text

    def _skip(self, problem: str) -> None:
        self.bad_lines += 1
        if self.bad_lines > self._max_bad_lines:
            after = f" (after {self._max_bad_lines} skipped)" if self._max_bad_lines else ""
            raise errors.UsageError(f"{problem}{after}. {_BAD_LINE_REMEDY}.")


class _Parquet(FileSource):
    """Every row is a document; null counts as empty text."""

    def __init__(self, name: str, files: list[pathlib.Path], column: str) -> None:
        super().__init__(name, files)
        self.field = column
        self._row = 0

    def documents(self, start: int = 0) -> Iterator[Document]:
        for path in self._files_in_turn():
            num_rows = self._num_rows(path) if start else 0
            if start < num_rows or not start:
                yield from self._read(path, start)
            start = max(0, start - num_rows)

    def _num_rows(self, path: pathlib.Path) -> int:
        import pyarrow.parquet

        with self._named(path), pyarrow.parquet.ParquetFile(path) as file:
            return file.metadata.num_rows

    def _read(self, path: pathlib.Path, start: int = 0) -> Iterator[Document]:
        import pyarrow.parquet

        self._count(path, 0)
        self._row = 0
        with self._named(path), pyarrow.parquet.ParquetFile(path) as file:
            self._check_column(path, file.schema_arrow)
            groups = range(file.metadata.num_row_groups)
            ends = list(itertools.accumulate(file.metadata.row_group(g).num_rows for g in groups))
            first = sum(end <= start for end in ends)  # whole row groups are skipped unread
            self._row = ends[first - 1] if first else 0
            batches = file.iter_batches(
                _PARQUET_BATCH_ROWS, row_groups=list(groups[first:]), columns=[self.field]
            )
            for batch in batches if first < len(ends) else ():
                self._count(path, path.stat().st_size * self._row // max(ends[-1], 1))
                # pyarrow takes "a.b" for the child b of a struct a as well.
                for value in batch.column(self.field):
                    self._row += 1
                    if self._row > start:
                        yield Document(value.as_py() or "", f"{path} row {self._row}")

    @contextlib.contextmanager
    def _named(self, path: pathlib.Path) -> Iterator[None]:
        """Says which file pyarrow could not read, and how far it came."""
        import pyarrow as pa

        try:
            yield
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise errors.UsageError(
                f"{path}: not readable as parquet, stopped after row {self._row} ({reason}). "
                "Check that it is parquet, or download it again."
            ) from None

    def _check_column(self, path: pathlib.Path, schema: Any) -> None:
        import pyarrow as pa

        if self.field not in schema.names:
            raise errors.UsageError(
                f"{path}: no column {self.field!r}, found {', '.join(schema.names)}. "
                f"Name it: parquet:{path}:COLUMN."
            )
        count = schema.names.count(self.field)
        if count > 1:
            raise errors.UsageError(
                f"{path}: {count} columns are called {self.field!r}, expected one. "
                "Rename the others."
            )
        kind = schema.field(self.field).type
        types = pa.types
        value = kind.value_type if types.is_dictionary(kind) else kind
        is_text = types.is_string(value) or types.is_large_string(value)
        if not (is_text or types.is_string_view(value) or types.is_null(value)):
            raise errors.UsageError(
                f"{path}: column {self.field!r} holds {kind}, expected text. Name another column."
            )


@contextlib.contextmanager
def _unpacked(path: pathlib.Path, raw: IO[bytes]) -> Iterator[Any]:
    """`raw` decompressed as the suffix of `path` says."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        yield gzip.open(raw, "rb")
    elif suffix in (".xz", ".lzma"):
        yield lzma.open(raw, "rb")
    elif suffix in (".zst", ".zstd"):
        yield _zstd_lines(path, raw)
    else:
        yield raw


def _zstd_lines(path: pathlib.Path, raw: IO[bytes]) -> Iterator[bytes]:
    """Lines of zstd frames. The library's own reader takes a truncated file for a whole one."""
    try:
        import zstandard
    except ModuleNotFoundError:
        raise errors.UsageError(
            f"{path}: .zst needs the library zstandard, which is not installed. "
            "Run: pip install -e '.[data]'"
        ) from None
    frame, started, rest = None, False, b""
    try:
        while block := raw.read(_ZSTD_BYTES):
            while block:
                if frame is None:  # as far back as `zstd --long=31` may reach
                    unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
                    frame = unpacker.decompressobj()
                started = True
                *lines, rest = (rest + frame.decompress(block)).split(b"\n")
                for line in lines:
                    yield line + b"\n"
                block = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise _ZstdProblem(error) from None
    if frame is not None or not started:
        raise EOFError("the last frame is not complete")
    if rest:
        yield rest
