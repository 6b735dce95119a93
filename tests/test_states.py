"""What is shown of a run under way: rows as they are appended, the live table, plain lines."""

import functools
import io
import json
import os
import pathlib
import subprocess
import sys

import pytest
import small_run
from rich.console import Console

from qkjax import files
from qkjax.study import plan, states, table


@pytest.fixture
def directory(tmp_path) -> pathlib.Path:
    """A run of 20 steps of 128 tokens that has written nothing but its config."""
    files.write_json(tmp_path / "config.json", small_run.make_config(tmp_path).to_dict())
    return tmp_path


def append(directory: pathlib.Path, text: str) -> None:
    with open(directory / "metrics.jsonl", "a") as file:
        file.write(text)


def row(step: int, **values: float) -> str:
    named = {name.replace("__", "/"): value for name, value in values.items()}
    return json.dumps({"step": step, "tokens": step * 128, **named}) + "\n"


def test_a_watch_sees_the_last_value_of_every_metric(directory):
    watch = states.Watch(directory)
    assert watch.look() is None
    append(directory, row(0, val__loss=5.7, pr__key__post_rope__raw=14.0))
    assert watch.look() == (0, 20, None, 5.7, 14.0, None, None)
    append(directory, row(1, train__loss=5.5, perf__tokens_per_second=64.0))
    assert watch.look() == (1, 20, 5.5, 5.7, 14.0, 64.0, 19 * 128 / 64.0)


def test_a_watch_waits_for_whole_lines_and_follows_a_resumed_run(directory):
    watch = states.Watch(directory)
    line = row(2, train__loss=5.0)
    append(directory, row(1, train__loss=5.5) + line[:20])
    assert watch.look().step == 1
    append(directory, line[20:])
    assert watch.look()[:3] == (2, 20, 5.0)
    (directory / "metrics.jsonl").write_text(row(1, train__loss=5.5))  # cut at its checkpoint
    assert watch.look()[:3] == (1, 20, 5.5)


@pytest.mark.process
def test_a_run_is_running_while_the_process_that_locked_it_lives(directory):
    assert not states.is_running(directory)
    code = (
        "import sys; from qkjax.runs.directory import RunDirectory\n"
        "with RunDirectory(sys.argv[1]).lock():\n    print('locked', flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "locked\n"
    assert states.is_running(directory)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet reaped
    assert not states.is_running(directory)
    process.wait()
    assert not states.is_running(directory)
    holder = json.loads((directory / "run.lock").read_text())
    files.write_json(directory / "run.lock", {**holder, "pid": os.getpid()})
    assert states.is_running(directory)
    assert states.other_host(directory) is None
    files.write_json(directory / "run.lock", {**holder, "pid": os.getpid(), "host": "x"})
    assert not states.is_running(directory)
    assert states.other_host(directory) == "x"


@pytest.fixture
def shown(directory, monkeypatch):
    """What a View prints of one running step, at some moments, to a terminal or to a file."""
    append(directory, row(5, train__loss=4.5, perf__tokens_per_second=64.0, val__loss=4.75))
    step = plan.Step("runs/muon_qk/seed_1", plan.RUN, "muon_qk", 1, None, (), "")
    found = {step: states.State(states.RUNNING)}

    def show(moments: list[float], *, terminal: bool) -> str:
        file = io.StringIO()
        console = functools.partial(Console, file=file, force_terminal=terminal, width=120)
        monkeypatch.setattr(table, "Console", console)
        with table.View(directory) as view:
            view.event("runs/muon_qk/seed_1  starts")
            for now in moments:
                view.update({step: directory}, found, now)
        return file.getvalue()

    return show


def test_a_terminal_has_a_table_that_is_drawn_again(shown):
    text = shown([0.0, 1.0], terminal=True)
    for cell in ("5/20", "4.500", "4.750", "64", "0:00:30", "runs/muon_qk/seed_1"):
        assert cell in text, cell
    assert "0 of 1 steps done, 1 running" in text.replace("\n", " ")
    assert "\x1b[1A" in text  # back over the table before


def test_a_file_has_a_plain_line_a_minute(shown):
    lines = shown([0.0, 59.5, 60.0, 61.0, 120.0, 179.5], terminal=False).splitlines()
    assert len(lines) == 3 and lines[0].endswith("starts")
    line = "runs/muon_qk/seed_1  step 5/20  loss 4.500  val/loss 4.750  tokens/s 64  left 0:00:30"
    assert lines[1].endswith(line) and lines[2].endswith(line)
    assert "\x1b" not in "".join(lines)
