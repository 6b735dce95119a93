"""JSON files of a study directory: read whole, or refused with the way to mend it."""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from qkjax import errors, run_directory


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


def damaged(path: pathlib.Path, what: str) -> errors.UsageError:
    """What to say of a file that another run of tools/run_study.py would write anew."""
    return errors.UsageError(
        f"{path}: damaged ({what}). Delete it and run tools/run_study.py again."
    )
