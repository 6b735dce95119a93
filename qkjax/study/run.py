"""Executes a plan: every step a process of its own, side by side where asked, resumable anywhere.

Finished steps are skipped, unfinished runs resume. A run that fails or diverges does not stop
others; steps that wait for it stay open.
"""

import ctypes
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from qkjax import errors, files
from qkjax.cli import children, places
from qkjax.data import dataset as dataset_lib
from qkjax.runs import directory as run_directory
from qkjax.runs import signals
from qkjax.runs.directory import RunDirectory
from qkjax.study import states, study_files, sweep
from qkjax.study.plan import (
    CHOICE,
    DATASET,
    DOWNSTREAM,
    EXPORT,
    REPORT,
    RUN,
    SURGERY,
    TRAINING,
    Plan,
    Step,
)
from qkjax.study.states import DIVERGED, FAILED, REFUSED, RUNNING, SETTLED, SKIPPED, State
from qkjax.study.table import View, counts

HUB_IS_SILENT = "the hub does not give"  # how `qkjax evaluate` says that there is no data
_POLL_SECONDS = 0.2
_DIVERGED_EXIT = errors.NonFiniteError.exit_code
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # before any fork
_PR_SET_PDEATHSIG = 1  # of Linux, sys/prctl.h

_TPU_PORT = 8476  # of the first of several runs side by side


class Incomplete(errors.QkjaxError):
    """Steps of the study are missing; exit code 1, or 4 where the disk was the only reason."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def execute(
    plan: Plan,
    workdir: str | os.PathLike[str],
    only: Sequence[str] = (),
    places: Sequence[Mapping[str, str]] = ({},),
    wandb: bool = False,
) -> None:
    """Runs what is left of the plan, or of the steps that `only` names.

    One process at a time may execute a whole study; parts of it (`only`) may run side by side.

    Args:
        places: environment variables of each process that runs side by side (`places_of`).
        wandb: every run is trained with --wandb.
    Raises:
        UsageError: another plan, dataset or config in the directory, or another process.
        Incomplete: steps failed, or wait for such; names them.
        Stopped: SIGTERM or SIGINT; every run has saved what it needs to resume.
    """
    steps = plan.select(only)
    directory = run_directory.make_workdir(workdir)
    with RunDirectory(directory).lock(shared=bool(only)), signals.StopRequest() as stop:
        _settle(plan, directory, steps)
        with View(directory) as view:
            executor = _Executor(plan, directory, steps, places, view, stop, wandb)
            executor.work()
        executor.conclude()


def _settle(plan: Plan, directory: pathlib.Path, steps: Sequence[Step]) -> None:
    """Records plan and dataset in a new study directory; in a used one, compares them."""
    with study_files.locked(directory):
        states.settle_plan(plan, directory)
        if any(step.kind in (DATASET, *TRAINING) for step in steps):
            _settle_dataset(plan, directory)


def _settle_dataset(plan: Plan, directory: pathlib.Path) -> None:
    """Opens the dataset that every run will take, and records it; refuses another one later."""
    if not plan.study.data_dir and plan.study.scale in dataset_lib.EMBEDDED_SCALES:
        print("dataset: the embedded corpus; made now if it is missing", flush=True)
    first = next(step for step in plan.steps if step.kind == RUN)
    try:
        dataset = dataset_lib.open_dataset(plan.run_config(first, None))
    except errors.UsageError as error:  # the study's flag has another name than a run's
        text = str(error).replace("--config.data.dir", "--config.data_dir")
        raise errors.UsageError(text) from error
    path = directory / "dataset.json"
    ours = {"name": dataset.manifest.name, "fingerprint": dataset.manifest.fingerprint}
    if not path.exists():
        files.write_sealed(path, ours)
    theirs = study_files.read_object(path) or {}
    if theirs["fingerprint"] != ours["fingerprint"]:
        raise errors.UsageError(
            f"{path}: this study started on the dataset {theirs['name']}, fingerprint "
            f"{theirs['fingerprint'][:12]}, but {dataset.directory} is {ours['fingerprint'][:12]}. "
            "Name the first one with --config.data_dir=DIR, or use another --workdir."
        )


@dataclasses.dataclass
class _Child:
    """A step that is under way."""

    step: Step
    process: subprocess.Popen
    directory: pathlib.Path  # of its result
    place: int
    log_start: int  # bytes of the log that are of earlier attempts
    started: float


class _Executor:
    """One start of a study, or of a part of it."""

    def __init__(
        self,
        plan: Plan,
        directory: pathlib.Path,
        steps: Sequence[Step],
        places: Sequence[Mapping[str, str]],
        view: View,
        stop: signals.StopRequest,
        wandb: bool,
    ) -> None:
        self.plan = plan
        self.files = states.StudyFiles(plan, directory)
        self.steps = steps
        self.places = places
        self.view = view
        self.stop = stop
        self.wandb = wandb
        self.tried: set[Step] = set()
        self.exit_codes: set[int] = set()  # of what failed in this start
        self.children: list[_Child] = []
        for step in steps:  # what failed or was skipped is tried again
            self.files.note(step).unlink(missing_ok=True)
        self.states = {step: self.files.state(step) for step in plan.steps}
        refused = [self.states[step].detail for step in steps if self._is(step, REFUSED)]
        if refused:
            raise errors.UsageError("\n".join(refused))

    def _is(self, step: Step, *statuses: str) -> bool:
        return self.states[step].status in statuses

    def work(self) -> None:
        """Starts what is ready and waits for it, until nothing is left that could be started.

        Raises:
            Stopped: after the runs that were under way have ended.
        """
        try:
            while True:
                for child in [c for c in self.children if c.process.poll() is not None]:
                    self.children.remove(child)
                    self._end(child)
                if self.stop.signum is not None:
                    self._leave()
                ready = next(self._ready(), None)
                if ready is not None and len(self.children) < len(self.places):
                    self._begin(ready)
                elif self.children:
                    self._show()
                    time.sleep(_POLL_SECONDS)
                else:
                    return
        finally:
            # There are children only where an error ends this loop. They die with this process,
            # so it stays until they have saved.
            for child in self.children:
                child.process.terminate()
            for child in self.children:
                child.process.wait()

    def _show(self) -> None:
        training = [child for child in self.children if child.step.kind in TRAINING]
        running = {child.step: child.directory for child in training}
        self.view.update(running, self.states, time.monotonic())

    def _ready(self) -> Iterator[Step]:
        """Steps that may start, in the order of the plan; the report when all others are over."""
        for step in self._left():
            if step.kind != REPORT and not self._lacks(step):
                yield step
        if not self.children:
            yield from (step for step in self._left() if step.kind == REPORT)

    def _left(self) -> list[Step]:
        """Steps that this start has not tried; the report may have grown old since the start."""
        return [
            step
            for step in self.steps
            if step not in self.tried and (step.kind == REPORT or not self._is(step, *SETTLED))
        ]

    def _lacks(self, step: Step) -> list[str]:
        return [need for need in step.needs if not self._is(self.plan.step(need), *SETTLED)]

    def _begin(self, step: Step) -> None:
        """Starts the step's process, or does at once what needs none."""
        self.tried.add(step)
        found = self.files.state(step)  # what it needs may have changed it
        if found.status in (*SETTLED, REFUSED):
            self._settle(step, found)
        elif step.kind == CHOICE:
            self._choose(step)
        elif step.kind in (EXPORT, DOWNSTREAM, SURGERY) and self._is(
            self.plan.step(step.needs[0]), DIVERGED
        ):
            self._note(step, State(SKIPPED, "its run diverged"))
        else:
            self._start(step)

    def _choose(self, step: Step) -> None:
        try:
            sweep.choose(self.plan, self.files.workdir, step.arm)
        except errors.QkjaxError as error:
            self.exit_codes.add(error.exit_code)
            self._note(step, State(FAILED, str(error)))
            return
        self._settle(step, self.files.state(step))

    def _start(self, step: Step) -> None:
        self.files.note(step).unlink(missing_ok=True)
        log = self.files.log(step)
        log.parent.mkdir(parents=True, exist_ok=True)
        place = min(set(range(len(self.places))) - {child.place for child in self.children})
        directory = self.files.directory(step)
        with open(log, "ab") as file:
            start = file.tell()
            process = subprocess.Popen(
                children.command(*self._arguments(step, directory)),
                cwd=places.PACKAGE.parent,  # arms name their config files from here
                env={**children.environment(), **self.places[place]},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent,
            )
        how = "resumes" if self._is(step, states.UNFINISHED, RUNNING) else "starts"
        self.states[step] = State(RUNNING)
        self.children.append(_Child(step, process, directory, place, start, time.monotonic()))
        self.view.event(f"{step.name}  {how}")

    def _arguments(self, step: Step, result: pathlib.Path) -> list[str]:
        """The verb of the step's command, and what follows it."""
        workdir = self.files.workdir
        if step.kind in TRAINING:
            train = self.plan.arguments(step, result, self.files.learning_rate(step))
            return [*train, "--wandb"] if self.wandb else train
        if step.kind == REPORT:
            return ["report", f"--workdir={workdir}"]
        run = f"--workdir={workdir / step.needs[0]}"
        if step.kind == EXPORT:
            return ["export", run, f"--out={result}"]
        if step.kind == SURGERY:
            return self._surgery_arguments(step, run, result)
        source = self.plan.study.downstream
        folder = pathlib.Path(source).expanduser().absolute()
        data = [] if source == "hub" else [f"--data_dir={folder}"]
        return [
            "evaluate",
            run,
            "--backend=jax",
            "--tasks=hellaswag,lambada",
            *data,
            f"--out={result}",
        ]

    def _surgery_arguments(self, step: Step, run: str, result: pathlib.Path) -> list[str]:
        ranks = ",".join(map(str, self.plan.surgery_ranks(step.arm)))
        what = ["--layers=all", "--kinds=top", "--centring=centred", "--nofigures"]
        tokens = self.plan.study.surgery.tokens
        return [
            "surgery",
            run,
            *what,
            f"--tokens={tokens}",
            f"--ranks={ranks}",
            f"--out={result}",
        ]

    def _end(self, child: _Child) -> None:
        step, code = child.step, child.process.returncode
        seconds = time.monotonic() - child.started
        found = self.files.state(step)
        expected = 0 if found.status != DIVERGED else _DIVERGED_EXIT
        if code == expected and found.status in (*SETTLED, REFUSED):
            self._settle(step, found, seconds)
            return
        if self.stop.signum is not None and code != 0:
            self.states[step] = found  # it was asked to stop
            return
        last = _last_words(self.files.log(step), child.log_start)
        if step.kind == DOWNSTREAM and HUB_IS_SILENT in last:
            self._note(step, State(SKIPPED, f"{states.NO_DATA}: {last}"))
            return
        self.exit_codes.add(code)
        ending = f"killed by signal {-code}" if code < 0 else f"exit {code}"
        ending = "no result" if code == 0 else ending
        self._note(step, State(FAILED, f"{ending}: {last}" if last else ending))

    def _note(self, step: Step, state: State) -> None:
        note = self.files.note(step)
        note.parent.mkdir(parents=True, exist_ok=True)
        files.write_sealed(note, state._asdict())
        self._settle(step, state)

    def _settle(self, step: Step, state: State, seconds: float | None = None) -> None:
        self.states[step] = state
        detail = f" ({state.detail})" if state.detail else ""
        time_taken = "" if seconds is None else f"  in {seconds:.0f} s"
        self.view.event(f"{step.name}  {state.status}{detail}{time_taken}")

    def _leave(self) -> None:
        """Passes the request to stop on, and waits until every run has saved."""
        assert self.stop.signum is not None
        for child in self.children:  # a SIGINT of the terminal has reached them already
            child.process.send_signal(signal.SIGTERM)
        while self.children:
            child = self.children.pop()
            child.process.wait()
            self._end(child)
        left = sum(not self._is(step, *SETTLED) for step in self.steps)
        raise signals.Stopped(
            self.stop.signum,
            f"{self.files.workdir}: stopped, {left} of {len(self.steps)} steps "
            f"{'is' if left == 1 else 'are'} left. "
            "Run the same command again to resume.",
        )

    def conclude(self) -> None:
        """Says what there is; raises where something is missing.

        Raises:
            Incomplete: names every missing step of those asked for.
        """
        workdir = self.files.workdir
        missing = [step for step in self.steps if not self._is(step, *SETTLED)]
        diverged = [step.name for step in self.steps if self._is(step, DIVERGED)]
        page = workdir / states.PAGE
        if page.exists():
            print(f"report: {page}", flush=True)
        if diverged:
            print(f"diverged, which is a result: {', '.join(diverged)}", flush=True)
        if not missing:
            shown = counts(self.states[step] for step in self.steps)
            print(f"{workdir}: complete, {shown}", flush=True)
            return
        failed = [s for s in missing if self._is(s, FAILED, REFUSED)]
        waiting = [f"{s.name} ({', '.join(self._lacks(s))})" for s in missing if s not in failed]
        reasons = [f"{step.name}: {self.states[step].detail}" for step in failed]
        raise Incomplete(
            f"{workdir}: {len(missing)} of {len(self.steps)} steps "
            f"{'is' if len(missing) == 1 else 'are'} missing. "
            + (f"Failed: {'; '.join(reasons)}. " if reasons else "")
            + (f"Waiting (for): {'; '.join(waiting)}. " if waiting else "")
            + f"What they printed is in {workdir / 'logs'}. Fix the cause and run the same "
            "command again.",
            errors.StorageError.exit_code
            if self.exit_codes == {errors.StorageError.exit_code}
            else errors.QkjaxError.exit_code,
        )


def _die_with_parent() -> None:
    """Runs in the child before its program: a killed executor leaves no run behind (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _last_words(log: pathlib.Path, start: int) -> str:
    """The last ERROR line after `start`, else the last line."""
    with open(log, "rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    mistakes = [line for line in lines if line.startswith("ERROR: ")]
    return (mistakes or lines or [""])[-1].removeprefix("ERROR: ")


def places_of(jobs: int | None, devices: Sequence[str]) -> list[dict[str, str]]:
    """Environment variables of each place that runs may take side by side.

    Args:
        jobs: how many; None: one a device, or one.
        devices: indices that CUDA_VISIBLE_DEVICES and TPU_VISIBLE_CHIPS take; () leaves all
            devices to every run. Several jobs on one device share its memory evenly.
    Raises:
        UsageError: more devices than jobs.
    """
    jobs = jobs or max(1, len(devices))
    if len(devices) > jobs:
        raise errors.UsageError(
            f"--devices: {len(devices)} devices for --jobs={jobs}, so some would not be used. "
            "Give as many jobs as devices, or more."
        )
    if not devices:
        return [{} for _ in range(jobs)]
    share = -(-jobs // len(devices))
    found = []
    for number in range(jobs):
        device, port = devices[number % len(devices)], _TPU_PORT + number
        variables = {
            "CUDA_VISIBLE_DEVICES": device,
            "TPU_VISIBLE_CHIPS": device,
            "TPU_PROCESS_BOUNDS": "1,1,1",
            "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
            "TPU_PROCESS_ADDRESSES": f"localhost:{port}",
            "TPU_PROCESS_PORT": str(port),
            "CLOUD_TPU_TASK_ID": "0",
        }
        if share > 1:
            variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / share:.2f}"
        found.append(variables)
    return found
