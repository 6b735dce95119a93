"""Runs and studies that earlier versions wrote stay readable: their files lie in tests/stored."""

import json
import pathlib
import shutil
import tarfile

import pytest
import small_run
import synthetic_study

from qkjax import config as config_lib
from qkjax import files
from qkjax.cli import places
from qkjax.data import manifest as manifest_lib
from qkjax.runs.directory import RunDirectory
from qkjax.study import run, states
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


def test_a_study_on_an_earlier_embedded_corpus_continues_on_it(tmp_path, monkeypatch):
    """Its runs that have not started too: one study has one corpus."""
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(places, "data", lambda: tmp_path / "data")
    corpora = [
        small_run.make_dataset(tmp_path / "data" / name, seed=seed)
        for seed, name in enumerate(("embedded", "embedded-v2"))
    ]
    shutil.copy(STORED / "study_tiny_quick.json", tmp_path / "study.json")
    today = synthetic_study.make_plan("tiny,quick")
    before, _ = states.as_recorded(today, tmp_path)
    for corpus in corpora:
        fingerprint = manifest_lib.load(corpus).fingerprint
        files.write_json(tmp_path / "dataset.json", {"name": "any", "fingerprint": fingerprint})
        plan, said = states.as_recorded(today, tmp_path)
        states.check_plan(plan, tmp_path)
        flags = plan.arguments(plan.step("runs/muon_qk/seed_42"), tmp_path, None)
        earlier = corpus.name == "embedded"
        assert (f"--config.data.dir={corpus}" in flags) == earlier == (str(corpus) in said)
        assert earlier or plan == before


@pytest.mark.long
@pytest.mark.process
def test_an_unfinished_study_is_finished(tmp_path):
    """Written by 42535a5, killed at step 10 of 20 of its first run, with a checkpoint of step 6.

    On one machine the parameters end in the bits of the unbroken study; losses end so on any.
    """
    with tarfile.open(STORED / "study_unfinished.tar.xz") as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 on
        archive.extractall(tmp_path)
    workdir = tmp_path / "study"
    recorded = json.loads((workdir / "study.json").read_text())
    plan, _ = states.as_recorded(
        synthetic_study.make_plan(
            recorded["words"].replace(",fixed", ""),
            arms=tuple(recorded["arms"]),
            tokens=recorded["tokens"],
            overrides=tuple(recorded["overrides"]),
            data_dir=str(tmp_path / "data"),
        ),
        workdir,
    )
    before = RunDirectory(workdir / "runs" / "muon_qk" / "seed_42").metrics.read_text()
    run.execute(plan, workdir)
    losses = {"muon_qk": 4.84122507912772, "adamw_noqk": 5.383576938084194}  # of the unbroken one
    study = results.load_study(workdir)
    assert not study.missing and (workdir / "report" / "index.html").is_file()
    for arm, loss in losses.items():
        found = study.runs[arm, 42]
        assert found.summary["step"] == 20 and not found.diverged
        assert found.value("val/loss") == pytest.approx(loss, rel=1e-5), arm
    after = RunDirectory(workdir / "runs" / "muon_qk" / "seed_42").metrics.read_text()
    assert after.startswith(before[: before.index('"step": 7')])
