"""Text documents by name: `docstrings`, `jsonl:GLOB[:FIELD]`, `parquet:GLOB[:COLUMN]`, `text:GLOB`.

A source yields its documents in the same order every time it is asked, each with its position
(file and line or row), so that whatever is wrong with one can be found.
"""

import abc
import glob
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from qkjax import errors
from qkjax.data import docstrings

KINDS = ("docstrings", "jsonl:GLOB[:FIELD]", "parquet:GLOB[:COLUMN]", "text:GLOB")
_OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
_REFUSED_SUFFIXES = {".zst", ".bz2", ".zip", ".7z", ".tar", ".lz4"}
_PARQUET_BATCH_ROWS = 256
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BAD_LINE_REMEDY = "Mend it, or skip bad lines with --max_bad_lines=N"


class Document(NamedTuple):
    """One text and where it stands: `file:line`, `file row N`, or a name."""

    text: str
    position: str


class Source(abc.ABC):
    """Documents in a deterministic order, any number of times.

    Attributes:
        name: the spec that the user wrote.
        bad_lines: lines that the latest pass skipped; never above max_bad_lines.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.bad_lines = 0

    @abc.abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yields every document; raises UsageError that names file and line of a broken one."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the documents are read from, for dataset.json: versions, or files and bytes."""


def open_source(spec: str, *, max_bad_lines: int = 0) -> Source:
    """The source that `spec` names; its files must exist.

    Args:
        spec: one of KINDS. GLOB and FIELD are split at the last ':' that no '/' follows.
        max_bad_lines: how many bad jsonl lines a pass may skip before it stops.
    Raises: UsageError for an unknown kind, a GLOB that matches nothing, an archive.
    """
    kind, _, rest = spec.partition(":")
    if kind == "docstrings":
        if rest:
            raise errors.UsageError(
                f"--source={spec}: docstrings takes no argument, found {rest!r}. "
                "Write --source=docstrings."
            )
        return _Docstrings(spec)
    if kind not in ("jsonl", "parquet", "text") or not rest:
        raise errors.UsageError(f"--source={spec}: unknown source. Known are: {', '.join(KINDS)}.")
    if kind == "text":
        return _Text(spec, _files(spec, rest))
    pattern, column = _split_column(rest)
    files = _files(spec, pattern)
    if kind == "parquet":
        return _Parquet(spec, files, column)
    return _JsonLines(spec, files, column, max_bad_lines)


def _split_column(rest: str) -> tuple[str, str]:
    pattern, colon, column = rest.rpartition(":")
    if colon and column and pattern and "/" not in column:
        return pattern, column
    return rest.removesuffix(":"), "text"


def _files(spec: str, pattern: str) -> list[Path]:
    # Sorted as strings: the order of documents must not depend on the file system.
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    files = [path for path in found if path.is_file()]
    if not files:
        raise errors.UsageError(
            f"--source={spec}: no file matches {pattern!r}. Check the path; quote globs."
        )
    for path in files:
        if path.suffix in _REFUSED_SUFFIXES:
            raise errors.UsageError(
                f"{path}: {path.suffix} is not read, only plain, .gz and .xz. Unpack it first."
            )
    return files


class _Docstrings(Source):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._versions = docstrings.versions()
        self._documents: list[Document] | None = None

    def documents(self) -> Iterator[Document]:
        if self._documents is None:  # 14 MB, and several seconds of parsing
            self._documents = [Document(text, name) for name, text in docstrings.documents()]
        yield from self._documents

    def describe(self) -> dict[str, Any]:
        return {"versions": self._versions}


class _FileSource(Source):
    def __init__(self, name: str, files: list[Path]) -> None:
        super().__init__(name)
        self._files = files

    def documents(self) -> Iterator[Document]:
        self.bad_lines = 0
        for path in self._files:
            yield from self._read(path)

    def describe(self) -> dict[str, Any]:
        return {"files": len(self._files), "bytes": sum(p.stat().st_size for p in self._files)}

    @abc.abstractmethod
    def _read(self, path: Path) -> Iterator[Document]: ...


class _Text(_FileSource):
    """Every file is one document."""

    def _read(self, path: Path) -> Iterator[Document]:
        data = b"".join(_lines(path)).removeprefix(_BYTE_ORDER_MARK)
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


class _JsonLines(_FileSource):
    """Every line is a JSON object with the text in one field."""

    def __init__(self, name: str, files: list[Path], field: str, max_bad_lines: int) -> None:
        super().__init__(name, files)
        self._field = field
        self._max_bad_lines = max_bad_lines

    def _read(self, path: Path) -> Iterator[Document]:
        number = 0
        for number, line in enumerate(_lines(path), start=1):
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
        if self._field not in value:
            known = ", ".join(sorted(value)[:8]) or "none"
            raise ValueError(f"no field {self._field!r}, found {known}")
        text = value[self._field]
        if not isinstance(text, str):
            raise ValueError(f"field {self._field!r}: expected text, found {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"field {self._field!r} holds a lone surrogate") from None
        return text

    def _skip(self, problem: str) -> None:
        self.bad_lines += 1
        if self.bad_lines > self._max_bad_lines:
            after = f" (after {self._max_bad_lines} skipped)" if self._max_bad_lines else ""
            raise errors.UsageError(f"{problem}{after}. {_BAD_LINE_REMEDY}.")


class _Parquet(_FileSource):
    """Every row is a document; null counts as empty text."""

    def __init__(self, name: str, files: list[Path], column: str) -> None:
        super().__init__(name, files)
        self._column = column

    def _read(self, path: Path) -> Iterator[Document]:
        import pyarrow
        import pyarrow.parquet

        row = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                self._check_column(path, file.schema_arrow)
                for batch in file.iter_batches(_PARQUET_BATCH_ROWS, columns=[self._column]):
                    for value in batch.column(0):
                        row += 1
                        yield Document(value.as_py() or "", f"{path} row {row}")
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise errors.UsageError(
                f"{path}: no readable parquet, stopped after row {row} ({reason}). "
                "The file is truncated or damaged: bring it again."
            ) from None

    def _check_column(self, path: Path, schema: Any) -> None:
        import pyarrow

        if self._column not in schema.names:
            raise errors.UsageError(
                f"{path}: no column {self._column!r}, found {', '.join(schema.names)}. "
                f"Name it: parquet:{path}:COLUMN."
            )
        kind = schema.field(self._column).type
        types = pyarrow.types
        value = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(value) or types.is_large_string(value)):
            raise errors.UsageError(
                f"{path}: column {self._column!r} holds {kind}, expected text. Name another column."
            )


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a plain, gz or xz file; a damaged archive is named with the last good line."""
    number = 0
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            for line in file:
                number += 1
                yield line
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise errors.UsageError(
            f"{path}: truncated or damaged after line {number} ({error}). Bring the file again."
        ) from None
