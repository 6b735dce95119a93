"""What a run writes while it trains: metrics.jsonl and TensorBoard event files.

The writers have the interface of CLU's `metric_writers.MetricWriter`. metrics.jsonl is the record
of truth: an error there stops the run. TensorBoard, and Weights & Biases where --wandb asks for it,
are a convenience: an error is a warning.
"""

import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging

from qkjax import files
from qkjax.runs import directory as run_directory
from qkjax.runs import tensorboard, wandb_writer
from qkjax.runs.tensorboard import MetricWriter, ScalarsOnly


class JsonlWriter(ScalarsOnly, MetricWriter):
    """metrics.jsonl: one JSON object per line, `step` first, steps ascending.

    Each row goes to the operating system as it is written, and to the disk at `flush`. What the
    disk refused stays in memory and is tried again at the next row or flush.
    """

    def __init__(self, path: str | os.PathLike[str], resume_step: int = -1) -> None:
        """Opens the file after the rows up to `resume_step`; later ones and a torn one are cut.

        Args:
            resume_step: step of the restored checkpoint; -1 where nothing was restored.
        Raises:
            UsageError: a line that is not the last is damaged.
            StorageError: the file cannot be read or written.
        """
        self.path = pathlib.Path(path)
        try:
            # A device or a pipe has no rows to read back.
            content = self.path.read_bytes() if self.path.is_file() else b""
            rows = run_directory.read_rows(self.path) if content else []
        except OSError as error:
            raise files.storage_error(self.path, error) from error
        kept = [(line, row) for line, row in rows if row["step"] <= resume_step]
        self._last = kept[-1][1] if kept else None
        last_step = kept[-1][1]["step"] if kept else None
        if resume_step >= 0 and last_step != resume_step:
            logging.warning(
                "%s: its last row is of step %s, the checkpoint of step %d: rows are missing",
                self.path,
                last_step,
                resume_step,
            )
        wanted = b"".join(line + b"\n" for line, _ in kept)
        link = self.path.is_symlink() and self.path.is_file()  # to a file that is not the run's
        if content != wanted or link or not self.path.exists():
            files.replace(self.path, wanted)
        self._open()

    def _open(self) -> None:
        try:
            self._file = open(self.path, "ab")
        except OSError as error:
            raise files.storage_error(self.path, error) from error

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Appends the row of a step; non-finite numbers and None become null.

        Raises:
            ValueError: the step is not above the last one, or a scalar is named `step`.
            OSError: the disk refused the row; it stays in memory.
        """
        if self._last is not None and step <= self._last["step"]:
            raise ValueError(
                f"{self.path}: a row of step {step} after one of step {self._last['step']}"
            )
        row = self._row(step, scalars)
        self._file.write(_line(row))
        self._last = row
        self._file.flush()

    def last_row(self) -> dict[str, Any] | None:
        """A copy of the last row, with its `step`; None where there is no row."""
        return None if self._last is None else dict(self._last)

    def rewrite_last(self, row: Mapping[str, Any]) -> None:
        """Replaces the last row, on the disk and atomically; `row` has the same `step`.

        Raises:
            ValueError: there is no row, or it has another step.
            StorageError: the disk failed; the old row stays.
        """
        if self._last is None or row.get("step") != self._last["step"]:
            raise ValueError(f"{self.path}: {row.get('step')} is not the step of the last row")
        new = self._row(row["step"], {name: v for name, v in row.items() if name != "step"})
        if new == self._last:
            return
        try:
            self._file.flush()
        except OSError as error:
            raise files.storage_error(self.path, error) from error
        lines = [line for line, _ in run_directory.read_rows(self.path)[:-1]]
        files.replace(self.path, b"".join(line + b"\n" for line in lines) + _line(new))
        self._last = new
        self._file.close()  # the replaced file
        self._open()

    def _row(self, step: int, scalars: Mapping[str, Any]) -> dict[str, Any]:
        if "step" in scalars:
            raise ValueError(f"{self.path}: a scalar is named `step`")
        return {"step": int(step), **files.plain(scalars)}

    def flush(self) -> None:
        """Writes every row to the disk and syncs it.

        Raises:
            OSError: the disk is full or fails.
        """
        self._file.flush()
        files.sync(self._file)

    def close(self) -> None:
        """Flushes and closes the file.

        Raises:
            OSError: the disk is full or fails.
        """
        if self._file.closed:
            return
        try:
            self.flush()
        finally:
            self._file.close()

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Does nothing: config.json has them."""


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, allow_nan=False) + "\n").encode()


class CompositeWriter(ScalarsOnly, MetricWriter):
    """Calls several writers; what one of them cannot write, the others still do.

    An error of metrics.jsonl is raised, once all writers were called: as StorageError where the
    disk failed. The first error of any other writer is a warning; it is called again for what
    comes next.
    """

    def __init__(self, jsonl: JsonlWriter, others: Sequence[MetricWriter] = ()) -> None:
        """Args: the essential writer, and those whose failure does not stop a run."""
        self.jsonl = jsonl
        self._others = tuple(others)
        self._errors: dict[str, Exception] = {}
        self._resumed_step = (jsonl.last_row() or {"step": None})["step"]

    def errors(self) -> dict[str, Exception]:
        """The first error of each writer, by its class name; empty where all is well."""
        return dict(self._errors)

    def _call(self, call: Callable[[Any], None]) -> None:
        for writer in self._others:
            self._try(writer, call)
        fatal = self._try(self.jsonl, call)
        if isinstance(fatal, OSError):
            raise files.storage_error(self.jsonl.path, fatal) from fatal
        if fatal is not None:
            raise fatal

    def _try(self, writer: MetricWriter, call: Callable[[Any], None]) -> Exception | None:
        try:
            call(writer)
        except Exception as error:  # any error; the other writers come first
            name = type(writer).__name__
            if name not in self._errors and writer is not self.jsonl:
                logging.warning(
                    "%s failed: %r. metrics.jsonl continues; more errors of %s are not shown.",
                    name,
                    error,
                    name,
                )
            self._errors.setdefault(name, error)
            return error
        return None

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes the row of a step.

        Raises:
            StorageError: metrics.jsonl could not be written.
            ValueError: the step is not above the last one.
        """
        self._call(lambda writer: writer.write_scalars(step, scalars))

    def last_row(self) -> dict[str, Any] | None:
        """A copy of the last row of metrics.jsonl; None where there is none."""
        return self.jsonl.last_row()

    def write_row(self, row: Mapping[str, Any]) -> None:
        """Writes a whole row, `step` and all.

        The row of the step that a run resumed from may be written again, once it has what the
        stopped run had no time to measure; then metrics.jsonl has the new row in its place.

        Raises:
            StorageError: metrics.jsonl could not be written.
            ValueError: the step is not above the last one.
        """
        step = row["step"]
        scalars = {name: value for name, value in row.items() if name != "step"}
        last = self.jsonl.last_row() or {}
        if step != self._resumed_step or step != last["step"]:
            return self.write_scalars(step, scalars)
        # TensorBoard keeps both of two values of a step: only new names go there. They are on the
        # disk before the row is, whose names a later resume takes for written.
        added = {name: value for name, value in scalars.items() if name not in last}

        def replace(writer: Any) -> None:
            if writer is self.jsonl:
                writer.rewrite_last(row)
            elif added:
                writer.write_scalars(step, added)
                writer.flush()

        return self._call(replace)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Writes images [H, W, C] or [N, H, W, C]."""
        self._call(lambda writer: writer.write_images(step, images))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes a flat mapping of options; call it once."""
        self._call(lambda writer: writer.write_hparams(hparams))

    def flush(self) -> None:
        """Writes everything to the disk and syncs it.

        Raises:
            StorageError: metrics.jsonl could not be written.
        """
        self._call(lambda writer: writer.flush())

    def close(self) -> None:
        """Flushes and closes every writer.

        Raises:
            StorageError: metrics.jsonl could not be written.
        """
        self._call(lambda writer: writer.close())


def create_run_writer(
    workdir: str | os.PathLike[str], resume_step: int = -1, *, wandb: bool = False
) -> CompositeWriter:
    """The writer of a run directory: metrics.jsonl, and TensorBoard where it can be had.

    Args:
        resume_step: step of the restored checkpoint, what follows it is removed; -1 for none.
        wandb: Weights & Biases as well; the directory then has its config.json.
    Raises:
        UsageError: metrics.jsonl is damaged.
        StorageError: metrics.jsonl cannot be read or written.
    """
    jsonl = JsonlWriter(run_directory.RunDirectory(workdir).metrics, resume_step)
    others: list[MetricWriter] = []
    try:
        others.append(tensorboard.SummaryWriter(workdir, resume_step))
    except ImportError as error:
        logging.warning(
            "no TensorBoard files (%s); metrics.jsonl has everything. "
            "To have them: pip install tensorboardX",
            error,
        )
    except OSError as error:
        logging.warning("no TensorBoard files (%s); metrics.jsonl has everything", error)
    if wandb:
        try:
            others.append(wandb_writer.WandbWriter(workdir, resume_step))
        except Exception as error:  # any of wandb's: it is no part of the run
            said = str(error).partition("\n")[0]
            logging.warning("nothing is sent to wandb (%s); metrics.jsonl has everything", said)
    return CompositeWriter(jsonl, others)
