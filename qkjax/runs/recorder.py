"""What a run saves and shows while it trains: one object, chosen once in each process.

Process 0 has a `Recorder`; every other process has a `Silent`, whose methods do nothing. So the
loop of qkjax/train.py is one program for all of them. Nothing here waits for another process.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import optax

from qkjax import errors, evaluation, files, flops, model, optimizer, processes, train_step
from qkjax.config import Config
from qkjax.data import dataset as dataset_lib
from qkjax.data import manifest as manifest_lib
from qkjax.data import pipeline
from qkjax.runs import checkpoint, progress, resources, spectra_images, writers
from qkjax.runs.directory import FINAL, RunDirectory, final_name, flatten


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a run before it starts, and goes into its files."""

    config: Config
    directory: RunDirectory
    manifest: manifest_lib.Manifest
    origin: checkpoint.Origin | None
    transformation: optax.GradientTransformation
    data_order: dict[str, Any]  # of `pipeline.fingerprint`
    wandb: bool  # rows go to Weights & Biases too


class Silent:
    """Of a process that writes nothing: every method does nothing.

    What a method returns here is what a run needs of a process that has no files.
    """

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """While entered, the checkpoints are open; from `start` or `resume` on, the writers too.

        Raises:
            UsageError: a file among the checkpoints is damaged.
            StorageError: the checkpoints cannot be opened, or a file could not be written in full.
        """
        yield

    def check_disk(self) -> None:
        """Refuses a disk without room for the run.

        Raises:
            StorageError: what is free is less than the run needs.
        """

    def restore(
        self, restore_step: int | None, changes: list[dict[str, Any]]
    ) -> checkpoint.Restored | None:
        """The checkpoint to resume from, verified; None where there is none. Changes nothing.

        Raises:
            UsageError: there is no such step, or it is damaged, or of another run.
        """
        return checkpoint.Restored((), (), {})  # process 0 has the arrays, and says from where

    def record_start(self, changes: list[dict[str, Any]]) -> None:
        """Writes what this start runs on, and takes the mark of a finished run away."""

    def start(self) -> None:
        """Opens the files of a new run."""

    def resume(self, step: int) -> None:
        """Removes what follows the step, and reads what the run has measured up to it."""

    def last_row(self) -> dict[str, Any] | None:
        """The last row of metrics.jsonl; None where there is none."""
        return None

    def show(self, line: str) -> None:
        """Prints a line."""

    def show_banner(self, start: int) -> None:
        """Prints what is about to be trained from step `start` on."""

    def profile(self, step: int) -> None:
        """Starts the trace before its first update, and ends it before the one after its last."""

    def end_profile(self) -> None:
        """Ends the trace where one is under way."""

    def show_step(self, step: int, row: dict[str, Any]) -> None:
        """Shows a finite step now and then, and warns of a loss that is a spike."""

    def write(self, row: dict[str, Any]) -> None:
        """Writes a row of metrics.jsonl.

        Raises:
            StorageError: the disk failed.
        """

    def write_evaluation(
        self, step: int, measured: evaluation.Evaluation, row: dict[str, Any]
    ) -> None:
        """Writes the arrays of an evaluation and shows the row, which has its metrics.

        Raises:
            StorageError: the disk failed.
        """

    def write_final(self, step: int, measured: evaluation.Evaluation) -> None:
        """Writes the arrays of the final pass; its metrics go into the summary.

        Raises:
            StorageError: the disk failed.
        """

    def flush(self) -> None:
        """Brings every row to the disk.

        Raises:
            StorageError: the disk failed.
        """

    def save(self, step: int, params: Any, opt_state: Any, wall_seconds: float) -> None:
        """Starts to checkpoint a step; everything written before it is on the disk first.

        Args:
            params, opt_state: whole arrays, on the host or the devices of this process.
            wall_seconds: that the run has taken up to here.
        Raises:
            StorageError: the disk failed, now or in the save before.
        """

    def wait(self) -> None:
        """Returns when every checkpoint is on the disk.

        Raises:
            StorageError: one of them could not be written.
        """

    def summarise(
        self, step: int, diverged_step: int | None, wall_seconds: float
    ) -> dict[str, Any]:
        """Writes summary.json, the mark of a finished run, and returns what it holds.

        Raises:
            StorageError: the disk failed.
        """
        return {}


class Recorder(Silent):
    """Of process 0, which alone reads and writes the run's files and shows its progress."""

    def __init__(self, facts: Facts, shown: progress.Progress) -> None:
        self._facts = facts
        self._directory = facts.directory
        self._progress = shown
        self._latest: dict[str, Any] = {}  # the last value of every metric
        self._table = ""  # of routes, as parameters.txt holds it
        self._profiling = False
        self._open: contextlib.ExitStack
        self._checkpoints: checkpoint.Checkpoints
        self._writer: writers.CompositeWriter

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        with contextlib.ExitStack() as self._open:
            self._checkpoints = self._open.enter_context(
                contextlib.closing(
                    checkpoint.Checkpoints(
                        self._directory.checkpoints,
                        keep_all=self._facts.config.checkpoint.keep_all,
                    )
                )
            )
            yield

    def _open_writer(self, resume_step: int) -> None:
        writer = writers.create_run_writer(
            self._directory.path, resume_step, wandb=self._facts.wandb
        )
        self._writer = self._open.enter_context(contextlib.closing(writer))

    def check_disk(self) -> None:
        resources.check_disk(self._directory, self._facts.config, self._facts.transformation)

    def restore(
        self, restore_step: int | None, changes: list[dict[str, Any]]
    ) -> checkpoint.Restored | None:
        facts, steps = self._facts, self._checkpoints.steps()
        if facts.origin is not None:
            self._directory.check_init_from(facts.origin.params_sha256, bool(steps))
        if restore_step is not None and restore_step not in steps:
            raise errors.UsageError(
                f"--restore_step: {self._directory} has no checkpoint of step {restore_step}. "
                f"It has {steps}."
            )
        if not steps:
            return None
        step = steps[-1] if restore_step is None else restore_step
        shapes = train_step.state_shapes(facts.config, facts.transformation)
        meta = self._checkpoints.meta(step)
        self._directory.check_checkpoint(meta, facts.config, facts.manifest.fingerprint, changes)
        pipeline.check_fingerprint(meta["data_order"], facts.data_order)
        self._directory.check_record(meta)
        return self._checkpoints.restore(step, shapes.params, shapes.opt_state)

    def record_start(self, changes: list[dict[str, Any]]) -> None:
        config, origin = self._facts.config, self._facts.origin
        fingerprint = self._facts.manifest.fingerprint
        summary = self._directory.read_summary()
        if summary is not None:  # first: it is the mark of a run with the config of now
            self._directory.set_summary_aside(summary["step"])
        self._directory.record_config(config, fingerprint, changes)
        self._directory.write_environment(fingerprint)
        if origin is not None:
            self._directory.record_init_from(origin.name, origin.params_sha256)
        routes = optimizer.routing_table(model.parameter_shapes(config.model), config)
        self._table = optimizer.format_routing_table(routes)
        self._directory.write_parameters(self._table)

    def start(self) -> None:
        self._open_writer(-1)
        self._writer.write_hparams(flatten(self._facts.config.to_dict()))

    def resume(self, step: int) -> None:
        aside = self._checkpoints.set_aside_after(step)
        if aside:
            self.show(
                f"set aside  {', '.join(aside)} in {self._directory.checkpoints}; leave "
                "--restore_step out of the next command, or it starts here again"
            )
        self._open_writer(step)
        for row in self._directory.read_metrics():
            self._latest.update(row)
            self._progress.remember_loss(row.get("train/loss"))
        self._directory.drop_evaluations_after(step)

    def last_row(self) -> dict[str, Any] | None:
        return self._writer.last_row()

    def show(self, line: str) -> None:
        print(line, flush=True)

    def show_banner(self, start: int) -> None:
        shown = progress.banner(
            self._facts.config,
            flops.num_parameters(self._facts.config.model),
            jax.devices(),
            self._facts.manifest,
            self._directory.path,
            start,
        )
        # The compiler follows, and for a minute nothing else is printed.
        self.show(f"{shown}\n\n{self._table}\n\ncompiling  the step and the evaluation")

    def profile(self, step: int) -> None:
        if not self._facts.config.profile.steps:
            return
        first, last = self._facts.config.profile.steps
        if step == first:
            jax.profiler.start_trace(self._directory.profile)
            self._profiling = True
        elif step == last + 1:
            self.end_profile()

    def end_profile(self) -> None:
        if self._profiling:
            self._profiling = False
            jax.profiler.stop_trace()
            self.show(f"profile    {self._directory.profile}")

    def show_step(self, step: int, row: dict[str, Any]) -> None:
        self._progress.watch_loss(step, float(row["train/loss"]))
        self._progress.show_step(step, row)

    def write(self, row: dict[str, Any]) -> None:
        self._writer.write_row(row)
        self._latest.update(row)

    def write_evaluation(
        self, step: int, measured: evaluation.Evaluation, row: dict[str, Any]
    ) -> None:
        self._directory.write_evaluation(step, measured.spectra, measured.validation)
        self._writer.write_images(step, spectra_images.of_evaluation(measured.spectra))
        self._progress.show_evaluation(step, row)

    def write_final(self, step: int, measured: evaluation.Evaluation) -> None:
        self._directory.write_evaluation(FINAL, measured.spectra, measured.validation)
        self._progress.show_evaluation(step, measured.metrics)
        self._latest |= {final_name(name): v for name, v in measured.metrics.items()}

    def flush(self) -> None:
        self._writer.flush()

    def save(self, step: int, params: Any, opt_state: Any, wall_seconds: float) -> None:
        self._writer.flush()
        self._checkpoints.save(
            step,
            params,
            opt_state,
            {
                "config": self._facts.config.to_dict(),
                "dataset_fingerprint": self._facts.manifest.fingerprint,
                "data_order": self._facts.data_order,
                "wall_seconds": wall_seconds,
                "record": self._directory.record_up_to(step),
            },
        )

    def wait(self) -> None:
        self._checkpoints.wait()

    def summarise(
        self, step: int, diverged_step: int | None, wall_seconds: float
    ) -> dict[str, Any]:
        config = self._facts.config
        summary = files.plain(
            {
                **self._latest,
                "arm": config.arm,
                "seed": config.seed,
                "step": step,
                "tokens": step * config.train.tokens_per_step,
                "epochs": dataset_lib.passes_over_data(config, self._facts.manifest, step),
                "params_sha256": self._checkpoints.meta(step)["params_sha256"],
                "diverged": diverged_step is not None,
                "diverged_step": diverged_step,
                "wall_seconds": wall_seconds,
            }
        )
        self._directory.write_summary(summary)
        return summary


def of_this_process(facts: Facts, shown: progress.Progress) -> Silent:
    """The recorder of a run in this process; `shown` shows the progress of process 0."""
    return Recorder(facts, shown) if processes.is_first() else Silent()
