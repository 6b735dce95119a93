"""The scripts for borrowed GPU machines, tried on the CPU with models that take seconds."""

import json
import os
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest
import small_run
from absl import flags
from ml_collections import config_flags

from qkjax.study import plan
from qkjax.verdicts import results

ROOT = pathlib.Path(__file__).resolve().parents[1]
OVERRIDES = (
    "model.num_layers=1",
    "model.d_model=32",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.head_dim=16",
    "model.d_ff=48",
    f"model.vocab_size={small_run.VOCABULARY}",
    f"model.sequence_length={small_run.LENGTH}",
    f"train.tokens_per_step={small_run.TOKENS_PER_STEP}",
    "eval.at_tokens=()",
    f"checkpoint.every_tokens={10**9}",
    "data.max_epochs=1000000000",
)


def script(
    name: str, *arguments: str, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python}
    return subprocess.run(
        ["bash", f"tools/airgapped/{name}", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def make_wheel(folder: pathlib.Path, name: str) -> None:
    """A wheel of one module that says its name."""
    folder.mkdir()
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"NAME = {name!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return small_run.make_dataset(tmp_path_factory.mktemp("gpu") / "data")


def planned(
    part: str, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[pathlib.Path, plan.Plan, list[plan.Step]]:
    """Study directory, plan and selected steps of a part, with a stand-in for its interpreter."""
    stand_in, calls = folder / "python", folder / f"calls_{part}"
    record = f"printf '%s\\n' \"$@\" > {calls}"
    stand_in.write_text(f"#!/bin/sh\n[ $1 != tools/run_study.py ] || {record}\n")
    stand_in.chmod(0o755)
    done = script(
        "gpu_pilot.sh",
        f"--part={part}",
        "--data=d",
        f"--workdir={folder / 'pilot'}",
        f"--out={folder / 'out'}",
        python=str(stand_in),
    )
    assert done.returncode == 0, done.stderr
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    flags.DEFINE_list("only", [], "", flag_values=values)
    flags.DEFINE_string("workdir", "", "", flag_values=values)
    monkeypatch.setattr(sys, "argv", calls.read_text().splitlines())
    values(sys.argv)
    study = plan.make_plan(values.config)
    return pathlib.Path(values.workdir), study, study.select(values.only)


@pytest.mark.process
def test_the_parts_of_a_study_train_every_run_of_its_plan(tmp_path, monkeypatch):
    """A seed that lacks an arm of the plan enters no contrast: nothing would be decided."""
    monkeypatch.chdir(ROOT)
    plans: dict[pathlib.Path, set[str]] = {}
    trained: dict[pathlib.Path, set[str]] = {}
    for part in "abcdefg":
        directory, study, steps = planned(part, tmp_path, monkeypatch)
        runs = {step.name for step in study.steps if step.kind == plan.RUN}
        assert plans.setdefault(directory, runs) == runs
        trained.setdefault(directory, set()).update(step.name for step in steps)
    assert trained == plans
    assert {directory.name: len(runs) for directory, runs in plans.items()} == {
        "original_65536": 12,
        "original_65536_controls": 20,
        "fixed": 16,
        "fixed_merged": 4,
        "original_4096": 4,
    }


def pilot(folder: pathlib.Path, tokens: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Part f, Muon on separate and merged matrices, which is four small runs here."""
    return script(
        "gpu_pilot.sh",
        "--part=f",
        "--platform=cpu",
        "--scale=tiny",
        f"--workdir={folder / 'pilot'}",
        f"--out={folder / 'out'}",
        *arguments,
        "--",
        f"--config.tokens={tokens}",
        f"--config.overrides={OVERRIDES!r}",
    )


@pytest.mark.process
@pytest.mark.long
def test_a_part_of_the_pilot_runs_and_comes_home(data, tmp_path):
    make_wheel(tmp_path / "wheels", "carried_along")
    tokens = 5 * small_run.TOKENS_PER_STEP
    done = pilot(tmp_path, tokens, f"--data={data}", f"--wheels={tmp_path / 'wheels'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "pilot" / "site" / "carried_along.py").is_file()
    archives = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in archives] == ["fixed_merged-0.tar.gz"]
    with tarfile.open(archives[0]) as archive:
        assert {"report/index.html", "report/results.csv"} <= set(archive.getnames())
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 on
        archive.extractall(tmp_path / "home")
    study = results.load_study(tmp_path / "home")
    arms = ("muon_noqk", "muon_noqk_merged")
    assert sorted(study.runs) == [(arm, seed) for arm in arms for seed in (42, 137)]
    assert all(run.summary["step"] == 5 for run in study.runs.values())
    checkpoints = tmp_path / "home" / "runs" / "muon_noqk_merged" / "seed_42" / "checkpoints"
    assert {path.name for path in checkpoints.rglob("*") if path.is_file()} == {"metadata"}


@pytest.mark.process
@pytest.mark.long
def test_the_time_limit_is_kept_and_leaves_what_is_there(data, tmp_path):
    done = pilot(tmp_path, 10**9, f"--data={data}", "--minutes=1")
    assert done.returncode == 143, done.stdout + done.stderr
    assert "stopped by the limit of 1 minutes" in done.stdout
    run = tmp_path / "pilot" / "fixed_merged" / "runs" / "muon_noqk" / "seed_42"
    saved = sorted(int(path.name) for path in (run / "checkpoints").iterdir())
    # Where it was stopped, which on a busy machine may be before the first step.
    assert saved[0] == 0 and saved[-1] == small_run.rows(run)[-1]["step"]
    with tarfile.open(tmp_path / "out" / "fixed_merged-0.tar.gz") as archive:
        assert "runs/muon_noqk/seed_42/metrics.jsonl" in archive.getnames()


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part=z", "--data=d"], "--part: z, expected one of a to g"),
        (["--part=b", "--data=d", "--minutes=0.5"], "--minutes: 0.5, expected a whole number"),
        (["--part=b", "--source=text:x"], "--data: missing, and no --source with a --tokenizer"),
        (["--prat=b"], "--prat=b: unknown"),
        (["--part=b", "--data=d", "--wheels=/none"], "--wheels: no folder /none"),
        (["--part=b", "--data=d", "--platform=npu"], "--platform: npu, expected gpu or cpu"),
        (["--part=b", "--data=d", "--scale=full"], "--scale: full, expected pilot or tiny"),
    ],
)
def test_wrong_flags_are_named(tmp_path, arguments, message):
    done = script("gpu_pilot.sh", f"--workdir={tmp_path / 'w'}", f"--out={tmp_path}", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"ERROR: {message}")


@pytest.mark.process
def test_without_a_gpu_it_does_not_train_on_the_cpu(data, tmp_path):
    if pathlib.Path("/dev/nvidia0").exists():
        pytest.skip("there is a GPU on this machine")
    done = script(
        "gpu_pilot.sh",
        "--part=b",
        f"--workdir={tmp_path / 'w'}",
        f"--out={tmp_path / 'out'}",
        f"--data={data}",
    )
    assert done.returncode == 2
    assert "ERROR: --platform: jax has no gpu here" in done.stderr
    assert not (tmp_path / "w" / "original_65536").exists()


def benchmark(folder: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    step = small_run.TOKENS_PER_STEP
    fields = [*OVERRIDES[:-2], f"train.tokens={4 * step}", f"checkpoint.every_tokens={2 * step}"]
    return script(
        "gpu_benchmark.sh",
        "--platform=cpu",
        "--scale=tiny",
        "--determinism=default",
        f"--workdir={folder / 'bench'}",
        f"--out={folder / 'out'}",
        *arguments,
        "--",
        *(f"--config.{field}" for field in fields),
    )


@pytest.mark.process
@pytest.mark.long
def test_the_check_of_determinism_comes_home_and_a_failed_part_stops_no_other(data, tmp_path):
    done = benchmark(tmp_path, f"--data={data}", "--subjects=nonsense")
    assert done.returncode == 1
    assert "not done, or found different: nonsense" in done.stderr
    assert "determinism, default\n" not in done.stderr
    outcome = json.loads((tmp_path / "out" / "determinism_default.json").read_text())
    assert outcome["equal"] and outcome["steps"] == 4


@pytest.mark.process
def test_a_wrong_setting_is_named_before_the_first_benchmark(tmp_path):
    done = script(
        "gpu_benchmark.sh",
        "--platform=cpu",
        "--scale=tiny",
        f"--workdir={tmp_path / 'w'}",
        f"--out={tmp_path / 'out'}",
        "--data=d",
        "--subjects=nonsense",
        "--determinism=defualt",
    )
    assert done.returncode == 2
    assert done.stderr == (
        "ERROR: --determinism: defualt, expected default, deterministic or both.\n"
    )
    assert done.stdout == ""
