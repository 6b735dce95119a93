"""`tools/soak.py`: a short soak with real kills, and what it calls a difference."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import small_run
import soak

from qkjax import train

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALL = (
    *("model.num_layers=1", "model.d_model=16", "model.num_heads=1", "model.num_kv_heads=1"),
    *("model.head_dim=8", "model.d_ff=16", f"model.vocab_size={small_run.VOCABULARY}"),
    *(f"model.sequence_length={small_run.LENGTH}", "train.tokens_per_step=64"),
    *("train.tokens=2560", "eval.at_tokens=(640,)", "checkpoint.every_tokens=320"),
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return small_run.make_dataset(tmp_path_factory.mktemp("datasets") / "dataset")


@pytest.mark.long
@pytest.mark.process
def test_a_short_soak(dataset, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "tools/soak.py",
            "--config=configs/muon_qk.py:tiny",
            f"--config.data.dir={dataset}",
            *(f"--config.{override}" for override in SMALL),
            f"--workdir={tmp_path / 'soak'}",
            "--minutes=0.3",
            "--disk_noise",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    figures = dict(line.split() for line in done.stdout.splitlines())
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(figures["cycles"]) > 0 and figures["mismatches"] == figures["failures"] == "0"
    assert int(figures["starts"]) > int(figures["cycles"])


def test_a_difference_of_one_number_is_seen(dataset, tmp_path, programs_built_once):
    first, other = tmp_path / "first", tmp_path / "other"
    train.train_and_evaluate(small_run.make_config(dataset), first)
    shutil.copytree(first, other)
    assert soak.differences(first, other) == []
    rows = (other / "metrics.jsonl").read_text().splitlines()
    changed = json.loads(rows[7])
    changed["train/loss"] += 1e-6
    rows[7] = json.dumps({**changed, "perf/mfu": 1.0})
    (other / "metrics.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    path = other / "validation" / "step_00000009.npz"
    with np.load(path) as arrays:
        np.savez(path, **{**arrays, "count": 2 * arrays["count"]})
    (other / "spectra" / "step_00000005.npz").unlink()
    shutil.rmtree(other / "checkpoints" / "20")
    found = soak.differences(first, other)
    assert found[0].startswith("digests of the last checkpoint (18,")
    assert found[1:] == [
        "metrics.jsonl: 20 rows, expected 21",
        "metrics.jsonl, step 7: train/loss",
        "spectra/step_00000005.npz: in one run alone",
        "validation/step_00000009.npz: count",
    ]
