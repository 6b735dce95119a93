"""The table of a study: what runs now, or how far every step is."""

import datetime
import pathlib
import sys
from collections import Counter
from collections.abc import Iterable, Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qkjax import errors
from qkjax.runs.directory import RunDirectory
from qkjax.study import states
from qkjax.study.plan import TRAINING, Step
from qkjax.study.plan_cost import duration

_PLAIN_SECONDS = 60.0  # between lines of one run where there is no terminal


def counts(found: Iterable[states.State]) -> str:
    """'12 of 38 steps done, 1 diverged, 2 running'."""
    number = Counter(state.status for state in found)
    parts = [f"{number[states.DONE]} of {sum(number.values())} steps done"]
    parts += [f"{n} {name}" for name, n in sorted(number.items()) if name != states.DONE]
    return ", ".join(parts)


def print_status(files: states.StudyFiles) -> None:
    """Every step of the study with its state; of a run also what it has reached.

    Raises:
        UsageError: the directory holds no study, or one of another plan.
    """
    states.check_plan(files.plan, files.workdir)
    found = {step: files.state(step) for step in files.plan.steps}
    rows = []
    for step, state in found.items():
        shown = state.status in (states.DONE, states.DIVERGED, states.RUNNING, states.UNFINISHED)
        glance = None
        if step.kind in TRAINING and shown and state.detail != "not needed":
            try:
                RunDirectory(files.directory(step)).check_files()
                glance = states.Watch(files.directory(step)).look()
            except errors.UsageError as error:
                state = found[step] = states.State(states.REFUSED, str(error))
        rows.append((step, state, glance))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(_table(rows))
    console.print(f"{files.workdir}: {counts(found.values())}", markup=False, highlight=False)


def _table(rows: Iterable[tuple[Step, states.State, states.Glance | None]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("step of the plan", no_wrap=True)
    table.add_column("state", overflow="fold")
    for name in ("step", "loss", "val/loss", "PR", "tokens/s", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    for step, state, glance in rows:
        words = state.status + (f" ({state.detail})" if state.detail else "")
        table.add_row(step.name, words, *_cells(state, glance))
    return table


def _cells(state: states.State, glance: states.Glance | None) -> list[str]:
    if glance is None:
        return [""] * 6
    moving = state.status == states.RUNNING
    left = glance.seconds_left if moving else None
    return [
        f"{glance.step:,}/{glance.num_steps:,}",
        _number(glance.train_loss, ".3f"),
        _number(glance.validation_loss, ".3f"),
        _number(glance.pr, ".1f"),
        _number(glance.tokens_per_second if moving else None, ",.0f"),
        "" if left is None else duration(left),
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


class View:
    """The live table of a study that is being executed; plain lines where there is no terminal."""

    def __init__(self, workdir: pathlib.Path) -> None:
        self._workdir = workdir
        self._console = Console(highlight=False, markup=False)
        self._live: Live | None = None
        self._watches: dict[Step, states.Watch] = {}
        self._shown: dict[Step, float] = {}  # when a run has last had a plain line

    def __enter__(self) -> "View":
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def event(self, text: str) -> None:
        """One line that stays: a step has started or ended."""
        self._console.print(f"{datetime.datetime.now():%H:%M:%S}  {text}", soft_wrap=True)

    def update(
        self,
        running: Mapping[Step, pathlib.Path],
        found: Mapping[Step, states.State],
        now: float,
    ) -> None:
        """Shows the runs that are under way; `running` are their directories."""
        rows = []
        for step, directory in running.items():
            watch = self._watches.setdefault(step, states.Watch(directory))
            rows.append((step, states.State(states.RUNNING), watch.look()))
        if self._live is not None:
            title = Text(f"{self._workdir}: {counts(found.values())}", overflow="fold")
            self._live.update(Group(title, _table(rows)), refresh=True)
            return
        for step, state, glance in rows:
            if glance is not None and now - self._shown.setdefault(step, now) >= _PLAIN_SECONDS:
                self._shown[step] = now
                names = ("step", "loss", "val/loss", "PR", "tokens/s", "left")
                cells = zip(names, _cells(state, glance), strict=True)
                self.event(f"{step.name}  " + "  ".join(f"{n} {c}" for n, c in cells if c))
