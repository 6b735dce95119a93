"""Makes one dataset in its work folder: tokenizer, validation, training, and a journal."""

import dataclasses
import importlib.metadata
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from qkjax import errors, files
from qkjax.data import (
    encoding,
    holdout,
    mixing,
    origins,
    overlap,
    reading,
    shards,
    sources,
    staging,
)
from qkjax.data import manifest as manifest_lib
from qkjax.data import tokenizer as tokenizer_lib
from qkjax.data.request import Request

# A tokenizer is trained on no more than this, shared by weight: its memory grows with the text.
_TOKENIZER_CHARACTERS = 64_000_000
_HELD_OUT = "held-out.npy"


class Job:
    """The making of one dataset in a work folder, and the journal of it."""

    def __init__(
        self,
        request: Request,
        opened: Sequence[sources.Source],
        tokenizer: tokenizer_lib.Tokenizer | None,
        work: pathlib.Path,
        progress: Callable[[str], None],
    ) -> None:
        self._request = request
        self._opened = opened
        self._work = work
        self._progress = progress
        self._benchmarks = (
            overlap.benchmark_files(request.benchmark_dir) if request.benchmark_dir else {}
        )
        identity = staging.identity(self._description(tokenizer))
        saved = staging.load_journal(work, identity)
        self._open_ledger()
        if saved is not None and not self._reads_the_same(saved):
            saved = None
        if saved is None:
            for path in work.iterdir():  # of another command, or of one that was killed early
                path.unlink()
            self._open_ledger()
        self._journal: dict[str, Any] = saved or {
            "identity": identity,
            "files_read": [0] * len(opened),
            "read_from": [source.content(0) for source in opened],
        }
        self._tokenizer = tokenizer or self._train_tokenizer()
        ends = [self._tokenizer.eos_id] if request.end_of_text else []
        self._end = np.array(ends, np.uint32)

    def run(self, name: str, workers: int) -> manifest_lib.Manifest:
        """Writes everything but dataset.json into the work folder."""
        record = self._write_tokenizer()
        encoder = encoding.open_encoder(self._tokenizer, workers)
        try:
            validation = self._validation(encoder)
            train, streams, counts = self._train(encoder)
        finally:
            encoder.close()
        self._close_ledger()
        return _manifest(
            self._request,
            name,
            record,
            self._opened,
            self._journal["read_from"],
            {"train": train, "validation": validation},
            counts,
            sum(stream.reader.bad_lines for stream in streams),
            self._overlap(counts),
        )

    def _description(self, tokenizer: tokenizer_lib.Tokenizer | None) -> dict[str, Any]:
        paths = [path for some in self._benchmarks.values() for path in some]
        return {
            "request": self._request.plain(),
            "read_from": [source.describe() for source in self._opened],
            "tokenizer": tokenizer and tokenizer.sha256,
            "benchmarks": [files.sha256(path) for path in paths],
            "records_per_shard": shards.RECORDS_PER_SHARD,
            # Another version may split text into other tokens.
            "tokenizers": importlib.metadata.version("tokenizers"),
        }

    def _reads_the_same(self, saved: dict[str, Any]) -> bool:
        """Whether the text that an interrupted command has used is still what it was.

        Raises:
            UsageError: it is not and training shards of it are finished.
        """
        for source, content in zip(self._opened, saved["read_from"], strict=True):
            changed = source.changed(content)
            if changed and staging.finished_shards(saved):
                raise errors.UsageError(
                    f"{changed[0]}: was changed after an interrupted command read it, and "
                    f"{self._work} has {staging.finished_shards(saved)} finished training shards "
                    f"of the earlier text. Restore the file, remove {self._work} to start again, "
                    "or name another --out."
                )
            if changed:
                self._progress(f"{changed[0]}: was changed since; starting again")
                return False
        self._ledger.keep(self._used(saved["files_read"]))
        return True

    def _open_ledger(self) -> None:
        self._ledger = origins.Ledger(self._work / origins.FILE_NAME)
        for source in self._opened:
            source.ledger = self._ledger

    def _used(self, files_read: Sequence[int]) -> list[pathlib.Path]:
        """The first files of each source."""
        counts = zip(self._opened, files_read, strict=True)
        return [path for source, count in counts for path in source.files[:count]]

    def _note_read(self, files_read: Sequence[int]) -> None:
        """Records in the journal that the first files of each source have been used."""
        counts = list(map(max, self._journal["files_read"], files_read))
        self._journal["files_read"] = counts
        self._journal["read_from"] = [
            source.content(count) for source, count in zip(self._opened, counts, strict=True)
        ]

    def _close_ledger(self) -> None:
        """Looks at every used file again, for those that are open still, and forgets others."""
        used = self._used(self._journal["files_read"])
        for path in used:
            self._ledger.note(path)
        self._ledger.keep(used)

    def _train_tokenizer(self) -> tokenizer_lib.Tokenizer:
        path = self._work / tokenizer_lib.FILE_NAME
        if "tokenizer" in self._journal:
            shards.check_finished(path, self._journal["tokenizer"])
            return tokenizer_lib.load(path, eos_token=self._request.eos_token)
        size = tokenizer_lib.trained_size(self._request.tokenizer)
        assert size is not None  # a FILE was loaded before anything was created
        self._progress(f"training a tokenizer of {size} tokens on the training documents")
        texts = _training_texts(self._opened, self._request.weights)
        trained = tokenizer_lib.train(texts, size, eos_token=self._request.eos_token)
        self._note_read([source.files_read for source in self._opened])
        return trained

    def _write_tokenizer(self) -> manifest_lib.TokenizerRecord:
        path = self._work / tokenizer_lib.FILE_NAME
        files.replace(path, self._tokenizer.content)
        self._save(tokenizer=self._tokenizer.sha256)
        return manifest_lib.TokenizerRecord(
            file=path.name,
            sha256=self._tokenizer.sha256,
            vocab_size=self._tokenizer.vocab_size,
            eos_id=self._tokenizer.eos_id,
        )

    def _validation(self, encoder: encoding.Encoder) -> shards.WrittenSplit:
        if "validation" in self._journal:
            written = shards.WrittenSplit.from_plain(self._journal["validation"])
            finished = {shard.file: shard.sha256 for shard in written.split.shards}
            for name, sha256 in {**finished, **self._journal["held_out"]}.items():
                shards.check_finished(self._work / name, sha256)
            return written
        self._progress("finding the validation documents")
        writer = self._writer("validation", self._request.validation_tokens)
        found = mixing.write_validation(
            self._opened, self._request.weights, encoder, writer, self._end
        )
        hashes = {name: overlap.benchmark_ngrams(f) for name, f in self._benchmarks.items()}
        overlap.build({"validation": found.ngrams, **hashes}, self._work)
        places = [(key, *place) for key, place in found.held_out.items()]
        files.write_array(self._work / _HELD_OUT, np.array(places, np.uint64))
        self._note_read(found.files_read)
        written = writer.close()
        names = (_HELD_OUT, *overlap.FILES.values())
        self._save(
            validation=dataclasses.asdict(written),
            held_out={name: files.sha256(self._work / name) for name in names},
        )
        return written

    def _train(
        self, encoder: encoding.Encoder
    ) -> tuple[shards.WrittenSplit, list[mixing.TrainStream], mixing.Counts]:
        saved = self._journal.get("train")
        counts = mixing.Counts(**(saved["counts"] if saved else {}))
        starts = saved["documents"] if saved else [0] * len(self._opened)
        tokens = saved["tokens"] if saved else [0] * len(self._opened)
        fix = f"Remove {self._work} to start again."
        places = files.read_array(self._work / _HELD_OUT, fix).tolist()
        held_out = {key: (source, number) for key, source, number in places}
        streams = [
            mixing.TrainStream(
                reading.Reader(
                    source, encoder, encoding.TRAIN, index_folder=str(self._work), start=start
                ),
                number,
                held_out,
                counts,
                self._request.decontaminate,
            )
            for number, (source, start) in enumerate(zip(self._opened, starts, strict=True))
        ]

        def note_down() -> None:
            self._note_read([stream.reader.files_read for stream in streams])
            self._save(
                train={
                    "counts": dataclasses.asdict(counts),
                    "documents": [stream.reader.consumed for stream in streams],
                    "tokens": tokens,
                    "writer": writer.state(),
                }
            )

        writer = self._writer("train", self._request.train_tokens, note_down)
        if saved:
            self._progress(
                f"resuming after {len(saved['writer']['shards'])} finished shards "
                f"({saved['writer']['num_tokens']:,} training tokens)"
            )
            writer.restore(saved["writer"])
        else:
            self._progress(f"writing records of {self._request.sequence_length}+1 tokens")
        mixing.write_train(
            streams, self._request.weights, tokens, writer, self._end, self._progress
        )
        _check_enough(self._request, writer)
        self._note_read([stream.reader.files_read for stream in streams])
        return writer.close(), streams, counts

    def _writer(
        self, split: str, num_tokens: int | None, on_shard: Callable[[], None] = lambda: None
    ) -> shards.SplitWriter:
        length = self._request.sequence_length
        return shards.SplitWriter(
            self._work,
            split,
            sequence_length=length,
            vocab_size=self._tokenizer.vocab_size,
            num_sources=len(self._request.sources),
            max_sequences=num_tokens and math.ceil(num_tokens / length),
            on_shard=on_shard,
        )

    def _overlap(self, counts: mixing.Counts) -> dict[str, Any]:
        sizes = overlap.load(self._work).num_ngrams()
        result: dict[str, Any] = {
            "ngram_words": overlap.LENGTH,
            "documents_dropped": self._request.decontaminate,
        }
        for i, name in enumerate(overlap.NAMES):
            paths = self._benchmarks.get(name, [])
            result[name] = {
                "ngrams": sizes[name],
                "training_documents": counts.documents[i],
                "training_ngrams": counts.ngrams[i],
            }
            if name in overlap.BENCHMARKS:
                names = [path.name for path in paths]
                digests = [files.sha256(path) for path in paths]
                result[name] = (
                    {"files": names, "sha256": digests, **result[name]} if paths else None
                )
        return result

    def _save(self, **parts: Any) -> None:
        self._journal |= parts
        self._ledger.save()
        staging.save_journal(self._work, self._journal)


def _training_texts(opened: Sequence[sources.Source], weights: Sequence[float]) -> Iterator[str]:
    for source, weight in zip(opened, weights, strict=True):
        left = _TOKENIZER_CHARACTERS * weight / math.fsum(weights)
        for document in source.documents():
            if left <= 0:
                break
            if not holdout.in_pool(holdout.hash64(holdout.normalise(document.text))):
                left -= len(document.text)
                yield document.text


def _check_enough(request: Request, train: shards.SplitWriter) -> None:
    names = ", ".join(request.sources)
    if request.train_tokens is not None and not train.full:
        at_shares = " at these weights" if len(request.sources) > 1 else ""
        raise errors.UsageError(
            f"--train_tokens: {request.train_tokens} in whole records need "
            f"{(train.max_tokens or 0) + 1} tokens, {names} holds {train.num_tokens}{at_shares}. "
            "Ask for fewer, or add more text."
        )
    if not train.num_sequences:
        raise errors.UsageError(
            f"--source={names}: one record needs {request.sequence_length + 1} training tokens, "
            f"found {train.num_tokens}. Add more text, or lower --sequence_length."
        )


def _manifest(
    request: Request,
    name: str,
    tokenizer: manifest_lib.TokenizerRecord,
    opened: Sequence[sources.Source],
    read_from: Sequence[dict[str, Any]],
    written: dict[str, shards.WrittenSplit],
    counts: mixing.Counts,
    bad_lines: int,
    overlaps: dict[str, Any],
) -> manifest_lib.Manifest:
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
                "read_from": {**source.describe(), **content},
            }
            for source, content, weight, documents, tokens in zip(
                opened,
                read_from,
                request.weights,
                train.documents_by_source,
                train.tokens_by_source,
                strict=True,
            )
        ),
        split=dict(holdout.RULE),
        dropped={
            "empty": counts.empty,
            "lost_by_tokenizer": counts.lost_by_tokenizer,
            "duplicates_of_validation": counts.duplicates_of_validation,
            "validation_pool_unused": counts.validation_pool_unused,
            "overlapping": counts.overlapping,
            "bad_lines": bad_lines,
        },
        splits={split: result.split for split, result in written.items()},
        documents={split: result.documents for split, result in written.items()},
        overlap=overlaps,
        request=request.plain(),
    )
