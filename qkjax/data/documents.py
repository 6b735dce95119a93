"""What every source of text is: documents in a fixed order, each with the place it stands at."""

import abc
import itertools
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple


class Document(NamedTuple):
    """One text and where it stands: `file:line`, `file row N`, or a name."""

    text: str
    position: str


class Source(abc.ABC):
    """Documents in a deterministic order, any number of times.

    Attributes:
        name: the spec that the user wrote.
        bad_lines: lines that the latest pass skipped; never above max_bad_lines.
        fraction: how much of the source the latest pass has read, in [0, 1]; None where unknown.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.bad_lines = 0
        self.fraction: float | None = None

    @abc.abstractmethod
    def documents(self, start: int = 0) -> Iterator[Document]:
        """Yields every document from number `start` on, without those before it.

        Raises: UsageError that names file and line or row of a broken one.
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the documents are read from, for dataset.json: versions, or files and bytes."""


class FileSource(Source):
    """Files that are read one after the other."""

    def __init__(self, name: str, files: list[pathlib.Path]) -> None:
        super().__init__(name)
        self._files = files
        self._before: dict[pathlib.Path, int] = {}  # bytes of the files before this one
        self._total = 0
        for path in files:
            self._before[path] = self._total
            self._total += path.stat().st_size

    def documents(self, start: int = 0) -> Iterator[Document]:
        self.bad_lines = 0
        return itertools.islice(self._all(), start, None)

    def describe(self) -> dict[str, Any]:
        return {"files": len(self._files), "bytes": sum(p.stat().st_size for p in self._files)}

    def _all(self) -> Iterator[Document]:
        for path in self._files:
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
