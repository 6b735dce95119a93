"""Checkpoints: Orbax items params / opt_state / meta, and a digest of every leaf.

Orbax stores arrays without checksums: a flipped byte restores silently. So `meta` holds dtype,
shape and sha256 of every leaf, and a sha256 of itself; nothing is restored that does not match them
or that is not finite.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import logging as std_logging
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from qkjax import errors, files

FORMAT_VERSION = 2  # 2 has meta_sha256
_METADATA = "_CHECKPOINT_METADATA"  # Orbax's own, of a step
_ITEMS = ("params", "opt_state", "meta")
_INCOMPLETE = re.compile(r"incomplete-(\d+)-\d+")  # a name that `_set_aside` gives
_TEMPORARY = ".orbax-checkpoint-tmp"  # in the names of directories that Orbax is writing


class Restored(NamedTuple):
    """One verified checkpoint, as numpy arrays on the host."""

    params: Any
    opt_state: Any
    meta: dict[str, Any]


class Origin(NamedTuple):
    """Parameters of another model that a run starts from."""

    name: str
    params: Any  # the tree of `model.init`, float32, numpy
    params_sha256: str


def leaf_names(tree: Any) -> list[str]:
    """The '/'-joined path of every leaf, in the order of jax.tree.leaves."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def digests(tree: Any) -> tuple[dict[str, dict[str, Any]], str]:
    """dtype, shape and sha256 of each leaf by name, and one sha256 over all of them.

    The hash takes, for the leaves sorted by name: name, dtype name, shape as JSON, and the
    little-endian bytes in C order.
    """
    found = dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))
    leaves = {name: np.asarray(found[name]) for name in sorted(found)}
    # Each its own thread, as far as there are cores: hashlib releases the interpreter's lock.
    with concurrent.futures.ThreadPoolExecutor() as threads:
        total = threads.submit(_sha256, leaves)
        alone = threads.map(lambda item: _sha256(dict([item])), leaves.items())
        records = {
            name: {"dtype": array.dtype.name, "shape": list(array.shape), "sha256": digest}
            for (name, array), digest in zip(leaves.items(), alone, strict=True)
        }
        return records, total.result()


def _sha256(leaves: Mapping[str, np.ndarray]) -> str:
    """The sha256 of leaves by name, one after another."""
    found = hashlib.sha256()
    for name, array in leaves.items():
        found.update(f"{name}{array.dtype.name}{json.dumps(list(array.shape))}".encode())
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        found.update(little.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def to_host(tree: Any) -> Any:
    """A copy of every leaf in host memory, safe from donation of the device's buffers."""
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), jax.device_get(tree))


class Checkpoints:
    """The directory `checkpoints/` of a run."""

    def __init__(
        self, directory: str | os.PathLike[str], *, keep_all: bool = False, read_only: bool = False
    ) -> None:
        """Opens the directory; read_only never writes, also while another process is at work there.

        Args:
            keep_all: keep every step instead of step 0 and the latest two.
        Raises:
            UsageError: Orbax cannot make sense of a file there.
            StorageError: the directory cannot be made or read.
        """
        self._directory = pathlib.Path(directory).absolute()
        self._keep_all, self._read_only = keep_all, read_only
        self._num_bytes = 0  # of the checkpoint that was saved last
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._started: concurrent.futures.Future[None] | None = None  # what it does
        policy = checkpoint_managers.AnyPreservationPolicy(
            [checkpoint_managers.CustomSteps([0]), checkpoint_managers.LatestN(2)]
        )
        _add_filter(_drop_orbax_notes)
        if not read_only:
            self._remove_temporary()
            self._set_incomplete_aside()
            self._delete_superseded()
            _quieten()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=(checkpoint_managers.LatestN(None) if keep_all else policy),
            read_only=read_only,
            create=not read_only and jax.process_count() == 1,
            multiprocessing_options=_of_this_process(),
            cleanup_tmp_directories=not read_only,
        )
        with self._damage_named():
            if not read_only and jax.process_count() > 1:
                self._directory.mkdir(parents=True, exist_ok=True)  # Orbax leaves it to us there
            self._manager = ocp.CheckpointManager(
                self._directory, options=options, item_names=_ITEMS
            )

    def set_aside_after(self, step: int) -> list[str]:
        """Renames every later checkpoint, so that the run can resume from `step`; loses nothing.

        Returns:
            The new names.
        """
        later = [path for path in self._step_directories() if int(path.name) > step]
        names = [_set_aside(path, "set-aside").name for path in later]
        with self._damage_named():
            self._manager.reload()
        return names

    @contextlib.contextmanager
    def _damage_named(self) -> Iterator[None]:
        """Orbax ignores most damage in what it reads of every step, and raises for the rest."""
        try:
            yield
        except OSError as error:
            raise files.storage_error(self._directory, error) from error
        except Exception as error:
            damaged = [path for path in self._step_directories() if not _has_sound_metadata(path)]
            place = damaged[0] / _METADATA if damaged else self._directory
            raise errors.UsageError(
                f"{place}: damaged ({errors.one_line(error)}). Move the checkpoint of that step "
                "away, or restore it from a copy."
            ) from error

    def _remove_temporary(self) -> None:
        """Deletes what killed saves left: Orbax spares those that lacked only their new name."""
        for path in self._directory.glob(f"*{_TEMPORARY}*"):
            if path.is_dir() and not path.is_symlink():
                logging.warning("%s: the rest of an interrupted save is deleted", path)
                shutil.rmtree(path, ignore_errors=True)

    def _set_incomplete_aside(self) -> None:
        """Orbax would count an empty step directory as the latest checkpoint.

        One that the run would have deleted is what a kill has left of that, and is deleted.
        """
        sound = self.steps()
        for path in self._step_directories():
            if _is_complete(path):
                continue
            if self._is_superseded(int(path.name), sound):
                logging.warning("%s: the rest of an interrupted deletion is deleted", path)
                shutil.rmtree(path, ignore_errors=True)
            else:
                aside = _set_aside(path, "incomplete")
                logging.warning("%s: an incomplete checkpoint, moved to %s", path, aside.name)

    def _is_superseded(self, step: int, sound: list[int]) -> bool:
        """Whether the run has this step again, or would have deleted it if it were complete."""
        behind = len(sound) > 1 and 0 < step < sound[-2]
        return step in sound or (behind and not self._keep_all)

    def _delete_superseded(self) -> None:
        """Deletes what was set aside as incomplete, once nothing is lost with it."""
        sound = self.steps()
        for path in self._directory.glob("incomplete-*-*"):
            match = _INCOMPLETE.fullmatch(path.name)
            if match and not path.is_symlink() and self._is_superseded(int(match[1]), sound):
                logging.warning("%s: superseded by a complete checkpoint, deleted", path)
                shutil.rmtree(path, ignore_errors=True)

    def _step_directories(self) -> list[pathlib.Path]:
        if not self._directory.is_dir():
            return []
        return [path for path in self._directory.iterdir() if path.name.isdigit()]

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(int(path.name) for path in self._step_directories() if _is_complete(path))

    def save(self, step: int, params: Any, opt_state: Any, meta: Mapping[str, Any]) -> None:
        """Starts to hash and write a checkpoint; an error of an earlier one surfaces here.

        Args:
            params, opt_state: trees of arrays; copied before this returns.
            meta: facts of the run, as JSON; digests and format version are added.
        Raises:
            StorageError: this or an earlier checkpoint could not be written.
        """
        self._finish_started()
        where = self._directory / str(step)
        if where.exists():  # Orbax would not write, and not always say so
            raise errors.StorageError(
                f"{where}: already exists, and no checkpoint is overwritten. Move it away."
            )
        params, opt_state = to_host(params), to_host(opt_state)
        self._num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((params, opt_state)))
        self._started = self._thread.submit(self._write, step, params, opt_state, dict(meta))

    def _write(self, step: int, params: Any, opt_state: Any, meta: dict[str, Any]) -> None:
        """In a thread of its own: hashing takes seconds of a large model, and steps continue."""
        params_leaves, params_sha256 = digests(params)
        opt_state_leaves, opt_state_sha256 = digests(opt_state)
        record = {
            **meta,
            "format_version": FORMAT_VERSION,
            "step": step,
            "params_sha256": params_sha256,
            "opt_state_sha256": opt_state_sha256,
            "params": params_leaves,
            "opt_state": opt_state_leaves,
        }
        record["meta_sha256"] = _own_digest(record)
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                opt_state=ocp.args.StandardSave(_named(opt_state)),
                meta=ocp.args.JsonSave(record),
            ),
            force=True,
        )
        if not saved:
            raise errors.StorageError(
                f"{self._directory / str(step)}: Orbax did not write this checkpoint. Run the "
                "same command again."
            )

    def _finish_started(self) -> None:
        """Waits for the thread, and raises what stopped it."""
        started, self._started = self._started, None
        if started is None:
            return
        with self._storage_errors():
            started.result()

    def wait(self) -> None:
        """Returns when every checkpoint is on disk.

        Raises:
            StorageError: one of them could not be written.
        """
        self._finish_started()
        with self._storage_errors():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Releases Orbax's threads; call after `wait`.

        Raises:
            StorageError: a checkpoint that was still being written could not be.
        """
        try:
            self._finish_started()
        finally:
            self._thread.shutdown()
            with self._storage_errors():
                self._manager.close()
            if not self._read_only:
                self._delete_superseded()

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON record of a step: digests and what `save` was given, such as the config.

        Raises:
            UsageError: it is damaged, or of a newer format.
        """
        try:
            record = self._manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            )["meta"]
        except Exception as error:
            raise self._unusable(step, "meta cannot be read", error) from error
        if not _is_record(record):
            raise self._unusable(step, "meta is not the record that was written", None)
        version = record["format_version"]
        if version > FORMAT_VERSION:
            raise errors.UsageError(
                f"{self._directory / str(step)}: written by a newer qkjax (checkpoint format "
                f"{version}, this one reads up to {FORMAT_VERSION}). Update qkjax."
            )
        if version >= 2 and record.get("meta_sha256") != _own_digest(record):
            raise self._unusable(step, "meta does not match its own sha256", None)
        if version == 1:
            logging.log_first_n(
                logging.WARNING,
                "%s: of checkpoint format 1: its arrays have digests, its settings have none",
                1,
                self._directory,
            )
        if record["step"] != step:
            raise self._unusable(step, f"meta is of step {record['step']}", None)
        return record

    def restore_params(self, step: int, shapes: Any) -> Any:
        """The verified parameters of a step as numpy arrays.

        Args:
            shapes: the tree expected, of jax.ShapeDtypeStruct.
        Raises:
            UsageError: another tree, shape or dtype than expected, or damaged bytes; names the
                leaf and the steps that may be used instead.
        """
        return self._restore_item(step, "params", shapes, self.meta(step))

    def restore(self, step: int, params_shapes: Any, opt_state_shapes: Any) -> Restored:
        """Parameters, optimiser state and meta of a step, all verified; errors as above."""
        meta = self.meta(step)
        params = self._restore_item(step, "params", params_shapes, meta)
        named = self._restore_item(step, "opt_state", _named(opt_state_shapes), meta)
        structure = jax.tree.structure(opt_state_shapes)
        opt_state = jax.tree.unflatten(
            structure, [named[name] for name in leaf_names(opt_state_shapes)]
        )
        return Restored(params, opt_state, meta)

    def _restore_item(self, step: int, item: str, shapes: Any, meta: dict[str, Any]) -> Any:
        self._check_expected(step, item, shapes, meta)
        targets = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
        arguments = ocp.args.Composite(**{item: ocp.args.StandardRestore(targets)})
        try:
            tree = self._manager.restore(step, args=arguments)[item]
        except Exception as error:
            raise self._unusable(step, f"{item} cannot be read", error) from error
        leaves, total = digests(tree)
        for name, record in leaves.items():
            if record != meta[item][name]:
                raise self._unusable(step, f"{item}/{name} does not match its sha256", None)
        if total != meta[f"{item}_sha256"]:
            raise self._unusable(step, f"{item} does not match {item}_sha256 of meta", None)
        for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
            if not np.isfinite(leaf).all():
                raise self._unusable(step, f"{item}/{name} has values that are not finite", None)
        return tree

    def _check_expected(self, step: int, item: str, shapes: Any, meta: dict[str, Any]) -> None:
        expected = {
            name: (leaf.dtype.name, list(leaf.shape))
            for name, leaf in zip(leaf_names(shapes), jax.tree.leaves(shapes), strict=True)
        }
        found = {name: (leaf["dtype"], leaf["shape"]) for name, leaf in meta[item].items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise errors.UsageError(
                    f"{self._directory / str(step)}: {item}/{name} is "
                    f"{_shape_text(found.get(name))} in the checkpoint and "
                    f"{_shape_text(expected.get(name))} in this config. "
                    "Use the config that the checkpoint was made with, or another --workdir."
                )

    def _unusable(self, step: int, what: str, error: Exception | None) -> errors.UsageError:
        others = [other for other in self.steps() if other != step]
        fix = (
            f"Steps that can be tried: {others}, with --restore_step={others[-1]} of qkjax.main to "
            f"continue training from there, or with --step={others[-1]} of the tools to read it"
            if others
            else "There is no other step: start again in another --workdir"
        )
        why = "" if error is None else f" ({errors.one_line(error)})"
        return errors.UsageError(
            f"{self._directory / str(step)}: damaged checkpoint, {what}{why}. {fix}."
        )

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """Turns what Orbax raises while it writes into one StorageError."""
        try:
            yield
        except errors.StorageError:
            raise
        except Exception as error:
            usage = os.statvfs(self._directory)
            raise errors.StorageError(
                f"{self._directory}: a checkpoint could not be written ({errors.one_line(error)}; "
                f"it needs {self._num_bytes / 1e9:.3g} GB, "
                f"{usage.f_bavail * usage.f_frsize / 1e9:.3g} GB are free). "
                f"Sound checkpoints: {self.steps()}. Make room and run the same command again."
            ) from error


def _of_this_process() -> ocp.options.MultiprocessingOptions:
    """Orbax's rule for checkpoints that one of several processes writes and reads, here process 0.

    Digests are of whole arrays, which `processes.whole` brings to it.
    """
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
    )


def _is_record(meta: Any) -> bool:
    """Whether all that restoring reads is there; the digests then prove what they are about."""
    try:
        leaves = [*meta["params"].values(), *meta["opt_state"].values()]
        fields = {
            "format_version": int,
            "step": int,
            "params_sha256": str,
            "opt_state_sha256": str,
        }
        return (
            all(meta[item] for item in ("params", "opt_state"))
            and all(type(meta[name]) is kind for name, kind in fields.items())
            and meta["format_version"] >= 1
            and all({"dtype", "shape", "sha256"} <= x.keys() for x in leaves)
        )
    except (AttributeError, KeyError, TypeError):
        return False


def _quieten() -> None:
    """Leaves failures of Orbax's threads to the one error that `save`, `wait` or `close` raises.

    Its threads log each failure several times, with tracebacks; tensorstore prints another one for
    every write that ends after the event loop was closed.
    """
    _add_filter(_drop_orbax_errors)
    if getattr(sys.unraisablehook, "func", None) is not _drop_closed_loop:
        sys.unraisablehook = functools.partial(_drop_closed_loop, sys.unraisablehook)


def _add_filter(drop: Callable[[std_logging.LogRecord], bool]) -> None:
    absl_logger = std_logging.getLogger("absl")
    if drop not in absl_logger.filters:
        absl_logger.addFilter(drop)


def _drop_orbax_notes(record: std_logging.LogRecord) -> bool:
    """Orbax warns that a directory is opened for reading, which is what was asked for."""
    note = record.levelno < std_logging.ERROR and "orbax" in record.pathname
    message = record.getMessage()
    return not (note and ("read_only" in message or "read only" in message))


def _drop_orbax_errors(record: std_logging.LogRecord) -> bool:
    return not (record.levelno >= std_logging.ERROR and "orbax" in record.pathname)


def _drop_closed_loop(hook: Callable[..., Any], unraisable: Any) -> None:
    """Passes on to `hook` what Python cannot raise, but for the end of a write nobody waits for."""
    error = unraisable.exc_value
    if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
        hook(unraisable)


def _own_digest(record: Mapping[str, Any]) -> str:
    """sha256 of a meta record as JSON, its own digest left out."""
    return files.digest_of(record, but="meta_sha256")


def _has_sound_metadata(path: pathlib.Path) -> bool:
    try:
        return files.read_object(path / _METADATA, "") is not None
    except errors.QkjaxError:
        return False


def _is_complete(path: pathlib.Path) -> bool:
    return all((path / item).is_dir() for item in _ITEMS)


def _set_aside(path: pathlib.Path, why: str) -> pathlib.Path:
    """The directory under the first free name <why>-<step>-<number>."""
    number = 1
    while (aside := path.with_name(f"{why}-{path.name}-{number}")).exists():
        number += 1
    files.move(path, aside)
    return aside


def _named(tree: Any) -> dict[str, Any]:
    """{name: leaf}: optimiser states are NamedTuples, which Orbax would restore by position."""
    return dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


def _shape_text(leaf: tuple[str, list[int]] | None) -> str:
    return "absent" if leaf is None else f"{leaf[0]}{leaf[1]}"
