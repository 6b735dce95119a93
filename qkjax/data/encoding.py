"""Documents to token ids, chunk by chunk, in this process or in worker processes.

The result for a document depends on its text alone, so it does not depend on the number
of workers. Workers are children that hold one end of a pipe each: they end when it closes, however
this process ends, and a worker that dies is an error here.
"""

import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import queue
import signal
import traceback
from concurrent import futures
from typing import Any, NamedTuple, Protocol

import numpy as np

from qkjax import errors
from qkjax.data import holdout, overlap
from qkjax.data import tokenizer as tokenizer_lib

# What a document is by its text; LOST: the tokenizer does not give it back.
EMPTY, POOL, TRAIN, LOST = range(4)


class Task(NamedTuple):
    """Texts, which of them to encode (POOL or TRAIN), and where the index of n-grams lies."""

    texts: list[str]
    wanted: int
    index_folder: str | None


class Encoded(NamedTuple):
    """The documents of one task, in order.

    kinds uint8 [documents]; hashes uint64 [documents] of the normalised text; lengths int64
    [documents], token ids of each, 0 where it is not wanted; ids uint32 [sum of lengths];
    overlaps int64 [documents, len(overlap.NAMES)], shared n-grams of the wanted ones.
    """

    kinds: np.ndarray
    hashes: np.ndarray
    lengths: np.ndarray
    ids: np.ndarray
    overlaps: np.ndarray


class Encoder(Protocol):
    """Encodes tasks; keeps up to `depth` of them in work for every stream of documents."""

    depth: int

    def submit(self, task: Task) -> "futures.Future[Encoded]": ...

    def close(self) -> None: ...


def open_encoder(tokenizer: tokenizer_lib.Tokenizer, num_workers: int) -> Encoder:
    """An encoder of this process for one worker, else of that many child processes."""
    return _Here(tokenizer) if num_workers <= 1 else _Workers(tokenizer, num_workers)


class _Chunks:
    """Encodes one task after the other; remembers the index of n-grams that it opened."""

    def __init__(self, tokenizer: tokenizer_lib.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._index: overlap.Index | None = None
        self._folder: str | None = None

    def encode(self, task: Task) -> Encoded:
        normalised = [holdout.normalise(text) for text in task.texts]
        hashes = [holdout.hash64(text) if text else 0 for text in normalised]
        kinds = [
            EMPTY if not text else POOL if holdout.in_pool(document_hash) else TRAIN
            for text, document_hash in zip(normalised, hashes, strict=True)
        ]
        wanted = [i for i, kind in enumerate(kinds) if kind == task.wanted]
        encoded = self._tokenizer.encode_exactly([task.texts[i] for i in wanted])
        for i, some in zip(wanted, encoded, strict=True):
            kinds[i] = LOST if some is None else kinds[i]
        chosen = [i for i in wanted if kinds[i] != LOST]
        ids = [some for some in encoded if some is not None]
        lengths = np.zeros(len(kinds), np.int64)
        lengths[chosen] = [len(some) for some in ids]
        overlaps = np.zeros((len(kinds), len(overlap.NAMES)), np.int64)
        if task.index_folder is not None:
            if self._index is None or self._folder != task.index_folder:
                self._index, self._folder = overlap.load(task.index_folder), task.index_folder
            overlaps[chosen] = self._index.count([normalised[i] for i in chosen])
        return Encoded(
            np.array(kinds, np.uint8),
            np.array(hashes, np.uint64),
            lengths,
            np.concatenate([*ids, np.zeros(0, np.uint32)]),
            overlaps,
        )


class _Here:
    """Encodes in this process when asked; tokenizers' own threads use the cores."""

    depth = 1

    def __init__(self, tokenizer: tokenizer_lib.Tokenizer) -> None:
        self._chunks = _Chunks(tokenizer)

    def submit(self, task: Task) -> "futures.Future[Encoded]":
        future: futures.Future[Encoded] = futures.Future()
        future.set_result(self._chunks.encode(task))
        return future

    def close(self) -> None:
        pass


class _Worker(NamedTuple):
    process: Any
    connection: multiprocessing.connection.Connection


class _Workers:
    """Child processes, and one thread here for each that hands it tasks."""

    def __init__(self, tokenizer: tokenizer_lib.Tokenizer, num_workers: int) -> None:
        self.depth = num_workers + 1
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads = futures.ThreadPoolExecutor(num_workers)
        # The terminal sends Ctrl-C to the children too, and it is for this process to stop them:
        # they inherit a mask. The tracker goes first, because its start takes the mask off.
        multiprocessing.resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(num_workers):
                self._start(tokenizer)
        except BaseException:
            self.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def submit(self, task: Task) -> "futures.Future[Encoded]":
        return self._threads.submit(self._call, task)

    def close(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()

    def _start(self, tokenizer: tokenizer_lib.Tokenizer) -> None:
        context = multiprocessing.get_context("spawn")  # fork would copy threads' locks
        here, there = context.Pipe()
        process = context.Process(
            target=_serve, args=(there, tokenizer.content, tokenizer.eos_token), daemon=True
        )
        process.start()
        there.close()  # the child's copy alone keeps it open, so its death is seen here
        worker = _Worker(process, here)
        self._workers.append(worker)
        self._idle.put(worker)

    def _call(self, task: Task) -> Encoded:
        worker = self._idle.get()
        try:
            worker.connection.send(task)
            result = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(5)
            raise errors.QkjaxError(
                f"--workers: a worker process died (exit code {worker.process.exitcode}), often "
                "because memory ran out. Run the same command again, and it resumes; "
                "fewer --workers need less memory."
            ) from None
        finally:
            self._idle.put(worker)
        if isinstance(result, str):
            raise RuntimeError(result)
        return result


def _serve(connection: Any, content: bytes, eos_token: str) -> None:
    """The life of a worker: tasks in, results out, until the other end of the pipe is closed."""
    # One process per core, so one thread per process.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        chunks = _Chunks(tokenizer_lib.Tokenizer(content, eos_token=eos_token))
        while True:
            task = connection.recv()
            try:
                result: Any = chunks.encode(task)
            except Exception:  # a fault of ours: to be shown by the parent
                result = traceback.format_exc()
            connection.send(result)
    except (EOFError, OSError):
        return
