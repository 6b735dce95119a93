"""The launchers of examples/, run by bash with a stand-in for what a cluster provides."""

import os
import pathlib
import shlex
import subprocess
import sys

import pytest
import small_run
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.process

# Runs the lines of an array at once, one after another, and prints a job's number. SLURM would wait
# for --dependency; here every stage is done before the next is queued.
SBATCH = """#!/bin/bash
echo "$@" >> "$QUEUE"
for argument in "$@"; do
  case "$argument" in
    --array=*) lines="${argument#--array=}" ;;
    --wrap=*) script="${argument#--wrap=}" ;;
  esac
done
for line in ${lines//,/ }; do
  SLURM_ARRAY_TASK_ID=$line bash -c "$script" >> "$QUEUE.out" 2>&1
done
wc -l < "$QUEUE"
"""


def stand_in(folder: pathlib.Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def environment(folder: pathlib.Path, **more: str) -> dict[str, str]:
    path = f"{folder}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **more}


def test_the_plan_of_a_study_is_queued_stage_by_stage(tmp_path):
    """Every line once, in arrays that wait for the stage before; here the lines only say so."""
    tools = tmp_path / "bin"
    stand_in(tools, "sbatch", SBATCH)
    stand_in(tools, "srun", '#!/bin/bash\n"$@"\n')
    python = shlex.quote(sys.executable)
    stand_in(
        tools,
        "qkjax",
        f'#!/bin/bash\n{python} -m qkjax.commands "$@" | sed "s/^cd .* --only=/echo did /"\n',
    )
    queue = tmp_path / "queue"
    flags = ("--config=configs/study.py:tiny", "--config.arms=muon_qk,muon_noqk")
    done = subprocess.run(
        ["bash", ROOT / "examples" / "slurm_study.sh", *flags, f"--workdir={tmp_path / 'study'}"],
        cwd=ROOT,
        env=environment(tools, QUEUE=str(queue), SBATCH="--partition=gpu", PLAN_DIR=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    jobs = queue.read_text().splitlines()
    for number, job in enumerate(jobs, start=1):
        assert f"stage {number}: job {number}, lines " in done.stdout
        assert "--partition=gpu" in job and "--signal=TERM@120" in job
        assert (f"--dependency=afterany:{number - 1} " in job) == (number > 1)
    did = (tmp_path / "queue.out").read_text().splitlines()
    assert len(did) == len(set(did)) and did[0] == "did dataset"
    runs = [i for i, line in enumerate(did) if line.startswith("did runs/")]
    choices = [i for i, line in enumerate(did) if "/choice" in line]
    assert len(runs) == 4 and max(choices) < min(runs)
    assert did[-1] == "did report"


@pytest.mark.long
def test_a_study_of_two_runs_through_the_stand_in(tmp_path):
    dataset = small_run.make_dataset(tmp_path / "dataset")
    tools, queue, study = tmp_path / "bin", tmp_path / "queue", tmp_path / "study"
    stand_in(tools, "sbatch", SBATCH)
    stand_in(tools, "srun", '#!/bin/bash\n"$@"\n')
    python = shlex.quote(sys.executable)
    # The runs alone: exports, tasks and the report have tests of their own.
    keep = 'grep -E "only=(dataset|runs/)"'
    stand_in(tools, "qkjax", f'#!/bin/bash\n{python} -m qkjax.commands "$@" | {keep}\n')
    flags = (
        "--config=configs/study.py:tiny,quick",
        "--config.arms=muon_qk,muon_noqk",
        f"--config.data_dir={dataset}",
        f"--config.tokens={10 * small_run.TOKENS_PER_STEP}",
        f"--config.overrides={small_run.STUDY_OVERRIDES!r}",
        f"--workdir={study}",
    )
    done = subprocess.run(
        ["bash", ROOT / "examples" / "slurm_study.sh", *flags],
        cwd=ROOT,
        env=environment(tools, QUEUE=str(queue), PLAN_DIR=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = sorted(path.parent.parent.name for path in study.glob("runs/*/*/summary.json"))
    assert found == ["muon_noqk", "muon_qk"], (tmp_path / "queue.out").read_text()


def test_the_file_for_skypilot_starts_every_node_with_its_number(tmp_path):
    task = yaml.safe_load((ROOT / "examples" / "skypilot.yaml").read_text())
    tools = tmp_path / "bin"
    stand_in(tools, "python", '#!/bin/bash\nprintf "%s\\n" "$@"\n')
    for rank in ("0", "1"):
        own = {
            **{name: str(value) for name, value in task["envs"].items()},
            "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
            "SKYPILOT_NUM_NODES": str(task["num_nodes"]),
            "SKYPILOT_NODE_RANK": rank,
        }
        done = subprocess.run(
            ["bash", "-euc", task["run"]],
            env=environment(tools, **own),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        flags = done.stdout.split()
        assert flags[:2] == ["-m", "qkjax.main"] and "--config=configs/muon_qk.py:full" in flags
        wanted = {"--coordinator=10.0.0.7:8476", "--num_processes=2", f"--process_id={rank}"}
        assert wanted < set(flags)
        shown = subprocess.run(  # the command knows every flag
            [sys.executable, *flags, "--print_config"], cwd=ROOT, capture_output=True, text=True
        )
        assert shown.returncode == 0, shown.stderr
