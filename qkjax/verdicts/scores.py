"""Downstream results of a study: read, checked, and refused where they cannot be compared."""

import hashlib
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from qkjax import errors, files
from qkjax.study import study_files

_FIELDS = ("backend", "bos", "limit", "run", "sample", "tasks")
_TASK_FIELDS = ("data_sha256", "metrics", "n", "name", "num_fewshot")
# What an item of downstream/<arm>/seed_<n>.items.jsonl holds, by task.
_ITEM_FIELDS = {
    "hellaswag": ("index", "item_sha256", "log_likelihoods", "gold", "acc", "acc_norm"),
    "lambada": ("index", "item_sha256", "log_likelihood", "acc"),
}


class Scores(NamedTuple):
    """What downstream/ holds, by arm and seed."""

    results: dict[tuple[str, int], dict[str, Any]]  # <arm>/seed_<n>.json
    items: dict[tuple[str, int], list[dict[str, Any]]]  # <arm>/seed_<n>.items.jsonl, where there
    notes: tuple[str, ...]  # what was left out, for people


def read(folder: pathlib.Path, trained: Mapping[tuple[str, int], str]) -> Scores:
    """The results of finished runs.

    Args:
        folder: downstream/ of a study.
        trained: by arm and seed the params_sha256 with which the run ended; results of other
            parameters are left out.
    Raises:
        UsageError: a damaged file; results of other items, or of items put otherwise.
        StorageError: the disk failed.
    """
    found = Scores({}, {}, ())
    for (arm, seed), parameters in trained.items():
        file = folder / arm / f"seed_{seed}.json"
        result = study_files.read_object(file)
        if result is None:
            continue
        _check_fields(file, result)
        if result["run"]["params_sha256"] != parameters:
            note = f"{file}: left out, it measured other parameters than the run's last"
            found = found._replace(notes=(*found.notes, note))
            continue
        found.results[arm, seed] = result
        lines = file.with_suffix(".items.jsonl")
        if lines.exists():
            found.items[arm, seed] = _read_items(lines, result.get("items_sha256"))
        elif "items_sha256" in result:
            note = f"{lines}: missing, so items are not compared; restore it from a copy"
            found = found._replace(notes=(*found.notes, note))
    _check_alike(folder, found.results)
    return found


def _check_fields(file: pathlib.Path, result: Mapping[str, Any]) -> None:
    study_files.need(file, "", result, _FIELDS)
    study_files.need(file, "run", result["run"], ("params_sha256",))
    study_files.need(file, "bos", result["bos"], ("added", "why"))
    study_files.need(file, "tasks", result["tasks"], ())
    for task, measured in result["tasks"].items():
        study_files.need(file, task, measured, _TASK_FIELDS)
        parts = {task: measured, f"{task} byte_exact": measured.get("byte_exact")}
        for where, part in parts.items():
            if part is not None:
                study_files.need(file, where, part, ("metrics", "n"))
                for metric, score in part["metrics"].items():
                    study_files.need(file, f"{where} {metric}", score, ("value", "stderr"))


def _check_alike(
    folder: pathlib.Path, results: Mapping[tuple[str, int], Mapping[str, Any]]
) -> None:
    """Refuses scores of other questions, or of questions put otherwise.

    A sample decides nothing, so samples and whole results are each compared with their own kind.
    """
    seen: dict[tuple[bool, str, str], tuple[pathlib.Path, Any]] = {}
    for (arm, seed), found in results.items():
        file = folder / arm / f"seed_{seed}.json"
        for task, what, value in _conditions(found):
            place = (bool(found["sample"]), task, what)
            other, theirs = seen.setdefault(place, (file, value))
            if value != theirs:
                raise errors.UsageError(
                    f"{file}: {task} has {what} {value}, but {other} has {theirs}. Scores are "
                    "compared on the same items, asked in the same way: evaluate this run again."
                )


def _conditions(found: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for task, measured in found["tasks"].items():
        yield task, "num_fewshot", measured["num_fewshot"]
        yield task, "data_sha256", measured["data_sha256"]
        yield task, "limit", found["limit"]
        yield task, "bos", found["bos"]


def _read_items(path: pathlib.Path, sha256: str | None) -> list[dict[str, Any]]:
    """The items of a downstream result, each with the fields of its task.

    Args:
        sha256: of the file, as the result has it; None: an older result has none.
    """
    try:
        data = path.read_bytes()
        lines = data.decode().splitlines()
    except ValueError as error:
        raise study_files.damaged(path, str(error)) from error
    except OSError as error:
        raise files.storage_error(path, error) from error
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256:
        result = path.name.replace(".items.jsonl", ".json")
        raise study_files.damaged(path, f"sha256 {found[:12]}, {result} has {str(sha256)[:12]}")
    return [_read_item(path, number, line) for number, line in enumerate(lines, start=1)]


def _read_item(path: pathlib.Path, number: int, line: str) -> dict[str, Any]:
    item = study_files.parse(line.encode(), f"{path}:{number}")
    study_files.need(path, f"line {number}", item, ("task",))
    wanted: Collection[str] = _ITEM_FIELDS.get(item["task"], ())
    study_files.need(path, f"line {number}", item, wanted)
    return item
