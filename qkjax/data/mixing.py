"""Documents of one or several sources to the two token streams of a dataset.

Training documents are taken from the source that is furthest behind its share, so shares hold
within one document at every point of the stream; validation documents likewise, from quotas that
each source fills in stream order out of its pool.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qkjax import errors
from qkjax.data import holdout, shards, sources
from qkjax.data import tokenizer as tokenizer_lib

# Enough text for all cores of encode_batch; what it makes of it takes some hundred MB at most.
_BATCH_CHARACTERS = 1 << 20
_PROGRESS_SECONDS = 5.0


@dataclass
class Dropped:
    """Documents that the dataset leaves out, by reason."""

    empty: int = 0
    duplicates_of_validation: int = 0
    validation_pool_unused: int = 0


class _Encoded(NamedTuple):
    ids: np.ndarray
    num_text: int
    document_hash: int


class Stream:
    """One source while it is read: encoded documents wait here until a split takes them."""

    def __init__(
        self,
        source: sources.Source,
        tokenizer: tokenizer_lib.Tokenizer,
        *,
        quota: int,
        end_of_text: bool,
        held_out: set[int],
        dropped: Dropped,
    ) -> None:
        """Args:
        quota: how many validation tokens this source gives, at least.
        held_out: hashes of the validation documents; shared by the streams of a dataset.
        dropped: is counted up; shared likewise.
        """
        self.source = source
        self.train: deque[_Encoded] = deque()
        self.validation: deque[_Encoded] = deque()
        self.validation_tokens = 0
        self.exhausted = False
        self._tokenizer = tokenizer
        self.quota = quota
        self._end = np.array([tokenizer.eos_id] if end_of_text else [], np.uint32)
        self._held_out = held_out
        self._dropped = dropped
        self._documents = source.documents()

    @property
    def quota_filled(self) -> bool:
        """True when the source has given its validation tokens."""
        return self.validation_tokens >= self.quota

    def next_train(self) -> _Encoded | None:
        """The next training document; None when the source is used up."""
        while not self.train and not self.exhausted:
            self._read_batch(with_train=True)
        return self.train.popleft() if self.train else None

    def fill_quota(self) -> None:
        """Reads on for validation documents alone, after the training stream has ended."""
        while not self.quota_filled and not self.exhausted:
            self._read_batch(with_train=False)

    def _read_batch(self, *, with_train: bool) -> None:
        batch = list(self._take(with_train))
        for (_, document_hash), ids in zip(
            batch, self._tokenizer.encode_batch([text for text, _ in batch]), strict=True
        ):
            encoded = _Encoded(np.concatenate([ids, self._end]), len(ids), document_hash)
            if not holdout.in_pool(document_hash):
                self.train.append(encoded)
            elif self._wanted(document_hash):
                self.validation.append(encoded)
                self.validation_tokens += len(encoded.ids)
                self._held_out.add(document_hash)

    def _take(self, with_train: bool) -> Iterator[tuple[str, int]]:
        characters = 0
        for document in self._documents:
            normalised = holdout.normalise(document.text)
            if not normalised:
                self._dropped.empty += 1
                continue
            document_hash = holdout.hash64(normalised)
            if holdout.in_pool(document_hash):
                if not self._wanted(document_hash):
                    continue
            elif not with_train:
                continue
            yield document.text, document_hash
            characters += len(document.text)
            if characters >= _BATCH_CHARACTERS:
                return
        self.exhausted = True

    def _wanted(self, document_hash: int) -> bool:
        if document_hash in self._held_out:
            self._dropped.duplicates_of_validation += 1
        elif self.quota_filled:
            self._dropped.validation_pool_unused += 1
        else:
            return True
        return False


def validation_quotas(num_tokens: int, weights: Sequence[float]) -> list[int]:
    """Validation tokens per source: num_tokens split by weight, each rounded up."""
    total = math.fsum(weights)
    return [math.ceil(num_tokens * weight / total) for weight in weights]


def write_train(
    streams: Sequence[Stream],
    weights: Sequence[float],
    writer: shards.SplitWriter,
    progress: Callable[[str], None],
) -> None:
    """Writes the training stream until the writer is full or a source is used up at its share."""
    tokens = [0] * len(streams)
    report = _Report(progress)
    while not writer.full:
        index = _furthest_behind(tokens, weights)
        document = streams[index].next_train()
        if document is None:
            break
        tokens[index] += _add(writer, document, index)
        report.tick(writer)


def write_validation(
    streams: Sequence[Stream], weights: Sequence[float], writer: shards.SplitWriter
) -> None:
    """Writes the validation stream, after `write_train`.

    Raises: UsageError where the pools hold fewer tokens than the quotas, with both numbers.
    """
    for stream in streams:
        stream.fill_quota()
        if not stream.quota_filled:
            raise errors.UsageError(
                f"--validation_tokens: {stream.source.name} has to give {stream.quota}, its "
                f"validation pool ({holdout.POOL_FRACTION:.0%} of the documents, chosen by hash) "
                f"holds {stream.validation_tokens}. Ask for fewer, or bring more text."
            )
    tokens = [0] * len(streams)
    while not writer.full:
        left = [index for index, stream in enumerate(streams) if stream.validation]
        position = _furthest_behind([tokens[i] for i in left], [weights[i] for i in left])
        index = left[position]
        tokens[index] += _add(writer, streams[index].validation.popleft(), index)


def _furthest_behind(tokens: Sequence[int], weights: Sequence[float]) -> int:
    return min(range(len(tokens)), key=lambda i: tokens[i] / weights[i])


def _add(writer: shards.SplitWriter, document: _Encoded, source: int) -> int:
    writer.add(
        document.ids,
        num_text=document.num_text,
        document_hash=document.document_hash,
        source=source,
    )
    return len(document.ids)


class _Report:
    """A line every few seconds: tokens so far, rate, and the time left where the end is known."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress = progress
        self._start = self._last = time.monotonic()

    def tick(self, writer: shards.SplitWriter) -> None:
        now = time.monotonic()
        if now - self._last < _PROGRESS_SECONDS:
            return
        self._last = now
        rate = writer.num_tokens / (now - self._start)
        text = f"{writer.num_tokens:,} training tokens, {rate:,.0f} tokens/s"
        if writer.max_tokens is not None:
            left = max(0, writer.max_tokens - writer.num_tokens) / rate
            text += f", {left:,.0f} s left of {writer.max_tokens:,} tokens"
        self._progress(text)
