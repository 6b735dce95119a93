"""What every source of text is: documents in a fixed order, each with the place it stands at."""

import abc
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from qkjax.data import origins


class Document(NamedTuple):
    """One text and where it stands: `file:line`, `file row N`, or a name."""

    text: str
    position: str


class Source(abc.ABC):
    """Documents in a deterministic order, any number of times.

    Attributes:
        name: the spec that the user wrote.
        bad_lines: lines that the latest pass skipped; never above max_bad_lines.
        files: the files that it reads, in order; none where it reads from elsewhere.
        field: what it reads of them, a column or field; "" where that is all.
        files_read: how many of them the latest pass has opened.
        ledger: records the content of every file that is opened.
        fraction: how much of the source the latest pass has read, in [0, 1]; None where unknown.
    """

    def __init__(self, name: str, files: Sequence[pathlib.Path] = ()) -> None:
        self.name = name
        self.files = files
        self.field = ""
        self.files_read = 0
        self.ledger = origins.Ledger()
        self.bad_lines = 0
        self.fraction: float | None = None

    @abc.abstractmethod
    def documents(self, start: int = 0) -> Iterator[Document]:
        """Yields every document from number `start` on, without those before it.

        Raises:
            UsageError: names file and line or row of a broken one.
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the documents are read from, for dataset.json: versions, or files and bytes."""

    def content(self, files_read: int) -> dict[str, Any]:
        """The first `files_read` files by content, for dataset.json; {} where it has no files."""
        if not self.files:
            return {}
        return {
            "files_read": files_read,
            "sha256": self.ledger.digest(self.files[:files_read]),
        }

    def _files_in_turn(self) -> Iterator[pathlib.Path]:
        """The files in order, each recorded before it is used and checked afterwards."""
        for number, path in enumerate(self.files, start=1):
            self.files_read = number
            self.ledger.note(path)
            yield path
            self.ledger.note(path)

    def changed(self, content: dict[str, Any], *, rehash: bool = False) -> list[str]:
        """Names the files that differ from `content`; [] also if it holds no digest.

        Args:
            rehash: read every file again, also those that look as they did.
        """
        if not self.files or not content.keys() >= {"files_read", "sha256"}:
            return []
        used = self.files[: content["files_read"]]
        return [str(path) for path in self.ledger.changed(used, content["sha256"], rehash)]


class FileSource(Source):
    """Files that are read one after the other."""

    def __init__(self, name: str, files: list[pathlib.Path]) -> None:
        super().__init__(name, files)
        self._before: dict[pathlib.Path, int] = {}  # bytes of the files before this one
        self._total = 0
        for path in files:
            self._before[path] = self._total
            self._total += path.stat().st_size

    def documents(self, start: int = 0) -> Iterator[Document]:
        self.bad_lines = 0
        return itertools.islice(self._all(), start, None)

    def describe(self) -> dict[str, Any]:
        return {"files": len(self.files), "bytes": sum(p.stat().st_size for p in self.files)}

    def _all(self) -> Iterator[Document]:
        for path in self._files_in_turn():
            self._count(path, 0)
            yield from self._read(path)

    def _count(self, path: pathlib.Path, read_bytes: int) -> None:
        """Sets `fraction` when `read_bytes` of the file `path` are read."""
        self.fraction = (self._before[path] + read_bytes) / max(self._total, 1)

    @abc.abstractmethod
    def _read(self, path: pathlib.Path) -> Iterator[Document]: ...


def text_of_row(value: Any, column: str) -> str:
    """The text of one cell; null counts as empty text, other types are a TypeError."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(f"column {column!r}: expected text, found {type(value).__name__}")
    return value
