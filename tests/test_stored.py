"""Runs and studies that earlier versions wrote stay readable: their files lie in tests/stored."""

import json
import pathlib
import shutil

import pytest
import synthetic_study

from qkjax import config as config_lib
from qkjax.runs.directory import RunDirectory
from qkjax.study import states
from qkjax.verdicts import results

STORED = pathlib.Path(__file__).parent / "stored"


def present(words: str, tokens: int) -> config_lib.Config:
    values = config_lib.base("muon", "learned", words)
    values.train.tokens = tokens
    return config_lib.resolve(values).for_platform("cpu")


@pytest.mark.parametrize(
    ("file", "words", "tokens"),
    [("config_fixed.json", "tiny", 400_000), ("config_seed.json", "tiny,original", 20_480)],
)
def test_a_stored_config_is_that_of_today(tmp_path, file, words, tokens):
    """Read as today's, and the run resumes without a question about its settings."""
    shutil.copy(STORED / file, tmp_path / "config.json")
    today = present(words, tokens)
    directory = RunDirectory(tmp_path)
    assert directory.read_config() == today
    assert directory.config_changes(today, "fingerprint") == []


@pytest.mark.parametrize(
    ("file", "words", "fields"),
    [
        ("study_tiny_quick.json", "tiny,quick", {}),
        (
            "study_pilot_seed.json",
            "pilot,original",
            {"controls": ("adamw_qk_frozen", "muon_qk_frozen"), "optional_controls": ()},
        ),
    ],
)
def test_a_stored_study_has_the_fingerprints_of_today(tmp_path, file, words, fields):
    shutil.copy(STORED / file, tmp_path / "study.json")
    plan, _ = states.as_recorded(synthetic_study.make_plan(words, **fields), tmp_path)
    states.check_plan(plan, tmp_path)
    study = results.load_study(tmp_path)
    assert study.plan["recipe"] == plan.study.recipe
    stored = json.loads((STORED / file).read_text())
    assert [step.fingerprint for step in plan.steps] == [s["fingerprint"] for s in stored["steps"]]
    assert plan.fingerprint == stored["fingerprint"]
