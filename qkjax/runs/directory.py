"""The files of a run directory but for metrics and checkpoints, and how files are replaced.

DESIGN.md section 4 names them: `config.json`, `environment.json`, `run.lock`, `summary.json`. It
also reads `metrics.jsonl`, for the report side, which imports no jax.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import math
import os
import pathlib
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from qkjax import config as config_lib
from qkjax import errors, presets
from qkjax.runs import environment

# Differences in these cannot change a result, so a resume does not ask about them.
FREE_FIELDS = ("checkpoint.keep_all", "data.dir", "log.every_seconds", "profile.steps")
# No checkpoint goes on with another of these: its batches or its arrays would be others.
FIXED_FIELDS = (
    "dataset",
    "seed",
    "train.tokens_per_step",
    "train.sequences_per_step",
    "optimizer.name",
    "model.mlp",
    "model.num_layers",
    "model.d_model",
    "model.num_heads",
    "model.num_kv_heads",
    "model.head_dim",
    "model.d_ff",
    "model.vocab_size",
    "model.sequence_length",
)
_ABSENT = "(absent)"


# --------------------------------------------------------------------------------------------
# The directory and its lock.


def make_workdir(path: str | os.PathLike[str]) -> pathlib.Path:
    """Creates the run directory where it is missing and returns its absolute path.

    Raises:
        UsageError: the path is empty, remote or holds a NUL.
        StorageError: it is a file, or cannot be created or written.
    """
    text = os.fspath(path)
    if not text or "\0" in text or "://" in text:
        raise errors.UsageError(
            f"--workdir: {text!r} is not the path of a local directory. Give one, such as runs/a."
        )
    workdir = pathlib.Path(text).expanduser().absolute()
    probe = workdir / f".write_test.{os.getpid()}"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        try:  # only writing shows a full or read-only disk: root ignores the mode bits
            probe.write_bytes(bytes(4096))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise errors.StorageError(
            f"{workdir}: cannot be used as the run directory ({_reason(error)}). "
            "Free the path or the disk, or give another --workdir."
        ) from error
    return workdir


@contextlib.contextmanager
def lock(workdir: pathlib.Path, *, shared: bool = False) -> Iterator[None]:
    """Holds `run.lock` while entered; the kernel drops it when the process dies.

    The file says who holds it: pid, host and start time, as JSON. It stays when the lock goes.

    Args:
        shared: only processes that do not share are kept out.
    Raises:
        UsageError: another process holds it.
        StorageError: the file system refuses the file or the lock.
    """
    path = workdir / "run.lock"
    try:
        file = open(path, "a+b")
    except OSError as error:
        raise storage_error(path, error) from error
    with file:
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise storage_error(path, error) from error
            raise errors.UsageError(
                f"{path}: another process runs in this directory ({_holder(path)}). "
                "Wait for it or stop it, or give another --workdir."
            ) from None
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "start_time": _now()}
        try:
            file.truncate(0)
            file.write((json.dumps(holder) + "\n").encode())
            file.flush()
        except OSError as error:
            raise storage_error(path, error) from error
        yield


def _holder(path: pathlib.Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"pid {holder['pid']} on {holder['host']}, started {holder['start_time']}"
    except (OSError, ValueError, KeyError, TypeError):  # it took the lock this very moment
        return "it has not written its pid yet"


# --------------------------------------------------------------------------------------------
# The config and the environment.


def read_config(workdir: pathlib.Path) -> config_lib.Config | None:
    """The resolved config of the run; None where the directory has none yet.

    Raises:
        UsageError: config.json is damaged, or of a version with other fields.
    """
    path = workdir / "config.json"
    values = _read_object(path)
    if values is None:
        return None
    try:
        return config_lib.from_dict(values)
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"its fields are not those of a config: {error}") from error


def config_changes(
    workdir: pathlib.Path,
    config: config_lib.Config,
    dataset_fingerprint: str,
    allowed: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Compares config and dataset with those the directory has on record; writes nothing.

    Fields of `FREE_FIELDS` may differ, those of `FIXED_FIELDS` never.

    Args:
        dataset_fingerprint: compared as the field `dataset`.
        allowed: dotted names of fields that may differ, such as "train.tokens".
    Returns:
        The allowed differences, {"field", "old", "new"} each; none in a new directory.
    Raises:
        UsageError: a field differs that is not allowed (all of them are listed); an allowed name
            is no field; config.json or environment.json is damaged.
        StorageError: the disk failed.
    """
    new = {**flatten(plain(config.to_dict())), "dataset": dataset_fingerprint}
    for name in allowed:
        if name not in new:
            raise errors.UsageError(
                f"--allow_config_change: unknown field {name!r}."
                f"{presets.suggest(name, tuple(new))} Give dotted names, such as train.tokens."
            )
    config_path, environment_path = workdir / "config.json", workdir / "environment.json"
    record = _read_object(environment_path) or {}
    old_values = _read_object(config_path)
    if old_values is None:  # a new run, or one killed before its first record
        return []
    if "dataset_fingerprint" not in record:
        logging.warning(
            "%s: does not name the dataset of this run; taken to be the present one",
            environment_path,
        )
    old_dataset = record.get("dataset_fingerprint", dataset_fingerprint)
    changes = _differences({**flatten(old_values), "dataset": old_dataset}, new)
    refused = [c for c in changes if c["field"] not in allowed or c["field"] in FIXED_FIELDS]
    if refused:
        raise errors.UsageError(_refusal(config_path, refused, allowed))
    return changes


def record_config(
    workdir: pathlib.Path,
    config: config_lib.Config,
    dataset_fingerprint: str,
    changes: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Makes `config` the directory's config.json, once it is certain that the run can use it.

    Args:
        changes: of `config_changes`; recorded with the time in environment.json, under
            `allowed_config_changes`.
    Raises:
        UsageError: environment.json is damaged.
        StorageError: the disk failed.
    """
    path = workdir / "environment.json"
    record = _read_object(path) or {}
    record["dataset_fingerprint"] = dataset_fingerprint
    if changes:
        dated = [{"time": _now(), **change} for change in changes]
        record["allowed_config_changes"] = [*record.get("allowed_config_changes", []), *dated]
    # The record comes first: killed in between, the next call finds the differences again.
    write_json(path, record)
    write_json(workdir / "config.json", config.to_dict())


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    fields = [name for name in dict.fromkeys((*old, *new)) if name not in FREE_FIELDS]
    changes = [
        {"field": name, "old": old.get(name, _ABSENT), "new": new.get(name, _ABSENT)}
        for name in fields
    ]
    return [change for change in changes if change["old"] != change["new"]]


def _refusal(path: pathlib.Path, refused: list[dict[str, Any]], allowed: Sequence[str]) -> str:
    rows = [("field", "old", "new")]
    rows += [(c["field"], _cell(c["old"]), _cell(c["new"])) for c in refused]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    table = "\n".join(f"  {f:<{widths[0]}}  {old:<{widths[1]}}  {new}" for f, old, new in rows)
    fixed = [change["field"] for change in refused if change["field"] in FIXED_FIELDS]
    names = ",".join([*allowed, *(change["field"] for change in refused)])
    rest = (
        f": no checkpoint can go on with another {', '.join(fixed)}."
        if fixed
        else f", or go on with --allow_config_change={names} (which is recorded)."
    )
    return (
        f"{path}: this run was begun with other settings:\n{table}\n"
        f"Use the old ones, or another --workdir{rest}"
    )


def _cell(value: Any) -> str:
    return value if value == _ABSENT else json.dumps(value)


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one, with dotted names: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}.{inner}": v for inner, v in flatten(value).items()})
        else:
            flat[name] = value
    return flat


def write_environment(
    workdir: pathlib.Path, dataset_fingerprint: str, command: Sequence[str] | None = None
) -> None:
    """Records in environment.json what this start runs on; earlier starts stay on record.

    The top level describes the latest start; `starts` has one entry for each: time, command,
    devices, and whatever else changed since the start before (the first entry has all of it).

    Args:
        command: the command line, secrets are masked; None is this process's own.
    Raises:
        UsageError: environment.json is damaged.
        StorageError: the disk failed.
    """
    path = workdir / "environment.json"
    record = _read_object(path) or {}
    now = {"time": _now(), **environment.describe(command)}
    always = ("time", "command", "devices")
    for package, version in record.get("versions", {}).items():
        if version != now["versions"].get(package):
            logging.warning(
                "%s: this run began with %s %s, now it is %s; the last bits may differ",
                path,
                package,
                version,
                now["versions"].get(package),
            )
    start = {name: v for name, v in now.items() if name in always or record.get(name) != plain(v)}
    kept = ("dataset_fingerprint", "allowed_config_changes", "starts")
    write_json(
        path,
        {
            **{name: record[name] for name in kept if name in record},
            "dataset_fingerprint": dataset_fingerprint,
            **now,
            "starts": [*record.get("starts", []), start],
        },
    )


# --------------------------------------------------------------------------------------------
# Reading and replacing files.


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Replaces a file as a whole: readers, and the file after a crash, have the old or the new.

    The temporary name is fixed, so that what a kill leaves behind is overwritten the next time;
    the caller sees to it that nobody else writes the same file.

    Raises:
        StorageError: the disk is full or fails; the old file stays.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # makes the new name survive a power loss
        finally:
            os.close(directory)
    except OSError as error:
        raise storage_error(path, error) from error


def write_json(path: pathlib.Path, value: Any) -> None:
    """Replaces a JSON file atomically; keys keep their order, numbers follow `plain`.

    Raises:
        StorageError: the disk is full or fails; the old file stays.
    """
    write_bytes(path, (json.dumps(plain(value), indent=2, allow_nan=False) + "\n").encode())


def plain(value: Any) -> Any:
    """The value as JSON has it: tuples as lists, arrays of one element as numbers.

    Non-finite floats become None. Float32 and narrower become the shortest decimal that reads back
    as the same float32 (0.1, not 0.10000000149011612); float64 keeps all of its digits.

    Raises:
        TypeError: a value that is none of these.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):  # np.float64 as well
        return float(value) if math.isfinite(value) else None
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind in "OUSMmc":
        raise TypeError(f"{value!r} is neither a number nor a container of numbers")
    if array.dtype.kind in "biu" or array.dtype == np.float64:
        return plain(array.item())
    return _shortest(np.float32(array.item()))


def _shortest(value: np.float32) -> float | None:
    if not np.isfinite(value):
        return None
    short = float(str(value))
    # Decimal -> float64 -> float32 rounds twice; were that ever to miss, the exact value stands.
    return short if np.float32(short) == value else float(value)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, in ascending `step`; null is None.

    A torn last line, which a killed run or a full disk leaves, is skipped with a warning.

    Raises:
        UsageError: no such file; or another line is damaged or out of order.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise errors.UsageError(
            f"{path}: no such file, expected the metrics of a run. Give a run directory."
        )
    return [row for _, row in read_rows(path)]


def read_rows(path: pathlib.Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Like `read_metrics`, each row with the bytes of its line, without the newline."""
    rows: list[tuple[bytes, dict[str, Any]]] = []
    lines = path.read_bytes().split(b"\n")
    last = max((i for i, line in enumerate(lines) if line), default=-1)
    for i, line in enumerate(lines[: last + 1]):
        try:
            row = json.loads(line)
            step = row["step"]
            if type(step) is not int or step < 0:
                raise ValueError(f"step is {step!r}")
        except (ValueError, KeyError, TypeError) as error:
            if i == last:
                logging.warning("%s:%d: a torn last line is skipped", path, i + 1)
                break
            raise errors.UsageError(
                f"{path}:{i + 1}: not a row of metrics ({error!r}), expected a JSON object with "
                "`step`. Restore the file from a copy, or use another --workdir."
            ) from error
        if rows and step <= rows[-1][1]["step"]:
            raise errors.UsageError(
                f"{path}:{i + 1}: step {step} follows step {rows[-1][1]['step']}, expected "
                "ascending steps. Restore the file from a copy, or use another --workdir."
            )
        rows.append((line, row))
    return rows


def read_summary(workdir: pathlib.Path) -> dict[str, Any] | None:
    """summary.json, the mark of a finished run; None where the run is not finished.

    Raises:
        UsageError: the file is damaged.
    """
    return _read_object(workdir / "summary.json")


def write_summary(workdir: pathlib.Path, summary: Mapping[str, Any]) -> None:
    """Marks the run as finished, atomically; the last file that a run writes.

    Raises:
        StorageError: the disk is full or fails.
    """
    write_json(workdir / "summary.json", summary)


def _read_object(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise storage_error(path, error) from error
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(value, dict):
        raise _damaged(path, "it is not a JSON object")
    return value


def _damaged(path: pathlib.Path, what: str) -> errors.UsageError:
    return errors.UsageError(
        f"{path}: damaged ({what}). Restore it from a copy, or use another --workdir."
    )


def storage_error(path: pathlib.Path, error: OSError) -> errors.StorageError:
    """The failure of one file, in the form that the command line shows."""
    return errors.StorageError(
        f"{path}: cannot be read or written ({_reason(error)}). "
        "Free the path or the disk, then run the same command again."
    )


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
