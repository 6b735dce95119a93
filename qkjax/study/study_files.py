"""Files of a study directory: JSON, read whole or refused with the way to mend it, and its lock."""

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qkjax import errors
from qkjax.runs import directory as run_directory


def read_object(path: pathlib.Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file.

    Raises:
        UsageError: it is damaged. StorageError: the disk failed.
    """
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
        return value
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise damaged(path, str(error)) from error
    except OSError as error:
        raise run_directory.storage_error(path, error) from error


def need(path: pathlib.Path, where: str, value: Any, fields: Iterable[str]) -> None:
    """Refuses an object of a file that lacks a field.

    Args:
        where: the object's place in the file, for people; "" is the file itself.
    """
    inside = f"{where} " if where else "it "
    if not isinstance(value, Mapping):
        raise damaged(path, f"{inside}is not a JSON object")
    absent = [field for field in fields if field not in value]
    if absent:
        raise damaged(path, f"{inside}lacks {', '.join(absent)}")


def newest_input(workdir: pathlib.Path) -> int:
    """Modification time, in ns, of the newest result that a report of the study shows; 0: none."""
    inputs = [
        workdir / "study.json",
        workdir / "sweep" / "learning_rates.json",
        *workdir.glob("runs/*/*/summary.json"),
        *workdir.glob("downstream/*/*.json"),
    ]
    return max((path.stat().st_mtime_ns for path in inputs if path.exists()), default=0)


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Held while a file that all parts of a study share is compared and replaced.

    Parts may be executed by several processes that begin at one moment (run.lock is shared then).

    Raises:
        StorageError: the disk failed.
    """
    path = workdir / ".lock"
    try:
        file = open(path, "ab")
    except OSError as error:
        raise run_directory.storage_error(path, error) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def damaged(path: pathlib.Path, what: str) -> errors.UsageError:
    """What to say of a file that another run of tools/run_study.py would write anew."""
    return errors.UsageError(
        f"{path}: damaged ({what}). Delete it and run tools/run_study.py again."
    )
