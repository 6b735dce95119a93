"""Several processes of one run: how they join, and all that they say to each other.

This module owns jax.distributed: its start and its end, what process 0 decides for all, the facts
that all must share, the agreed stop, arrays that leave a process, and the end of all where one
fails. With one process every function returns at once, and jax.distributed is not touched.

Messages go as JSON through the coordinator, in process 0, and are kept while the others run; arrays
go over the devices. Every process makes the same calls in the same order.
"""

import contextlib
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qkjax import errors

_GONE_SECONDS = 20  # without a heartbeat; also what shutting down waits for others
_WAIT_MS = 30 * 24 * 3600 * 1000  # no limit of its own: a dead process is noticed by its heartbeat
_POLL_SECONDS = 0.25
_HEAR_SECONDS = 1.0
# That process 0 stays for the others to hear why all end. It must be gone before the coordinator
# misses a process that was killed, and jaxlib aborts process 0: half of _GONE_SECONDS at the least.
_LINGER_SECONDS = 5.0
_STATUS = re.compile(
    "(ABORTED|CANCELLED|DATA_LOSS|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN):"
)
_FAILURE, _LEFT = "qkjax/failure", "qkjax/left"
_numbers = itertools.count()  # of messages; equal in all processes, as their calls are

Describe = Callable[[BaseException], tuple[int, str]]  # exit code and text of an error


def count() -> int:
    """How many processes the run has."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this is process 0, which alone writes the run's files."""
    return jax.process_index() == 0


# --------------------------------------------------------------------------------------------
# Joining, and the end of all.


@contextlib.contextmanager
def joined(
    describe: Describe,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    seconds: int = 300,
) -> Iterator[None]:
    """While entered this process is one of several; enter it before the first use of devices.

    An error in one process ends all of them with its exit code and its text, as soon as they hear
    of it: the others leave by os._exit, wherever they are.

    Args:
        describe: exit code and text of an error.
        coordinator: HOST:PORT of process 0; None: all three from the environment of SLURM, a TPU
            VM, Open MPI or Kubernetes, as jax detects it.
        seconds: to wait for the coordinator and the other processes.
    Raises:
        UsageError: the coordinator or another process does not answer in time, or nothing of a
            cluster is found in the environment.
    """
    _join(coordinator, num_processes, process_id, seconds)
    watch = _Watch()
    try:
        yield
        meet()
    except BaseException as error:
        if _is_of_runtime(error):
            # If another has said why, the watch prints that and ends this process.
            time.sleep(_HEAR_SECONDS)
            error = _lost(error)
        watch.close()
        _leave(*describe(error))
        raise error
    watch.close()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # all have met: the work is done
        jax.distributed.shutdown()


def _join(
    coordinator: str | None, num_processes: int | None, process_id: int | None, seconds: int
) -> None:
    # A Python handler takes SIGTERM (runs/signals.py); jax's own would swallow it until then.
    jax.config.update("jax_enable_preemption_service", False)
    # Collectives of two programs under way at one time would mix on CPUs.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if coordinator is not None and process_id:
        _reach(coordinator, seconds)
    guard = threading.Timer(seconds, _give_up, (coordinator, num_processes, seconds))
    guard.daemon = True
    guard.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method=None if coordinator is None else "deactivate",
            initialization_timeout=seconds + _GONE_SECONDS,
            heartbeat_timeout_seconds=_GONE_SECONDS,
            shutdown_timeout_seconds=_GONE_SECONDS,
        )
    except ValueError as error:
        raise errors.UsageError(
            f"--distributed: jax detects no cluster here ({errors.one_line(error)}). Give "
            "--coordinator=HOST:PORT --num_processes=N --process_id=I instead."
        ) from error
    except RuntimeError as error:
        raise errors.UsageError(
            f"--coordinator: {coordinator or 'of the cluster'} cannot be used "
            f"({errors.one_line(error)}). Give a port that is free on the host of process 0, the "
            "same in every process."
        ) from error
    finally:
        guard.cancel()


def _give_up(coordinator: str | None, num_processes: int | None, seconds: int) -> None:
    """Ends this process in one line, where jax would abort it with a stack of C++."""
    text = (
        f"ERROR: --coordinator: {num_processes or 'the'} processes did not meet at "
        f"{coordinator or 'the address of the cluster'} within {seconds} s. Start the same command "
        "on every host, each with its own --process_id; see --join_seconds.\n"
    )
    os.write(2, text.encode(errors="backslashreplace"))
    os._exit(errors.UsageError.exit_code)


def _reach(address: str, seconds: int) -> None:
    """Waits until the coordinator listens; jax's own wait ends the process without a message."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            raise errors.UsageError(
                f"--coordinator: {address} cannot be reached within {seconds} s "
                f"({errors.one_line(error)}). Give the host and port of process 0, which must run "
                "and be reachable from here."
            ) from error


class _Watch:
    """A thread that ends this process once another has said that it failed."""

    def __init__(self) -> None:
        self._closed = threading.Event()
        self._end = threading.Lock()  # of the one that prints the last line
        self._thread = threading.Thread(target=self._run, name="processes", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the watch; from here on this process reports its own errors."""
        with self._end:
            self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            failure = _failure()
            with self._end:
                if failure is None or self._closed.is_set():
                    continue
                sys.stdout.flush()
                text = f"ERROR: process {failure['process']}: {failure['text']}\n"
                os.write(2, text.encode(errors="backslashreplace"))
                _linger()
                os._exit(failure["code"])


def _failure() -> dict[str, Any] | None:
    """What the first process to fail has said; None: none has, or nobody answers."""
    try:
        return json.loads(_client().key_value_try_get(_FAILURE))
    except jax.errors.JaxRuntimeError:
        return None


def _leave(code: int, text: str) -> None:
    """Tells the others why all end."""
    said = json.dumps({"process": jax.process_index(), "code": code, "text": text})
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or nobody is there
        _client().key_value_set(_FAILURE, said)
    _linger()


def _linger() -> None:
    """Process 0 stays until the others know: the coordinator ends with it."""
    deadline = time.monotonic() + _LINGER_SECONDS
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"{_LEFT}/{jax.process_index()}", "")
        while is_first() and time.monotonic() < deadline:
            if len(_client().key_value_dir_get(_LEFT)) == count():
                return
            time.sleep(_POLL_SECONDS)


def _is_of_runtime(error: BaseException) -> bool:
    """Whether devices or the coordinator failed; jax also raises their status as ValueError."""
    return isinstance(error, jax.errors.JaxRuntimeError) or (
        isinstance(error, ValueError) and _STATUS.match(str(error)) is not None
    )


def _lost(error: BaseException) -> errors.QkjaxError:
    """The error for devices or a coordinator that failed, if no process has said why."""
    lost = errors.QkjaxError(
        f"processes: devices or coordinator of the {count()} processes of this run failed "
        f"({errors.one_line(error)}). "
        "Usually one of them was killed: look at the last line of each, and start the same "
        "command on every host again to resume."
    )
    lost.__cause__ = error
    return lost


def _client() -> Any:
    from jax._src import distributed  # no public name gives the coordinator's store

    return distributed.global_state.client


# --------------------------------------------------------------------------------------------
# Words.


def meet() -> None:
    """Returns once every process has come here."""
    if count() > 1:
        _client().wait_at_barrier(f"qkjax/meet/{next(_numbers)}", _WAIT_MS)


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` returns in process 0, where alone it is called; elsewhere as JSON gives it."""
    if count() == 1:
        return make()
    key = f"qkjax/first/{next(_numbers)}"
    if not is_first():
        return json.loads(_client().blocking_key_value_get(key, _WAIT_MS))
    value = make()
    _client().key_value_set(key, json.dumps(value))
    return value


def from_all(value: Any) -> list[Any]:
    """The JSON value of every process, by their index."""
    if count() == 1:
        return [value]
    key = f"qkjax/all/{next(_numbers)}"
    _client().key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    return [
        json.loads(_client().blocking_key_value_get(f"{key}/{index}", _WAIT_MS))
        for index in range(count())
    ]


def check_equal(facts: Mapping[str, str]) -> None:
    """Refuses processes that would not compute the same run.

    Args:
        facts: by what they are called.
    Raises:
        UsageError: the first fact that differs, in every process.
    """
    found = from_all(dict(facts))
    for index, theirs in enumerate(found):
        for name, value in theirs.items():
            if value != found[0].get(name):
                raise errors.UsageError(
                    f"--process_id={index}: {name} is {value}, expected {found[0].get(name)} as in "
                    "process 0. Start the same command with the same files on every host."
                )


# --------------------------------------------------------------------------------------------
# Arrays.


def whole(tree: Any) -> Any:
    """Every leaf on the host as numpy, also where its parts lie in several processes."""
    if count() == 1:
        return jax.device_get(tree)

    def of(leaf: Any) -> np.ndarray:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return jax.device_get(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(of, tree)


def arrays_from_first(tree: Any, shapes: Any) -> Any:
    """Numpy arrays of process 0 in every process, bit for bit.

    Args:
        tree: of numpy arrays; read in process 0 alone.
        shapes: the same tree of jax.ShapeDtypeStruct.
    """
    if count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(shapes)
    sources = jax.tree.leaves(tree) if is_first() else leaves
    return jax.tree.unflatten(
        structure, [_from_first(*pair) for pair in zip(sources, leaves, strict=True)]
    )


def _from_first(source: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
    num_bytes = shape.size * shape.dtype.itemsize
    # jax adds zeros to what process 0 has: of floats that would lose the sign of -0.
    word = np.uint32 if num_bytes % 4 == 0 else np.uint8
    words = np.zeros(num_bytes // np.dtype(word).itemsize, word)
    if is_first():
        words = np.ascontiguousarray(source).reshape(-1).view(word)
    found = np.ascontiguousarray(multihost_utils.broadcast_one_to_all(words))
    return found.view(shape.dtype).reshape(shape.shape)


class Votes:
    """Which signal to stop by: the same answer in every process, at the same call."""

    def __init__(self, mesh: Mesh) -> None:
        """Args: a mesh over the devices of all processes."""
        self._rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._devices = sum(d.process_index == jax.process_index() for d in mesh.devices.flat)
        self._cast: jax.Array | None = None

    def of_all(self, signum: int | None) -> int | None:
        """Casts this process's vote; the answer is that of the call before, so nobody waits.

        With one process the answer is `signum`.
        """
        if count() == 1:
            return signum
        own = np.full(self._devices, signum or 0, np.int32)
        before = self._cast
        self._cast = self._largest(jax.make_array_from_process_local_data(self._rows, own))
        return None if before is None else (int(before) or None)
