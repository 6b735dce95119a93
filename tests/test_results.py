"""A study read from its directory: what the numbers are, what is missing, what is refused."""

import json
import math
import pathlib
from collections.abc import Callable

import numpy as np
import pytest
import synthetic_study
from synthetic_study import LOSS, PR

from qkjax import errors, files
from qkjax.runs.directory import FINAL, RunDirectory
from qkjax.verdicts import results

SEEDS = (42, 43)
STEPS = 195  # of tiny, without a final pass


@pytest.fixture
def study(tmp_path: pathlib.Path) -> pathlib.Path:
    """Four arms, two seeds, tiny."""
    arms = synthetic_study.arms(32, muon_noqk={PR: 25.0, LOSS: 3.0})
    return synthetic_study.write(tmp_path / "study", arms, seeds=SEEDS, scale="tiny")


def run_of(study: pathlib.Path, arm: str = "muon_noqk", seed: int = 42) -> pathlib.Path:
    return study / "runs" / arm / f"seed_{seed}"


def edit(path: pathlib.Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refusal(study: pathlib.Path) -> str:
    with pytest.raises(errors.UsageError) as caught:
        results.load_study(study)
    return str(caught.value)


# --------------------------------------------------------------------------------------------
# What is read.


def test_a_study_is_its_plan_and_its_runs(study: pathlib.Path):
    found = results.load_study(study)
    assert found.arms == list(synthetic_study.ARMS) and found.seeds == list(SEEDS)
    assert set(found.runs) == {(arm, seed) for arm in synthetic_study.ARMS for seed in SEEDS}
    assert not found.missing and not found.notes and found.learning_rates is None
    assert [run.seed for run in found.of_arm("muon_qk")] == list(SEEDS)
    assert found.values(PR)["muon_noqk"] == {42: 25.0, 43: 25.0}


def test_numbers_of_a_run(study: pathlib.Path):
    run = results.load_study(study).runs["muon_noqk", 42]
    assert (run.arm, run.seed, run.diverged, run.has_final_pass) == ("muon_noqk", 42, False, False)
    assert run.value(LOSS) == pytest.approx(3.0)
    assert run.at_step(LOSS, 0) == synthetic_study.START[LOSS]
    assert math.isnan(run.at_step(LOSS, 1)) and math.isnan(run.value("no/such"))
    series = run.series(PR)
    assert [tokens for tokens, _ in series] == [probe.tokens for probe in run.probes]
    assert series[0] == (0, 30.0) and series[-1][1] == pytest.approx(25.0)
    assert not any("train/" in name or "perf/" in name for name in run.probes[0].metrics)


def test_halves_are_those_of_the_sequences(study: pathlib.Path):
    run = results.load_study(study).runs["muon_noqk", 42]
    path = run_of(study) / "validation" / f"step_{STEPS:08d}.npz"
    with np.load(path) as arrays:
        per_token = arrays["loss_sum"].astype(np.float64) / arrays["count"]
    assert run.half_losses() == (per_token[:8].mean(), per_token[8:].mean())
    assert run.half_losses()[0] < run.value(LOSS) < run.half_losses()[1]  # the easy ones come first


def test_the_final_pass_is_what_is_reported(tmp_path: pathlib.Path):
    arms = {"muon_noqk": synthetic_study.arms()["muon_noqk"]}
    fields = {"train__tokens": 1_000_000}
    synthetic_study.write(tmp_path, arms, seeds=(42,), scale="pilot", fields=fields)
    run_directory = RunDirectory(run_of(tmp_path))
    found = run_directory.read_validation(FINAL)
    arrays = {"loss_sum": found.counts * 1.25, "count": found.counts}
    files.write_arrays(run_directory.validation(FINAL), arrays)
    edit(run_directory.summary, **{"val_final/loss": 1.25, "pr_final/key": None})
    synthetic_study.seal(tmp_path)
    run = results.load_study(tmp_path).runs["muon_noqk", 42]
    assert run.has_final_pass and run.value(LOSS) == 1.25
    assert math.isnan(run.value("pr/key"))  # measured, and not finite
    assert run.at_step(LOSS, 15) == pytest.approx(3.5)  # the last ordinary evaluation


def test_no_number_stands_for_the_end_of_a_diverged_run(tmp_path: pathlib.Path):
    arms = synthetic_study.arms(32)
    synthetic_study.write(
        tmp_path, arms, seeds=(42,), scale="tiny", diverged={("adamw_qk", 42): 60}
    )
    run = results.load_study(tmp_path).runs["adamw_qk", 42]
    assert run.diverged and run.rows[-1]["train/loss"] is None
    for metric in (LOSS, PR):
        assert math.isfinite(run.at_step(metric, 48))
        assert math.isnan(run.value(metric)) and math.isnan(run.at_step(metric, STEPS))
    assert math.isnan(run.at_step(LOSS, 30))  # reached, and not evaluated


# --------------------------------------------------------------------------------------------
# What is missing.


def test_a_run_that_nobody_started(study: pathlib.Path):
    run_of(study).rename(study / "elsewhere")
    found = results.load_study(study)
    assert found.missing == (results.Missing("muon_noqk", 42, "not started"),)
    assert [run.seed for run in found.of_arm("muon_noqk")] == [43]


@pytest.mark.parametrize(
    ("rows", "torn", "why"),
    [
        (31, b"", "unfinished, at step 30 of 195"),
        (
            31,
            b'{"step": 31, "tok',
            "unfinished, at step 30 of 195; the torn last line of metrics.jsonl is skipped",
        ),
        (0, b"", "unfinished, before step 1 of 195"),
    ],
)
def test_an_unfinished_run_says_how_far_it_is(
    study: pathlib.Path, rows: int, torn: bytes, why: str
):
    (run_of(study) / "summary.json").unlink()
    metrics = run_of(study) / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(lines[:rows]) + torn)
    assert [run.why for run in results.load_study(study).missing] == [why]


# --------------------------------------------------------------------------------------------
# What is refused.


def cut(run: pathlib.Path, data: Callable[[bytes], bytes]) -> None:
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(data(metrics.read_bytes()))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: cut(run, lambda data: data[:-9]), "ends at step 194, but summary.json says"),
        (lambda run: cut(run, lambda data: data[: len(data) // 2]), "but summary.json says 195"),
        (lambda run: cut(run, lambda _: b""), "ends at step None"),
        (
            lambda run: cut(run, lambda data: data.replace(data.split(b"\n")[9] + b"\n", b"")),
            "holds 195 rows up to step 195, expected one of every step from 0",
        ),
        (
            lambda run: cut(run, lambda data: data.replace(b'"val/loss"', b'"lost"')),
            "no evaluation in it, expected val/loss",
        ),
        (lambda run: (run / "summary.json").write_text("{"), "summary.json: damaged"),
        (lambda run: (run / "config.json").write_text("{}"), "config.json: arm is missing"),
        (lambda run: edit(run / "environment.json", dataset_fingerprint=""), "names no dataset"),
        (
            lambda run: (run / "validation" / "step_00000195.npz").write_bytes(b"PK"),
            "step_00000195.npz: damaged",
        ),
        (
            lambda run: (run / "validation" / "step_00000195.npz").unlink(),
            "step_00000195.npz: missing",
        ),
        (
            lambda run: (
                edit(run / "environment.json", dataset_fingerprint="1" * 64),
                synthetic_study.seal(run),
            ),
            f"dataset {'1' * 64}, but",
        ),
    ],
)
def test_a_damaged_run_is_refused(study: pathlib.Path, damage: Callable, words: str):
    damage(run_of(study))
    message = refusal(study)
    assert words in message and "muon_noqk/seed_42" in message.replace("\\", "/")
    assert message.rstrip().endswith(".")


@pytest.mark.parametrize(
    ("metric", "file"), [(LOSS, "validation"), (PR, "spectra")], ids=["loss", "pr"]
)
def test_numbers_that_the_arrays_do_not_hold_are_refused(
    study: pathlib.Path, metric: str, file: str
):
    """Edited in summary.json, in metrics.jsonl, or in both alike."""
    arms = synthetic_study.arms(32, muon_noqk={PR: 25.0, LOSS: 3.0})
    study = synthetic_study.write(study.parent / "s", arms, seeds=SEEDS, scale="tiny", spectra=True)
    directory = RunDirectory(run_of(study))
    summary, lines = directory.summary.read_text(), directory.metrics.read_text()
    true = directory.read_metrics()[-1][metric]
    edit(directory.summary, **{metric: true + 0.01})
    synthetic_study.seal(directory.path)
    message = refusal(study)
    assert f"summary.json: {metric} is {true + 0.01}" in message and str(true) in message
    changed = lines.rstrip("\n").split("\n")
    changed[-1] = json.dumps({**json.loads(changed[-1]), metric: true + 0.01})
    directory.metrics.write_text("\n".join(changed) + "\n")
    message = refusal(study)
    assert f"metrics.jsonl, step {STEPS}: {metric} is {true + 0.01}, but" in message
    assert f"{file}/step_{STEPS:08d}.npz gives" in message
    directory.summary.write_text(summary)
    assert f"summary.json: {metric} is {true}, but" in refusal(study)
    directory.metrics.write_text(lines)
    results.load_study(study)


def test_what_is_not_a_study(tmp_path: pathlib.Path):
    assert "study.json: no such file, expected a study" in refusal(tmp_path)
    files.write_json(tmp_path / "study.json", {"scale": "tiny"})
    assert "it lacks recipe, arms, controls, seeds" in refusal(tmp_path)
    (tmp_path / "study.json").write_text("[]")
    assert "it is not a JSON object" in refusal(tmp_path)


def test_a_run_in_another_place_is_refused(study: pathlib.Path):
    moved = run_of(study, "adamw_qk", 42)
    moved.rename(study / "kept")
    run_of(study, "adamw_qk", 43).rename(moved)
    assert "is adamw_qk with seed 43, expected adamw_qk with seed 42" in refusal(study)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"train__tokens": 300_000}, "steps 146, but"),
        ({"train__tokens_per_step": 1_024, "train__tokens": 199_680}, "tokens a step 1024, but"),
        ({"recipe": "original"}, "recipe original, but"),
    ],
)
def test_other_budgets_are_refused(study: pathlib.Path, fields: dict, words: str):
    recipe = fields.pop("recipe", "fixed")
    config = synthetic_study.make_config("muon_noqk", 42, "tiny", recipe, **fields)
    files.write_json(run_of(study) / "config.json", config.to_dict())
    synthetic_study.seal(study)
    message = refusal(study)
    assert words in message and "compared on one dataset and one budget" in message


def test_other_validation_sequences_are_refused(study: pathlib.Path):
    path = run_of(study) / "validation" / f"step_{STEPS:08d}.npz"
    loss = RunDirectory(run_of(study)).read_metrics()[-1][LOSS]
    np.savez(path, loss_sum=np.full(3, 256 * loss, np.float32), count=np.full(3, 256, np.float32))
    synthetic_study.seal(study)
    assert "validation sequences 3, but" in refusal(study)


# --------------------------------------------------------------------------------------------
# Downstream.


@pytest.fixture
def scored(study: pathlib.Path) -> pathlib.Path:
    """The study with downstream results of two arms."""
    right = {"muon_noqk": 0.3, "adamw_qk": 0.3}
    synthetic_study.write_downstream(study, right, seeds=SEEDS, items=20)
    return study


def score_of(study: pathlib.Path, seed: int = 43) -> pathlib.Path:
    return study / "downstream" / "muon_noqk" / f"seed_{seed}.json"


def change_task(path: pathlib.Path, **fields: object) -> None:
    found = json.loads(path.read_text())
    found["tasks"]["hellaswag"].update(fields)
    path.write_text(json.dumps(found))


def test_scores_and_items_are_read(scored: pathlib.Path):
    found = results.load_study(scored)
    assert set(found.downstream) == {(a, s) for a in ("muon_noqk", "adamw_qk") for s in SEEDS}
    assert [item["index"] for item in found.items["muon_noqk", 42]][:4] == [0, 0, 1, 1]


def test_scores_of_other_parameters_are_left_out(scored: pathlib.Path):
    edit(score_of(scored), run={"params_sha256": "of an earlier checkpoint"})
    found = results.load_study(scored)
    assert ("muon_noqk", 43) not in found.downstream
    assert ["left out, it measured other parameters" in note for note in found.notes] == [True]


def test_scores_put_in_another_way_are_refused(scored: pathlib.Path):
    """Few-shot counts, data, limits and first tokens must not be mixed."""
    path = score_of(scored)
    before = path.read_text()
    for change, words in (
        (lambda: change_task(path, num_fewshot=0), "hellaswag has num_fewshot 0, but"),
        (
            lambda: change_task(path, data_sha256={"hellaswag.jsonl": "e" * 64}),
            f"hellaswag has data_sha256 {{'hellaswag.jsonl': '{'e' * 64}'}}, but",
        ),
        (lambda: edit(path, limit=10), "hellaswag has limit 10, but"),
        (
            lambda: edit(path, bos={"added": False, "why": "documents ran on"}),
            "hellaswag has bos {'added': False, 'why': 'documents ran on'}, but",
        ),
    ):
        path.write_text(before)
        change()
        message = refusal(scored)
        assert words in message and "compared on the same items, asked in the same way" in message
        assert str(path) in message
    path.write_text(before)
    results.load_study(scored)


def test_a_sample_is_compared_with_samples_alone(study: pathlib.Path):
    synthetic_study.write_downstream(study, {"adamw_qk": 0.3}, seeds=SEEDS, items=20)
    synthetic_study.write_downstream(study, {"muon_noqk": 0.3}, seeds=SEEDS, items=8, sample=True)
    assert len(results.load_study(study).downstream) == 4
    change_task(score_of(study), num_fewshot=3)
    assert "hellaswag has num_fewshot 3, but" in refusal(study)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bos": "none"}, "bos is not a JSON object"),
        ({"run": {}}, "run lacks params_sha256"),
        ({"tasks": {"hellaswag": {"n": 3}}}, "hellaswag lacks data_sha256, metrics, name"),
        (
            {
                "tasks": {
                    "lambada": {
                        "name": "",
                        "num_fewshot": 0,
                        "n": 1,
                        "data_sha256": {},
                        "metrics": {"acc": {"value": 0.5}},
                    }
                }
            },
            "lambada acc lacks stderr",
        ),
    ],
)
def test_damaged_scores_are_refused(scored: pathlib.Path, fields: dict, words: str):
    edit(score_of(scored), **fields)
    message = refusal(scored)
    assert words in message and "muon_noqk/seed_43.json: damaged" in message


def test_damaged_learning_rates_are_refused(study: pathlib.Path):
    synthetic_study.write_sweep(study, {"muon_qk": {0.006: 3.0, 0.012: 3.1}})
    assert results.load_study(study).learning_rates["muon_qk"]["chosen"] == 0.006
    files.write_json(study / "sweep" / "learning_rates.json", {"muon_qk": {"runs": []}})
    assert "muon_qk lacks chosen, edge, extended" in refusal(study)


def test_learning_rates_without_an_arm_are_refused(study: pathlib.Path):
    files.write_json(study / "sweep" / "learning_rates.json", {})
    assert "learning_rates.json: damaged (it names no arm)" in refusal(study)


def test_items_are_those_that_were_scored(scored: pathlib.Path):
    path = scored / "downstream" / "muon_noqk" / "seed_42.json"
    items = path.with_suffix(".items.jsonl")
    edit(path, items_sha256=files.sha256(items))
    assert ("muon_noqk", 42) in results.load_study(scored).items
    text = items.read_text()
    items.write_text(text.replace('"acc": 1', '"acc": 0', 1))
    assert "seed_42.items.jsonl: damaged (sha256" in refusal(scored)
    items.unlink()
    assert "seed_42.items.jsonl: missing" in results.load_study(scored).notes[0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"task": "hellaswag", "index": 0}', "line 1 lacks item_sha256, log_likelihoods"),
        ('{"index": 0}', "line 1 lacks task"),
        ("[]", "line 1 is not a JSON object"),
        ("{", "damaged"),
    ],
)
def test_damaged_items_are_refused(scored: pathlib.Path, line: str, words: str):
    score_of(scored).with_suffix(".items.jsonl").write_text(line + "\n")
    message = refusal(scored)
    assert words in message and "seed_43.items.jsonl" in message
