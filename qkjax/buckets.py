"""The only access to buckets: folders at gs:// and s3://, read and written through pyarrow.

A bucket keeps whole objects. It has no locks, no renames and no appended rows, so nothing works
inside one: files are copied out of it and into it, each whole and compared with its sha256 or its
size, and the file that makes a folder complete is written last. Credentials are found where every
tool of these stores finds them; nothing of them is read, stored or logged here.
"""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qkjax import errors, files

_SCHEME = re.compile(r"(gs|s3)://")
_ADDRESS = re.compile(r"(gs|s3)://([a-z0-9][a-z0-9._-]+)((?:/[^/?#*]+)*)/?")
_BLOCK_BYTES = 16 << 20
_COPIES = 8  # files at a time
_RETRY = datetime.timedelta(seconds=30)  # of gs://, which else retries for 15 minutes
_CONNECT_SECONDS = 10
# How the two libraries say that the store refuses us, and that they found no credentials at all.
_DENIED = re.compile(
    "ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|EXPIRED_?TOKEN"
    "|HTTP status 40[013]|PERMISSION_DENIED|UNAUTHENTICATED",
    re.IGNORECASE,
)
_NO_LOGIN = "Could not create a OAuth2 access token"
_ABSENT = re.compile("NO_SUCH_BUCKET|NO_SUCH_KEY|NOT_FOUND|not found")
_LOGIN = {
    "gs": "Log in (gcloud auth application-default login), or name a key file in "
    "GOOGLE_APPLICATION_CREDENTIALS.",
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
}


class _Denied(errors.UsageError):
    """The store answers, and refuses."""


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in a bucket that `open_folder` takes."""
    return _SCHEME.match(os.fspath(path)) is not None


def open_folder(field: str, address: str) -> "Folder":
    """The folder at gs://BUCKET/FOLDER or s3://BUCKET/FOLDER, which need not exist.

    AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL names another store than Amazon's, such as MinIO, and
    CLOUD_STORAGE_EMULATOR_ENDPOINT another than Google's.

    Args:
        field: what the user wrote the address into, for messages.
    Raises:
        UsageError: it is no such address, or there is no such bucket.
        StorageError: the store cannot be reached.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or any(part in (".", "..") for part in match[3].split("/")):
        raise errors.UsageError(
            f"{field}: {address} is no folder of a bucket, expected gs://BUCKET/FOLDER or "
            "s3://BUCKET/FOLDER. Write it so, without ?, # and *."
        )
    from pyarrow import fs

    scheme, bucket, path = match.groups()
    whole = f"{scheme}://{bucket}{path}"
    with _explained(whole):
        system = _file_system(scheme, bucket)
    with contextlib.suppress(_Denied):  # who may read objects need not be allowed to ask this
        with _explained(whole):
            absent = system.get_file_info(bucket).type == fs.FileType.NotFound
        if absent:
            raise errors.UsageError(
                f"{field}: {whole}: there is no bucket {bucket}. Make it, or fix its name."
            )
    return Folder(whole, system, bucket + path)


def _file_system(scheme: str, bucket: str) -> Any:
    """pyarrow's file system of a store."""
    from pyarrow import fs

    if scheme == "gs":
        endpoint = os.environ.get("CLOUD_STORAGE_EMULATOR_ENDPOINT", "")
        if not endpoint:
            return fs.GcsFileSystem(retry_time_limit=_RETRY)
        kind, _, host = endpoint.rpartition("://")
        return fs.GcsFileSystem(
            anonymous=True, scheme=kind or "https", endpoint_override=host, retry_time_limit=_RETRY
        )
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    endpoint = next((os.environ[name] for name in names if os.environ.get(name)), "")
    if not endpoint:
        region = fs.resolve_s3_region(bucket)
        return fs.S3FileSystem(region=region, connect_timeout=_CONNECT_SECONDS)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return fs.S3FileSystem(
        region=region, endpoint_override=endpoint, connect_timeout=_CONNECT_SECONDS
    )


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder of a bucket; `open_folder` makes it."""

    address: str  # without a slash at its end
    system: Any  # pyarrow.fs.FileSystem
    path: str  # BUCKET/FOLDER, as the system takes it

    def names(self) -> list[str]:
        """Every object under the folder, by its name in it; none where there is no folder.

        Raises:
            UsageError: access is denied.
            StorageError: the store cannot be reached.
        """
        from pyarrow import fs

        selector = fs.FileSelector(self.path, recursive=True, allow_not_found=True)
        with _explained(self.address):
            found = self.system.get_file_info(selector)
        start = len(self.path) + 1
        return sorted(info.path[start:] for info in found if info.type != fs.FileType.Directory)

    def read(self, name: str) -> bytes | None:
        """An object's bytes; None where there is no such object.

        Raises:
            UsageError: access is denied.
            StorageError: the store cannot be reached.
        """
        with _explained(self._where(name)):
            try:
                with self.system.open_input_stream(f"{self.path}/{name}") as stream:
                    return stream.read()
            except FileNotFoundError:
                return None

    def fetch(
        self, digests: Mapping[str, str], into: pathlib.Path, progress: Callable[[str], None]
    ) -> None:
        """Copies objects into a local directory; each takes its name there when it is whole.

        Args:
            digests: sha256 hex of every object, by name.
            into: keeps what was copied before a failure.
            progress: is told after every tenth of them.
        Raises:
            UsageError: an object is absent, or is not what its digest says.
            StorageError: the store cannot be reached, or the disk failed.
        """

        def copy(name: str) -> None:
            files.replace(into / name, self._blocks(name, digests[name]))

        _all_of(copy, list(digests), lambda share: progress(f"{self.address}: {share} fetched"))

    def store(
        self,
        paths: Sequence[pathlib.Path],
        last: pathlib.Path,
        progress: Callable[[str], None],
    ) -> None:
        """Copies local files into the folder under their own names, `last` after all others.

        Raises:
            UsageError: access is denied.
            StorageError: the store cannot be reached, or the disk failed; `last` is not there.
        """
        _all_of(self._put, list(paths), lambda share: progress(f"{self.address}: {share} copied"))
        self._put(last)

    def _where(self, name: str) -> str:
        return f"{self.address}/{name}"

    def _blocks(self, name: str, sha256: str) -> Iterator[bytes]:
        """An object's bytes; raises after the last one if its sha256 differs."""
        digest = hashlib.sha256()
        with _explained(self._where(name)):
            with self.system.open_input_stream(f"{self.path}/{name}") as stream:
                while block := stream.read(_BLOCK_BYTES):
                    digest.update(block)
                    yield block
        if (found := digest.hexdigest()) != sha256:
            raise errors.UsageError(
                f"{self._where(name)}: expected sha256 {sha256}, found {found}. "
                "Copy the whole folder there again."
            )

    def _put(self, path: pathlib.Path) -> None:
        key = f"{self.path}/{path.name}"
        try:
            size = path.stat().st_size
            source = path.open("rb")
        except OSError as error:
            raise files.storage_error(path, error) from error
        with source, _explained(self._where(path.name)):
            with self.system.open_output_stream(key) as stream:
                while block := source.read(_BLOCK_BYTES):
                    stream.write(block)
            found = self.system.get_file_info(key).size
        if found != size:
            raise errors.StorageError(
                f"{self._where(path.name)}: expected {size} bytes, found {found}. "
                "Run the same command again."
            )


def _all_of(
    work: Callable[[Any], None], items: Sequence[Any], progress: Callable[[str], None]
) -> None:
    """Calls `work` for every item, some at a time; after a failure no other one starts."""
    pool = concurrent.futures.ThreadPoolExecutor(_COPIES)
    told = 0
    try:
        for done, future in enumerate([pool.submit(work, item) for item in items], 1):
            future.result()
            if done * 10 // len(items) > told:
                told = done * 10 // len(items)
                progress(f"{done} of {len(items)} files")
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turns the errors of both libraries, which are OSError and ValueError, into ours."""
    try:
        yield
    except (OSError, ValueError) as error:
        text, reason = str(error), errors.one_line(error)
        if isinstance(error, FileNotFoundError) or _ABSENT.search(text):
            raise errors.UsageError(
                f"{address}: there is no such object or bucket. Check the name, and that the copy "
                "to it has ended."
            ) from error
        login = _LOGIN[address[:2]]
        if _NO_LOGIN in text:
            raise errors.UsageError(
                f"{address}: no access token was obtained ({reason}). {login}"
            ) from error
        if _DENIED.search(text):
            raise _Denied(f"{address}: access is denied ({reason}). {login}") from error
        raise errors.StorageError(
            f"{address}: cannot be reached ({reason}). Check the network, then run the same "
            "command again."
        ) from error
