"""Documents of one or several sources to the two token streams of a dataset.

The validation documents are found first, in a pass of their own: each source fills its quota in
stream order out of its pool. Then the training stream: every document is taken from the source
that is furthest behind its share, so shares hold within one document at every point. Both streams
are pure functions of the sources; how far ahead documents are read and encoded does not show.
"""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from absl import logging

from qkjax import errors
from qkjax.data import encoding, holdout, overlap, reading, shards, sources

_PROGRESS_SECONDS = 5.0


@dataclasses.dataclass
class Counts:
    """Documents that the training stream left out, by reason, and n-grams that it met.

    `documents` and `ngrams`: for each of overlap.NAMES, training documents that share an n-gram
    with it, and how many n-grams of theirs those are.
    """

    empty: int = 0
    lost_by_tokenizer: int = 0
    duplicates_of_validation: int = 0
    validation_pool_unused: int = 0
    overlapping: int = 0
    documents: list[int] = dataclasses.field(default_factory=lambda: [0] * len(overlap.NAMES))
    ngrams: list[int] = dataclasses.field(default_factory=lambda: [0] * len(overlap.NAMES))


@dataclasses.dataclass
class Validation:
    """The validation documents in the order of their stream.

    `held_out`: hash -> (source, number of the document in it), for those that the split holds.
    `ngrams`: their n-grams, uint64 [n]. `files_read`: files of each source up to its last one.
    """

    held_out: dict[int, tuple[int, int]]
    ngrams: np.ndarray
    files_read: list[int]


class TrainStream:
    """The training documents of one source."""

    def __init__(
        self,
        reader: reading.Reader,
        number: int,
        held_out: dict[int, tuple[int, int]],
        counts: Counts,
        decontaminate: bool,
    ) -> None:
        """Args:
        number: of the source; a held-out document at its own place is no duplicate.
        counts: is counted up; shared by the streams of a dataset.
        """
        self.reader = reader
        self._number = number
        self._held_out = held_out
        self._counts = counts
        self._decontaminate = decontaminate

    def next_train(self) -> reading.Item | None:
        """The next training document; None when the source is used up."""
        while (item := self.reader.next()) is not None:
            if item.kind == encoding.EMPTY:
                self._counts.empty += 1
            elif item.kind == encoding.LOST:
                if not self._counts.lost_by_tokenizer:
                    logging.warning(
                        "%s: the first document whose text the tokenizer does not restore",
                        item.position,
                    )
                self._counts.lost_by_tokenizer += 1
            elif item.kind == encoding.POOL:
                place = self._held_out.get(item.document_hash)
                if place is None:
                    self._counts.validation_pool_unused += 1
                elif place != (self._number, item.number):
                    self._counts.duplicates_of_validation += 1
            elif not self._count_overlaps(item) or not self._decontaminate:
                return item
            else:
                self._counts.overlapping += 1
        return None

    def _count_overlaps(self, item: reading.Item) -> bool:
        for i, found in enumerate(item.overlaps.tolist()):
            self._counts.documents[i] += found > 0
            self._counts.ngrams[i] += found
        return bool(item.overlaps.any())


def validation_quotas(num_tokens: int, weights: Sequence[float]) -> list[int]:
    """Validation tokens per source: num_tokens split by weight, each rounded up."""
    total = math.fsum(weights)
    return [math.ceil(num_tokens * weight / total) for weight in weights]


def write_validation(
    opened: Sequence[sources.Source],
    weights: Sequence[float],
    encoder: encoding.Encoder,
    writer: shards.SplitWriter,
    end: np.ndarray,
) -> Validation:
    """Finds the validation documents and writes their stream.

    Args:
        end: uint32 [0 or 1], what follows every document.
    Raises:
        UsageError: the pools hold fewer tokens than the quotas, with both numbers.
    """
    quotas = validation_quotas((writer.max_tokens or 0) + 1, weights)
    seen: set[int] = set()
    readers = [reading.Reader(source, encoder, encoding.POOL) for source in opened]
    waiting = [
        _fill_quota(reader, quota, seen, end) for reader, quota in zip(readers, quotas, strict=True)
    ]
    tokens = [0] * len(waiting)
    held_out: dict[int, tuple[int, int]] = {}
    ngrams = [np.zeros(0, np.uint64)]
    while not writer.full:
        left = [index for index, items in enumerate(waiting) if items]
        index = left[_furthest_behind([tokens[i] for i in left], [weights[i] for i in left])]
        item = waiting[index].popleft()
        tokens[index] += _add(writer, item, index, end)
        held_out[item.document_hash] = (index, item.number)
        ngrams.append(overlap.ngrams([holdout.normalise(item.text)]).hashes)
    files_read = [reader.files_read for reader in readers]
    return Validation(held_out, np.concatenate(ngrams), files_read)


def write_train(
    streams: Sequence[TrainStream],
    weights: Sequence[float],
    tokens: list[int],
    writer: shards.SplitWriter,
    end: np.ndarray,
    progress: Callable[[str], None],
) -> None:
    """Writes the training stream until the writer is full or a source is used up at its share.

    Args:
        tokens: what each source has given already; is counted up.
        end: uint32 [0 or 1], what follows every document.
    """
    report = _Report(progress, writer, [stream.reader.source for stream in streams])
    while not writer.full:
        index = _furthest_behind(tokens, weights)
        item = streams[index].next_train()
        if item is None:
            break
        tokens[index] += len(item.ids) + len(end)  # before a shard may be finished and noted down
        _add(writer, item, index, end)
        report.tick()


def _fill_quota(
    reader: reading.Reader,
    quota: int,
    seen: set[int],
    end: np.ndarray,
) -> deque[reading.Item]:
    """The first documents of a source's pool that hold `quota` tokens, each text once."""
    items: deque[reading.Item] = deque()
    tokens = 0
    while tokens < quota:
        item = reader.next()
        if item is None:
            raise errors.UsageError(
                f"--validation_tokens: {reader.source.name} has to give {quota}, its validation "
                f"pool ({holdout.POOL_FRACTION:.0%} of the documents, chosen by hash) holds "
                f"{tokens}. Ask for fewer with --validation_tokens=N, or add more text."
            )
        if item.kind == encoding.POOL and item.document_hash not in seen:
            seen.add(item.document_hash)
            items.append(item)
            tokens += len(item.ids) + len(end)
    reader.close()
    return items


def _furthest_behind(tokens: Sequence[int], weights: Sequence[float]) -> int:
    return min(range(len(tokens)), key=lambda i: tokens[i] / weights[i])


def _add(writer: shards.SplitWriter, item: reading.Item, source: int, end: np.ndarray) -> int:
    writer.add(
        np.concatenate([item.ids, end]),
        num_text=len(item.ids),
        document_hash=item.document_hash,
        source=source,
    )
    return len(item.ids) + len(end)


class _Report:
    """A line every few seconds: tokens so far, rate, and the time left where it can be told."""

    def __init__(
        self,
        progress: Callable[[str], None],
        writer: shards.SplitWriter,
        opened: Sequence[sources.Source],
    ) -> None:
        self._progress = progress
        self._writer = writer
        self._sources = opened
        self._first = writer.num_tokens
        self._start = self._last = time.monotonic()

    def tick(self) -> None:
        now = time.monotonic()
        if now - self._last < _PROGRESS_SECONDS:
            return
        self._last = now
        tokens = self._writer.num_tokens
        rate = max(1.0, (tokens - self._first) / (now - self._start))
        text = f"{tokens:,} training tokens, {rate:,.0f} tokens/s"
        if self._writer.max_tokens is not None:
            left = max(0, self._writer.max_tokens - tokens) / rate
            text += f", {left:,.0f} s left of {self._writer.max_tokens:,} tokens"
        elif (fraction := self._fraction()) > 0:
            # The shares are fixed, so the source that is read furthest ends first, and with it all.
            left = tokens * (1 - fraction) / fraction / rate
            text += f", about {left:,.0f} s left, {fraction:.0%} read"
        self._progress(text)

    def _fraction(self) -> float:
        return max((source.fraction or 0.0 for source in self._sources), default=0.0)
