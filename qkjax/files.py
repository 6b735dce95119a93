"""The only access to the disk: files replaced whole, locks, JSON and npz read or refused, digests.

What is written here is seen by readers, and found after a crash, as the old file or as the new one.
What is read here is refused with one line that names the file where it is damaged in any way: a
torn JSON, a flipped byte in a zip archive, a field of another type.
"""

import contextlib
import datetime
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import pathlib
import secrets
import socket
import time
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import IO, Any

import numpy as np

from qkjax import errors

_READ_BYTES = 1 << 20
_TEMPORARY = ".{name}.{token}.tmp"  # the token cannot be predicted: nobody can put a link there
# A file system without fsync for directories, such as some network mounts: the rename itself holds.
_NO_DIRECTORY_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)
# Of a JSON file that carries one: the sha256 of all its other values.
SEAL = "own_sha256"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What numpy and zipfile raise on a damaged archive, each seen on files with a flipped byte.
_DAMAGE = (
    ValueError,
    KeyError,
    EOFError,
    IndexError,
    NotImplementedError,
    RuntimeError,
    OverflowError,
    MemoryError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
)

Types = type | tuple[type, ...]


# --------------------------------------------------------------------------------------------
# What is said of a file that cannot be used.


def storage_error(path: str | os.PathLike[str], error: OSError) -> errors.StorageError:
    """The failure of one file in the form that the command line shows; "make room" only if so."""
    fix = (
        "Make room on the disk, then run the same command again."
        if error.errno in NO_SPACE
        else "Check the path and its file system, then run the same command again."
    )
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno == errno.ELOOP:
        reason, fix = "a link is in its place", "Remove the link."
    return errors.StorageError(f"{os.fspath(path)}: cannot be read or written ({reason}). {fix}")


def damaged(path: str | os.PathLike[str], what: str, fix: str) -> errors.UsageError:
    """A file that is there and cannot be what it should be.

    Args:
        fix: a sentence that says how the user gets a sound one.
    """
    return errors.UsageError(f"{os.fspath(path)}: damaged ({what}). {fix}")


# --------------------------------------------------------------------------------------------
# Writing.


def replace(path: str | os.PathLike[str], data: bytes | Iterable[bytes]) -> None:
    """Replaces a file as a whole, and its directory where that is missing.

    The new bytes are on the disk before they take the name. The temporary file has a name of its
    own and is no link. It goes when the write fails; `remove_temporary` removes what kills left.

    Args:
        data: the bytes, or blocks of them; what their source raises is raised here.
    Raises:
        StorageError: the disk is full or fails; the old file stays.
    """
    target = pathlib.Path(path)
    temporary = target.with_name(_TEMPORARY.format(name=target.name, token=secrets.token_hex(8)))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
                file.writelines([data] if isinstance(data, bytes) else data)
                sync(file)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(target.parent)
    except OSError as error:
        raise storage_error(target, error) from error


def unlinked(path: str, flags: int) -> int:
    """Opener for `open` that refuses a link, whose target is no file of ours, with ELOOP."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Replaces a JSON file; keys keep their order, numbers follow `plain`.

    Raises:
        StorageError: the disk is full or fails; the old file stays.
    """
    replace(path, (json.dumps(plain(value), indent=2, allow_nan=False) + "\n").encode())


def write_sealed(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """As `write_json`, with a digest of all values, by which `read_object` knows an edited file.

    Raises:
        StorageError: the disk is full or fails; the old file stays.
    """
    replace(path, sealed_bytes(value))


def sealed_bytes(value: Mapping[str, Any]) -> bytes:
    """The file that `write_sealed` writes."""
    values = plain({name: item for name, item in value.items() if name != SEAL})
    sealed = {**values, SEAL: digest_of(values)}
    return (json.dumps(sealed, indent=2, allow_nan=False) + "\n").encode()


def digest_of(values: Mapping[str, Any], but: str = SEAL) -> str:
    """sha256 of JSON values but one; the order of names and the space between do not matter."""
    rest = {name: value for name, value in values.items() if name != but}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Replaces an npz file; floats as float32, integers as they are, sorted by name.

    Equal arrays give equal bytes; `read_arrays` reads them.

    Raises:
        TypeError: something that is not an array of numbers.
        StorageError: the disk is full or fails; the old file stays.
    """
    replace(path, arrays_to_bytes(arrays, path))


def arrays_to_bytes(arrays: Mapping[str, Any], path: str | os.PathLike[str] = "npz") -> bytes:
    """The npz file that `write_arrays` writes.

    Raises:
        TypeError: something that is not an array of numbers; names `path`.
    """
    converted: dict[str, Any] = {}
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        if array.dtype.kind in "OUSMmc":
            raise TypeError(f"{path}: {name} has dtype {array.dtype}, expected numbers")
        converted[name] = array if array.dtype.kind in "biu" else array.astype(np.float32)
    buffer = io.BytesIO()
    np.savez(buffer, **converted)  # stamps every member with 1980-01-01, not with the time
    return buffer.getvalue()


def write_array(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Replaces an npy file, its type kept; `read_array` reads it.

    Raises:
        StorageError: the disk is full or fails; the old file stays.
    """
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    replace(path, buffer.getvalue())


def move(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Renames a file or directory over `target`, so that the new name survives a power cut.

    Raises:
        StorageError: the file system refuses; nothing has moved.
    """
    try:
        os.replace(source, target)
        for folder in {pathlib.Path(source).parent, pathlib.Path(target).parent}:
            if folder.is_dir():
                sync_directory(folder)
    except OSError as error:
        raise storage_error(target, error) from error


def sync(file: IO[Any]) -> None:
    """Writes an open file through to the disk.

    Raises:
        OSError: the disk is full or fails.
    """
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: str | os.PathLike[str]) -> None:
    """Writes a closed file, which a library has written, through to the disk.

    Raises:
        OSError: the disk is full or fails.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: str | os.PathLike[str]) -> None:
    """Makes renames inside `directory` survive a power cut, where its file system can.

    Raises:
        OSError: the disk fails.
    """
    try:
        sync_path(directory)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise


def remove_temporary(directory: str | os.PathLike[str]) -> None:
    """Removes what killed writers left in `directory`; call it as the holder of its lock.

    Raises:
        StorageError: the file system refuses.
    """
    pattern = _TEMPORARY.format(name="*", token="?" * 16)
    for path in pathlib.Path(directory).glob(pattern):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(path, error) from error


# --------------------------------------------------------------------------------------------
# Locks.


@contextlib.contextmanager
def lock(
    path: str | os.PathLike[str],
    *,
    shared: bool = False,
    wait: bool = False,
    waiting: Callable[[str], None] = lambda holder: None,
    elsewhere: str = "another directory",
) -> Iterator[None]:
    """Holds a lock file while entered; the kernel drops the lock when the process dies.

    The file says who holds it: pid, host and start time, as JSON. It stays when the lock goes.

    Args:
        shared: only processes that do not share are kept out.
        wait: wait for the holder instead of refusing.
        waiting: is told once who the holder is.
        elsewhere: what the user can give instead, for the refusal.
    Raises:
        UsageError: another process holds it.
        StorageError: the file system refuses the file, or knows no locks.
    """
    path = pathlib.Path(path)
    try:
        file = os.fdopen(unlinked(os.fspath(path), os.O_RDWR | os.O_CREAT), "r+b")
    except OSError as error:
        raise storage_error(path, error) from error
    with file:
        _take(file, path, shared, waiting if wait else None, elsewhere)
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "start_time": now()}
        try:
            file.seek(0)
            file.truncate(0)
            file.write((json.dumps(holder) + "\n").encode())
            file.flush()
        except OSError as error:
            raise storage_error(path, error) from error
        yield


def _take(
    file: IO[bytes],
    path: pathlib.Path,
    shared: bool,
    waiting: Callable[[str], None] | None,
    elsewhere: str,
) -> None:
    told = False
    while True:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in _NO_LOCKS:
                raise errors.StorageError(
                    f"{path}: this file system has no locks ({error.strerror}), so two processes "
                    "could use it at the same time. Use a directory on a local disk."
                ) from error
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise storage_error(path, error) from error
        held = holder_of(path)
        by = (
            f"pid {held['pid']} on {held['host']}, started {held['start_time']}"
            if held
            else "it has not written its pid yet"
        )
        if waiting is None:
            raise errors.UsageError(
                f"{path}: another process runs in this directory ({by}). "
                f"Wait for it or stop it, or give {elsewhere}."
            )
        if not told:
            waiting(by)
            told = True
        time.sleep(0.1)


def holder_of(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """pid, host and start_time that a lock file names; None where it names nobody (yet)."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        held = json.loads(pathlib.Path(path).read_bytes())
        fields = {"pid": int, "host": str, "start_time": str}
        if isinstance(held, dict) and all(type(held.get(k)) is t for k, t in fields.items()):
            return held
    return None


def now() -> str:
    """The time of day in UTC, to the second, as ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# --------------------------------------------------------------------------------------------
# Reading.


def read_object(path: str | os.PathLike[str], fix: str) -> dict[str, Any] | None:
    """A file that holds one JSON object; None where there is no such file.

    The digest of `write_sealed` is compared where there is one, and is not among the values.

    Args:
        fix: as of `damaged`.
    Raises:
        UsageError: the file is damaged or was edited, or holds something else.
        StorageError: the disk failed.
    """
    try:
        data = pathlib.Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise storage_error(path, error) from error
    value = parse_json(data, path, fix)
    if not isinstance(value, dict):
        raise damaged(path, "it is not a JSON object", fix)
    if SEAL in value and (seal := value.pop(SEAL)) != (found := digest_of(value)):
        raise damaged(path, f"its values have sha256 {found[:12]}, {SEAL} is {str(seal)[:12]}", fix)
    return value


def parse_json(data: bytes, path: str | os.PathLike[str], fix: str) -> Any:
    """JSON as we write it: no NaN, no infinity, no unlimited nesting.

    Raises:
        UsageError: the bytes are something else; names `path`.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}")

    try:
        return json.loads(data, parse_constant=refuse, parse_float=_finite)
    except RecursionError as error:
        raise damaged(path, "it is nested too deeply", fix) from error
    except ValueError as error:
        raise damaged(path, str(error), fix) from error


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"it holds {digits:.20}, which is not a finite number")
    return value


def need(
    path: str | os.PathLike[str],
    where: str,
    value: Any,
    fields: Mapping[str, Types] | Collection[str],
    fix: str,
) -> None:
    """Refuses an object of a file that lacks a field, or has it with another type.

    Args:
        where: the object's place in the file, for people; "" is the file itself.
        fields: names, or names with the type or types that each may have (bool is no int).
    Raises:
        UsageError: names the file, the place and the fields.
    """
    inside = f"{where} " if where else "it "
    if not isinstance(value, Mapping):
        raise damaged(path, f"{inside}is not a JSON object", fix)
    absent = [field for field in fields if field not in value]
    if absent:
        raise damaged(path, f"{inside}lacks {', '.join(absent)}", fix)
    if not isinstance(fields, Mapping):
        return
    for field, types in fields.items():
        allowed = types if isinstance(types, tuple) else (types,)
        found = value[field]
        fits = type(found) in allowed or (float in allowed and type(found) is int)
        if not fits:
            expected = " or ".join("null" if t is type(None) else t.__name__ for t in allowed)
            place = f"{where}." if where else ""
            raise damaged(path, f"{place}{field} is {found!r:.60}, expected {expected}", fix)


def read_arrays(
    path: str | os.PathLike[str], fix: str, names: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """Every array of an npz file, each read whole and checked against the archive's checksum.

    Args:
        fix: as of `damaged`.
        names: arrays that must be among them.
    Raises:
        UsageError: the file is damaged or missing, or lacks one of `names`.
        StorageError: the disk failed.
    """
    with _array_errors(path, fix):
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is not an npz archive")
        with archive:
            arrays = {name: archive[name] for name in archive.files}
    bad = [name for name, x in arrays.items() if not isinstance(x, np.ndarray)]
    if bad:
        raise damaged(path, f"{', '.join(bad)} are not arrays", fix)
    absent = [name for name in names if name not in arrays]
    if absent:
        raise damaged(path, f"it lacks {', '.join(absent)}", fix)
    return arrays


def read_array(path: str | os.PathLike[str], fix: str, *, mapped: bool = False) -> np.ndarray:
    """The array of an npy file.

    Args:
        fix: as of `damaged`.
        mapped: its memory is the file's, read where it is used and shared with other processes.
    Raises:
        UsageError: the file is damaged or missing.
        StorageError: the disk failed.
    """
    with _array_errors(path, fix):
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    if not isinstance(array, np.ndarray):
        array.close()
        raise damaged(path, "it is an archive of arrays", fix)
    return array


@contextlib.contextmanager
def _array_errors(path: str | os.PathLike[str], fix: str) -> Iterator[None]:
    """Turns any error of numpy about a file into one of ours."""
    try:
        yield
    except FileNotFoundError as error:
        raise errors.UsageError(f"{os.fspath(path)}: missing. {fix}") from error
    except OSError as error:
        raise storage_error(path, error) from error
    except _DAMAGE as error:
        raise damaged(path, errors.one_line(error), fix) from error


def sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a file's bytes, hex.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------
# Values as JSON has them.


def plain(value: Any) -> Any:
    """The value as JSON has it: tuples as lists, arrays of one element as numbers.

    Non-finite floats become None. Float32 and narrower become the shortest decimal that reads back
    as the same float32 (0.1, not 0.10000000149011612); float64 keeps all of its digits.

    Raises:
        TypeError: a value that is none of these.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):  # np.float64 as well
        return float(value) if math.isfinite(value) else None
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind in "OUSMmc":
        raise TypeError(f"{value!r} is neither a number nor a container of numbers")
    if array.dtype.kind in "biu" or array.dtype == np.float64:
        return plain(array.item())
    return _shortest(np.float32(array.item()))


def _shortest(value: np.float32) -> float | None:
    if not np.isfinite(value):
        return None
    short = float(str(value))
    # Decimal -> float64 -> float32 rounds twice; were that ever to miss, the exact value stands.
    return short if np.float32(short) == value else float(value)
