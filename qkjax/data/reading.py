"""The documents of one source, encoded some chunks ahead of where they are used."""

from collections import deque
from collections.abc import Iterator
from concurrent import futures
from typing import NamedTuple

import numpy as np

from qkjax import errors
from qkjax.data import documents, encoding

_CHUNK_CHARACTERS = 1 << 18  # some 100 ms of work for one core: little is lost on the way


class Item(NamedTuple):
    """One document of a source after encoding; `ids` is empty where it was not wanted."""

    number: int
    position: str  # where it stands: file and line, or row
    text: str
    kind: int
    document_hash: int
    ids: np.ndarray
    overlaps: np.ndarray


class _Mark(NamedTuple):
    """How far a source had come: lines skipped, files opened, where its document stands."""

    bad_lines: int
    files_read: int
    position: str = ""


class _Chunk(NamedTuple):
    texts: list[str]
    marks: list[_Mark]  # of each document, and of the end
    error: Exception | None  # what ended the source after these documents


class Reader:
    """The documents of one source from number `start` on, encoded some chunks ahead.

    Attributes:
        consumed: documents given so far, `start` included.
        bad_lines: lines that the source skipped before the next document.
        files_read: files of the source up to that of the last document given.
    """

    def __init__(
        self,
        source: documents.Source,
        encoder: encoding.Encoder,
        wanted: int,
        *,
        index_folder: str | None = None,
        start: int = 0,
    ) -> None:
        """Args:
        wanted: encoding.POOL or encoding.TRAIN.
        index_folder: where the index of n-grams lies; None counts none.
        """
        self.source = source
        self.consumed = start
        self.bad_lines = 0
        self.files_read = 0
        self._encoder = encoder
        self._wanted = wanted
        self._index_folder = index_folder
        self._chunks = _chunks(source, start)
        self._ahead: deque[tuple[_Chunk, futures.Future[encoding.Encoded]]] = deque()
        self._items: Iterator[Item] = iter(())

    def next(self) -> Item | None:
        """The next document; None at the end of the source."""
        while True:
            for item in self._items:
                return item
            chunk = next(self._chunks, None)
            while chunk is not None:
                task = encoding.Task(chunk.texts, self._wanted, self._index_folder)
                self._ahead.append((chunk, self._encoder.submit(task)))
                chunk = next(self._chunks, None) if len(self._ahead) < self._encoder.depth else None
            if not self._ahead:
                return None
            self._items = self._open(*self._ahead.popleft())

    def close(self) -> None:
        """Forgets what was read ahead."""
        for _, future in self._ahead:
            future.cancel()

    def _open(self, chunk: _Chunk, future: "futures.Future[encoding.Encoded]") -> Iterator[Item]:
        encoded = future.result()
        ends = np.cumsum(encoded.lengths)
        for i, text in enumerate(chunk.texts):
            self.bad_lines, self.files_read, position = chunk.marks[i]
            self.consumed += 1
            yield Item(
                self.consumed - 1,
                position,
                text,
                int(encoded.kinds[i]),
                int(encoded.hashes[i]),
                encoded.ids[ends[i] - encoded.lengths[i] : ends[i]],
                encoded.overlaps[i],
            )
        self.bad_lines, self.files_read, _ = chunk.marks[-1]
        if chunk.error is not None:
            raise chunk.error


def _chunks(source: documents.Source, start: int) -> Iterator[_Chunk]:
    """The documents in groups; an error waits until the documents before it are used."""
    remaining = source.documents(start)
    while True:
        texts: list[str] = []
        marks: list[_Mark] = []
        characters = 0
        ended = False
        try:
            while characters < _CHUNK_CHARACTERS:
                document = next(remaining, None)
                if document is None:
                    ended = True
                    break
                texts.append(document.text)
                marks.append(_Mark(source.bad_lines, source.files_read, document.position))
                characters += len(document.text)
        except errors.QkjaxError as error:
            yield _Chunk(texts, [*marks, _Mark(source.bad_lines, source.files_read)], error)
            return
        yield _Chunk(texts, [*marks, _Mark(source.bad_lines, source.files_read)], None)
        if ended:
            return
