"""A dataset in a bucket, fetched once into the user's cache and read there.

The copy lies in a folder that is named after the sha256 of its dataset.json: another dataset at the
same address is another folder, and one dataset at two addresses is fetched once.
"""

import hashlib
import pathlib
from collections.abc import Callable

from qkjax import buckets, errors, files
from qkjax.cli import places
from qkjax.data import manifest as manifest_lib

_LOCK = ".fetch.lock"


def local_directory(
    field: str, directory: str | pathlib.Path, progress: Callable[[str], None] = print
) -> pathlib.Path:
    """The directory itself, or the local copy of one in a bucket, which is fetched where needed.

    Every file is compared with its sha256 of dataset.json as it comes, and dataset.json is written
    last. What an interrupted fetch has left is used. One process fetches, others of this machine
    wait for it.

    Args:
        field: what the user wrote the directory into, for messages.
    Raises:
        UsageError: a remote path of another kind, no bucket, no dataset in it, or a damaged one.
        StorageError: the bucket cannot be reached, or the disk failed.
    """
    if not buckets.is_address(directory):
        require_local(field, directory)
        return pathlib.Path(directory)
    source = buckets.open_folder(field, str(directory))
    content = source.read(manifest_lib.FILE_NAME)
    if content is None:
        raise errors.UsageError(
            f"{field}: {source.address} holds no {manifest_lib.FILE_NAME}, so it is no finished "
            "dataset. Check the address, or let the copy to it end."
        )
    manifest = manifest_lib.parse(content, f"{source.address}/{manifest_lib.FILE_NAME}")
    folder = places.cache() / "datasets" / hashlib.sha256(content).hexdigest()[:16]
    if not _is_whole(folder, manifest):
        _fetch(source, manifest, content, folder, progress)
    return folder


def require_local(field: str, directory: str | pathlib.Path) -> None:
    """Refuses remote paths that are neither gs:// nor s3://.

    Raises:
        UsageError: the path is one.
    """
    if "://" in str(directory):
        raise errors.UsageError(
            f"{field}: {directory} is a remote path, expected a local directory, gs:// or s3://. "
            "Copy the directory as it is; docs/data.md has the commands."
        )


def explained(
    error: errors.UsageError, asked: str | pathlib.Path, folder: pathlib.Path
) -> errors.UsageError:
    """An error about a file of `folder`; where that is the copy of `asked`, it says how to fix it.

    Args:
        asked: the directory or address that the user named.
    """
    if not buckets.is_address(asked):
        return error
    text = str(error).removesuffix(manifest_lib.REBUILD)
    return errors.UsageError(
        f"{text}Remove {folder} and run the same command again: it is a copy of {asked}."
    )


def _is_whole(folder: pathlib.Path, manifest: manifest_lib.Manifest) -> bool:
    """Whether all files are there with their sizes; whoever reads them compares the digests."""
    names = [manifest_lib.FILE_NAME, *manifest.digests]
    if not all((folder / name).is_file() for name in names):
        return False
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    return all((folder / shard.file).stat().st_size == shard.num_bytes for shard in shards)


def _fetch(
    source: buckets.Folder,
    manifest: manifest_lib.Manifest,
    content: bytes,
    folder: pathlib.Path,
    progress: Callable[[str], None],
) -> None:
    def tell(holder: str) -> None:
        progress(f"{folder}: waiting for {holder}, who fetches {source.address}")

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.storage_error(folder, error) from error
    with files.lock(folder / _LOCK, wait=True, waiting=tell):
        if _is_whole(folder, manifest):
            return
        files.remove_temporary(folder)
        missing = {
            name: digest
            for name, digest in manifest.digests.items()
            if not (folder / name).is_file() or files.sha256(folder / name) != digest
        }
        progress(f"{source.address}: fetching {len(missing)} files into {folder}")
        source.fetch(missing, folder, progress)
        files.replace(folder / manifest_lib.FILE_NAME, content)
