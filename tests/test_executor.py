"""The executor with runs that take no time: what is started, skipped, refused, and in which order.

Processes are replaced by `Machine`, which leaves the files of a run; real ones: test_run_study.py.
"""

import concurrent.futures
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence

import pytest
import synthetic_study

from qkjax import errors, files
from qkjax.data import dataset as dataset_lib
from qkjax.runs import directory as run_directory
from qkjax.runs import signals
from qkjax.runs.directory import RunDirectory
from qkjax.study import plan, run, states, table
from qkjax.trained import rank_curves

ROOT = pathlib.Path(__file__).resolve().parents[1]
METRICS = (synthetic_study.LOSS, synthetic_study.PR, synthetic_study.PR_BEFORE)


def make_plan(words="tiny", **fields) -> plan.Plan:
    values = synthetic_study.load_config(words)
    values.arms = ("muon_qk", "adamw_noqk")
    values.controls, values.seeds = (), (1,)
    values.tokens, values.sweep.tokens, values.surgery.tokens = 20_480, 10_240, 0
    values.update_from_flattened_dict({name.replace("__", "."): v for name, v in fields.items()})
    return plan.make_plan(values)


def surgery_csv(name: str, ranks: Sequence[int]) -> bytes:
    """Of the run whose parameters `synthetic_study.write_run` names."""
    _, arm, seed = name.split("/")
    digest = f"{arm}-{seed.removeprefix('seed_')}"
    return rank_curves.to_csv(
        [
            rank_curves.Row("all", "pre_rope", "centred", "top", r, None, 64, digest, 3.0, 0.0)
            for r in ranks
        ]
    )


class Machine:
    """Runs every step at once and writes what a real one would leave; faults by its name."""

    def __init__(self, study: plan.Plan, workdir: pathlib.Path) -> None:
        self.study, self.workdir = study, workdir
        self.started: list[str] = []
        self.environments: list[dict[str, str]] = []
        self.exit_codes: dict[str, int] = {}
        self.words = "something broke"  # of what fails
        self.losses: dict[float, float] = {}  # by learning rate
        self.asleep = 0  # looks until a process has ended
        self.alive, self.most_alive = 0, 0
        self.when_started: Callable[[str], None] = lambda name: None

    def __call__(self, command, *, env, stdout, **_):
        return _Process(self, command, env, stdout)

    def do(self, name: str, command: list[str]) -> int:
        code = self.exit_codes.get(name, 0)
        kind = name.partition("/")[0]
        if code not in (0, 3):
            return code
        if kind in ("sweep", "runs"):
            self._train(name, command, diverged=code == 3)
        elif kind == "exports":
            (self.workdir / name).mkdir(parents=True)
        elif kind == "downstream":
            arm = name.split("/")[1]
            measured = {"run": {"params_sha256": f"{arm}-1"}}
            files.write_json(self.workdir / f"{name}.json", measured)
        elif kind == "surgery":
            ranks = self.study.surgery_ranks(name.split("/")[1])
            files.replace(self.workdir / f"{name}.csv", surgery_csv(name, ranks))
        elif kind == "report":
            run_directory.make_workdir(self.workdir / "report")
            (self.workdir / states.PAGE).write_text("page")
        return code

    def _train(self, name: str, command: list[str], *, diverged: bool) -> None:
        found = re.search(r"--config\.optimizer\.learning_rate=(\S+)", " ".join(command))
        rate = float(found[1]) if found else None
        steps = [s for s in self.study.steps if s.name == name]
        arm = name.split("/")[1]
        extension = [s for s in self.study.steps if s.name == f"sweep/{arm}/extension"]
        config = self.study.run_config((steps or extension)[0], rate).for_platform("cpu")
        synthetic_study.write_run(
            self.workdir / name,
            config,
            dict.fromkeys(METRICS, self.losses.get(rate, 3.0)),
            dict.fromkeys(METRICS, 0.0),
            diverged_after=2 if diverged else None,
        )


class _Process:
    def __init__(self, machine: Machine, command, env, stdout) -> None:
        self.machine, self.returncode, self.looks = machine, None, 0
        results = [a for a in command if a.startswith(("--out=", "--workdir="))]
        place = pathlib.Path(results[-1].partition("=")[2])
        name = "report" if place == machine.workdir else str(place.relative_to(machine.workdir))
        self.name, self.command = name.removesuffix(".json").removesuffix(".csv"), command
        machine.started.append(self.name)
        machine.environments.append(env)
        machine.alive += 1
        machine.most_alive = max(machine.most_alive, machine.alive)
        if machine.exit_codes.get(self.name):
            stdout.write(f"ERROR: {self.name}: {machine.words}\nthe end\n".encode())
        machine.when_started(self.name)

    def poll(self):
        self.looks += 1
        if self.returncode is None and self.looks > self.machine.asleep:
            self.machine.alive -= 1
            self.returncode = self.machine.do(self.name, self.command)
        return self.returncode

    def wait(self):
        while self.poll() is None:
            pass

    def send_signal(self, signum):
        self.machine.exit_codes[self.name] = 128 + signum

    def terminate(self):
        self.send_signal(signal.SIGTERM)


@pytest.fixture
def world(tmp_path, monkeypatch) -> Callable[..., tuple[plan.Plan, pathlib.Path, Machine]]:
    """A plan, its directory, and a machine in place of processes; no dataset is looked at."""

    manifest = types.SimpleNamespace(name="made-up", fingerprint="f" * 64)
    opened = types.SimpleNamespace(directory=pathlib.Path("nowhere"), manifest=manifest)
    monkeypatch.setattr(dataset_lib, "open_dataset", lambda config: opened)
    monkeypatch.setattr(run, "_POLL_SECONDS", 0.0)

    def build(words="tiny", **fields):
        study, workdir = make_plan(words, **fields), tmp_path / "study"
        machine = Machine(study, workdir)
        stand_in = types.SimpleNamespace(
            Popen=machine, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT
        )
        monkeypatch.setattr(run, "subprocess", stand_in)  # others may start processes
        return study, workdir, machine

    return build


def statuses(study: plan.Plan, workdir: pathlib.Path) -> dict[str, str]:
    kept = states.StudyFiles(study, workdir)
    return {step.name: kept.state(step).status for step in study.steps}


def missing(study: plan.Plan, workdir: pathlib.Path, **arguments) -> run.Incomplete:
    with pytest.raises(run.Incomplete) as raised:
        run.execute(study, workdir, **arguments)
    return raised.value


def test_every_step_is_done_once_and_in_order(world, capsys):
    study, workdir, machine = world()
    run.execute(study, workdir)
    expected = [s.name for s in study.steps if s.kind not in ("dataset", "choice", "downstream")]
    assert machine.started == expected
    found = statuses(study, workdir)
    assert {found.pop(f"downstream/{arm}/seed_1") for arm in study.study.arms} == {"skipped"}
    assert set(found.values()) == {"done"}
    assert capsys.readouterr().out.endswith(
        f"report: {workdir / states.PAGE}\n{workdir}: complete, 12 of 14 steps done, 2 skipped\n"
    )
    machine.started.clear()
    run.execute(study, workdir)
    assert machine.started == []
    recorded = json.loads((workdir / "study.json").read_text())
    assert recorded["fingerprint"] == study.fingerprint


def test_wandb_is_asked_for_by_every_training_and_by_nothing_else(world, monkeypatch):
    study, workdir, machine = world()
    commands = {}
    started = _Process.__init__

    def note(process, *arguments):
        started(process, *arguments)
        commands[process.name] = "--wandb" in process.command

    monkeypatch.setattr(_Process, "__init__", note)
    run.execute(study, workdir, wandb=True)
    assert set(commands) == set(machine.started)
    assert {name for name, asked in commands.items() if asked} == {
        step.name for step in study.steps if step.kind in plan.TRAINING and step.name in commands
    }
    assert len({name.partition("/")[0] for name, asked in commands.items() if asked}) == 2


def test_final_runs_take_the_chosen_rate_and_controls_that_of_their_parent(world):
    study, workdir, machine = world(controls=("muon_qk_frozen",))
    machine.losses = {0.024: 2.5}
    run.execute(study, workdir)
    for arm in ("muon_qk", "muon_qk_frozen"):
        config = RunDirectory(workdir / "runs" / arm / "seed_1").read_config()
        assert config.arm == arm
        assert config.optimizer.learning_rate == 0.024
        assert config.optimizer.adam_learning_rate == 0.006
    kept = states.StudyFiles(study, workdir)
    choice = kept.state(study.step("sweep/muon_qk/choice"))
    assert choice == states.State("done", "0.024, EDGE: high end of the grid")


def test_a_grid_is_extended_where_its_best_is_at_an_edge(world):
    study, workdir, machine = world("pilot", sweep__factors=(1.0, 2.0), data_dir="x")
    machine.losses = {0.024: 2.9, 0.048: 2.8, 0.0012: 2.9, 0.0006: 2.95}
    run.execute(study, workdir)
    assert "sweep/muon_qk/lr_0.048" in machine.started  # higher, and better still
    assert "sweep/adamw_noqk/lr_0.0006" in machine.started  # lower, and no better
    chosen = files.read_object(workdir / "sweep" / "learning_rates.json", "")
    assert {arm: entry["chosen"] for arm, entry in chosen.items()} == {
        "muon_qk": 0.048,
        "adamw_noqk": 0.0012,
    }
    assert chosen["muon_qk"]["edge"] == "high" and chosen["adamw_noqk"]["edge"] is None


def test_a_grid_whose_best_lies_inside_is_not_extended(world):
    study, workdir, machine = world("pilot", sweep__factors=(0.5, 1.0, 2.0), data_dir="x")
    machine.losses = {0.012: 2.9, 0.0012: 2.9}
    run.execute(study, workdir)
    assert sum(name.startswith("sweep/") for name in machine.started) == 6
    kept = states.StudyFiles(study, workdir)
    state = kept.state(study.step("sweep/muon_qk/extension"))
    assert state == states.State("done", "not needed")


def test_a_diverged_run_is_a_result(world, capsys):
    study, workdir, machine = world(sweep__factors=(1.0, 2.0))
    machine.exit_codes = {"sweep/muon_qk/lr_0.024": 3, "runs/adamw_noqk/seed_1": 3}
    run.execute(study, workdir)
    found = statuses(study, workdir)
    assert found["sweep/muon_qk/lr_0.024"] == found["runs/adamw_noqk/seed_1"] == "diverged"
    assert found["exports/adamw_noqk/seed_1"] == "skipped"  # there is no model to export
    config = RunDirectory(workdir / "runs" / "muon_qk" / "seed_1").read_config()
    assert config.optimizer.learning_rate == 0.012
    shown = capsys.readouterr().out
    assert "diverged, which is a result: sweep/muon_qk/lr_0.024, runs/adamw_noqk/seed_1" in shown
    machine.started.clear()
    run.execute(study, workdir)
    assert machine.started == []


def test_a_failed_run_stops_no_other_and_is_named(world):
    study, workdir, machine = world()
    machine.exit_codes = {"sweep/muon_qk/lr_0.012": 2}
    error = missing(study, workdir)
    assert error.exit_code == 1
    text = str(error)
    assert "4 of 14 steps are missing. Failed: " in text
    assert "sweep/muon_qk/lr_0.012: exit 2: sweep/muon_qk/lr_0.012: something broke." in text
    assert "runs/muon_qk/seed_1 (sweep/muon_qk/choice)" in text
    found = statuses(study, workdir)
    assert found["runs/adamw_noqk/seed_1"] == found["report"] == "done"
    assert found["sweep/muon_qk/lr_0.012"] == "failed"
    assert found["runs/muon_qk/seed_1"] == "open"
    machine.exit_codes, machine.started = {}, []
    run.execute(study, workdir)  # the same command, when the cause is fixed
    assert machine.started == [
        "sweep/muon_qk/lr_0.012",
        "runs/muon_qk/seed_1",
        "exports/muon_qk/seed_1",
        "report",
    ]


def test_where_every_rate_diverged_the_arm_is_missing(world):
    study, workdir, machine = world()
    machine.exit_codes = {f"sweep/muon_qk/lr_{rate:g}": 3 for rate in study.grid("muon_qk")}
    error = missing(study, workdir)
    assert error.exit_code == 1
    assert "sweep/muon_qk/choice: sweep/muon_qk: every learning rate diverged" in str(error)
    assert statuses(study, workdir)["runs/adamw_noqk/seed_1"] == "done"


def test_a_full_disk_is_told_apart(world):
    study, workdir, machine = world()
    machine.exit_codes = {"runs/muon_qk/seed_1": 4}
    assert missing(study, workdir).exit_code == 4
    machine.exit_codes = {"runs/muon_qk/seed_1": 4, "exports/adamw_noqk/seed_1": 2}
    (workdir / "exports" / "adamw_noqk" / "seed_1").rmdir()
    assert missing(study, workdir).exit_code == 1


def test_a_killed_run_is_said_to_be_killed(world):
    study, workdir, machine = world()
    machine.exit_codes = {"runs/muon_qk/seed_1": -9}
    assert "runs/muon_qk/seed_1: killed by signal 9" in str(missing(study, workdir))


def test_a_finished_run_of_another_config_is_refused_not_skipped(world):
    study, workdir, machine = world()
    run.execute(study, workdir)
    path = workdir / "runs" / "muon_qk" / "seed_1" / "config.json"
    values = json.loads(path.read_text())
    values["optimizer"]["clip_norm"] = 0.25
    path.write_text(json.dumps(values))
    machine.started.clear()
    with pytest.raises(errors.UsageError) as refused:
        run.execute(study, workdir)
    assert machine.started == []
    assert str(path) in str(refused.value)
    assert "optimizer.clip_norm is 0.25, planned 1.0" in str(refused.value)
    run.execute(study, workdir, only=["adamw_noqk"])  # the others may run


def test_a_run_whose_rate_is_no_longer_the_chosen_one_is_refused(world):
    study, workdir, _ = world()
    run.execute(study, workdir, only=["sweep", "choice", "dataset"])
    run.execute(study, workdir, only=["runs/muon_qk/*"])
    path = workdir / "sweep" / "learning_rates.json"
    synthetic_study.edit_sealed(path, '"chosen": 0.012', '"chosen": 0.024')
    with pytest.raises(errors.UsageError, match=r"learning_rate is 0.012, planned 0.024"):
        run.execute(study, workdir)


def test_another_plan_in_the_directory_is_refused_with_the_fields_that_differ(world):
    study, workdir, _ = world()
    run.execute(study, workdir, only=["dataset"])
    with pytest.raises(errors.UsageError) as refused:
        run.execute(make_plan(seeds=(1, 2)), workdir)
    assert "seeds: there [1], now [1, 2]" in str(refused.value)
    with pytest.raises(errors.UsageError) as refused:
        run.execute(make_plan(overrides=("model.d_ff=64",)), workdir)
    assert 'overrides: there [], now ["model.d_ff=64"]' in str(refused.value)


def test_scores_may_be_asked_for_later(world):
    study, workdir, machine = world(export=False)
    run.execute(study, workdir)
    assert json.loads((workdir / "study.json").read_text())["downstream"] == "none"
    machine.started.clear()
    run.execute(make_plan(export=False, downstream="benchmarks"), workdir)
    assert machine.started == [
        "downstream/muon_qk/seed_1",
        "downstream/adamw_noqk/seed_1",
        "report",
    ]


def test_a_plan_whose_configs_have_another_meaning_now_is_refused(world):
    """Equal fields of the study, but the code makes other runs of them."""
    study, workdir, _ = world()
    run.execute(study, workdir, only=["dataset"])
    path = workdir / "study.json"
    synthetic_study.edit_sealed(path, study.step("runs/muon_qk/seed_1").fingerprint, "0")
    with pytest.raises(errors.UsageError, match="another plan: configs of runs/muon_qk/seed_1"):
        run.execute(study, workdir)


def test_a_choice_among_other_runs_is_made_again(world):
    study, workdir, machine = world()
    run.execute(study, workdir)
    path = workdir / "sweep" / "learning_rates.json"
    good = path.read_bytes()
    fingerprint = study.step("sweep/muon_qk/choice").fingerprint
    synthetic_study.edit_sealed(path, fingerprint, "0")
    run.execute(study, workdir)
    assert path.read_bytes() == good
    assert machine.started[-1] == "report" and machine.started.count("report") == 2


def test_more_seeds_keep_the_finished_runs_when_study_json_is_moved_away(world):
    study, workdir, machine = world()
    run.execute(study, workdir)
    (workdir / "study.json").rename(workdir / "study.old.json")
    larger = make_plan(seeds=(1, 2))
    machine.study, machine.started = larger, []
    run.execute(larger, workdir)
    assert machine.started == [
        "runs/muon_qk/seed_2",
        "runs/adamw_noqk/seed_2",
        "exports/muon_qk/seed_2",
        "exports/adamw_noqk/seed_2",
        "report",
    ]


def test_a_wider_sweep_that_chooses_anew_refuses_the_runs_of_the_old_choice(world):
    """What the old choice has recorded does not make its runs those of the new plan."""
    study, workdir, machine = world()
    run.execute(study, workdir)
    (workdir / "study.json").rename(workdir / "study.old.json")
    wider = make_plan(sweep__factors=(0.5, 1.0, 2.0))
    machine.study, machine.losses = wider, {0.006: 2.5, 0.0006: 3.5}  # better, and worse
    kept = states.StudyFiles(wider, workdir)
    assert kept.state(wider.step("runs/muon_qk/seed_1")).status == "open"
    error = missing(wider, workdir)
    assert error.exit_code == 1
    assert "learning_rate is 0.012, planned 0.006" in str(error)
    assert "runs/adamw_noqk" not in str(error)  # its rate is chosen again
    assert [name for name in machine.started if name.startswith("runs/")] == [
        "runs/muon_qk/seed_1",
        "runs/adamw_noqk/seed_1",
    ]


def test_lines_that_begin_at_one_moment_record_plan_and_dataset_once(world, monkeypatch):
    """An array of --only lines on a fresh directory; none finds another's half-written file."""
    study, workdir, _ = world()
    workdir.mkdir()
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (time.sleep(0.01), sync(file)))
    with concurrent.futures.ThreadPoolExecutor(8) as lines:
        started = [lines.submit(run._settle, study, workdir, study.steps) for _ in range(8)]
    assert [line.exception() for line in started] == [None] * 8
    written = {path: path.stat().st_mtime_ns for path in workdir.glob("*.json")}
    assert {path.name for path in written} == {"dataset.json", "study.json"}
    run._settle(study, workdir, study.steps)
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_another_dataset_is_refused(world, monkeypatch):
    study, workdir, _ = world()
    run.execute(study, workdir, only=["dataset"])
    manifest = types.SimpleNamespace(name="other", fingerprint="a" * 64)
    other = types.SimpleNamespace(directory=pathlib.Path("there"), manifest=manifest)
    monkeypatch.setattr(dataset_lib, "open_dataset", lambda config: other)
    with pytest.raises(errors.UsageError, match=r"started on the dataset made-up, .* is aaaa"):
        run.execute(study, workdir)


def test_without_a_dataset_the_command_that_makes_one_is_named(tmp_path):
    with pytest.raises(errors.UsageError) as refused:
        run.execute(make_plan("pilot"), tmp_path)
    assert "qkjax prepare --preset=pilot" in str(refused.value)
    assert "--config.data_dir=DIR" in str(refused.value)


def test_two_executors_exclude_each_other_but_parts_run_side_by_side(world):
    study, workdir, _ = world()
    workdir.mkdir()
    with RunDirectory(workdir).lock():
        for only in ([], ["dataset"]):
            with pytest.raises(errors.UsageError, match="another process runs in this directory"):
                run.execute(study, workdir, only)
    with RunDirectory(workdir).lock(shared=True):
        run.execute(study, workdir, ["dataset"])
        with pytest.raises(errors.UsageError, match="another process runs in this directory"):
            run.execute(study, workdir)


def test_only_does_what_it_names_and_says_what_that_waits_for(world):
    study, workdir, machine = world()
    text = str(missing(study, workdir, only=["runs/muon_qk/*"]))
    assert "1 of 1 steps is missing" in text
    assert "Waiting (for): runs/muon_qk/seed_1 (sweep/muon_qk/choice)" in text
    assert machine.started == []
    run.execute(study, workdir, only=["muon_qk"])
    assert all("muon_qk" in name for name in machine.started) and len(machine.started) == 4
    run.execute(study, workdir, only=["report"])
    assert machine.started[-1] == "report"
    with pytest.raises(errors.UsageError, match="--only: 'runs/x' matches no step"):
        run.execute(study, workdir, only=["runs/x"])


def test_jobs_run_side_by_side_each_on_its_devices(world):
    study, workdir, machine = world()
    machine.asleep = 3
    run.execute(study, workdir, places=run.places_of(None, ["0", "5"]))
    assert machine.most_alive == 2
    used = {environment["CUDA_VISIBLE_DEVICES"] for environment in machine.environments}
    assert used == {"0", "5"}
    # A place is free again when its run has ended: never two runs on one device.
    first, second = machine.environments[:2]
    assert first["TPU_VISIBLE_CHIPS"] != second["TPU_VISIBLE_CHIPS"]


def test_places():
    assert run.places_of(None, []) == [{}]
    assert run.places_of(3, []) == [{}, {}, {}]
    four = run.places_of(4, ["0", "1"])
    assert [place["CUDA_VISIBLE_DEVICES"] for place in four] == ["0", "1", "0", "1"]
    assert {place["XLA_PYTHON_CLIENT_MEM_FRACTION"] for place in four} == {"0.45"}
    assert len({place["TPU_PROCESS_PORT"] for place in four}) == 4
    with pytest.raises(errors.UsageError, match="3 devices for --jobs=2"):
        run.places_of(2, ["0", "1", "2"])


def test_the_report_comes_last_and_again_when_something_is_new(world):
    study, workdir, machine = world()
    machine.exit_codes = {"exports/muon_qk/seed_1": 1}
    missing(study, workdir)
    assert machine.started[-1] == "report"
    machine.exit_codes, machine.started = {}, []
    summary = workdir / "runs" / "muon_qk" / "seed_1" / "summary.json"
    summary.write_bytes(summary.read_bytes())
    run.execute(study, workdir)
    assert machine.started == ["exports/muon_qk/seed_1", "report"]


@pytest.mark.usefixtures("stub_charts")
def test_a_page_made_while_a_run_finished_is_made_again(world, monkeypatch):
    """By another process with --only: the page is younger than the run, and does not show it."""
    # Before `world` replaces processes: matplotlib starts one where it has no list of fonts yet.
    reason = "matplotlib is absent: pip install -e '.[report]'"
    pytest.importorskip("matplotlib.font_manager", reason=reason)
    from qkjax.report import report

    study, workdir, _ = world()
    run.execute(study, workdir)
    kept = states.StudyFiles(study, workdir)
    report.make_report(workdir)
    assert kept.state(study.step("report")).status == "done"
    gather = report.gather

    def finish_meanwhile(found):
        summary = workdir / "runs" / "muon_qk" / "seed_1" / "summary.json"
        files.replace(summary, summary.read_bytes())
        return gather(found)

    monkeypatch.setattr(report, "gather", finish_meanwhile)
    report.make_report(workdir)
    assert kept.state(study.step("report")).status == "open"


def test_downstream_results_are_made_skipped_or_refused(world):
    study, workdir, machine = world(downstream="hub", export=False)
    assert run.HUB_IS_SILENT in (ROOT / "qkjax" / "tasks" / "benchmarks.py").read_text()
    machine.words = f"--tasks: {run.HUB_IS_SILENT} hellaswag"
    name, other = "downstream/muon_qk/seed_1", "downstream/adamw_noqk/seed_1"
    machine.exit_codes = {name: 2, other: 2}
    run.execute(study, workdir)
    kept = states.StudyFiles(study, workdir)
    state = kept.state(study.step(name))
    assert state.status == "skipped" and state.detail.startswith("no data: ")
    files.write_json(workdir / f"{other}.json", {"run": {"params_sha256": "adamw_noqk-1"}})
    machine.started.clear()
    run.execute(study, workdir)
    assert machine.started == [name, "report"]  # there may be data now
    path = workdir / f"{name}.json"
    files.write_json(path, {"run": {"params_sha256": "muon_qk-1"}})
    assert kept.state(study.step(name)).status == "done"
    files.write_json(path, {"run": {"params_sha256": "another"}})
    with pytest.raises(errors.UsageError, match="measured the parameters another, but the run has"):
        run.execute(study, workdir)


def test_the_commands_of_the_other_tools(world, monkeypatch):
    study, workdir, machine = world(downstream="benchmarks")
    commands = {}
    monkeypatch.setattr(
        machine,
        "do",
        lambda name, command: (
            commands.setdefault(name, command) and Machine.do(machine, name, command)
        ),
    )
    run.execute(study, workdir)
    seed = workdir / "runs" / "muon_qk" / "seed_1"
    start = [sys.executable, "-P", "-m", "qkjax.commands"]
    assert commands["exports/muon_qk/seed_1"] == [
        *start,
        "export",
        f"--workdir={seed}",
        f"--out={workdir / 'exports/muon_qk/seed_1'}",
    ]
    assert commands["downstream/muon_qk/seed_1"] == [
        *start,
        "evaluate",
        f"--workdir={seed}",
        "--backend=jax",
        "--tasks=hellaswag,lambada",
        f"--data_dir={pathlib.Path('benchmarks').absolute()}",
        f"--out={workdir / 'downstream/muon_qk/seed_1.json'}",
    ]
    assert commands["report"] == [*start, "report", f"--workdir={workdir}"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_leaves_everything_resumable(world, signum):
    study, workdir, machine = world()
    machine.asleep = 5

    def stop_at_the_first_run(name: str) -> None:
        if name.startswith("runs/"):
            signal.raise_signal(signum)

    machine.when_started = stop_at_the_first_run
    with pytest.raises(signals.Stopped, match="stopped, 5 of 14 steps are left") as stopped:
        run.execute(study, workdir)
    assert stopped.value.exit_code == 128 + signum
    assert machine.started[-1] == "runs/muon_qk/seed_1"
    assert machine.exit_codes == {"runs/muon_qk/seed_1": 143}  # SIGTERM, a second one is harmless
    assert statuses(study, workdir)["runs/muon_qk/seed_1"] == "open"  # and not failed
    machine.exit_codes, machine.when_started = {}, lambda name: None
    run.execute(study, workdir)
    assert statuses(study, workdir)["report"] == "done"


def test_an_error_of_its_own_waits_until_the_runs_have_saved(world, monkeypatch):
    """They die with the executor, so it may not leave before them."""
    study, workdir, machine = world()
    machine.asleep = 3
    machine.exit_codes = {"sweep/muon_qk/lr_0.012": 1}

    def full(self, step, state):
        raise errors.StorageError("no space left")

    monkeypatch.setattr(run._Executor, "_note", full)
    with pytest.raises(errors.StorageError, match="no space left"):
        run.execute(study, workdir, places=run.places_of(2, []))
    assert machine.started == ["sweep/muon_qk/lr_0.012", "sweep/muon_qk/lr_0.024"]
    assert machine.exit_codes["sweep/muon_qk/lr_0.024"] == 143  # asked to stop
    assert machine.alive == 0


def test_an_unfinished_run_names_the_other_host_that_held_it(world):
    study, workdir, _ = world()
    run.execute(study, workdir)
    kept, step = states.StudyFiles(study, workdir), study.step("runs/muon_qk/seed_1")
    (kept.directory(step) / "summary.json").unlink()
    assert kept.state(step) == states.State("unfinished")
    files.write_json(
        kept.directory(step) / "run.lock", {"host": "node7", "pid": 1, "start_time": files.now()}
    )
    assert kept.state(step) == states.State("unfinished", "last held by node7")


def test_status_refuses_a_finished_run_whose_metrics_were_edited(world, capsys):
    study, workdir, _ = world()
    run.execute(study, workdir)
    metrics = workdir / "runs" / "muon_qk" / "seed_1" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("3.0", "3.1"))
    capsys.readouterr()
    table.print_status(states.StudyFiles(study, workdir))
    said = capsys.readouterr().out
    assert said.count("refused") == 2 and "1 refused" in said.splitlines()[-1]
    assert "metrics.jsonl: has sha256" in said.replace("\n", "").replace(" ", "").replace(
        "metrics.jsonl:hassha256", "metrics.jsonl: has sha256"
    )


def test_status_shows_every_step_with_what_it_has_reached(world, capsys):
    study, workdir, machine = world()
    machine.exit_codes = {"runs/muon_qk/seed_1": 2, "runs/adamw_noqk/seed_1": 3}
    missing(study, workdir)
    capsys.readouterr()
    table.print_status(states.StudyFiles(study, workdir))
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split()[0]: line for line in lines[1:-1] if line and line[0] != " "}
    assert set(shown) == {step.name for step in study.steps}
    assert "5/5" in shown["sweep/muon_qk/lr_0.012"] and "3.0" in shown["sweep/muon_qk/lr_0.012"]
    assert "failed (exit 2" in shown["runs/muon_qk/seed_1"]
    assert "diverged (at step 3)" in shown["runs/adamw_noqk/seed_1"]
    with pytest.raises(errors.UsageError, match="no such file, expected a study"):
        table.print_status(states.StudyFiles(study, workdir / "elsewhere"))
    with pytest.raises(errors.UsageError, match=r"seeds: there \[1\], now \[1, 2\]"):
        table.print_status(states.StudyFiles(make_plan(seeds=(1, 2)), workdir))
    assert lines[-1].startswith(f"{workdir}: 8 of 14 steps done, 1 diverged, 1 failed, 1 open, 3")


# --------------------------------------------------------------------------------------------
# Rank surgery.


def test_surgery_is_measured_resumed_skipped_or_refused(world, capsys):
    study, workdir, machine = world(export=False, surgery__tokens=64, surgery__ranks=(2, 8))
    machine.exit_codes = {"runs/adamw_noqk/seed_1": 3, "surgery/muon_qk/seed_1": 1}
    missing(study, workdir)
    name = "surgery/muon_qk/seed_1"
    found = statuses(study, workdir)
    assert found["surgery/adamw_noqk/seed_1"] == "skipped" and found[name] == "failed"
    (workdir / "surgery" / "muon_qk").mkdir(parents=True)
    part = workdir / f"{name}.part.json"
    part.write_text("{}")  # what a kill leaves beside the CSV
    (workdir / "logs" / f"{name}.json").unlink()
    assert statuses(study, workdir)[name] == "unfinished"
    machine.exit_codes = {}
    commands = {}
    machine.when_started = lambda step: commands.update({step: 1})
    run.execute(study, workdir)
    assert name in commands and statuses(study, workdir)[name] == "done"
    assert f"{name}  resumes" in capsys.readouterr().out
    path = workdir / f"{name}.csv"
    path.write_bytes(surgery_csv(name, (2, 4)))
    with pytest.raises(errors.UsageError, match=r"seed_1\.csv: measured ranks \[2, 4\] of"):
        run.execute(study, workdir)
    path.write_text("layer,stage\n")
    with pytest.raises(errors.UsageError, match=r"seed_1\.csv: damaged"):
        run.execute(study, workdir)


def test_a_study_recorded_before_surgery_continues_without_it(world):
    study, workdir, machine = world(export=False, surgery__tokens=64)
    run.execute(plan.without_surgery(study), workdir)
    recorded = json.loads((workdir / "study.json").read_text())
    del recorded["surgery"]
    files.write_sealed(workdir / "study.json", recorded)
    continued, said = states.as_recorded(study, workdir)
    assert "continues without it" in said
    machine.started.clear()
    run.execute(continued, workdir)
    assert machine.started == ["report"]  # study.json is newer than the page
    with pytest.raises(errors.UsageError, match="surgery"):
        run.execute(study, workdir)
    assert states.as_recorded(study, workdir.parent / "new") == (study, "")


def test_a_study_recorded_with_earlier_default_seeds_continues_with_them(tmp_path):
    study = synthetic_study.make_plan("pilot,original")
    assert study.study.seeds == (42, 137, 256)
    recorded = plan.with_seeds(study, (42, 137))
    states.settle_plan(recorded, tmp_path)
    continued, said = states.as_recorded(study, tmp_path)
    assert continued == recorded
    assert said == (
        f"{tmp_path / 'study.json'}: recorded with the seeds 42, 137, and continues with them; "
        "studies of this scale now have 42, 137, 256"
    )
    states.check_plan(continued, tmp_path)
    with pytest.raises(errors.UsageError, match="seeds"):  # seeds of one's own are no default
        other = plan.with_seeds(study, (42, 137, 9))
        assert states.as_recorded(other, tmp_path) == (other, "")
        states.check_plan(other, tmp_path)
