"""What a dataset was read from, by content: the sha256 of every file that gave it text.

A file's bytes are hashed when it is first opened. As long as its size, inode and times of change
stay what they were then, it counts as the same file; otherwise its bytes are hashed again.
dataset.json holds one digest per source, which alone decides. `sources.jsonl` beside it holds one
line per file: it saves hashing, and lets a changed file be named.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence

from qkjax import errors, files

FILE_NAME = "sources.jsonl"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file as it was when it was hashed; `path` is absolute."""

    path: str
    num_bytes: int
    inode: int
    mtime_ns: int
    ctime_ns: int
    sha256: str

    def is_unchanged(self) -> bool:
        """Whether the file looks as it did, without reading it."""
        return _looks(self.path) == (self.num_bytes, self.inode, self.mtime_ns, self.ctime_ns)


_TYPES = {field.name: field.type for field in dataclasses.fields(Entry)}


class Ledger:
    """The files that were opened so far, in memory and, where it has a path, on the disk."""

    def __init__(self, path: pathlib.Path | None = None) -> None:
        """Reads the lines that are at `path` already; what is damaged there is hashed again."""
        self._path = path
        self._entries: dict[str, Entry] = {}
        self._unwritten: list[Entry] = []
        if path is not None and path.exists():
            self._read(path)

    def note(self, path: pathlib.Path) -> None:
        """Records a file that is about to be read, or has just been read.

        Raises:
            UsageError: it is no longer the file that was recorded before.
        """
        known = self._entries.get(os.path.abspath(path))
        if known is not None and known.is_unchanged():
            return
        found = _hashed(path)
        if known is not None and found.sha256 != known.sha256:
            raise errors.UsageError(
                f"{path}: was changed while text was read from it, sha256 {known.sha256[:12]} "
                f"became {found.sha256[:12]}. Run the command again when the file is finished."
            )
        self._add(found)

    def digest(self, paths: Sequence[pathlib.Path]) -> str:
        """sha256 hex of the contents of files in their order, all of them recorded."""
        combined = hashlib.sha256()
        for path in paths:
            combined.update(f"{self._entries[os.path.abspath(path)].sha256}\n".encode())
        return combined.hexdigest()

    def changed(
        self, paths: Sequence[pathlib.Path], expected: str, rehash: bool = False
    ) -> list[pathlib.Path]:
        """Checks files again: [] where `digest` is the expected one.

        Args:
            rehash: read every file, also those that look as they did.
        Returns:
            Otherwise the files that differ from their entries; all where no entry tells.
        """
        different = []
        for path in paths:
            known = self._entries.get(os.path.abspath(path))
            if rehash or known is None or not known.is_unchanged():
                found = _hashed(path)
                self._add(found)
                if known is not None and found.sha256 != known.sha256:
                    different.append(path)
        return [] if self.digest(paths) == expected else different or list(paths)

    def keep(self, paths: Sequence[pathlib.Path]) -> None:
        """Forgets all files but these, on the disk too."""
        self._entries = {
            name: self._entries[name] for name in dict.fromkeys(map(os.path.abspath, paths))
        }
        self._unwritten = list(self._entries.values())
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self.save()

    def save(self) -> None:
        """Appends what is new to the file."""
        if self._path is None or not self._unwritten:
            return
        with open(self._path, "a", encoding="utf-8") as file:
            for entry in self._unwritten:
                file.write(f"{json.dumps(dataclasses.asdict(entry))}\n")
        self._unwritten = []

    def _add(self, entry: Entry) -> None:
        self._entries[entry.path] = entry
        self._unwritten.append(entry)

    def _read(self, path: pathlib.Path) -> None:
        for line in path.read_bytes().splitlines():
            try:
                values = json.loads(line)
                files.need(path, "", values, _TYPES, "")
                entry = Entry(**values)
                entry.is_unchanged()
            except (ValueError, RecursionError, TypeError, OSError, errors.UsageError):
                continue  # of another version, damaged, or of a file that is gone
            self._entries[entry.path] = entry


def _looks(path: str | pathlib.Path) -> tuple[int, int, int, int]:
    status = os.stat(path)
    return status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _hashed(path: pathlib.Path) -> Entry:
    before = _looks(path)
    sha256 = files.sha256(path)
    if _looks(path) != before:
        raise errors.UsageError(
            f"{path}: changes while it is read. Run the command again when the file is finished."
        )
    return Entry(os.path.abspath(path), *before, sha256)
