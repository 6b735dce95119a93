"""A study made again beside the published one, by the command; studies are written, not trained."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import synthetic_study

from qkjax import errors
from qkjax.runs.directory import RunDirectory
from qkjax.verdicts import power, reproduction, results

ROOT = pathlib.Path(__file__).resolve().parents[1]
ARMS = ("adamw_noqk", "adamw_qk")


def write(directory: pathlib.Path, **options) -> pathlib.Path:
    arms = {arm: courses for arm, courses in synthetic_study.arms().items() if arm in ARMS}
    return synthetic_study.write(directory, arms, seeds=(42, 43), **options)


def elsewhere(directory: pathlib.Path, old: str, new: str) -> None:
    """Makes the runs those of another machine: other parameters, and `new` in environment.json."""
    for path in directory.glob("runs/*/*/environment.json"):
        path.write_text(path.read_text().replace(old, new))
        run = RunDirectory(path.parent)
        run.write_summary({**run.read_summary(), "params_sha256": "another"})
    synthetic_study.seal(directory)


def compared(published, again) -> list[reproduction.Pair]:
    found = reproduction.pairs(*map(results.load_study, (published, again)))
    reproduction.check(found, str(again))
    return found


@pytest.fixture
def studies(tmp_path):
    published = write(tmp_path / "published", noise={"val/loss": 0.01})
    return published, pathlib.Path(shutil.copytree(published, tmp_path / "again"))


@pytest.mark.process
def test_equal_runs_and_runs_of_another_machine_by_the_command(studies):
    published, again = studies
    shutil.rmtree(again / "runs" / "adamw_qk" / "seed_43")  # not made again

    def call() -> str:
        done = subprocess.run(
            [
                sys.executable,
                "tools/compare_studies.py",
                f"--published={published}",
                f"--workdir={again}",
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert call().splitlines()[-1] == "P1: all 3 runs are equal to the bit"
    elsewhere(again, '"jax": "', '"jax": "99.')
    said = call().splitlines()
    assert said[0].split()[:2] == ["adamw_qk/seed_42", "apart,"] and "val/loss 0.0" in said[0]
    assert said[-1].startswith("P3: 0 of 3 runs are equal to the bit, the others within 4 dev")
    assert re.search(r"; jax [\d.]+ -> 99\.[\d.]+$", said[-1])


def test_a_run_farther_away_than_seeds_is_refused(studies, tmp_path):
    published, _ = studies
    near, far = (
        write(tmp_path / name, noise={"val/loss": 0.01 + more}, random_seed=0)
        for name, more in (("near", 0.002), ("far", 0.1))
    )
    for again in (near, far):
        elsewhere(again, "", "")
    runs = [results.load_study(study).runs["adamw_qk", 42] for study in (published, near)]
    apart = runs[1].value("val/loss") - runs[0].value("val/loss")
    spread = power.measured(results.load_study(published), 64)["loss"]
    found = {pair.name: pair for pair in compared(published, near)}
    expected = abs(apart) / (2**0.5 * spread)
    assert found["adamw_qk/seed_42"].apart["val/loss"] == pytest.approx(expected)
    assert 0 < expected < 4 and not found["adamw_qk/seed_42"].equal
    with pytest.raises(errors.UsageError, match=r"far: adamw_\w+/seed_\d+ is .* in val/loss, exp"):
        compared(published, far)


def test_a_run_that_diverges_in_one_of_them_is_refused(tmp_path):
    published = write(tmp_path / "published")
    again = write(tmp_path / "again", diverged={("adamw_qk", 42): 100})
    elsewhere(again, "", "")
    with pytest.raises(errors.UsageError, match="adamw_qk/seed_42 is inf deviations"):
        compared(published, again)


def test_what_cannot_be_compared_is_refused(studies, tmp_path):
    published, again = studies
    elsewhere(again, synthetic_study.FINGERPRINT, "f" * 64)
    with pytest.raises(errors.UsageError, match=r"again: other corpus: not comparable\. adamw_qk"):
        compared(published, again)
    other = write(tmp_path / "other", fields={"optimizer__beta2": 0.9})
    with pytest.raises(errors.UsageError, match="other: adamw_qk/seed_42 has another config"):
        compared(published, other)
    for study, rate in ((published, 1.0), (other, 2.0)):
        synthetic_study.write_sweep(study, {arm: {rate: 3.5} for arm in ARMS})
    with pytest.raises(errors.UsageError, match="has another config"):  # of equal rates
        compared(published, other)
    other = write(tmp_path / "chosen", fields={"optimizer__learning_rate": 0.002})
    with pytest.raises(errors.UsageError, match=r"chosen: the sweep chose the rate 0\.002 for ad"):
        compared(published, other)
    shutil.rmtree(again / "runs")
    with pytest.raises(errors.UsageError, match=r"again: no run in common .* adamw_qk/seed_42, "):
        compared(published, again)
