"""Files of a study directory: JSON, read whole or refused with the way to fix it, and its lock."""

import contextlib
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from qkjax import errors, files

_FIX = "Move it away and run `qkjax study` again."


def read_object(path: pathlib.Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file.

    Raises:
        UsageError: it is damaged.
        StorageError: the disk failed.
    """
    return files.read_object(path, _FIX)


def parse(data: bytes, place: str) -> Any:
    """JSON in a line of a file.

    Raises:
        UsageError: it is damaged; names `place`.
    """
    return files.parse_json(data, place, _FIX)


def need(
    path: pathlib.Path,
    where: str,
    value: Any,
    fields: Mapping[str, files.Types] | Collection[str],
) -> None:
    """Refuses an object of a file that lacks a field or has it with another type.

    Args:
        where: the object's place in the file, for people; "" is the file itself.
        fields: as of `files.need`.
    Raises:
        UsageError: names the file, the place and the fields.
    """
    files.need(path, where, value, fields, _FIX)


def damaged(path: pathlib.Path, what: str) -> errors.UsageError:
    """A file that another run of `qkjax study` would write again."""
    return files.damaged(path, what, _FIX)


def read_note(path: pathlib.Path) -> tuple[str, str] | None:
    """(status, why) that the executor has noted of a step without a result; None: nothing to read.

    A note is advice alone, which the same command writes again: a damaged one counts as none.
    """
    try:
        noted = read_object(path)
        if noted is None:
            return None
        need(path, "", noted, {"status": str, "detail": str})
    except errors.UsageError:
        return None
    return noted["status"], noted["detail"]


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Held while a file that all parts of a study share is compared and replaced.

    Parts may be executed by several processes that start at one moment (run.lock is shared then).

    Raises:
        StorageError: the disk failed.
    """
    with files.lock(workdir / ".lock", wait=True):
        yield
