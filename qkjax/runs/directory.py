"""A run directory: the name of every file in it, and the one way to read or write each.

A model that others have trained and `qkjax measure` has measured lies in the same files, with a
model.json instead of config.json.

docs/run_directory.md describes the format. Readers return what they have checked, or refuse with
the file's name; they import no jax, so that reports start at once.
"""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from absl import logging

from qkjax import config as config_lib
from qkjax import errors, files, presets
from qkjax.runs import environment

# No checkpoint continues with another of these.
_FIXED_FIELDS = ("dataset", *config_lib.FIXED_FIELDS)
_ABSENT = "(absent)"

FINAL: Literal["final"] = "final"
Evaluation = int | Literal["final"]  # updates done before it, or the pass after the last one

_OTHER_STEP = "Restore the checkpoint from a copy, or give an earlier step."
RESTORE = "Restore it from a copy, or use another --workdir."
_ARRAYS = re.compile(r"step_(\d{8,})\.npz")
_NONE = type(None)
_OF_OTHERS = ("study.json", "dataset.json")  # of no run
_BESIDE = ("figures", "rank_surgery", "wandb", "wandb.json")
# Hidden files, TensorBoard's, and what a shell or a scheduler wrote of the command itself.
_MAY_LIE_THERE = re.compile(r"\.|events\.out\.|.*\.(log|out|err)$")
_FILES = "files"  # by name their sha256
_FOLDERS = ("spectra", "validation")
_SUMMARY: dict[str, files.Types] = {
    "arm": str,
    "seed": int,
    "step": int,
    "tokens": int,
    "params_sha256": str,
    "diverged": bool,
    "diverged_step": (int, _NONE),
}
_MORE_OF_SUMMARY: dict[str, files.Types] = {"epochs": float, "wall_seconds": float}
_DATA_ORDER: dict[str, files.Types] = {
    "dataset": str,
    "seed": int,
    "sequences_per_step": int,
    "sequence_length": int,
}
_ENVIRONMENT: dict[str, files.Types] = {
    "dataset_fingerprint": str,
    "versions": dict,
    "devices": dict,
    "variables": dict,
    "git": dict,
    "command": list,
    "starts": list,
    "allowed_config_changes": list,
    "init_from": dict,
}


_MODEL: dict[str, files.Types] = {
    "kind": str,
    "format_version": int,
    "name": str,
    "class": str,
    "qk_norm": str,
    "num_layers": int,
    "num_heads": int,
    "num_kv_heads": int,
    "head_dim": int,
    "parameters": int,
    "text": dict,
    "revisions": list,
}
_REVISION: dict[str, files.Types] = {
    "revision": str,
    "step": int,
    "tokens": (int, _NONE),
    "params_sha256": str,
}
MODEL_KIND, MODEL_FORMAT = "model", 1


class SequenceLosses(NamedTuple):
    """The losses of one evaluation, by validation sequence."""

    loss_sum: np.ndarray  # [sequences] float64, nats
    counts: np.ndarray  # [sequences] predicted tokens, above 0

    @property
    def per_token(self) -> np.ndarray:
        """[sequences] float64, nats per predicted token."""
        return self.loss_sum / self.counts


class RunDirectory:
    """One run directory. Making the object touches nothing on the disk."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self.config = self.path / "config.json"
        self.model = self.path / "model.json"
        self.environment = self.path / "environment.json"
        self.parameters = self.path / "parameters.txt"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.profile = self.path / "profile"
        self.run_lock = self.path / "run.lock"

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def make(cls, path: str | os.PathLike[str]) -> "RunDirectory":
        """Creates the directory where it is missing; its path is absolute.

        Raises:
            UsageError: the path is empty, remote or holds a NUL; something else than a run, its
                logs or a measured model lies there.
            StorageError: it is a file, or cannot be created or written.
        """
        directory = cls(make_workdir(path))
        other = [name for name in _OF_OTHERS if (directory.path / name).exists()]
        if other and not directory.config.exists():
            raise errors.UsageError(
                f"{directory.path}: holds {other[0]}, expected a new directory or one of a run. "
                "Give another --workdir."
            )
        if foreign := directory._foreign():
            raise errors.UsageError(
                f"{directory.path}: holds other files ({', '.join(foreign[:5])}), expected a new "
                "directory or one of a run. Name a folder inside it, as "
                f"{directory.path / 'run'}; nothing was written."
            )
        return directory

    def _foreign(self) -> list[str]:
        """What no run has left here, where there is no run and no model; logs may lie there."""
        if self.config.exists() or self.model.exists():
            return []
        own = {path.name for path in vars(self).values()} | {*_FOLDERS, *_BESIDE}
        return sorted(
            entry.name
            for entry in self.path.iterdir()
            if entry.name not in own and not _MAY_LIE_THERE.match(entry.name)
        )

    @contextlib.contextmanager
    def lock(self, *, shared: bool = False) -> Iterator[None]:
        """Holds run.lock while entered, as `files.lock`; removes what killed writers left.

        Raises:
            UsageError: another process holds it.
            StorageError: the file system refuses the file or the lock.
        """
        with files.lock(self.run_lock, shared=shared, elsewhere="another --workdir"):
            if not shared:
                for folder in (self.path, self.path / "spectra", self.path / "validation"):
                    files.remove_temporary(folder)
            yield

    # ----------------------------------------------------------------------------------------
    # Config and environment.

    def read_config(self) -> config_lib.Config | None:
        """The resolved config of the run; None where the directory has none yet.

        Raises:
            UsageError: config.json is damaged, or of a version with other fields.
            StorageError: the disk failed.
        """
        values = files.read_object(self.config, RESTORE)
        return None if values is None else config_lib.from_dict(values, where=str(self.config))

    def need_config(self) -> config_lib.Config:
        """The resolved config of the run.

        Raises:
            UsageError: there is no run in the directory, or config.json is damaged.
            StorageError: the disk failed.
        """
        config = self.read_config() if self.path.is_dir() else None
        if config is None:
            raise errors.UsageError(
                f"{self.path}: not a run directory, expected a config.json in it. "
                "Give the --workdir of a run."
            )
        return config

    def read_model(self) -> dict[str, Any] | None:
        """model.json, what a measured model is; None where the directory is not one of a model.

        Raises:
            UsageError: the file is damaged, or of a newer version.
            StorageError: the disk failed.
        """
        record = files.read_object(self.model, RESTORE)
        if record is None:
            return None
        files.need(self.model, "", record, _MODEL, RESTORE)
        found = (record["kind"], record["format_version"])
        if found != (MODEL_KIND, MODEL_FORMAT):
            raise errors.UsageError(
                f"{self.model}: kind and format_version are {found}, expected "
                f"{(MODEL_KIND, MODEL_FORMAT)}. Read it with the version of qkjax that wrote it."
            )
        files.need(self.model, "text", record["text"], {"sequence_length": int}, RESTORE)
        for i, revision in enumerate(record["revisions"]):
            files.need(self.model, f"revisions[{i}]", revision, _REVISION, RESTORE)
        return record

    def write_model(self, record: Mapping[str, Any]) -> None:
        """Writes model.json, of `read_model`'s form; kind and format_version are added.

        Raises:
            StorageError: the disk is full or fails.
        """
        files.write_json(self.model, {"kind": MODEL_KIND, "format_version": MODEL_FORMAT, **record})

    def read_environment(self) -> dict[str, Any] | None:
        """What the run's starts ran on, as `write_environment` records it; None: no file yet.

        Raises:
            UsageError: environment.json is damaged.
            StorageError: the disk failed.
        """
        record = files.read_object(self.environment, RESTORE)
        if record is not None:
            present = {name: kind for name, kind in _ENVIRONMENT.items() if name in record}
            files.need(self.environment, "", record, present, RESTORE)
        return record

    def need_environment(self) -> dict[str, Any]:
        """As `read_environment`, with `dataset_fingerprint` in it for certain.

        Raises:
            UsageError: environment.json is missing, damaged, or does not name the dataset.
            StorageError: the disk failed.
        """
        record = self.read_environment() or {}
        if not record.get("dataset_fingerprint"):
            raise errors.UsageError(
                f"{self.environment}: names no dataset_fingerprint, expected the identity of the "
                "dataset that the run was trained on. Restore it from a copy, or train this run "
                "again."
            )
        return record

    def recorded_dataset(self) -> str:
        """Fingerprint of the dataset that the directory has on record; "" in a new directory.

        Raises:
            UsageError: environment.json is damaged.
            StorageError: the disk failed.
        """
        return str((self.read_environment() or {}).get("dataset_fingerprint", ""))

    def config_changes(
        self, config: config_lib.Config, dataset_fingerprint: str, allowed: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """Compares a config with the directory's; writes nothing.

        `FREE_FIELDS` of the config do not count. The dataset is the field "dataset" (fingerprint).

        Args:
            allowed: dotted names that may differ, of --allow_config_change.
        Returns:
            {"field", "old", "new"} of every field that differs; [] in a new directory.
        Raises:
            UsageError: a field differs that is not allowed (all of them are listed); an allowed
                name is no field; config.json or environment.json is damaged.
            StorageError: the disk failed.
        """
        new = {**flatten(files.plain(config.to_dict())), "dataset": dataset_fingerprint}
        for name in allowed:
            if name not in new:
                raise errors.UsageError(
                    f"--allow_config_change: unknown field {name!r}."
                    f"{presets.suggest(name, tuple(new))} Give dotted names, such as train.tokens."
                )
        record = self.read_environment() or {}
        stored = files.read_object(self.config, RESTORE)
        if stored is None:  # a new run, or one killed before its first record
            return []
        if "dataset_fingerprint" not in record:
            logging.warning(
                "%s: does not name the dataset of this run; taken to be the present one",
                self.environment,
            )
        old_dataset = record.get("dataset_fingerprint", dataset_fingerprint)
        old = {**flatten(config_lib.upgraded(stored)), "dataset": old_dataset}
        changes = _differences(old, new)
        refused = [c for c in changes if c["field"] not in allowed or c["field"] in _FIXED_FIELDS]
        if refused:
            raise errors.UsageError(_refusal(self.config, refused, allowed))
        return changes

    def record_config(
        self,
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
        record = self.read_environment() or {}
        record["dataset_fingerprint"] = dataset_fingerprint
        if changes:
            dated = [{"time": files.now(), **change} for change in changes]
            record["allowed_config_changes"] = [*record.get("allowed_config_changes", []), *dated]
        # The record comes first: killed in between, the next call finds the differences again.
        files.write_json(self.environment, record)
        files.write_json(self.config, config.to_dict())

    def write_environment(
        self, dataset_fingerprint: str, command: Sequence[str] | None = None
    ) -> None:
        """Records in environment.json what this start runs on; earlier starts stay on record.

        The top level describes the latest start; `starts` has one entry for each: time, command,
        devices, and what else changed since the start before (the first entry has all of it).

        Args:
            command: the command line, secrets are masked; None is this process's own.
        Raises:
            UsageError: environment.json is damaged.
            StorageError: the disk failed.
        """
        record = self.read_environment() or {}
        now = {"time": files.now(), **environment.describe(command)}
        always = ("time", "command", "devices")
        for package, version in record.get("versions", {}).items():
            if version != now["versions"].get(package):
                logging.warning(
                    "%s: this run started with %s %s, now it is %s; the last bits may differ",
                    self.environment,
                    package,
                    version,
                    now["versions"].get(package),
                )
        start = {
            name: value
            for name, value in now.items()
            if name in always or record.get(name) != files.plain(value)
        }
        kept = ("dataset_fingerprint", "init_from", "allowed_config_changes", "starts")
        files.write_json(
            self.environment,
            {
                **{name: record[name] for name in kept if name in record},
                "dataset_fingerprint": dataset_fingerprint,
                **now,
                "starts": [*record.get("starts", []), start],
            },
        )

    def check_checkpoint(
        self,
        meta: Mapping[str, Any],
        config: config_lib.Config,
        dataset_fingerprint: str,
        changes: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Refuses a checkpoint that is not of this run.

        Args:
            meta: the checkpoint's record, as `qkjax.runs.checkpoint` verified it.
            config: of the run; what was allowed to change since the checkpoint may differ.
            changes: of `config_changes`, not on record yet.
        Raises:
            UsageError: the checkpoint has another config, dataset or digest than the directory's
                files; names the fields.
            StorageError: the disk failed.
        """
        place = self.checkpoints / str(meta["step"])
        facts: dict[str, files.Types] = {
            "config": dict,
            "data_order": dict,
            "dataset_fingerprint": str,
            "wall_seconds": float,
        }
        files.need(place, "meta", meta, facts, _OTHER_STEP)
        if not 0 <= meta["wall_seconds"] < math.inf:
            raise files.damaged(place, f"wall_seconds is {meta['wall_seconds']}", _OTHER_STEP)
        files.need(place, "data_order in meta", meta["data_order"], _DATA_ORDER, _OTHER_STEP)
        recorded = (self.read_environment() or {}).get("allowed_config_changes", [])
        allowed = {change.get("field") for change in (*recorded, *changes)}
        found = {**flatten(_config_values(place, meta)), "dataset": meta["dataset_fingerprint"]}
        ours = {**flatten(files.plain(config.to_dict())), "dataset": dataset_fingerprint}
        differences = [c for c in _differences(found, ours) if c["field"] not in allowed]
        if differences:
            raise errors.UsageError(
                f"{place}: of another run than {self.config}: "
                f"{_listed(differences, 'checkpoint', 'here')}. "
                "Restore the run's own config.json and checkpoints from a copy."
            )
        summary = self.read_summary()
        if summary is not None and summary["step"] == meta["step"]:
            if summary["params_sha256"] != meta["params_sha256"]:
                raise errors.UsageError(
                    f"{self.summary}: params_sha256 is {summary['params_sha256'][:12]}, but the "
                    f"checkpoint of step {meta['step']} has {meta['params_sha256'][:12]}. "
                    "Restore both from one copy of the run."
                )

    def check_init_from(self, params_sha256: str, started: bool) -> None:
        """Refuses to resume a run under --init_from that started from something else.

        Args:
            params_sha256: of the parameters that the flag names.
            started: whether the directory has a checkpoint.
        Raises:
            UsageError: the run started from other parameters, or environment.json is damaged.
            StorageError: the disk failed.
        """
        recorded = ((self.read_environment() or {}).get("init_from") or {}).get("params_sha256")
        if started and recorded != params_sha256:
            found = str(recorded)[:12] if recorded else "random ones"
            raise errors.UsageError(
                f"--init_from: its parameters are {params_sha256[:12]}, but {self.path} started "
                f"from {found}. Leave the flag out to resume, or use another --workdir."
            )

    def record_init_from(self, name: str, params_sha256: str) -> None:
        """Records in environment.json what the run starts from.

        Raises:
            UsageError: environment.json is damaged.
            StorageError: the disk failed.
        """
        origin = {"name": name, "params_sha256": params_sha256}
        files.write_json(self.environment, {**(self.read_environment() or {}), "init_from": origin})

    def write_parameters(self, table: str) -> None:
        """Writes parameters.txt: which optimiser updates which parameter, for people.

        Raises:
            StorageError: the disk is full or fails.
        """
        files.replace(self.parameters, f"{table}\n".encode())

    # ----------------------------------------------------------------------------------------
    # Results.

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl in ascending `step`; null is None.

        A torn last line, which a killed run or a full disk leaves, is skipped with a warning.

        Raises:
            UsageError: no such file; or another line is damaged or out of order.
            StorageError: the disk failed.
        """
        if not self.metrics.exists():
            raise errors.UsageError(
                f"{self.metrics}: no such file, expected the metrics of a run. "
                "Give a run directory."
            )
        return [row for _, row in read_rows(self.metrics)]

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replaces metrics.jsonl: a row with `step` for each, in ascending steps.

        Of a measured model alone; a run appends with `writers.JsonlWriter`.

        Raises:
            StorageError: the disk is full or fails.
        """
        lines = [json.dumps(files.plain(row), allow_nan=False) + "\n" for row in rows]
        files.replace(self.metrics, "".join(lines).encode())

    def read_summary(self) -> dict[str, Any] | None:
        """summary.json, the mark of a finished run; None where the run is not finished.

        Raises:
            UsageError: the file is damaged.
            StorageError: the disk failed.
        """
        summary = files.read_object(self.summary, RESTORE)
        if summary is not None:
            files.need(self.summary, "", summary, _SUMMARY, RESTORE)
            more = {name: kind for name, kind in _MORE_OF_SUMMARY.items() if name in summary}
            files.need(self.summary, "", summary, more, RESTORE)
            _check_numbers(self.summary, summary)
            summary.pop(_FILES, None)  # `check_files` compares them
        return summary

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Marks the run as finished; the last file that a run writes.

        It also holds the sha256 of every file that results are read from, and one of its own.

        Raises:
            StorageError: the disk is full or fails.
        """
        recorded = [path for path in (self.config, self.environment, self.metrics) if path.exists()]
        digests = self._digests([*recorded, *self._arrays()])
        files.write_sealed(self.summary, {**summary, _FILES: digests})

    def summary_with(self, digests: Mapping[str, str | None]) -> bytes:
        """summary.json with these sha256 of files, by name; None for a file that it shall not list.

        Raises:
            UsageError: a file is not the one that summary.json lists.
            StorageError: the disk failed.
        """
        self.check_files()
        summary = files.read_object(self.summary, RESTORE) or {}
        listed = summary.get(_FILES, {})
        changed = {name: sha256 for name, sha256 in digests.items() if name in listed}
        if not changed:
            return self.summary.read_bytes()
        kept = {name: sha256 for name, sha256 in {**listed, **changed}.items() if sha256}
        return files.sealed_bytes({**summary, _FILES: kept})

    def check_files(self) -> None:
        """Refuses a run whose files are not those that it ended with.

        Of a run without summary.json, what its latest checkpoint recorded is compared; one of a
        version that recorded no digests passes.

        Raises:
            UsageError: a file was edited, exchanged or lost; names it.
            StorageError: the disk failed.
        """
        if self.read_summary() is None:
            self.check_record(self._latest_meta())
            return
        summary = files.read_object(self.summary, RESTORE) or {}
        if _FILES in summary:
            files.need(self.summary, "", summary, {_FILES: dict}, RESTORE)
            self._compare(summary[_FILES], self.summary.name)

    def _latest_meta(self) -> dict[str, Any]:
        """What the latest checkpoint says of the run; {} where that cannot be read.

        A restore reads it through `qkjax.runs.checkpoint`, which refuses a damaged one.
        """
        steps = sorted(int(path.name) for path in self.checkpoints.glob("[0-9]*") if _is_step(path))
        if not steps:
            return {}
        path = self.checkpoints / str(steps[-1]) / "meta" / "metadata"
        with contextlib.suppress(errors.QkjaxError):
            meta = files.read_object(path, RESTORE) or {}
            if meta.get("meta_sha256") == files.digest_of(meta, but="meta_sha256"):
                return meta
        return {}

    def _arrays(self, last: int | None = None) -> list[pathlib.Path]:
        """The npz files of evaluations; of those after at most `last` updates where it is given."""
        found = sorted(path for folder in _FOLDERS for path in (self.path / folder).glob("*.npz"))
        if last is None:
            return found
        steps = {path: _ARRAYS.fullmatch(path.name) for path in found}
        return [path for path, match in steps.items() if match and int(match[1]) <= last]

    def _digests(self, paths: Sequence[pathlib.Path]) -> dict[str, str]:
        found = {}
        for path in paths:
            try:
                found[path.relative_to(self.path).as_posix()] = files.sha256(path)
            except OSError as error:
                raise files.storage_error(path, error) from error
        return found

    def _compare(self, recorded: Mapping[str, Any], where: str) -> None:
        """Refuses files whose sha256 is not the recorded one."""
        absent = [name for name in recorded if not (self.path / name).is_file()]
        if absent:
            raise errors.UsageError(
                f"{self.path / absent[0]}: missing, {where} lists it. {RESTORE}"
            )
        for name, found in self._digests([self.path / name for name in recorded]).items():
            if found != recorded[name]:
                raise errors.UsageError(
                    f"{self.path / name}: has sha256 {found[:12]}, but {where} says "
                    f"{str(recorded[name])[:12]}. {RESTORE}"
                )

    def record_up_to(self, step: int) -> dict[str, Any]:
        """Digests of what is on the disk of updates up to `step`, the last row; for a checkpoint.

        Returns:
            "rows": how many stand before the last; "rows_sha256": of their lines; "row": the last,
            which a resume may still complete by an evaluation; "files": of the arrays.
        Raises:
            UsageError: the last row of metrics.jsonl is damaged.
            StorageError: the disk failed.
        """
        try:
            lines = self.metrics.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise files.storage_error(self.metrics, error) from error
        return {
            "rows": len(lines) - 1,
            "rows_sha256": hashlib.sha256(b"".join(lines[:-1])).hexdigest(),
            "row": parse_row(f"{self.metrics}:{len(lines)}", lines[-1]),
            _FILES: self._digests(self._arrays(step)),
        }

    def check_record(self, meta: Mapping[str, Any]) -> None:
        """Refuses rows and arrays that were edited after the checkpoint of `meta` was saved.

        Rows that are missing at the end of metrics.jsonl are not checked here: a resuming run warns
        of them. Checkpoints of versions without a record pass.

        Raises:
            UsageError: names the file.
            StorageError: the disk failed.
        """
        record, step = meta.get("record"), meta.get("step")
        if not record:
            return
        where = f"the checkpoint of step {step}"
        self._compare(record[_FILES], where)
        rows = read_rows(self.metrics) if self.metrics.exists() else []
        rows = [(line, row) for line, row in rows if row["step"] <= step]
        if not rows or rows[-1][1]["step"] != step:
            return
        before = hashlib.sha256(b"".join(line + b"\n" for line, _ in rows[:-1])).hexdigest()
        last = rows[-1][1]
        changed = [name for name, value in record["row"].items() if last.get(name) != value]
        if len(rows) - 1 != record["rows"] or before != record["rows_sha256"] or changed:
            which = f"the row of step {step}" if changed else f"rows before step {step}"
            raise errors.UsageError(
                f"{self.metrics}: {which} are not those that {where} recorded. {RESTORE}"
            )

    def set_summary_aside(self, step: int) -> None:
        """Takes the mark of a finished run away; the summary stays as summary.step_<step>.json.

        Raises:
            StorageError: the disk failed.
        """
        files.move(self.summary, self.path / f"summary.step_{step}.json")

    def spectra(self, evaluation: Evaluation) -> pathlib.Path:
        """The npz file of an evaluation's spectra."""
        return self.path / "spectra" / _name_of(evaluation)

    def validation(self, evaluation: Evaluation) -> pathlib.Path:
        """The npz file of an evaluation's losses by sequence."""
        return self.path / "validation" / _name_of(evaluation)

    def spectra_steps(self) -> list[int]:
        """The steps whose spectra are there, ascending; the final pass is not among them."""
        matches = (_ARRAYS.fullmatch(p.name) for p in (self.path / "spectra").glob("step_*.npz"))
        return sorted(int(match[1]) for match in matches if match)

    def read_spectra(self, evaluation: Evaluation) -> dict[str, np.ndarray]:
        """Every array that an evaluation saved of the spectra.

        Raises:
            UsageError: the file is missing or damaged.
            StorageError: the disk failed.
        """
        return files.read_arrays(self.spectra(evaluation), RESTORE)

    def read_validation(self, evaluation: Evaluation) -> SequenceLosses:
        """The losses of every validation sequence that an evaluation saved.

        Raises:
            UsageError: the file is missing or damaged.
            StorageError: the disk failed.
        """
        path = self.validation(evaluation)
        arrays = files.read_arrays(path, RESTORE, ("loss_sum", "count"))
        loss_sum, count = arrays["loss_sum"], arrays["count"]
        if loss_sum.ndim != 1 or loss_sum.shape != count.shape or not loss_sum.size:
            raise files.damaged(
                path, f"loss_sum has shape {loss_sum.shape}, count {count.shape}", RESTORE
            )
        if loss_sum.dtype.kind not in "fiu" or count.dtype.kind not in "fiu" or (count <= 0).any():
            raise files.damaged(path, "count has a sequence without predicted tokens", RESTORE)
        return SequenceLosses(loss_sum.astype(np.float64), count)

    def write_evaluation(
        self, evaluation: Evaluation, spectra: Mapping[str, Any], validation: Mapping[str, Any]
    ) -> None:
        """Writes the arrays of one evaluation.

        Raises:
            StorageError: the disk is full or fails.
        """
        files.write_arrays(self.spectra(evaluation), spectra)
        files.write_arrays(self.validation(evaluation), validation)

    def drop_evaluations_after(self, step: int) -> None:
        """Removes the arrays of evaluations whose rows a resume has cut.

        Raises:
            StorageError: the disk failed.
        """
        for path in (
            *(self.path / "spectra").glob("*.npz"),
            *(self.path / "validation").glob("*.npz"),
        ):
            match = _ARRAYS.fullmatch(path.name)
            if path.name == _name_of(FINAL) or (match and int(match[1]) > step):
                try:
                    path.unlink()
                except OSError as error:
                    raise files.storage_error(path, error) from error


def make_workdir(path: str | os.PathLike[str]) -> pathlib.Path:
    """Creates a directory that a command writes into, and returns its absolute path.

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
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Only writing shows a full or read-only disk: root ignores the mode bits.
        with tempfile.TemporaryFile(dir=workdir) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        raise errors.StorageError(
            f"{workdir}: cannot be used as the run directory ({error.strerror or error}). "
            "Free the path or the disk, or give another --workdir."
        ) from error
    return workdir


def final_name(metric: str) -> str:
    """val/loss -> val_final/loss: the name of a metric of the final pass."""
    family, _, rest = metric.partition("/")
    return f"{family}_final/{rest}"


def _name_of(evaluation: Evaluation) -> str:
    return "final.npz" if evaluation == FINAL else f"step_{evaluation:08d}.npz"


def _check_numbers(place: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Refuses a metric (its name has a '/') that is neither a number nor null."""
    metrics = {name: (float, _NONE) for name in values if "/" in name}
    files.need(place, "", values, metrics, RESTORE)


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one, with dotted names: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}.{inner}": v for inner, v in flatten(value).items()})
        else:
            flat[name] = value
    return flat


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    fields = [name for name in dict.fromkeys((*old, *new)) if name not in config_lib.FREE_FIELDS]
    changes = [
        {"field": name, "old": old.get(name, _ABSENT), "new": new.get(name, _ABSENT)}
        for name in fields
    ]
    return [change for change in changes if change["old"] != change["new"]]


def _refusal(path: pathlib.Path, refused: list[dict[str, Any]], allowed: Sequence[str]) -> str:
    fixed = [change["field"] for change in refused if change["field"] in _FIXED_FIELDS]
    names = ",".join([*allowed, *(change["field"] for change in refused)])
    rest = (
        f": no checkpoint can resume with another {', '.join(fixed)}."
        if fixed
        else f", or resume with --allow_config_change={names} (which is recorded)."
    )
    return (
        f"{path}: this run started with other settings: {_listed(refused, 'old', 'new')}. "
        f"Use the old ones, or another --workdir{rest}"
    )


def _listed(changes: Sequence[Mapping[str, Any]], old: str, new: str) -> str:
    """Each changed field with both values, in one line; `old` and `new` say whose they are."""
    return errors.listed(
        [f"{c['field']}: {old} {_cell(c['old'])}, {new} {_cell(c['new'])}" for c in changes]
    )


def _config_values(place: pathlib.Path, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a checkpoint's meta, as this version would have written it."""
    config = config_lib.from_dict(meta["config"], where=f"{place}: config in meta")
    return files.plain(config.to_dict())


def _cell(value: Any) -> str:
    return value if value == _ABSENT else json.dumps(value)


def read_rows(path: pathlib.Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The rows of a metrics.jsonl, each with the bytes of its line, without the newline.

    Raises:
        UsageError: a line but the last is damaged or out of order.
        StorageError: the disk failed.
    """
    rows: list[tuple[bytes, dict[str, Any]]] = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise files.storage_error(path, error) from error
    last = max((i for i, line in enumerate(lines) if line), default=-1)
    for i, line in enumerate(lines[: last + 1]):
        place = f"{path}:{i + 1}"
        if i == last and _is_torn(line):
            logging.warning("%s: a torn last line is skipped", place)
            break
        row = parse_row(place, line)
        if rows and row["step"] <= rows[-1][1]["step"]:
            raise errors.UsageError(
                f"{place}: step {row['step']} follows step {rows[-1][1]['step']}, expected "
                f"ascending steps. {RESTORE}"
            )
        rows.append((line, row))
    return rows


def parse_row(place: str, line: bytes) -> dict[str, Any]:
    """One line of metrics.jsonl: a JSON object with `step`, whose metrics are numbers or null.

    Args:
        place: file and line, for messages.
    Raises:
        UsageError: the line is something else.
    """
    row = files.parse_json(line, place, RESTORE)
    files.need(place, "", row, {"step": int}, RESTORE)
    if row["step"] < 0:
        raise files.damaged(place, f"step is {row['step']}", RESTORE)
    _check_numbers(place, row)
    return row


def _is_step(path: pathlib.Path) -> bool:
    return path.name.isdigit()


def _is_torn(line: bytes) -> bool:
    """Whether a line is no row at all, as what a killed run or a full disk leaves of one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return True
    return not isinstance(row, dict) or type(row.get("step")) is not int
