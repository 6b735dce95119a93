"""What an interrupted preparation had finished, so that the same command goes on from there.

journal.json lies in the hidden work folder and is replaced whole after the tokenizer, after the
validation split and after every training shard. A journal of another request, of other text or of
another version is of no use; it is refused where training shards would be lost with it.
"""

import hashlib
import json
import os
import pathlib
from typing import Any

from qkjax import errors
from qkjax.data import manifest as manifest_lib

FILE_NAME = "journal.json"
_VERSION = 1  # raise it whenever the same request would give other shards


def identity(description: dict[str, Any]) -> str:
    """sha256 hex of all that the shards depend on; `description` is JSON-able."""
    text = json.dumps({"version": _VERSION, **description}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def load(work: pathlib.Path, wanted: str) -> dict[str, Any] | None:
    """The journal of the preparation with the identity `wanted`; None where there is none.

    Raises:
        UsageError: it is of another preparation, which has finished training shards.
    """
    try:
        content = json.loads((work / FILE_NAME).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("identity") == wanted:
        return content if isinstance(content, dict) else None
    finished = len(content.get("train", {}).get("writer", {}).get("shards", []))
    if finished:
        raise errors.UsageError(
            f"{work}: has {finished} finished training shards of another command, of other text "
            "or of another version of tokenizers. Run that command again to have them used, "
            f"remove {work} to drop them, or name another --out."
        )
    return None


def save(work: pathlib.Path, content: dict[str, Any]) -> None:
    """Replaces the journal; what it speaks of must be on the disk already."""
    temporary = work / f"{FILE_NAME}.new"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, work / FILE_NAME)
    manifest_lib.sync_directory(work)
