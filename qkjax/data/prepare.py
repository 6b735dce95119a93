"""Text to a dataset directory: whole-document hold-out, tokens, shards, manifest."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qkjax import errors
from qkjax.data import holdout, mixing, shards, sources, staging
from qkjax.data import manifest as manifest_lib
from qkjax.data import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True)
class Request:
    """What a dataset is made of: the options of tools/prepare_data.py.

    `weights` are shares of training tokens, one a source; one source needs none. `train_tokens`
    None means all of one source, or of a mix until the first source is used up. Token counts are
    rounded up to whole records.
    """

    sources: tuple[str, ...]
    tokenizer: str
    weights: tuple[float, ...] = ()
    sequence_length: int = 2048
    train_tokens: int | None = None
    validation_tokens: int = 5_000_000
    end_of_text: bool = True
    eos_token: str = ""
    max_bad_lines: int = 0

    def __post_init__(self) -> None:
        if not self.weights and len(self.sources) == 1:
            object.__setattr__(self, "weights", (1.0,))
        problems = list(_problems(self))
        if problems:
            raise errors.UsageError(f"{'; '.join(problems)}. See --help.")


def prepare(
    request: Request,
    directory: str | Path,
    *,
    wait: bool = False,
    progress: Callable[[str], None] = print,
) -> manifest_lib.Manifest:
    """Makes the dataset that `request` describes in `directory`, or finds it there finished.

    Args:
        directory: new or empty; otherwise it must hold this very dataset.
        wait: wait for another process that is writing there, instead of refusing.
        progress: is given one line now and then.
    Returns: the manifest; a directory without its dataset.json is unfinished.
    Raises: UsageError for bad input, an unknown name, too little text, another dataset or foreign
    files in `directory`; StorageError for the disk.
    """
    folder = Path(directory)
    opened = [
        sources.open_source(spec, max_bad_lines=request.max_bad_lines) for spec in request.sources
    ]
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
                    name = folder.resolve().name
                    manifest = _write(request, opened, tokenizer, name, work, progress)
                    staging.publish(folder, manifest)
                finally:
                    staging.discard(folder)
                progress(f"{folder}: {_summary(manifest)}")
                return manifest
    _check_same_origin(finished, folder, opened, tokenizer)
    progress(f"{folder}: already complete, nothing to do")
    return finished


def prepare_embedded(
    directory: str | Path,
    *,
    sequence_length: int = 256,
    vocab_size: int = 4096,
    validation_tokens: int = 100_000,
    end_of_text: bool = True,
    progress: Callable[[str], None] = print,
) -> Path:
    """The embedded corpus as a dataset in `directory`: made when absent, reused when present.

    A dataset that was made with other versions of the libraries is still reused, so that an
    upgrade does not take the data away from under the runs that are compared on it.
    Several processes may ask at once: one makes it, the others wait.
    """
    folder = Path(directory)
    request = Request(
        sources=("docstrings",),
        tokenizer=f"train:{vocab_size}",
        sequence_length=sequence_length,
        validation_tokens=validation_tokens,
        end_of_text=end_of_text,
    )
    if _find_finished(request, folder) is None:
        prepare(request, folder, wait=True, progress=progress)
    return folder


def _write(
    request: Request,
    opened: Sequence[sources.Source],
    tokenizer: tokenizer_lib.Tokenizer | None,
    name: str,
    work: Path,
    progress: Callable[[str], None],
) -> manifest_lib.Manifest:
    """Writes everything but dataset.json into `work`."""
    size = tokenizer_lib.trained_size(request.tokenizer)
    if tokenizer is None and size is not None:
        progress(f"training a tokenizer of {size} tokens on the training documents")
        tokenizer = tokenizer_lib.train(_training_texts(opened), size, eos_token=request.eos_token)
    assert tokenizer is not None  # a FILE was loaded before anything was created
    record = _write_tokenizer(tokenizer, work)
    progress(f"writing records of {request.sequence_length}+1 tokens")
    num_validation = math.ceil(request.validation_tokens / request.sequence_length)
    dropped = mixing.Dropped()
    held_out: set[int] = set()
    quotas = mixing.validation_quotas(num_validation * request.sequence_length + 1, request.weights)
    streams = [
        mixing.Stream(
            source,
            tokenizer,
            quota=quota,
            end_of_text=request.end_of_text,
            held_out=held_out,
            dropped=dropped,
        )
        for source, quota in zip(opened, quotas, strict=True)
    ]
    train = _writer(request, work, "train", tokenizer, request.train_tokens)
    mixing.write_train(streams, request.weights, train, progress)
    _check_enough(request, train)
    validation = _writer(request, work, "validation", tokenizer, request.validation_tokens)
    mixing.write_validation(streams, request.weights, validation)
    return _manifest(
        request, name, record, opened, dropped, {"train": train, "validation": validation}
    )


def _writer(
    request: Request,
    work: Path,
    split: str,
    tokenizer: tokenizer_lib.Tokenizer,
    num_tokens: int | None,
) -> shards.SplitWriter:
    return shards.SplitWriter(
        work,
        split,
        sequence_length=request.sequence_length,
        vocab_size=tokenizer.vocab_size,
        num_sources=len(request.sources),
        max_sequences=num_tokens and math.ceil(num_tokens / request.sequence_length),
    )


def _training_texts(opened: Sequence[sources.Source]) -> Iterator[str]:
    for source in opened:
        for document in source.documents():
            if not holdout.in_pool(holdout.hash64(holdout.normalise(document.text))):
                yield document.text


def _write_tokenizer(
    tokenizer: tokenizer_lib.Tokenizer, work: Path
) -> manifest_lib.TokenizerRecord:
    path = work / tokenizer_lib.FILE_NAME
    with open(path, "wb") as file:
        file.write(tokenizer.content)
        file.flush()
        os.fsync(file.fileno())
    return manifest_lib.TokenizerRecord(
        file=path.name,
        sha256=manifest_lib.file_sha256(path),
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
    )


def _check_enough(request: Request, train: shards.SplitWriter) -> None:
    names = ", ".join(request.sources)
    if request.train_tokens is not None and not train.full:
        at_shares = " at these weights" if len(request.sources) > 1 else ""
        raise errors.UsageError(
            f"--train_tokens: {request.train_tokens} in whole records need "
            f"{(train.max_tokens or 0) + 1} tokens, {names} holds {train.num_tokens}{at_shares}. "
            "Ask for fewer, or bring more text."
        )
    if not train.num_sequences:
        raise errors.UsageError(
            f"--source={names}: one record needs {request.sequence_length + 1} training tokens, "
            f"found {train.num_tokens}. Bring more text, or lower --sequence_length."
        )


def _manifest(
    request: Request,
    name: str,
    tokenizer: manifest_lib.TokenizerRecord,
    opened: Sequence[sources.Source],
    dropped: mixing.Dropped,
    writers: dict[str, shards.SplitWriter],
) -> manifest_lib.Manifest:
    written = {split: writer.close() for split, writer in writers.items()}
    train = written["train"]
    total = math.fsum(request.weights)
    return manifest_lib.Manifest(
        name=name,
        sequence_length=request.sequence_length,
        dtype=shards.token_dtype(tokenizer.vocab_size),
        end_of_text=request.end_of_text,
        tokenizer=tokenizer,
        sources=tuple(
            {
                "name": source.name,
                "weight": weight / total,
                "documents": documents,
                "tokens": tokens,
                "read_from": source.describe(),
            }
            for source, weight, documents, tokens in zip(
                opened,
                request.weights,
                train.documents_by_source,
                train.tokens_by_source,
                strict=True,
            )
        ),
        split=dict(holdout.RULE),
        dropped={
            **dataclasses.asdict(dropped),
            "bad_lines": sum(source.bad_lines for source in opened),
        },
        splits={split: result.split for split, result in written.items()},
        documents={split: result.documents for split, result in written.items()},
        request=_plain(request),
    )


def _find_finished(request: Request, folder: Path) -> manifest_lib.Manifest | None:
    """The finished dataset in `folder`, None where there is none; UsageError for another one."""
    if not (folder / manifest_lib.FILE_NAME).exists():
        return None
    found = manifest_lib.load(folder)
    wanted = _plain(request)
    differences = [
        f"{key}: expected {wanted[key]}, found {found.request.get(key)}"
        for key in wanted
        if found.request.get(key) != wanted[key]
    ]
    if differences:
        raise errors.UsageError(
            f"{folder}: holds another dataset ({'; '.join(differences)}). "
            "Name another directory; nothing was removed."
        )
    manifest_lib.verify_files(found, folder)
    return found


def _check_same_origin(
    found: manifest_lib.Manifest,
    folder: Path,
    opened: Sequence[sources.Source],
    tokenizer: tokenizer_lib.Tokenizer | None,
) -> None:
    """The same options, but is it the same text and tokenizer? UsageError where it is not."""
    for source, record in zip(opened, found.sources, strict=True):
        if record["read_from"] != source.describe():
            raise errors.UsageError(
                f"{folder}: was made from another {source.name}, expected {source.describe()}, "
                f"found {record['read_from']}. Name another --out; nothing was removed."
            )
    if tokenizer is not None and tokenizer.content != (folder / found.tokenizer.file).read_bytes():
        raise errors.UsageError(
            f"{folder}: was made with another tokenizer.json than --tokenizer names. "
            "Name another --out; nothing was removed."
        )


def _problems(request: Request) -> Iterator[str]:
    if not request.sources:
        yield "--source: missing, expected at least one"
    if not request.tokenizer:
        yield f"--tokenizer: missing, expected {' or '.join(tokenizer_lib.KINDS)}"
    if len(set(request.sources)) < len(request.sources):
        yield "--source: the same source is named twice"
    if len(request.weights) != len(request.sources):
        yield (
            f"--weight: expected one a source ({len(request.sources)}), "
            f"found {len(request.weights)}"
        )
    for weight in request.weights:
        if not (math.isfinite(weight) and weight > 0):
            yield f"--weight: expected a number above 0, found {weight}"
    smallest = {"sequence_length": 1, "validation_tokens": 1, "train_tokens": 1, "max_bad_lines": 0}
    for field, low in smallest.items():
        value = getattr(request, field)
        if value is not None and value < low:
            yield f"--{field}: expected at least {low}, found {value}"


def _plain(request: Request) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(request)))


def _summary(manifest: manifest_lib.Manifest) -> str:
    return ", ".join(
        f"{split} {record.num_tokens:,} tokens of {manifest.documents[split].num_documents:,} "
        f"documents in {len(record.shards)} shards"
        for split, record in manifest.splits.items()
    )
