"""The training run: set up, restore, loop, finish."""

import contextlib
import json
import os
import time
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import qkjax
from qkjax import (
    after_update,
    errors,
    evaluation,
    files,
    flops,
    model,
    optimizer,
    processes,
    sharding,
    train_step,
)
from qkjax import config as config_lib
from qkjax.cli import startup
from qkjax.config import Config
from qkjax.data import dataset as dataset_lib
from qkjax.data import pipeline
from qkjax.runs import attention_check, checkpoint, progress, recorder, resources, signals
from qkjax.runs.directory import RunDirectory, flatten


def train_and_evaluate(
    config: Config,
    workdir: str | os.PathLike[str],
    *,
    restore_step: int | None = None,
    allow_config_change: tuple[str, ...] = (),
    origin: checkpoint.Origin | None = None,
    wandb: bool = False,
) -> dict[str, Any]:
    """Trains one arm in `workdir`, or resumes what an earlier call left.

    With several processes each calls this, inside `processes.joined`; process 0 alone reads and
    writes the run directory, and the others need not see it.

    Args:
        config: a resolved config; dtypes "auto" are settled for the devices at hand.
        workdir: the run directory (docs/run_directory.md).
        restore_step: resume from this checkpoint instead of the latest.
        allow_config_change: fields that may differ from the directory's config.json.
        origin: what a new run starts from; None: random parameters of its seed.
        wandb: send the metrics to Weights & Biases too.
    Returns:
        The summary, as summary.json holds it; the same in every process.
    Raises:
        UsageError: dataset, config or checkpoint do not fit; before anything is computed.
        NonFiniteError: the run diverged; its last finite state is saved.
        StorageError: the disk failed; earlier checkpoints stay.
        Stopped: SIGTERM or SIGINT; a checkpoint was saved.
    """
    directory = RunDirectory.make(workdir) if processes.is_first() else RunDirectory(workdir)
    platform = jax.default_backend()
    _check_determinism(config, platform)
    config = attention_check.settle(config.for_platform(platform), platform)
    lock = directory.lock() if processes.is_first() else contextlib.nullcontext()
    with lock, signals.StopRequest() as stop:
        dataset = _open_dataset(config, directory)
        run = _Run(config, directory, dataset, stop, origin, wandb)
        _check_processes(config, dataset, origin)

        def changes_or_summary() -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
            changes = directory.config_changes(
                config, dataset.manifest.fingerprint, allow_config_change
            )
            summary = directory.read_summary()
            if summary is None or restore_step is not None or not _is_finished(summary, config):
                return changes, None
            _check_finished(directory, summary, changes)
            run.check_latest_checkpoint()
            print(
                f"{directory}: already complete at step {summary['step']}; nothing to do",
                flush=True,
            )
            return changes, summary

        changes, summary = processes.from_first(changes_or_summary)
        if summary is not None:
            return summary
        resources.check_memory(config, run.transformation)
        run.recorder.check_disk()
        resources.warn_of_cpu(config, platform)
        try:
            return run.execute(restore_step, changes)
        except jax.errors.JaxRuntimeError as error:
            raise resources.explain(error, config, run.transformation) from error


def _open_dataset(config: Config, directory: RunDirectory) -> dataset_lib.Dataset:
    """Process 0 first, which makes the embedded corpus where it is missing; then the others."""
    if not processes.is_first():
        return dataset_lib.open_dataset(config, processes.from_first(str))
    recorded = directory.recorded_dataset()
    dataset = dataset_lib.open_dataset(config, recorded)
    processes.from_first(lambda: recorded)
    return dataset


def _check_processes(
    config: Config, dataset: dataset_lib.Dataset, origin: checkpoint.Origin | None
) -> None:
    """Refuses processes that would not train the same run."""
    if processes.count() == 1:
        return
    settings = flatten(files.plain(config.to_dict()))
    private = ("data.dir", *config_lib.FREE_FIELDS)  # each host has its own paths
    processes.check_equal(
        {
            **{f"config.{n}": json.dumps(v) for n, v in settings.items() if n not in private},
            "the dataset's fingerprint": dataset.manifest.fingerprint,
            "params_sha256 of --init_from": "none" if origin is None else origin.params_sha256,
            "the version of jax": jax.__version__,
            "the version of qkjax": qkjax.__version__,
            "the device": jax.local_devices()[0].device_kind,
            "the number of its devices": str(jax.local_device_count()),
        }
    )


def _check_determinism(config: Config, platform: str) -> None:
    """Refuses a GPU whose compiler was asked for something else than the config says."""
    asked = bool(startup.gpu_determinism())
    if platform == "gpu" and asked != config.determinism.gpu:
        raise errors.UsageError(
            f"determinism.gpu: {str(config.determinism.gpu).lower()}, but XLA_FLAGS asks for "
            f"{'deterministic' if asked else 'other'} operations. Call qkjax.prepare_process() "
            "before jax is imported, leave --xla_gpu_deterministic_ops out of XLA_FLAGS, or set "
            f"determinism.gpu={str(asked).lower()}."
        )


class Programs(NamedTuple):
    """What a run computes with; made from the config alone, compiled at first use."""

    transformation: optax.GradientTransformation
    train_step: jax.stages.Wrapped
    hooks: after_update.Programs
    evaluate: evaluation.Evaluator


def make_programs(config: Config, mesh: jax.sharding.Mesh) -> Programs:
    """The optimiser, the jitted update and the evaluation of a config on these devices.

    Raises:
        UsageError: the batch does not divide over the devices, or a parameter has no rule.
    """
    transformation = optimizer.make_optimizer(config, model.parameter_shapes(config.model))
    return Programs(
        transformation,
        train_step.make_train_step(config, transformation, mesh),
        after_update.make_programs(config, mesh),
        evaluation.Evaluator(config, mesh),
    )


def _first_not_finite(metrics: train_step.StepMetrics, names: list[str]) -> str:
    """Where a step that is not finite went wrong first; `names` are those of the parameters."""

    def first(finite: Iterable[Any]) -> str:
        return next((name for name, ok in zip(names, finite, strict=True) if not ok), "")

    if gradient := first(metrics.leaf_finite):
        return f"the gradient of {gradient}"
    if not np.isfinite(metrics.loss):
        return "the loss"
    if not np.isfinite(metrics.grad_norm):
        return "the gradient's norm"
    return f"the updated {first(metrics.updated_finite)}"


def initialisation_key(seed: int) -> jax.Array:
    """The key of a seed's initial parameters; data order has its own, derived by another name."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"initialisation"))


def _is_finished(summary: dict[str, Any], config: Config) -> bool:
    """False for a run that --allow_config_change=train.tokens has made longer."""
    return summary["diverged"] or summary["step"] >= config.train.num_steps


def _check_finished(
    directory: RunDirectory, summary: dict[str, Any], changes: list[dict[str, Any]]
) -> None:
    """Refuses other settings, a run that diverged, and files that were edited."""
    if changes:
        names = ", ".join(change["field"] for change in changes)
        raise errors.UsageError(
            f"{directory}: ended at step {summary['step']}, nothing is left to train with another "
            f"{names}. Use another --workdir, or resume from a checkpoint with --restore_step."
        )
    if summary["diverged"]:
        raise errors.NonFiniteError(
            f"{directory}: this run diverged at step {summary['diverged_step']}. "
            "Nothing was computed; use another --workdir for another config."
        )
    directory.check_files()


def _of_resume(meta: dict[str, Any]) -> dict[str, Any]:
    """What of a checkpoint's record every process needs."""
    return {name: meta[name] for name in ("step", "wall_seconds")}


class _Pending(NamedTuple):
    """A dispatched step whose metrics are still on the device."""

    step: int  # updates done after it
    metrics: train_step.StepMetrics
    rows: after_update.Rows
    batch: pipeline.Batch
    data_wait: float  # seconds


class _NonFiniteStep(Exception):
    """The step that has just been read has a non-finite loss or gradient."""

    def __init__(self, pending: _Pending, where: str) -> None:
        super().__init__(where)
        self.pending = pending
        self.where = where


class _Run:
    """One run, from its set-up to its summary."""

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        dataset: dataset_lib.Dataset,
        stop: signals.StopRequest,
        origin: checkpoint.Origin | None,
        wandb: bool,
    ) -> None:
        self.config = config
        self.origin = origin
        self.directory = directory
        self.dataset = dataset
        self.stop = stop
        self.mesh = sharding.make_mesh()
        self.votes = processes.Votes(self.mesh)
        self.stopping: int | None = None  # the signal that all processes stop by
        self.transformation, self.train_step, self.hooks, self.evaluate = make_programs(
            config, self.mesh
        )
        self.rate = optimizer.learning_rate(config.schedule, config.optimizer.learning_rate)
        self.progress = progress.Progress(
            config,
            flops.num_parameters(config.model),
            jax.devices()[0].device_kind,
            jax.device_count(),
        )
        data_order = pipeline.fingerprint(
            dataset.manifest, seed=config.seed, sequences_per_step=config.train.sequences_per_step
        )
        facts = recorder.Facts(
            config, directory, dataset.manifest, origin, self.transformation, data_order, wandb
        )
        self.recorder = recorder.of_this_process(facts, self.progress)
        self.saved: set[int] = set()  # steps
        self.started = time.monotonic()
        self.earlier_seconds = 0.0

    def execute(self, restore_step: int | None, changes: list[dict[str, Any]]) -> dict[str, Any]:
        """Everything from the restored or fresh state to the summary.

        Args:
            changes: of the config, recorded once the checkpoint has taken them.
        """
        with self.recorder.opened():
            restored = self.recorder.restore(restore_step, changes)
            self.recorder.record_start(changes)
            meta = processes.from_first(lambda: restored and _of_resume(restored.meta))
            if meta is None:
                state = self._start()
            else:
                assert restored is not None
                state = self._resume(restored._replace(meta=meta))
            self.recorder.show_banner(int(state.step))
            return self._finish(self._train(state))

    def check_latest_checkpoint(self) -> None:
        """Refuses a finished run whose checkpoints are another run's; one without any passes."""
        if not self.directory.checkpoints.is_dir():
            return
        checkpoints = checkpoint.Checkpoints(self.directory.checkpoints, read_only=True)
        with contextlib.closing(checkpoints):
            for step in checkpoints.steps()[-1:]:
                meta = checkpoints.meta(step)
                fingerprint = self.dataset.manifest.fingerprint
                self.directory.check_checkpoint(meta, self.config, fingerprint)

    def _start(self) -> train_step.TrainState:
        self.recorder.start()
        if self.origin is not None:
            return train_step.state_of(
                self.origin.params, self.config, self.transformation, self.mesh
            )
        return train_step.init_state(
            initialisation_key(self.config.seed), self.config, self.transformation, self.mesh
        )

    def _resume(self, restored: checkpoint.Restored) -> train_step.TrainState:
        step = restored.meta["step"]
        self.earlier_seconds = restored.meta["wall_seconds"]
        self.saved.add(step)
        self.recorder.resume(step)
        shapes = train_step.state_shapes(self.config, self.transformation)
        params = processes.arrays_from_first(restored.params, shapes.params)
        opt_state = processes.arrays_from_first(restored.opt_state, shapes.opt_state)
        state = train_step.TrainState(jnp.int32(step), params, opt_state, jnp.ones((), bool))
        placed = train_step.state_shardings(self.config, self.transformation, self.mesh)
        return jax.device_put(state, placed)

    def _train(self, state: train_step.TrainState) -> train_step.TrainState:
        """Runs the steps that are left."""
        start = int(state.step)
        row = processes.from_first(self.recorder.last_row)
        if row is None or row["step"] != start:  # a new run, or metrics.jsonl has lost rows
            row = {"step": start, "tokens": start * self.config.train.tokens_per_step}
        self._settle(state, start, row)
        if start >= self.config.train.num_steps:
            return state
        pending: _Pending | None = None
        with contextlib.closing(self._open_loader(start)) as batches:
            program = self._compile_step(state)
            self.progress.restart_clock(start)
            try:
                for step in range(start + 1, self.config.train.num_steps + 1):
                    self.recorder.profile(step)
                    waiting = time.monotonic()
                    batch = next(batches)
                    data_wait = time.monotonic() - waiting
                    tokens = sharding.put_batch(self.mesh, batch.tokens)
                    measured = self.hooks.measure(state.params, tokens)
                    state, metrics = program(state, tokens)
                    params, rows = self.hooks.apply(state.params, measured, state.finite)
                    state = state._replace(params=params)
                    if pending is not None:  # one step late, so that the device never waits
                        self.recorder.write(self._read(pending))
                    pending = _Pending(step, metrics, rows, batch, data_wait)
                    if self._is_stopping() or self._is_boundary(step):
                        row, pending = self._read(pending), None
                        self._settle(state, step, row)
            except _NonFiniteStep as bad:
                self._record_divergence(state, bad)
            finally:
                self.recorder.end_profile()
        return state

    def _compile_step(self, state: train_step.TrainState) -> jax.stages.Compiled:
        """The step's program before its first batch; shows what the compiler says of it."""
        started = time.monotonic()
        program = resources.compile_step(self.train_step, self.config, state, self.mesh)
        seconds = time.monotonic() - started
        self.recorder.show(f"compiled   in {seconds:.1f} s: {resources.program_cost(program)}")
        processes.meet()  # a collective may not wait for as long as another process compiles
        return program

    def _open_loader(self, start: int) -> pipeline.TrainLoader:
        return pipeline.TrainLoader(
            self.dataset.directory,
            self.dataset.manifest,
            seed=self.config.seed,
            sequences_per_step=self.config.train.sequences_per_step,
            start_step=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def _is_boundary(self, step: int) -> bool:
        """Whether the step is followed by an evaluation or a checkpoint."""
        return step in self.config.eval.steps or step in self.config.checkpoint.steps

    def _settle(self, state: train_step.TrainState, step: int, row: dict[str, Any]) -> None:
        """Evaluation, row and checkpoint of a step, as far as each is due and not done yet.

        A signal is never kept waiting by an evaluation: the checkpoint is saved without it, and
        the resumed run evaluates.
        """
        if step in self.config.eval.steps and "val/loss" not in row:
            measured = self._measure(state.params, self.config.eval.tokens)
            if measured is not None:
                row = {**row, **measured.metrics}
                self.recorder.write_evaluation(step, measured, row)
        self.recorder.write(row)
        if self._is_stopping() or step in self.config.checkpoint.steps:
            self._save(state, step)
        if self._is_stopping():  # asked again: the signal may have come during the save
            self._save(state, step)
            self._stop(f"after step {step}, which is saved")
        processes.meet()  # process 0 has written
        self.progress.restart_clock(step)

    def _is_stopping(self) -> bool:
        """Asks all processes; once the answer is yes, it stays."""
        if self.stopping is None:
            self.stopping = self.votes.of_all(self.stop.signum)
        return self.stopping is not None

    def _stop(self, where: str) -> None:
        self._wait_for_checkpoints()
        assert self.stopping is not None
        raise signals.Stopped(
            self.stopping,
            f"{self.directory}: stopped {where}. Run the same command again to resume.",
        )

    def _wait_for_checkpoints(self) -> None:
        """Returns, in all processes, when process 0 has them on the disk."""
        self.recorder.wait()
        processes.meet()

    def _measure(self, params: model.Params, tokens: int) -> evaluation.Evaluation | None:
        """One pass over the first `tokens` of the validation split (0 = all); None: interrupted."""
        dataset = self.dataset
        size = pipeline.num_validation_sequences(dataset.manifest, tokens)
        batches = pipeline.read_validation(
            dataset.directory,
            dataset.manifest,
            num_tokens=tokens,
            sequences_per_batch=self.evaluate.sequences_per_batch(size),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return self.evaluate(params, batches, self._is_stopping)

    def _read(self, pending: _Pending) -> dict[str, Any]:
        """Waits for a step and makes its row.

        Raises:
            _NonFiniteStep: its loss, its gradient or the updated parameters are not finite.
        """
        metrics, rows = jax.device_get((pending.metrics, pending.rows))
        row = {
            "step": pending.step,
            "tokens": pending.step * self.config.train.tokens_per_step,
            "train/loss": np.float32(metrics.loss),
            "train/grad_norm": np.float32(metrics.grad_norm),
            "train/learning_rate": np.float32(self.rate(pending.step - 1)),
            **{name: np.float32(value) for name, value in rows.items()},
            "train/epoch": pending.batch.epoch,
            **self.progress.rates(pending.step, pending.data_wait),
        }
        if not metrics.finite:
            self.recorder.write(row)
            names = checkpoint.leaf_names(model.parameter_shapes(self.config.model))
            raise _NonFiniteStep(pending, _first_not_finite(metrics, names))
        self.recorder.show_step(pending.step, row)
        return row

    def _save(self, state: train_step.TrainState, step: int) -> None:
        """Checkpoints a step unless it is there; everything written before it is on disk first."""
        if step in self.saved:
            return
        self.saved.add(step)
        params, opt_state = state.params, state.opt_state
        if processes.count() > 1:
            params, opt_state = processes.whole((params, opt_state))
        self.recorder.save(step, params, opt_state, self._wall_seconds())

    def _wall_seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.started

    def _record_divergence(self, state: train_step.TrainState, bad: _NonFiniteStep) -> None:
        """Saves the last finite state, writes the summary, and raises."""
        step = int(state.step)
        self._save(state, step)
        self._wait_for_checkpoints()
        self._write_summary(step, diverged_step=bad.pending.step)
        shares = processes.from_all(bad.pending.batch.record_ids.tolist())
        ids = ", ".join(str(i) for row in zip(*shares, strict=True) for i in row)
        raise errors.NonFiniteError(
            f"{self.directory}: step {bad.pending.step} is not finite, first in {bad.where}; its "
            f"batch has the training records {ids}. The state after step {step} is saved. "
            "The run counts as diverged: lower the learning rate, in another --workdir."
        )

    def _finish(self, state: train_step.TrainState) -> dict[str, Any]:
        """The final pass, if there is one, and the summary that marks the run as finished."""
        step = int(state.step)
        self._wait_for_checkpoints()
        if self.config.eval.final_tokens >= 0:
            measured = self._measure(state.params, self.config.eval.final_tokens)
            if measured is None:
                self._stop("in the final pass; training is complete and saved")
                raise AssertionError("_stop raises")
            self.recorder.write_final(step, measured)
        self.recorder.flush()
        summary = self._write_summary(step, diverged_step=None)
        self.recorder.show(f"done       {self.directory.summary}")
        return summary

    def _write_summary(self, step: int, diverged_step: int | None) -> dict[str, Any]:
        """Marks the run as finished; every process returns with the summary when it is written."""
        return processes.from_first(
            lambda: self.recorder.summarise(step, diverged_step, self._wall_seconds())
        )
