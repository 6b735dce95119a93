"""A directory that one process fills and that looks finished only when it is.

Everything is written in the hidden folder `.unfinished` of the directory and moved out at the
end, the manifest last. A killed run leaves that folder, and the next run finds it. Nothing that a
run did not write itself is ever removed.

The folder holds a journal of what is finished, which is replaced whole after the tokenizer, after
the validation split and after every training shard. A journal of another request, of other text or
of another version is of no use; it is refused where training shards would be lost with it.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from qkjax import errors, files
from qkjax.data import manifest as manifest_lib
from qkjax.data import origins

_LOCK = ".prepare.lock"
_WORK = ".unfinished"
_MOVED = "moved.json"
JOURNAL = "journal.json"
_VERSION = 2  # raise it whenever the same request would give other shards


@contextlib.contextmanager
def locked(
    directory: pathlib.Path, *, wait: bool, progress: Callable[[str], None] = print
) -> Iterator[None]:
    """Creates `directory` where needed and holds its lock; the lock dies with the process.

    Args:
        directory: the output directory; removed again if nothing was put into it.
        wait: wait for another process that holds the lock, instead of refusing.
        progress: is told when it has to wait.
    Raises:
        UsageError: another process holds it; names its pid, host and time.
        StorageError: a file is in place of the directory.
    """
    path = directory / _LOCK

    def tell(holder: str) -> None:
        progress(f"{directory}: waiting for the process that writes it ({holder})")

    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise errors.StorageError(
                f"{directory}: a file is in its place, expected a directory or nothing. "
                "Name another --out."
            ) from None
        except OSError as error:
            raise files.storage_error(directory, error) from error
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(
                    files.lock(
                        path,
                        wait=wait,
                        waiting=lambda by: progress(
                            f"{directory}: waiting for {by}, who writes it"
                        ),
                        elsewhere="another --out",
                    )
                )
            except errors.StorageError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    continue  # the last holder removed the directory just now
                raise
            holder = files.holder_of(path)
            if holder is None or holder["pid"] != os.getpid():
                continue  # the last holder removed this file: lock the new one
            try:
                yield
            finally:
                # Only under the lock: a process that opened the file meanwhile sees it is gone.
                if [entry.name for entry in directory.iterdir()] == [_LOCK]:
                    path.unlink()
                    directory.rmdir()
            return


def begin(directory: pathlib.Path) -> pathlib.Path:
    """The folder to work in, under the lock, with what an interrupted run left there.

    Raises:
        UsageError: the directory holds anything that no run of ours left.
    """
    work = directory / _WORK
    if work.is_symlink() or any(path.is_symlink() or path.is_dir() for path in _entries(work)):
        raise errors.UsageError(
            f"{work}: is a link, or holds links or directories, expected the files of an "
            "interrupted command. Move it away; nothing was removed."
        )
    fix = f"Remove {work} to start again."
    moved = files.read_object(work / _MOVED, fix)
    if moved is not None:
        files.need(work / _MOVED, "", moved, {"names": list}, fix)
        if any(type(name) is not str or "/" in name for name in moved["names"]):
            raise files.damaged(work / _MOVED, "names are not plain file names", fix)
        _take_back(directory, moved["names"])
    foreign = sorted(p.name for p in directory.iterdir() if p.name not in (_LOCK, _WORK))
    if foreign:
        raise errors.UsageError(
            f"{directory}: holds other files ({', '.join(foreign[:5])}), expected a new or empty "
            "directory. Name another --out; nothing was removed."
        )
    work.mkdir(exist_ok=True)
    return work


def _entries(folder: pathlib.Path) -> list[pathlib.Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def publish(directory: pathlib.Path, manifest: manifest_lib.Manifest) -> None:
    """Moves the manifest's files out of the work folder; the manifest makes them a dataset."""
    work = directory / _WORK
    names = [manifest.tokenizer.file, *(record.file for record in manifest.documents.values())]
    names += [shard.file for split in manifest.splits.values() for shard in split.shards]
    names += [origins.FILE_NAME] if (work / origins.FILE_NAME).exists() else []
    files.write_json(work / _MOVED, {"names": names})
    try:
        for name in names:
            files.move(work / name, directory / name)
        # What a failed write leaves must not lie among the user's files.
        manifest_lib.write(manifest, work)
        files.move(work / manifest_lib.FILE_NAME, directory / manifest_lib.FILE_NAME)
    except BaseException:
        if not (directory / manifest_lib.FILE_NAME).exists():
            _take_back(directory, names)
        raise
    discard(directory)


def discard(directory: pathlib.Path) -> None:
    """Removes the work folder, which holds only what a run wrote itself."""
    shutil.rmtree(directory / _WORK, ignore_errors=True)


def identity(description: dict[str, Any]) -> str:
    """sha256 hex of all that the shards depend on; `description` is JSON-able."""
    return _digest({"version": _VERSION, **description})


def load_journal(work: pathlib.Path, wanted: str) -> dict[str, Any] | None:
    """The journal of the preparation with the identity `wanted`; None where there is none.

    Raises:
        UsageError: it is damaged, or of another preparation, which has finished training shards.
    """
    path, fix = work / JOURNAL, f"Remove {work} to start again, or name another --out."
    content = files.read_object(path, fix)
    if content is None:
        return None
    if content.pop("sha256", None) != _digest(content):
        raise files.damaged(path, "its digest is not its own, or not of this version", fix)
    if content["identity"] == wanted:
        return content
    finished = finished_shards(content)
    if finished:
        raise errors.UsageError(
            f"{work}: has {finished} finished training shards of another command, of other text "
            "or of another version of tokenizers. Run that command again to use them, "
            f"remove {work} to drop them, or name another --out."
        )
    return None


def save_journal(work: pathlib.Path, content: dict[str, Any]) -> None:
    """Replaces the journal; what it names must be on the disk already."""
    files.write_json(work / JOURNAL, {"sha256": _digest(content), **content})


def finished_shards(journal: dict[str, Any]) -> int:
    """How many training shards a journal speaks of."""
    return len(journal["train"]["writer"]["shards"]) if "train" in journal else 0


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _take_back(directory: pathlib.Path, names: list[str]) -> None:
    """Undoes a move that was cut short: without its manifest no file belongs outside."""
    for name in names:
        if (directory / name).exists():
            files.move(directory / name, directory / _WORK / name)
    (directory / _WORK / _MOVED).unlink(missing_ok=True)
