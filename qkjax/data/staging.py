"""A directory that one process fills and that looks finished only when it is.

Everything is written in the hidden folder `.unfinished` of the directory and moved out at the
end, the manifest last. A killed run leaves that folder, and the next run finds it. Nothing that a
run did not write itself is ever removed.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from typing import IO

from qkjax import errors
from qkjax.data import manifest as manifest_lib

_LOCK = ".prepare.lock"
_WORK = ".unfinished"
_MOVED = "moved.json"


@contextlib.contextmanager
def locked(
    directory: pathlib.Path, *, wait: bool, progress: Callable[[str], None] = print
) -> Iterator[None]:
    """Creates `directory` where needed and holds its lock; the lock dies with the process.

    Args:
        directory: the output directory; removed again if nothing was put into it.
        wait: wait for another process that holds the lock, instead of refusing.
        progress: is told when it has to wait.
    Raises: UsageError with pid, host and time of the other process; StorageError for a file in
    place of the directory.
    """
    lock = _lock(directory, wait, progress)
    try:
        yield
    finally:
        # Only while the lock is held; whoever opened this file meanwhile sees that it is gone.
        if [entry.name for entry in directory.iterdir()] == [_LOCK]:
            (directory / _LOCK).unlink()
            directory.rmdir()
        lock.close()


def require_local(field: str, directory: str | pathlib.Path) -> None:
    """Refuses a bucket: ArrayRecord reads and writes local files only. UsageError."""
    if "://" in str(directory):
        raise errors.UsageError(
            f"{field}: {directory} is a remote path, expected a local directory. Prepare and read "
            "locally and copy the directory as it is; docs/data.md has the commands."
        )


def begin(directory: pathlib.Path) -> pathlib.Path:
    """The folder to work in, under the lock, with whatever an interrupted run left there.

    Raises: UsageError where the directory holds anything that no run of ours left.
    """
    work = directory / _WORK
    with contextlib.suppress(FileNotFoundError, ValueError):
        _take_back(directory, json.loads((work / _MOVED).read_text()))
    foreign = sorted(p.name for p in directory.iterdir() if p.name not in (_LOCK, _WORK))
    if foreign:
        raise errors.UsageError(
            f"{directory}: holds other files ({', '.join(foreign[:5])}), expected a new or empty "
            "directory. Name another --out; nothing was removed."
        )
    work.mkdir(exist_ok=True)
    return work


def publish(directory: pathlib.Path, manifest: manifest_lib.Manifest) -> None:
    """Moves the manifest's files out of the work folder; the manifest makes them a dataset."""
    work = directory / _WORK
    names = [manifest.tokenizer.file, *(record.file for record in manifest.documents.values())]
    names += [shard.file for split in manifest.splits.values() for shard in split.shards]
    moved = work / _MOVED
    with open(moved, "w", encoding="utf-8") as file:
        json.dump(names, file)
        file.flush()
        os.fsync(file.fileno())
    try:
        for name in names:
            os.replace(work / name, directory / name)
        # What a failed write leaves must not lie among the user's files.
        manifest_lib.write(manifest, work)
        manifest_lib.sync_directory(directory)
        os.replace(work / manifest_lib.FILE_NAME, directory / manifest_lib.FILE_NAME)
        manifest_lib.sync_directory(directory)
    except BaseException:
        if not (directory / manifest_lib.FILE_NAME).exists():
            _take_back(directory, names)
        raise
    discard(directory)


def discard(directory: pathlib.Path) -> None:
    """Removes the work folder, which holds only what a run wrote itself."""
    shutil.rmtree(directory / _WORK, ignore_errors=True)


def _take_back(directory: pathlib.Path, names: list[str]) -> None:
    """Undoes a move that was cut short: without its manifest no file belongs outside."""
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.replace(directory / name, directory / _WORK / name)
    (directory / _WORK / _MOVED).unlink(missing_ok=True)


def _lock(directory: pathlib.Path, wait: bool, progress: Callable[[str], None]) -> IO[str]:
    path = directory / _LOCK
    told = False
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", encoding="utf-8")
        except (FileExistsError, NotADirectoryError):
            raise errors.StorageError(
                f"{directory}: a file stands in its way, expected a directory or nothing. "
                "Name another --out."
            ) from None
        except FileNotFoundError:
            continue  # its last holder removed the directory just now
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            if not wait:
                raise errors.UsageError(
                    f"{directory}: {holder} is writing it. Wait for it, or name another --out."
                ) from None
            if not told:
                progress(f"waiting for {holder}, which is writing {directory}")
                told = True
            time.sleep(0.2)
            continue
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # the holder before removed this file: lock the new one
    file.truncate(0)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()} (since {started})\n")
    file.flush()
    return file
