"""Text to a dataset directory: whole-document hold-out, tokens, shards, manifest."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Sequence

from qkjax import buckets, errors
from qkjax.cli import places
from qkjax.data import check, mirror, shards, sources, staging
from qkjax.data import manifest as manifest_lib
from qkjax.data import tokenizer as tokenizer_lib
from qkjax.data.job import Job
from qkjax.data.request import Request


def prepare(
    request: Request,
    directory: str | pathlib.Path,
    *,
    workers: int = 1,
    wait: bool = False,
    progress: Callable[[str], None] = print,
) -> manifest_lib.Manifest:
    """Makes the dataset that `request` describes in `directory`, or finds it there finished.

    Interrupted, it resumes after the last finished shard when it is called again. For a bucket
    (gs://, s3://) it is made in the user's cache and copied there, dataset.json last.

    Args:
        directory: new or empty; otherwise it must hold this very dataset.
        workers: processes that encode text; 1: this process. The dataset does not depend on it.
        wait: wait for another process that is writing there, instead of refusing.
        progress: is given one line now and then.
    Returns: the manifest; a directory without its dataset.json is unfinished.
    Raises:
        UsageError: bad input, an unknown name, too little text, another dataset or foreign files in
            `directory`; of a bucket also: there is none, or access is denied.
        StorageError: the disk failed, or the bucket cannot be reached.
    """
    if buckets.is_address(directory):
        return _prepare_in_bucket(request, str(directory), workers, wait, progress)
    mirror.require_local("--out", directory)
    folder = pathlib.Path(directory)
    opened = [
        sources.open_source(spec, max_bad_lines=request.max_bad_lines) for spec in request.sources
    ]
    _refuse_shared_files(opened)
    tokenizer = None
    if tokenizer_lib.trained_size(request.tokenizer) is None:
        tokenizer = tokenizer_lib.load(request.tokenizer, eos_token=request.eos_token)
    finished = _find_finished(request, folder)
    if finished is None:
        with staging.locked(folder, wait=wait, progress=progress):
            finished = _find_finished(request, folder)  # another process may have made it meanwhile
            if finished is None:
                work = staging.begin(folder)
                try:
                    job = Job(request, opened, tokenizer, work, progress)
                    try:
                        manifest = job.run(folder.resolve().name, workers)
                        staging.publish(folder, manifest)
                    except errors.UsageError:
                        staging.discard(folder)  # what is kept is of use to the same command only
                        raise
                finally:
                    if not (work / staging.JOURNAL).exists():
                        staging.discard(folder)
                progress(f"{folder}: {_summary(manifest)}")
                lost = manifest.dropped["lost_by_tokenizer"]
                if lost:
                    progress(
                        f"{folder}: {lost:,} documents left out, because the tokenizer does not "
                        "restore their text"
                    )
                return manifest
    _check_same_tokenizer(finished, folder, tokenizer)
    _check_same_text(finished, folder, opened, progress)
    progress(f"{folder}: already complete, nothing to do")
    return finished


def _prepare_in_bucket(
    request: Request,
    address: str,
    workers: int,
    wait: bool,
    progress: Callable[[str], None],
) -> manifest_lib.Manifest:
    target = buckets.open_folder("--out", address)
    key = hashlib.sha256(target.address.encode()).hexdigest()[:16]
    local = places.cache() / "prepared" / key / target.address.rpartition("/")[2]
    finished = target.read(manifest_lib.FILE_NAME)
    if finished is None:
        # By their names before hours of work, and by the manifest after it.
        _refuse_objects(target, [n for n in target.names() if not shards.FILE_NAMES.fullmatch(n)])
    elif not _holds(local, finished):
        local = mirror.local_directory("--out", address, progress)
    try:
        manifest = prepare(request, local, workers=workers, wait=wait, progress=progress)
    except errors.UsageError as error:
        if finished is None:
            raise
        raise errors.UsageError(str(error).replace(str(local), target.address)) from error
    if finished is not None:
        progress(f"{target.address}: already complete, nothing to do")
        return manifest
    manifest_lib.verify_digests(manifest, local)
    _refuse_objects(target, sorted({*target.names()} - manifest.digests.keys()))
    progress(f"{target.address}: copying {local} to it")
    paths = [local / name for name in manifest.digests]
    target.store(paths, local / manifest_lib.FILE_NAME, progress)
    progress(f"{target.address}: complete; {local} is not needed any more")
    return manifest


def _holds(folder: pathlib.Path, content: bytes) -> bool:
    path = folder / manifest_lib.FILE_NAME
    return path.is_file() and path.read_bytes() == content


def _refuse_objects(target: buckets.Folder, names: Sequence[str]) -> None:
    if names:
        raise errors.UsageError(
            f"{target.address}: holds other objects ({', '.join(names[:5])}), expected a new or "
            "empty folder. Name another --out; nothing was removed."
        )


def prepare_embedded(
    directory: str | pathlib.Path,
    *,
    sequence_length: int = 256,
    vocab_size: int = 4096,
    validation_tokens: int = 100_000,
    end_of_text: bool = True,
    progress: Callable[[str], None] = print,
) -> pathlib.Path:
    """The embedded corpus as a dataset in `directory`: made when absent, reused when present.

    Libraries repeat each other's docstrings (jax.numpy those of numpy), so training documents that
    share a 13-gram with a validation document are dropped.
    A dataset that was made with other versions of the libraries is still reused, so that an upgrade
    does not change the data of runs that are compared on it.
    Several processes may ask at once: one makes it, the others wait.
    """
    folder = pathlib.Path(directory)
    request = Request(
        sources=("docstrings",),
        tokenizer=f"train:{vocab_size}",
        sequence_length=sequence_length,
        validation_tokens=validation_tokens,
        end_of_text=end_of_text,
        decontaminate=True,
    )
    if _find_finished(request, folder) is None:
        prepare(request, folder, wait=True, progress=progress)
    return folder


def _refuse_shared_files(opened: Sequence[sources.Source]) -> None:
    """A file that two sources read would be in the dataset twice: UsageError."""
    readers: dict[tuple[int, int, str], sources.Source] = {}
    for source in opened:
        for path in source.files:
            status = path.stat()
            other = readers.setdefault((status.st_dev, status.st_ino, source.field), source)
            if other is not source:
                raise errors.UsageError(
                    f"--source={source.name}: reads {path}, as --source={other.name} does, so its "
                    "documents would occur twice. Leave one of them out."
                )


def _find_finished(request: Request, folder: pathlib.Path) -> manifest_lib.Manifest | None:
    """The finished dataset in `folder`, None where there is none.

    Raises:
        UsageError: another one is there.
    """
    if not (folder / manifest_lib.FILE_NAME).exists():
        return None
    found = manifest_lib.load(folder)
    wanted = request.plain()
    defaults = {f.name: f.default for f in dataclasses.fields(Request)}
    held = {**defaults, **found.request}  # an older dataset lacks the options that came later
    differences = [
        f"{key}: expected {wanted[key]}, found {held[key]}"
        for key in wanted
        if held[key] != wanted[key]
    ]
    if differences:
        raise errors.UsageError(
            f"{folder}: holds another dataset ({'; '.join(differences)}). "
            "Name another directory; nothing was removed."
        )
    manifest_lib.verify_files(found, folder)
    return found


def _check_same_tokenizer(
    found: manifest_lib.Manifest, folder: pathlib.Path, tokenizer: tokenizer_lib.Tokenizer | None
) -> None:
    if tokenizer is not None and tokenizer.sha256 != found.tokenizer.sha256:
        raise errors.UsageError(
            f"{folder}: was made with another tokenizer.json than --tokenizer names. "
            "Name another --out; nothing was removed."
        )


def _check_same_text(
    found: manifest_lib.Manifest,
    folder: pathlib.Path,
    opened: Sequence[sources.Source],
    progress: Callable[[str], None],
) -> None:
    """The same options, but is it the same text? UsageError where it is not."""
    for source, record in zip(opened, found.sources, strict=True):
        described, read_from = source.describe(), record["read_from"]
        recorded = {key: read_from[key] for key in described if key in read_from}
        if recorded != described:
            raise errors.UsageError(
                f"{folder}: was made from another {source.name}, expected {described}, "
                f"found {recorded}. Name another --out; nothing was removed."
            )
    for line in check.check_text(found, folder, opened):
        progress(line)


def _summary(manifest: manifest_lib.Manifest) -> str:
    return ", ".join(
        f"{split} {record.num_tokens:,} tokens of {manifest.documents[split].num_documents:,} "
        f"documents in {len(record.shards)} shards"
        for split, record in manifest.splits.items()
    )
