"""How far a study is: the state of every step, read from the files that it leaves.

A step is finished by what its directory holds, never by a note of the executor: a run by its
summary.json and a config equal to the plan's. Only failures and skips are noted, in logs/.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
from typing import Any, NamedTuple

from qkjax import config as config_lib
from qkjax import errors, files, presets
from qkjax.data import dataset as dataset_lib
from qkjax.runs import directory as run_directory
from qkjax.runs.directory import RunDirectory
from qkjax.runs.results import LOSS, PR, newest_input
from qkjax.study import plan_arms, plan_config, study_files, sweep
from qkjax.study.plan import (
    CHOICE,
    DATASET,
    DOWNSTREAM,
    EXTENSION,
    REPORT,
    SURGERY,
    SWEEP,
    TRAINING,
    Plan,
    Step,
    with_seeds,
    without_surgery,
)
from qkjax.trained import rank_curves

DONE, DIVERGED, SKIPPED, RUNNING, UNFINISHED, FAILED, REFUSED, OPEN = (
    "done",
    "diverged",
    "skipped",
    "running",
    "unfinished",
    "failed",
    "refused",
    "open",
)
SETTLED = (DONE, DIVERGED, SKIPPED)  # nothing is left to do
NO_DATA = "no data"
PAGE = pathlib.Path("report", "index.html")
# Fields of study.json: the first is that of its steps; scores may be asked for later.
_NOT_COMPARED = ("fingerprint", "downstream", "unanswerable")


class State(NamedTuple):
    """How far one step is."""

    status: str  # one of the above
    detail: str = ""  # for people


class StudyFiles:
    """The files of one study directory, as its plan knows them."""

    def __init__(self, plan: Plan, workdir: pathlib.Path) -> None:
        self.plan = plan
        self.workdir = workdir

    def log(self, step: Step) -> pathlib.Path:
        """What the step's process has printed."""
        return self.workdir / "logs" / f"{step.name}.log"

    def note(self, step: Step) -> pathlib.Path:
        """Why the step has no result."""
        return self.workdir / "logs" / f"{step.name}.json"

    def learning_rate(self, step: Step) -> float | None:
        """A training step's rate; None where it is the recipe's, not known yet, or not needed."""
        if step.kind == EXTENSION:
            return sweep.extension(self.plan, self.workdir, step.arm)
        choice = self.plan.choice_of(step.arm)
        if step.kind == SWEEP or choice is None:
            return step.learning_rate
        entry = self._choice_entry(self.plan.step(choice))
        return None if entry is None else entry["chosen"]

    def directory(self, step: Step) -> pathlib.Path:
        """Where the step's result lies."""
        if step.kind == EXTENSION and (rate := self.learning_rate(step)) is not None:
            return self.workdir / sweep.directory_of(step.arm, rate)
        suffixes = {DATASET: ".json", DOWNSTREAM: ".json", SURGERY: ".csv"}
        return self.workdir / f"{step.name}{suffixes.get(step.kind, '')}"

    def state(self, step: Step) -> State:
        """The state of one step; a damaged or foreign result counts as refused."""
        try:
            found = self._result(step)
        except errors.UsageError as error:
            return State(REFUSED, str(error))
        if found.status not in (OPEN, UNFINISHED):
            return found
        noted = study_files.read_note(self.note(step))
        return found if noted is None else State(*noted)

    def _result(self, step: Step) -> State:
        if step.kind in TRAINING:
            return self._training(step)
        if step.kind == CHOICE:
            return self._choice(step)
        if step.kind == DOWNSTREAM:
            return self._downstream(step)
        if step.kind == SURGERY:
            return self._surgery(step)
        if step.kind == REPORT:
            return State(DONE if self._report_is_new() else OPEN)
        return State(DONE if self.directory(step).exists() else OPEN)  # dataset, export

    def _training(self, step: Step) -> State:
        if step.kind == EXTENSION and not self._grid_is_finished(step.arm):
            return State(OPEN)
        rate = self.learning_rate(step)
        if step.kind == EXTENSION and rate is None:
            return State(DONE, "not needed")
        if step.kind != SWEEP and self.plan.choice_of(step.arm) and rate is None:
            return State(OPEN)
        directory = self.directory(step)
        config = RunDirectory(directory).read_config() if directory.is_dir() else None
        if config is None:
            return State(OPEN)
        _check_config(directory, config, self.plan.run_config(step, rate))
        summary = RunDirectory(directory).read_summary()
        if summary is None:
            if is_running(directory):
                return State(RUNNING)
            host = other_host(directory)
            return State(UNFINISHED, f"last held by {host}" if host else "")
        if summary["diverged"]:
            return State(DIVERGED, f"at step {summary['diverged_step']}")
        return State(DONE)

    def _grid_is_finished(self, arm: str) -> bool:
        grid = self.plan.grid(arm)
        return len(sweep.read(self.workdir, arm, grid)) == len(grid)

    def _choice_entry(self, step: Step) -> dict[str, Any] | None:
        """What the choice has recorded; None where it has not, or not among this plan's runs."""
        entry = sweep.recorded(self.workdir).get(step.arm)
        return entry if entry is not None and entry["fingerprint"] == step.fingerprint else None

    def _choice(self, step: Step) -> State:
        entry = self._choice_entry(step)
        if entry is None:
            return State(OPEN)
        if entry["chosen"] is None:
            return State(FAILED, "every learning rate diverged")
        edge = "" if entry["edge"] is None else f", EDGE: {entry['edge']} end of the grid"
        return State(DONE, f"{entry['chosen']:g}{edge}")

    def _downstream(self, step: Step) -> State:
        file = self.directory(step)
        if file.exists():
            summary = RunDirectory(self.workdir / step.needs[0]).read_summary() or {}
            trained = summary.get("params_sha256")
            result = study_files.read_object(file) or {}
            study_files.need(file, "", result, {"run": dict})
            measured = result["run"].get("params_sha256")
            if measured != trained:
                raise errors.UsageError(
                    f"{file}: measured the parameters {measured}, but the run has {trained}. "
                    "Move it away and run the same command again."
                )
            return State(DONE)
        return State(OPEN) if self.plan.study.downstream else State(SKIPPED, NO_DATA)

    def _surgery(self, step: Step) -> State:
        """A CSV is whole; rows that were measured before a kill wait beside it."""
        path = self.directory(step)
        if not path.exists():
            part = path.with_suffix(".part.json").exists()
            return State(UNFINISHED, "a part of its ranks is measured") if part else State(OPEN)
        rows = rank_curves.read_csv(path)
        summary = RunDirectory(self.workdir / step.needs[0]).read_summary() or {}
        found = {row.params_sha256 for row in rows}, sorted({row.rank for row in rows})
        planned = {summary.get("params_sha256")}, list(self.plan.surgery_ranks(step.arm))
        if found != planned:
            raise errors.UsageError(
                f"{path}: measured ranks {found[1]} of the parameters {', '.join(found[0])}, "
                f"expected {planned[1]} of those of {step.needs[0]}. "
                "Move it away and run the same command again."
            )
        return State(DONE)

    def _report_is_new(self) -> bool:
        """Whether the page is of everything that there is to show."""
        page = self.workdir / PAGE
        newest = newest_input(self.workdir)
        return page.exists() and page.stat().st_mtime_ns >= newest


def _check_config(
    directory: pathlib.Path, found: config_lib.Config, planned: config_lib.Config
) -> None:
    """Refuses a run directory that another plan has made.

    Raises:
        UsageError: lists the fields that differ. What the plan leaves to the platform may be any.
    """
    ours, theirs = plan_arms.identity(planned), plan_arms.identity(found)
    differences = [
        f"{field} is {theirs.get(field)}, planned {ours.get(field)}"
        for field in dict.fromkeys((*ours, *theirs))
        if ours.get(field) != theirs.get(field)
        and not config_lib.is_left_to_platform(field, ours.get(field))
    ]
    if differences:
        raise errors.UsageError(
            f"{RunDirectory(directory).config}: not the run of this plan: "
            f"{'; '.join(differences)}. Move the directory away, or use another --workdir."
        )


def as_recorded(plan: Plan, workdir: pathlib.Path) -> tuple[Plan, str]:
    """The plan that a used study directory continues with, and what to say of it; "" is nothing.

    A study whose study.json was written before rank surgery was a step goes without it; one with
    the default seeds of its time keeps them; one on an earlier embedded corpus trains all its runs
    on that corpus.
    """
    path = workdir / "study.json"
    recorded = study_files.read_object(path)
    if recorded is None:
        return plan, ""
    said = []
    if "surgery" not in recorded and plan.study.surgery.tokens:
        plan = without_surgery(plan)
        said.append("recorded before rank surgery was a step of a study, and continues without it")
    earlier, now = plan_config.EARLIER_SEEDS, plan_config.SEEDS[plan.study.scale]
    if recorded.get("seeds") == list(earlier) and plan.study.seeds == now != earlier:
        plan = with_seeds(plan, earlier)
        said.append(
            f"recorded with the seeds {', '.join(map(str, earlier))}, and continues with them; "
            f"studies of this scale now have {', '.join(map(str, now))}"
        )
    corpus = _earlier_corpus(plan, workdir)
    if corpus is not None:
        plan = dataclasses.replace(
            plan, study=dataclasses.replace(plan.study, data_dir=str(corpus))
        )
        said.append(f"recorded on an earlier embedded corpus, and continues on {corpus}")
    return plan, "\n".join(f"{path}: {line}" for line in said)


def _earlier_corpus(plan: Plan, workdir: pathlib.Path) -> pathlib.Path | None:
    """The embedded corpus that the study started on, where it is not the one of today."""
    if plan.study.data_dir:
        return None
    recorded = study_files.read_object(workdir / "dataset.json") or {}
    corpus = dataset_lib.embedded_of_fingerprint(recorded.get("fingerprint", ""))
    config = next(iter(plan.arms.values())).config
    today = dataset_lib.embedded_directory(config.model.vocab_size, config.data.end_of_text)
    return None if corpus == today else corpus


def settle_plan(plan: Plan, workdir: pathlib.Path) -> None:
    """Records the plan in a new study directory; in a used one, compares it.

    Raises:
        UsageError: as `check_plan`.
        StorageError: the disk failed.
    """
    path = workdir / "study.json"
    if path.exists():
        check_plan(plan, workdir)
    else:
        files.write_sealed(path, plan.to_dict())


def check_plan(plan: Plan, workdir: pathlib.Path) -> None:
    """Compares the plan with the one of the study directory.

    Raises:
        UsageError: there is none, or another one; lists the fields that differ.
    """
    path = workdir / "study.json"
    if not path.exists():
        raise errors.UsageError(f"{path}: no such file, expected a study. Give its --workdir.")
    ours = plan.to_dict()
    theirs = presets.with_present_recipe(study_files.read_object(path) or {})
    steps = theirs.get("steps") or []
    study_files.need(path, "", {"steps": steps}, {"steps": list})
    for number, step in enumerate(steps):
        study_files.need(path, f"steps[{number}]", step, {"name": str, "fingerprint": str})
    old, new = (run_directory.flatten({**values, "steps": None}) for values in (theirs, ours))
    differences = [
        f"{field}: there {json.dumps(old.get(field))}, now {json.dumps(new.get(field))}"
        for field in dict.fromkeys((*old, *new))
        if field.partition(".")[0] not in _NOT_COMPARED and old.get(field) != new.get(field)
    ]
    fingerprints = {step["name"]: step["fingerprint"] for step in steps}
    changed = [s.name for s in plan.steps if fingerprints.get(s.name) != s.fingerprint]
    if changed and not differences:
        differences = [f"configs of {errors.listed(changed)}"]
    if differences:
        raise errors.UsageError(
            f"{path}: this directory has another plan: {errors.listed(differences)}. Use another "
            "--workdir. Or, to change the plan of this one, rename study.json to study.1.json, and "
            "the report will say so: finished runs whose config is still planned count as done, "
            "others are refused."
        )


# --------------------------------------------------------------------------------------------
# A run while it trains: the rows that it has appended, and whether it is alive.


class Glance(NamedTuple):
    """A run at one moment; None where it has not measured that yet."""

    step: int  # updates done
    num_steps: int
    train_loss: float | None
    validation_loss: float | None
    pr: float | None  # post-RoPE raw PR of the keys
    tokens_per_second: float | None
    seconds_left: float | None  # at that rate, evaluations left out


class Watch:
    """Follows metrics.jsonl of a run directory, reading only what has been appended."""

    def __init__(self, directory: pathlib.Path) -> None:
        self._directory = directory
        self._offset = 0
        self._latest: dict[str, Any] = {}  # the last value of every metric
        self._budget: tuple[int, int] | None = None  # steps, tokens a step

    def look(self) -> Glance | None:
        """The run as it is now; None before its first row."""
        self._read()
        if self._budget is None:
            config = RunDirectory(self._directory).read_config()
            if config is not None:
                self._budget = config.train.num_steps, config.train.tokens_per_step
        if not self._latest or self._budget is None:
            return None
        num_steps, tokens_per_step = self._budget
        step, rate = self._latest["step"], self._latest.get("perf/tokens_per_second")
        return Glance(
            step,
            num_steps,
            self._latest.get("train/loss"),
            self._latest.get(LOSS),
            self._latest.get(PR),
            rate,
            (num_steps - step) * tokens_per_step / rate if rate else None,
        )

    def _read(self) -> None:
        path = RunDirectory(self._directory).metrics
        try:
            with open(path, "rb") as file:
                if file.seek(0, os.SEEK_END) < self._offset:  # a resumed run has cut its rows
                    self._offset, self._latest = 0, {}
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        self._offset += len(whole) + len(newline)
        for line in whole.splitlines():
            with contextlib.suppress(errors.UsageError):  # the run itself will say so
                self._latest.update(run_directory.parse_row(str(path), line))


def other_host(directory: pathlib.Path) -> str | None:
    """The other host that has last locked the run directory; it may be at work still."""
    holder = files.holder_of(RunDirectory(directory).run_lock)
    return None if holder is None or holder["host"] == socket.gethostname() else holder["host"]


def is_running(directory: pathlib.Path) -> bool:
    """Whether a process of this host that has locked the run directory is alive.

    Read off run.lock without taking the lock, which would keep a starting run out.
    """
    holder = files.holder_of(RunDirectory(directory).run_lock)
    if holder is None or holder["host"] != socket.gethostname():
        return False
    try:
        os.kill(holder["pid"], 0)
    except PermissionError:  # it is another user's
        return True
    except (OSError, OverflowError):
        return False
    stat = pathlib.Path("/proc", str(holder["pid"]), "stat")
    return not (stat.exists() and ") Z " in stat.read_text())  # killed, its parent too
