"""The report of studies whole, unfinished and damaged: its words, its numbers, its bytes."""

import csv
import dataclasses
import functools
import html.parser
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import synthetic_study
from synthetic_study import LOSS, PR

from qkjax import errors, presets
from qkjax.config import gamma_exposure
from qkjax.report import (
    arms,
    material,
    original,
    report,
    sections_measures,
    sections_record,
    sections_result,
    sections_verdicts,
)
from qkjax.report.blocks import Box, Charts, Lead, Report, Section, Table, number
from qkjax.report.csv import COLUMNS, results_csv
from qkjax.report.markdown import markdown
from qkjax.runs import environment
from qkjax.runs.directory import RunDirectory
from qkjax.verdicts import results

pytest.importorskip("matplotlib", reason="matplotlib is absent: pip install -e '.[report]'")
ROOT = pathlib.Path(__file__).resolve().parents[1]
SEEDS = (42, 43)
SECTIONS = (
    "result",
    "verdicts",
    "warnings",
    "attribution",
    "rank",
    "confounds",
    "loss",
    "keys",
    "downstream",
    "sweep",
    "missing",
    "original",
    "deviations",
    "record",
)
RATES = {arm: {0.3: 3.9, 0.6: 3.7, 1.2: 3.8} for arm in synthetic_study.ARMS}


class Page(html.parser.HTMLParser):
    """What a browser would find: ids, references, tags, and the text of each section."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.sections: dict[str, str] = {}
        self._inside = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.ids.append(given["id"])
        for name in ("href", "xlink:href", "src"):
            self.references += [given[name]] if name in given else []
        self.references += re.findall(r"url\(([^)]*)\)", " ".join(given.values()))
        if tag == "section":
            self._inside = given["id"]

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.sections[self._inside] = self.sections.get(self._inside, "") + data


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Report]:
    """A tiny study with all that a study can have, its report written, and as data."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    given = synthetic_study.arms(
        32, adamw_qk={PR: 12.0, LOSS: 3.6}, muon_noqk={PR: 25.0}, muon_qk_frozen={PR: 21.0}
    )
    noise = {PR: 0.2, LOSS: 0.002}
    synthetic_study.write(folder, given, seeds=SEEDS, noise=noise, scale="tiny", spectra=True)
    prs = {arm: {0.3: 20.0, 0.6: 18.0, 1.2: 14.0} for arm in synthetic_study.ARMS}
    synthetic_study.write_sweep(folder, RATES, prs=prs)
    used = {"adamw_qk": (8, 12), "muon_noqk": (20, 24), "muon_qk": (16, 16)}
    synthetic_study.write_surgery(folder, used, SEEDS)
    change_plan(folder, surgery={"tokens": 65_536, "ranks": []})
    right = {"muon_noqk": 0.4, "adamw_qk": 0.3}
    synthetic_study.write_downstream(folder, right, seeds=SEEDS, items=100)
    found = material.load(folder)
    made = report.assemble(found)
    report.write(made, results_csv(found), folder / "report")
    return folder, made


@pytest.fixture(scope="module")
def whole(built: tuple[pathlib.Path, Report]) -> pathlib.Path:
    """The study of `built`."""
    return built[0]


def write_tiny(
    folder: pathlib.Path, by_arm: synthetic_study.Arms | None = None, **options: Any
) -> pathlib.Path:
    """A tiny study without spectra."""
    given = {"seeds": SEEDS, "scale": "tiny", "noise": {PR: 0.2, LOSS: 0.002}, **options}
    return synthetic_study.write(folder, by_arm or synthetic_study.arms(32), **given)


@pytest.fixture
def write(tmp_path: pathlib.Path, stub_charts: None) -> Callable[..., pathlib.Path]:
    """Writes a tiny study, whose report is read for its words alone."""
    return functools.partial(write_tiny, tmp_path / "study")


def sections(study: pathlib.Path) -> dict[str, str]:
    """Makes the report; by section what its page says."""
    return Page(report.make_report(study)).sections


def change_plan(study: pathlib.Path, **fields: Any) -> None:
    plan = json.loads((study / "study.json").read_text())
    (study / "study.json").write_text(json.dumps({**plan, **fields}))


def command(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "tools/make_report.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


# --------------------------------------------------------------------------------------------
# A whole study.


def test_the_page_has_every_section_and_needs_nothing_else(whole: pathlib.Path):
    page = Page(whole / "report" / "index.html")
    assert tuple(page.sections) == SECTIONS
    assert "and their controls answer." in page.sections["verdicts"]
    served = "none: Muon, no QK-Norm; frozen: Muon + QK-Norm, γ frozen."
    assert served in page.sections["attribution"]
    assert len(set(page.ids)) == len(page.ids) > 100
    assert not page.tags & {"script", "link", "iframe", "object", "img"}
    for reference in page.references:
        assert reference.startswith(("#", "data:image/png;base64,")), reference
        if reference.startswith("#"):
            assert reference[1:] in page.ids
    assert "@import" not in (whole / "report" / "index.html").read_text()


def test_every_chart_is_in_the_page_and_a_file(whole: pathlib.Path):
    page = Page(whole / "report" / "index.html")
    files = {path.stem for path in (whole / "report" / "figures").glob("*.svg")}
    assert {f"{name}-title" for name in files} <= set(page.ids)
    for name in (
        "sweep_adamw",
        "sweep_muon",
        "loss_arms",
        "loss_controls_muon",
        "pr_post_rope_raw_arms",
        "pr_pre_rope_centred_arms",
        "axes_arms",
        "heat_maps_key_post_rope_raw_arms",
        "spectra_key_pre_rope_centred_layer_0",
        "spectra_key_pre_rope_centred_layer_2",
        "spectra_key_pre_rope_centred_layer_3",
        "gamma_k_mean",
        "max_logit_arms",
    ):
        assert name in files


def test_the_tables_hold_what_the_runs_measured(whole: pathlib.Path):
    study = results.load_study(whole)
    page = Page(whole / "report" / "index.html").sections
    for run in study.runs.values():
        for text in (f"{run.value(LOSS):.4f}", *(f"{half:.4f}" for half in run.half_losses())):
            assert text in page["loss"]
        assert f"{run.value(PR):.2f}" in page["keys"]
        assert run.summary["params_sha256"][:16] in page["record"]
    for found in study.downstream.values():
        score = found["tasks"]["hellaswag"]["metrics"]["acc_norm"]
        assert f"{100 * score['value']:.2f} ± {100 * score['stderr']:.2f}" in page["downstream"]
    assert "byte for byte" in page["downstream"] and "10-shot" in page["downstream"]


def test_the_text_has_the_facts_of_the_page(built: tuple[pathlib.Path, Report]):
    """Every cell of every table, every verdict, warning and command, in both forms."""
    whole, made = built
    text = (whole / "report" / "report.md").read_text().replace("\\", "")
    page = " ".join(Page(whole / "report" / "index.html").sections.values()).replace("−", "-")
    page = page.replace("`", "")
    facts = [section.title for section in made.sections]
    waiting = [block for section in made.sections for block in section.blocks]
    while waiting:
        block = waiting.pop()
        waiting += getattr(block, "blocks", ())  # folded ones
        facts += [cell for row in getattr(block, "rows", ()) for cell in row]
        facts += getattr(block, "items", ())
        facts += [block.text] if hasattr(block, "text") else []
    for verdict in material.load(whole).judgement.verdicts:
        if verdict.left_out:
            facts += [verdict.title, verdict.left_out]
            continue
        facts += [verdict.title, verdict.question, verdict.headline, verdict.reason]
        for clause in (*verdict.clauses, *verdict.shown):
            facts += [clause.said, clause.reason.removeprefix(f"{clause.said}: ")]
            facts += [clause.text] if sections_verdicts.has_data(clause) else [clause.name]
    assert len(facts) > 400
    for fact in facts:
        plain = " ".join(fact.split())
        assert plain in " ".join(text.replace("&lt;", "<").replace("&gt;", ">").split()), fact
        words = plain.replace("`", "")
        assert words[1:].removesuffix(".") in " ".join(page.split()), fact


@pytest.mark.process
def test_equal_results_give_equal_bytes(whole: pathlib.Path, tmp_path: pathlib.Path):
    """By the command, elsewhere, of runs of another speed; results.csv also after another time."""
    copy = tmp_path / "elsewhere" / "again"
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("report"))
    for run in (copy / "runs").glob("*/*"):
        summary = json.loads((run / "summary.json").read_text())
        summary["perf/tokens_per_second"] = 3.0
        (run / "summary.json").write_text(json.dumps(summary))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rows[-1]["perf/eval_seconds"] = 5.0
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    synthetic_study.seal(copy)
    done = command(f"--workdir={copy}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out" / "index.html")
    names = {file.relative_to(whole / "report") for file in (whole / "report").rglob("*.*")}
    assert names == {file.relative_to(tmp_path / "out") for file in (tmp_path / "out").rglob("*.*")}
    for name in names:
        ours, other = whole / "report" / name, tmp_path / "out" / name
        assert other.read_bytes() == ours.read_bytes(), name
    for run in (copy / "runs").glob("*/*"):
        recorded = json.loads((run / "environment.json").read_text())
        (run / "environment.json").write_text(json.dumps({**recorded, "command": ["other"]}))
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps({**summary, "wall_seconds": 7.0}))
    synthetic_study.seal(copy)
    csv_text = results_csv(material.load(copy))
    assert csv_text == (whole / "report" / "results.csv").read_text()


def test_results_csv(whole: pathlib.Path):
    text = (whole / "report" / "results.csv").read_text()
    assert str(whole) not in text and "seconds" not in text and "perf/" not in text
    rows = list(csv.DictReader(text.splitlines()))
    assert tuple(rows[0]) == COLUMNS
    assert {row["table"] for row in rows} == {
        "clause",
        "downstream",
        "evaluation",
        "run",
        "surgery",
        "sweep",
        "verdict",
    }
    places = [
        (r["table"], r["name"], int(r["seed"] or -1), int(r["step"] or -1), r["metric"])
        for r in rows
    ]
    assert places == sorted(places) and len(set(places)) == len(places)
    value = {place: row["value"] for place, row in zip(places, rows, strict=True)}
    for (arm, seed), run in results.load_study(whole).runs.items():
        assert value["run", arm, seed, -1, "params_sha256"] == run.summary["params_sha256"]
        assert float(value["run", arm, seed, -1, PR]) == run.value(PR)
        assert float(value["evaluation", arm, seed, 24, PR]) == run.at_step(PR, 24)
        halves = [
            float(value["run", arm, seed, -1, f"{LOSS}/{n}_half"]) for n in ("first", "second")
        ]
        assert tuple(halves) == run.half_losses()
    assert value["verdict", "H1", -1, -1, "status"] in ("supported", "refuted", "inconclusive")
    assert float(value["clause", "H1 post-RoPE", 42, -1, "estimate"]) > 0
    assert value["sweep", "muon_qk", 7, -1, "chosen"] == "0.6"
    assert value["sweep", "muon_qk", 7, -1, f"lr_1.2/{PR}"] == "14.0"
    assert value["surgery", "adamw_qk", 43, -1, "directions"] == "12"
    assert value["downstream", "muon_noqk", 43, -1, "hellaswag/byte_exact/n"] == "50"


def test_figures_of_an_earlier_report_go(built: tuple[pathlib.Path, Report]):
    whole, made = built
    kept = sorted((whole / "report").rglob("*"))
    (whole / "report" / "figures" / "of_an_arm_that_left.svg").write_text("<svg/>")
    numbers = (whole / "report" / "results.csv").read_text()
    assert report.write(made, numbers, whole / "report") == whole / "report" / "index.html"
    assert sorted((whole / "report").rglob("*")) == kept


# --------------------------------------------------------------------------------------------
# Unfinished studies.


def test_a_study_that_has_not_begun(write: Callable[..., pathlib.Path]):
    study = write(missing=[(arm, seed) for arm in synthetic_study.ARMS for seed in SEEDS])
    page = sections(study)
    assert tuple(page) == SECTIONS
    assert "0 of 8 runs finished" in page["verdicts"]
    assert page["missing"].count("seeds 42 and 43: not started") == 4  # a line for each arm
    assert "No run has finished yet" in page["loss"] and "No run has finished" in page["keys"]
    assert "no run has been scored" in page["downstream"]
    text = (report.make_report(study).parent / "report.md").read_text()
    assert text.count("H3(a), H3(b), H3(c): no seed has every arm") == 1
    assert "Without data: H3" not in text  # its reason has said so


def test_a_deleted_seed(write: Callable[..., pathlib.Path]):
    """The other seeds of that arm stand alone, and no contrast is decided on one seed."""
    study = write()
    shutil.rmtree(study / "runs" / "muon_noqk" / "seed_43")
    page = sections(study)
    assert "The verdicts are about scale tiny at 400,000 tokens a run alone" in page["verdicts"]
    assert "7 of 8 runs finished" in page["verdicts"]
    assert "contrasts of H1 to H4, have seed 42." in page["verdicts"]
    assert "nothing is decided" in page["verdicts"]
    assert "one seed: nothing is decided (seed 42)" in page["warnings"]
    assert "seed 43 is left out of H1 to H4, it lacks muon_noqk" in page["warnings"]
    assert "Muon, no QK-Norm, seed 43: not started" in page["missing"]
    assert page["result"].count("(1 of 2 seeds)") == 1
    assert "supported" not in page["verdicts"].split("H4 finishes")[0].split("p", 1)[0]


def test_a_diverged_arm(tmp_path: pathlib.Path):
    """In words and in the charts."""
    diverged = {("adamw_noqk", seed): 60 for seed in SEEDS}
    page = sections(write_tiny(tmp_path, diverged=diverged))
    for seed in SEEDS:
        assert f"adamw_noqk seed {seed} diverged at step 61" in page["warnings"]
    assert "AdamW, no QK-Norm (2 of 2 diverged)––" in page["result"]
    assert (
        "10.8" not in page["result"].split("Lines are")[0] + page["loss"]
    )  # no number stands for a divergence
    assert "A diverged run has no loss at its end" in page["loss"]
    assert "AdamW, no QK (×: diverged)" in page["loss"]
    assert "diverged at step 61" in page["record"]
    assert "AdamW, no QK-Norm (diverged)" in page["keys"]
    assert "halves" not in page["loss"]  # no sound run: there are none


def test_a_mean_of_fewer_halves_says_so(write: Callable[..., pathlib.Path]):
    page = sections(write(diverged={("adamw_noqk", 42): 60}))
    assert page["loss"].count("mean of 2 (halves: of 1)") == 1


def test_keys_that_are_all_zero(write: Callable[..., pathlib.Path]):
    """Their participation ratio is undefined: shown as absent, and no contrast is made of it."""
    study = write(spectra=True, seeds=(42, 43))
    run = study / "runs" / "muon_noqk" / "seed_42"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[-1][PR] = None
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, PR: None}))
    path = run / "spectra" / "step_00000195.npz"
    with np.load(path) as arrays:
        zeros = {name: 0 * values if "key_" in name else values for name, values in arrays.items()}
    np.savez(path, **zeros)
    synthetic_study.seal(study)
    page = sections(study)
    assert "no finite value of muon_noqk seed 42" in page["verdicts"]
    assert "Muon, no QK-Norm–" in page["result"]


def test_a_torn_last_line_is_skipped_with_a_note(write: Callable[..., pathlib.Path]):
    study = write()
    run = study / "runs" / "muon_qk" / "seed_42"
    (run / "summary.json").unlink()
    with open(run / "metrics.jsonl", "r+b") as file:
        file.truncate(5_000)
    page = sections(study)
    assert "Muon + QK-Norm, seed 42: unfinished, at step" in page["missing"]
    assert "torn last line of metrics.jsonl is skipped" in page["missing"]


def test_rank_surgery_of_other_parameters_is_left_out(write: Callable[..., pathlib.Path]):
    study = write()
    synthetic_study.write_surgery(study, {"muon_qk": (8, 12)}, SEEDS)
    one, other = (study / "surgery" / "muon_qk" / f"seed_{seed}.csv" for seed in SEEDS)
    one.write_bytes(other.read_bytes())
    found = material.load(str(study))
    assert set(found.surgery) == {("muon_qk", 43)}
    assert f"{one}: left out, it measured other parameters than the run's last" in found.warnings
    other.write_text(other.read_text().replace(",12,,", ",16,,", 1))
    with pytest.raises(errors.UsageError, match=r"seed_43\.csv: damaged \(its rows are not those"):
        material.load(str(study))


@pytest.mark.process
def test_a_finished_run_that_lost_rows_is_refused(write: Callable[..., pathlib.Path]):
    study = write()
    with open(study / "runs" / "muon_qk" / "seed_42" / "metrics.jsonl", "r+b") as file:
        file.truncate(5_000)
    done = command(f"--workdir={study}")
    assert done.returncode == 2 and not (study / "report").exists()
    assert re.fullmatch(
        r"ERROR: \S*/muon_qk/seed_42/metrics.jsonl: ends at step \d+, but summary.json says 195. "
        "Restore it from a copy, or run this run again elsewhere.",
        done.stderr.splitlines()[-1],
    )


@pytest.mark.process
def test_another_dataset_is_refused_with_both_digests(write: Callable[..., pathlib.Path]):
    study = write()
    path = study / "runs" / "muon_qk" / "seed_43" / "environment.json"
    recorded = json.loads(path.read_text())
    path.write_text(json.dumps({**recorded, "dataset_fingerprint": "f" * 64}))
    synthetic_study.seal(study)
    done = command(f"--workdir={study}")
    assert done.returncode == 2
    assert f"dataset {'f' * 64}, but" in done.stderr and f"has {'0' * 64}" in done.stderr


def test_other_few_shot_counts_are_refused(write: Callable[..., pathlib.Path]):
    study = write()
    synthetic_study.write_downstream(
        study, {"muon_noqk": 0.3, "adamw_qk": 0.3}, seeds=SEEDS, items=20
    )
    path = study / "downstream" / "adamw_qk" / "seed_43.json"
    path.write_text(path.read_text().replace('"num_fewshot": 10', '"num_fewshot": 0'))
    with pytest.raises(errors.UsageError, match="hellaswag has num_fewshot 0, but"):
        report.make_report(study)
    assert not (study / "report").exists()


def test_what_the_executor_noted_is_said(write: Callable[..., pathlib.Path]):
    study = write(missing=[("muon_qk", 42)])
    for step, note in (
        ("runs/muon_qk/seed_42", {"status": "failed", "detail": "exit 4: disk full"}),
        ("downstream/adamw_qk/seed_42", {"status": "skipped", "detail": "its run diverged"}),
        ("downstream/muon_noqk/seed_43", {"status": "failed", "detail": "exit 1: no such item"}),
    ):
        path = study / "logs" / f"{step}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(note))
    plan = json.loads((study / "study.json").read_text())
    plan["left_out"] = {"adamw_qk_decayed": "adamw_qk"}
    (study / "study.json").write_text(json.dumps(plan))
    page = sections(study)
    assert "seed 42: not started (failed: exit 4: disk full)" in page["missing"]
    assert "downstream scores of AdamW + QK-Norm, seed 43" in page["missing"]
    assert "its run diverged" not in page["missing"]  # seed 42 will have none
    assert "Skipped of AdamW + QK-Norm, seed 42: its run diverged." in page["downstream"]
    assert (
        "downstream scores of Muon, no QK-Norm, seed 43 (failed: exit 1: no such item)"
        in page["missing"]
    )
    assert "Left out of the plan: AdamW + QK-Norm, γ decayed (trains the same as" in page["record"]


def test_scores_that_nobody_asked_for_are_not_missing(write: Callable[..., pathlib.Path]):
    study = write()
    change_plan(study, downstream="none")
    page = sections(study)
    assert "downstream" not in page["missing"]
    assert "Not part of this study" in page["downstream"]
    synthetic_study.write_downstream(study, {"muon_noqk": 0.3}, seeds=SEEDS, items=20)
    page = sections(study)  # asked for later
    assert "downstream scores of AdamW + QK-Norm, seeds 42 and 43" in page["missing"]


def test_a_plan_that_was_changed_is_said(write: Callable[..., pathlib.Path]):
    study = write()
    plan = json.loads((study / "study.json").read_text())
    earlier = {**plan, "seeds": [42], "sweep": {"tokens": 100_000}}
    (study / "study.1.json").write_text(json.dumps(earlier))
    (study / "study.2.json").write_text(json.dumps({**plan, "fingerprint": "f" * 64}))
    page = sections(study)
    assert "study.1.json has seeds 42; other sweep; error rates hold only" in page["warnings"]
    assert "study.2.json" not in page["warnings"]  # the same arms, seeds and budgets


def test_settings_that_runs_do_not_share_are_said(write: Callable[..., pathlib.Path]):
    study = write()
    assert "have different values" not in sections(study)["warnings"]
    path = study / "runs" / "muon_qk" / "seed_43" / "config.json"
    values = json.loads(path.read_text())
    values["model"] |= {"dtype": "bfloat16", "unroll": 2}
    values["muon"]["dtype"] = "bfloat16"
    path.write_text(json.dumps(values))
    synthetic_study.seal(study)
    page = sections(study)["warnings"]
    for field in ("model.dtype", "muon.dtype"):
        assert f"runs of one comparison have different values of {field} (float32: " in page
    assert page.count("; bfloat16: muon_qk seed 43)") == 2
    assert "qk_norm" not in page and "unroll" not in page


@pytest.mark.usefixtures("stub_charts")
def test_tables_and_curves_of_other_tokens_say_so(tmp_path: pathlib.Path):
    given = {"muon_noqk": synthetic_study.arms()["muon_noqk"]}
    fields = {"train__tokens": 1_000_000}
    synthetic_study.write(tmp_path, given, seeds=(42,), scale="pilot", fields=fields)
    page = sections(tmp_path)
    for section in ("result", "loss", "keys"):
        assert (
            "Tables give the pass over all of the validation split after the last step, curves "
            "the evaluations of the first 1,048,576 tokens: their ends differ."
        ) in page[section]


def test_what_decides_beside_the_intervals(write: Callable[..., pathlib.Path]):
    """The level after correction; one of a unit is not plural."""
    study = write(synthetic_study.arms(32, adamw_qk={PR: 26.0}, muon_qk={PR: 26.0}))
    right = {"muon_noqk": 0.4, "adamw_qk": 0.3}
    synthetic_study.write_downstream(study, right, seeds=SEEDS, items=50)
    report.make_report(study)
    page = Page(study / "report" / "index.html").sections["verdicts"]
    text = (study / "report" / "report.md").read_text().replace("\\", "")
    judged = material.load(study).judgement
    assert judged.verdict("H1").p is not None
    for said in (page, text):
        assert "tested at one-sided 0.0125" in said
    assert not re.search(r"(?<![\d.,])1 points(?!eeds)", page) and "SESOI1 point" in page
    assert "divergences" not in page and "Every run finished." in page


def test_a_study_without_sweep_spectra_and_scores_says_so(
    write: Callable[..., pathlib.Path], monkeypatch: pytest.MonkeyPatch
):
    study = write()
    monkeypatch.setitem(presets.OPTIMIZERS, "lion", presets.OPTIMIZERS["muon"])
    for path in study.glob("runs/muon_noqk/*/config.json"):  # somebody's own optimiser
        path.write_text(path.read_text().replace('"name": "muon"', '"name": "lion"'))
    synthetic_study.seal(study)
    page = sections(study)
    assert "none}, answer." in page["verdicts"]
    assert "Muon, no QK-Norm0.0120.003195" in page["sweep"]  # with an auxiliary AdamW
    assert "This study has no sweep" in page["sweep"] and "0.0012" in page["sweep"]
    assert "Rates" not in page["confounds"] and "heat maps" in page["confounds"]
    assert "No run has saved spectra" in page["keys"]
    assert "spectra: of every run" in page["missing"]
    assert "downstream scores: of every run" in page["missing"]


def test_a_planned_sweep_that_is_not_there_is_missing(write: Callable[..., pathlib.Path]):
    study = write()
    plan = json.loads((study / "study.json").read_text())
    plan["sweep"] = {"tokens": 100_000, "grids": {}}
    (study / "study.json").write_text(json.dumps(plan))
    page = sections(study)
    assert "Not available yet" in page["sweep"]
    assert page["missing"].count("no learning rate chosen yet") == 4
    synthetic_study.write_sweep(study, {"muon_qk": {0.006: 3.0, 0.012: 3.1}})
    page = sections(study)
    assert "Short runs of 100k tokens each, seed 7" in page["sweep"]
    assert page["missing"].count("no learning rate chosen yet") == 3


def test_edges_and_divergence_of_the_sweep(write: Callable[..., pathlib.Path]):
    study = write()
    rates = {
        "adamw_qk": {3e-4: 4.0, 6e-4: 3.9, 1.2e-3: 3.8},
        "muon_noqk": {0.006: 3.6, 0.012: 3.7, 0.024: None},
        "muon_qk": {0.012: None, 0.024: None},
    }
    edge = {"adamw_qk": "high", "muon_noqk": "low"}
    synthetic_study.write_sweep(study, rates, edge=edge, extended=["adamw_qk"])
    page = sections(study)
    assert (
        "EDGE: the best learning rate of AdamW + QK-Norm, 0.0012, is the highest of its grid, "
        "extended once already; a better one may lie outside. Next values to try: 0.0024, 0.0048"
    ) in page["warnings"]
    assert "0.006, is the lowest of its grid; a better" in page["warnings"]
    assert "Next values to try: 0.003, 0.0015" in page["warnings"]
    assert "Muon + QK-Norm: every learning rate of the sweep diverged" in page["warnings"]
    assert (
        "Muon, no QK-Norm ran at the learning rate 0.012, but the sweep chose 0.006"
        in (page["warnings"])
    )
    assert "EDGE (high); grid extended" in page["sweep"] and "diverged at 0.024" in page["sweep"]
    sensitivity = (3.6 + 3.7 + 10.8) / 3 - 3.6
    assert f"{sensitivity:.4f}" in page["sweep"]


def test_a_sample_is_marked_and_decides_nothing(write: Callable[..., pathlib.Path]):
    study = write()
    right = {"muon_noqk": 0.9, "adamw_qk": 0.1}
    synthetic_study.write_downstream(study, right, seeds=SEEDS, items=20, sample=True)
    page = sections(study)
    assert page["downstream"].count("Muon, no QK-Norm (sample)") == 4  # also byte-exact
    assert page["downstream"].count("Difference (sample)") == 2
    assert page["warnings"].count("measured on a sample of the items, which decides nothing") == 4
    assert "has only a sample" in page["verdicts"]


def test_differences_of_scores_are_of_items_in_pairs(whole: pathlib.Path):
    study = results.load_study(whole)
    sides = [
        [i["acc_norm"] for i in study.items[arm, 42] if i["task"] == "hellaswag"]
        for arm in ("muon_noqk", "adamw_qk")
    ]
    differences = [a - b for a, b in zip(*sides, strict=True)]
    mean = sum(differences) / 100
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 99 / 100)
    said = f"{100 * mean:+.2f} ± {100 * error:.2f}"
    assert said in Page(whole / "report" / "index.html").sections["downstream"]


# --------------------------------------------------------------------------------------------
# What a page must not do.


def test_what_runs_and_results_say_is_text(write: Callable[..., pathlib.Path]):
    """Nothing of a study becomes markup."""
    evil = "<script>alert('`x`')</script><img src=x onerror=alert(1)>|[a](http://b)"
    study = write()
    synthetic_study.write_downstream(study, {"muon_noqk": 0.3}, seeds=SEEDS, items=20)
    for path in study.glob("runs/*/*/environment.json"):
        recorded = json.loads(path.read_text())
        recorded |= {"command": ["python", evil], "variables": {evil: evil}}
        path.write_text(json.dumps(recorded))
    synthetic_study.seal(study)
    bos = {"added": True, "token": "<s>", "token_id": 0, "why": evil}
    for path in study.glob("downstream/*/*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "bos": bos}))
    plan = json.loads((study / "study.json").read_text())
    (study / "study.json").write_text(json.dumps({**plan, "words": evil, "fingerprint": evil}))
    page = Page(report.make_report(study))
    assert not page.tags & {"script", "img"}
    assert all("http:" not in reference for reference in page.references)
    assert (
        "alert('x')" in page.sections["record"]
        and evil.replace("`", "") in (page.sections["downstream"])
    )
    text = (study / "report" / "report.md").read_text()
    assert "\n    python" in text  # a block of code; elsewhere:
    assert not re.search(r"^(?!    ).*<script", text, re.MULTILINE) and "[a\\](http" in text
    assert not re.search(r"^(?!    ).*\[a\]\(http", text, re.MULTILINE)


@pytest.mark.process
def test_the_record_names_the_source_commit(write: Callable[..., pathlib.Path]):
    """Of a real checkout, as a run records it; without one there is no such row."""
    study = write()
    source = study / "source"
    for arguments in (
        ("init", "-q", str(source)),
        (
            "-C",
            str(source),
            "-c",
            "user.name=n",
            "-c",
            "user.email=e",
            "commit",
            "-q",
            "--allow-empty",
            "-m",
            "m",
        ),
    ):
        subprocess.run(["git", *arguments], check=True, timeout=60)
    (source / "change").touch()
    recorded = environment.git_state(source)
    assert recorded["sha"] and recorded["dirty"]
    for index, path in enumerate(sorted(study.glob("runs/*/*/environment.json"))):
        git = environment.git_state(study) if index else recorded
        path.write_text(json.dumps({**json.loads(path.read_text()), "git": git}))
    synthetic_study.seal(study)
    said = sections(study)["record"]
    assert said.count("source") == 1 and f"{recorded['sha']} with changes" in said


def test_deviations_are_those_of_the_docs():
    page = (ROOT / "docs" / "deviations.md").read_text()
    rows = [f"| {' | '.join(row)} |" for row in original.DEVIATIONS]
    table = page[page.index("## In words") : page.index("## In the configs")]
    assert [line for line in table.splitlines() if line.startswith("| ")][1:] == rows


@pytest.mark.parametrize(
    ("scale", "recipe", "words", "numbers"),
    [
        ("tiny", "fixed", "Heads here have 32 dimensions", False),
        ("pilot", "fixed", "for orientation, not as a replication", True),
        ("pilot", "original", "the same setting except for the deviations below", True),
        ("full", "original", "for orientation, not as a replication", True),
    ],
)
def test_the_originals_numbers_are_marked_as_what_they_are(
    tmp_path: pathlib.Path, scale: str, recipe: str, words: str, numbers: bool
):
    given = {"muon_noqk": synthetic_study.arms()["muon_noqk"]}
    options = {"fields": {"train__tokens": 1_100_000}} if scale != "tiny" else {}
    synthetic_study.write(tmp_path, given, seeds=(42,), scale=scale, recipe=recipe, **options)
    section = sections_record.comparison(material.load(tmp_path))
    text, table, _ = section.blocks
    assert words in text.text
    starts = {column: cell for column, cell in zip(table.columns, table.rows[0], strict=True)}
    assert starts["Muon, no QK: original"] == "60.8"
    run = results.load_study(tmp_path).runs["muon_noqk", 42]
    ours = run.at_step(PR, 1_000_000 // run.config.train.tokens_per_step)
    assert [row[-1] for row in table.rows[:3]] == (
        ["60.0", f"{ours:.1f}", "–"] if numbers else ["60.8", "46.1", "50.1"]
    )
    assert f"recipe {recipe}" in sections_record.deviations(material.load(tmp_path)).blocks[0].text


def test_recipe_original_stands_beside_the_original_by_steps(tmp_path: pathlib.Path):
    """A step is what its rates and decays act by: 25M of its tokens are 6,103 steps."""
    given = {"adamw_qk": {**synthetic_study.arms()["adamw_qk"], PR: 18.0}}
    options = {"scale": "small", "recipe": "original"}
    synthetic_study.write(tmp_path, given, seeds=(42,), **options)
    _, table, _ = sections_record.comparison(material.load(tmp_path)).blocks
    assert table.columns[0] == "Steps"
    assert [row[0] for row in table.rows] == ["0", "244", "976", "1,953", "6,103"]
    assert [row[2] for row in table.rows][3:] == ["–", "18.0"]  # 6,100 steps; none near 1,953


@pytest.mark.parametrize(
    ("scale", "plan", "words"),
    [
        ("pilot", {}, "scale pilot at 25,000,000 tokens a run alone: they do not answer"),
        ("full", {}, "the study's own scale"),
        ("full", {"overrides": ["model.unroll=22"]}, "the study's own scale"),
        ("full", {"quick": True, "tokens": 150_000_000}, "full at 150,000,000 tokens a run alone"),
        ("full", {"tokens": 50_000_000}, "full at 50,000,000 tokens a run alone: they do not"),
        ("full", {"overrides": ["model.num_layers=4"]}, "with model.num_layers=4 alone: they do"),
    ],
)
def test_the_page_says_first_what_its_verdicts_are_about(
    tmp_path: pathlib.Path, scale: str, plan: dict, words: str
):
    given = {"muon_noqk": synthetic_study.arms()["muon_noqk"]}
    every = [("muon_noqk", 42)]  # a study that has not started says so too
    synthetic_study.write(tmp_path, given, seeds=(42,), scale=scale, missing=every)
    change_plan(tmp_path, **plan)
    section = sections_verdicts.verdicts(material.load(tmp_path))
    before = section.blocks[: [type(block) for block in section.blocks].index(Box)]
    assert any(words in getattr(block, "text", "") for block in before)


@pytest.mark.process
def test_no_study(tmp_path: pathlib.Path):
    done = command(f"--workdir={tmp_path}")
    assert done.returncode == 2 and "study.json: no such file" in done.stderr
    done = command()
    assert done.returncode == 2 and "--workdir: missing, expected a study directory" in done.stderr


# --------------------------------------------------------------------------------------------
# The first screen, rank surgery, confounds.


def test_the_first_screen_is_the_result(built: tuple[pathlib.Path, Report]):
    """A sentence, the numbers by arm, two charts; then the verdicts."""
    folder, made = built
    first = made.sections[0]
    lead, table, charts = first.blocks
    assert (type(lead), type(table), type(charts)) == (Lead, Table, Charts)
    study = results.load_study(folder)
    ends = {arm: np.array([run.value(PR) for run in study.of_arm(arm)]) for arm in study.arms}
    assert lead.text.startswith("A rehearsal: nothing is decided. So far: keys with QK-Norm use ")
    for under, arm in (("AdamW", "adamw"), ("Muon", "muon")):
        qk, noqk = (ends[f"{arm}_{word}"].mean() for word in ("qk", "noqk"))
        assert f"{qk:.1f} under {under} (without: {noqk:.1f})" in lead.text
    assert table.columns[1:] == (
        "PR after RoPE",
        "PR before RoPE",
        "Val loss (nat)",
        "HellaSwag (%)",
    )
    rows = {row[0]: row[1:] for row in table.rows}
    assert list(rows) == [arms.label(arm) for arm in study.arms]
    muon = ends["muon_noqk"]
    assert rows["Muon, no QK-Norm"][0] == f"{muon.mean():.1f} ±\u00a0{muon.std(ddof=1):.1f}"
    assert rows["AdamW, no QK-Norm"][-1] == "–" and "±" in rows["AdamW + QK-Norm"][-1]
    assert [chart.name for chart in charts.charts] == ["result_pr", "result_loss"]


def test_one_seed_decides_nothing_and_shows_no_spread(write: Callable[..., pathlib.Path]):
    page = sections(write(seeds=(42,)))["result"]
    assert page.startswith("ResultOne seed: nothing is decided. So far: keys with QK-Norm use")
    assert "±" not in page and "deviation" not in page


def test_extra_seeds_are_named_and_counted(write: Callable[..., pathlib.Path]):
    arms = synthetic_study.arms() | {"muon_qk_frozen": synthetic_study.arms()["muon_qk"]}
    extra = {"muon_qk": [7, 8], "muon_qk_frozen": [7]}
    path = write(arms, seeds=(42, 43), extra_seeds=extra, missing=[("muon_qk", 8)])
    found = material.load(path)
    assert "5 arms, seeds 42 and 43 (some have 2 more), " in report.subtitle(found)
    blocks = (sections_result.result, sections_verdicts.verdicts, sections_verdicts.missing)
    text = markdown(Report("", "", tuple(section(found) for section in blocks)))
    assert "12 of 13 runs finished." in text
    assert "have seeds 42 and 43." in text
    assert (
        "(Muon + QK-Norm: seeds 7 and 8; Muon + QK-Norm, γ frozen: seed 7), enter the tables"
        in text
    )
    assert "| Muon + QK-Norm (3 of 4 seeds) |" in text and "| Muon + QK-Norm, γ frozen | " in text
    assert "- Muon + QK-Norm, seed 8: not started" in text


def test_controls_stand_beside_their_parents(write: Callable[..., pathlib.Path]):
    given = synthetic_study.arms()
    given |= {f"muon_noqk_{word}": given["muon_noqk"] for word in ("clip", "merged")}
    path = write(given, seeds=(42, 43), noise={})
    for summary in (path / "runs" / "muon_noqk_clip").glob("*/summary.json"):
        synthetic_study.edit_sealed(summary, '"muon_noqk_clip-', '"muon_noqk-')
    found = material.load(path)
    text = markdown(Report("", "", (sections_verdicts.attribution(found),)))
    never = "equal to muon_noqk bit for bit: the clip never acted, so there is no contrast"
    assert f"| Muon, no QK-Norm, QK-Clip | PR | {never} | – |" in text
    assert "| Muon, no QK-Norm, QKVO merged | PR | inconclusive" in text
    assert arms.label("muon_noqk_groups_of_2_mup") == (
        "Muon, no QK-Norm, heads in groups of 2, scale mup"
    )
    rows = results_csv(found)
    assert re.search(r"^clause,muon_noqk_merged: PR,,,estimate,0(\.0)?$", rows, re.MULTILINE)


def test_no_word_of_a_rehearsal_stands_alone(write: Callable[..., pathlib.Path]):
    found = material.load(write())
    text = markdown(Report("", "", (sections_verdicts.verdicts(found),)))
    assert "| rehearsal: " in text
    assert not re.search(r"\| (supported|refuted|inconclusive)", text)


def test_one_of_a_kind_is_not_plural(write: Callable[..., pathlib.Path]):
    arms = {"muon_qk": synthetic_study.arms()["muon_qk"]}
    found = material.load(write(arms, seeds=(42,)))
    assert ": 1 arm, seed 42, " in report.subtitle(found)
    verdicts = markdown(Report("", "", (sections_verdicts.verdicts(found),)))
    assert "1 of 1 run finished." in verdicts


def test_what_stands_beside_the_pr_of_keys(write: Callable[..., pathlib.Path]):
    """Stages, q.k, sinks, weights, gammas and clips by arm; of a study from before them nothing."""
    arms_ = {**synthetic_study.arms(32), "muon_noqk_clip": synthetic_study.arms(32)["muon_noqk"]}
    path = write(arms_)
    assert list(sections_measures.measures(material.load(path))) == []
    for file in path.glob("runs/*/*/summary.json"):
        directory, rows = RunDirectory(file.parent), file.with_name("metrics.jsonl")
        summary = directory.read_summary()
        seed = summary["seed"] - SEEDS[0]  # 0 and 1: means end in .5
        new = {"pr/qk/pre_rope/raw": 7.0, "sink/mass": 0.03, "sink/uniform": 0.0201}
        new |= {"weight/pr/key": 28.0 + seed, "mean_share/key/pre_rope": 0.25}
        stages = ("pre_norm", "post_norm", "pre_rope", "post_rope")
        if summary["arm"].endswith("_qk"):
            new |= {f"pr/key/{s}/centred": 20.0 - i + seed for i, s in enumerate(stages)}
            new |= {"gamma/key_pr": 30.0, "gamma/key_spread": 1.5, "gamma/key_negative": 0.02}
        if summary["arm"].endswith("_clip"):
            lines = [json.loads(line) for line in rows.read_text().splitlines()]
            for step, row in enumerate(lines[1:]):
                row |= {"train/max_logit": 40.0 - step, "train/clipped_heads": 2 * (step == 0)}
            rows.write_text("".join(f"{json.dumps(row)}\n" for row in lines))
            clipped = f"{100 / (len(lines) - 1):.1f} | {2 / (len(lines) - 1):.2f}"
        final = {name.replace("/", "_final/", 1): value for name, value in new.items()}
        directory.write_summary(summary | final)
    blocks = tuple(sections_measures.measures(material.load(path)))
    text = markdown(Report("", "", (Section("", "", blocks),)))
    cells = r"– / 20\.5 \| – / 19\.5 \| [\d.]+ / 18\.5 \| [\d.]+ / 17\.5"
    assert re.search(rf"\| Muon \+ QK-Norm \| keys \| {cells} \|", text)
    row = "| Muon, no QK-Norm | 7.0 | 25.0 | 3.00 | 28.5 |"
    assert row in text and "Uniform attention would give 2.01%." in text
    assert "| Muon + QK-Norm | 30.0 | 1.50 | 2.0 |" in text
    assert "| Muon, no QK-Norm | 30.0 " not in text  # no gamma, and no zero
    assert f"| 30 | 40.0 | {clipped} |" in text
    drawn = {chart.name for block in blocks if isinstance(block, Charts) for chart in block.charts}
    assert {"stages_key_centred_arms", "clip_logits", "clip_heads"} <= drawn


def test_directions_that_the_loss_needs(whole: pathlib.Path):
    page = Page(whole / "report" / "index.html")
    said = page.sections["rank"].replace("−", "-")
    assert "AdamW + QK-Norm10.0–42: 8, 43: 12" in said  # an interval needs three seeds
    assert "Muon + QK-Norm16.0–42: 16, 43: 16" in said and "at the ranks 1, 2, 4" in said
    assert "AdamW, no QK-Norm–––" in said and "65,536 validation tokens" in said
    assert "rank_arms-title" in page.ids
    assert "rank surgery of AdamW, no QK-Norm, seeds 42 and 43" in page.sections["missing"]


def test_directions_of_three_seeds_have_an_interval(write: Callable[..., pathlib.Path]):
    seeds = (42, 43, 44)
    study = write(seeds=seeds)
    change_plan(study, surgery={"tokens": 65_536, "ranks": []})
    used = {"adamw_qk": (8, 12, 16), "muon_qk": (8, 8, 8)}
    synthetic_study.write_surgery(study, used, seeds)
    said = sections(study)["rank"].replace("−", "-")
    half = 4.3027 * 4 / math.sqrt(3)  # t of two degrees of freedom, sd 4
    assert f"AdamW + QK-Norm12.0{12 - half:.1f} to {12 + half:.1f}42: 8, 43: 12" in said
    assert "Muon + QK-Norm8.0–42: 8" in said  # no spread is no interval of width 0


def test_a_part_of_rank_surgery_is_called_one(write: Callable[..., pathlib.Path]):
    study = write()
    change_plan(study, surgery={"tokens": 64, "ranks": []})
    part = study / "surgery" / "muon_qk" / "seed_42.part.json"
    part.parent.mkdir(parents=True)
    part.write_text("{}")
    page = sections(study)
    assert "No result yet" in page["rank"]
    assert "rank surgery of Muon + QK-Norm, seed 42 (a part is measured)" in page["missing"]


def test_confounds_are_named_with_their_numbers(tmp_path: pathlib.Path):
    """Gamma's rate, force, tau, noise and logit cap; PR against rate; ties of the choice."""
    study = tmp_path / "study"
    names = ("adamw_qk", "adamw_noqk", "muon_qk", "muon_noqk")
    given = {name: arm for name, arm in synthetic_study.arms(32).items() if name in names}
    synthetic_study.write(
        study,
        given,
        seeds=SEEDS,
        scale="tiny",
        recipe="original",
        noise={PR: 0.2, LOSS: 0.002},
    )
    rates = {"adamw_qk": {0.3: 3.9, 0.6: 3.7, 1.2: 3.705}, "muon_qk": {0.3: 3.9, 0.6: 3.7}}
    synthetic_study.write_sweep(study, rates, prs={"adamw_qk": {0.3: 20.5, 1.2: 14.25}})
    page = Page(report.make_report(study))
    said = page.sections["confounds"]
    for arm in ("adamw_qk", "muon_qk"):
        config = results.load_study(study).runs[arm, 42].config
        found = gamma_exposure(config)
        cap = math.sqrt(32) / found.weight_decay**2
        row = f"{arms.label(arm)}decayed to 0{found.learning_rate:g}{found.weight_decay:g}"
        assert f"{row}{found.tau:.4g}{found.noise:.2f}{cap:.4g}" in said
    assert "AdamW + QK-Norm0.320.50–" in said and "AdamW + QK-Norm1.214.25–" in said
    assert {"pr_over_rate_adamw-title", "pr_against_loss-title"} <= set(page.ids)
    assert page.sections["sweep"].count("TIE: 0.6 and 1.2 are within 0.01 nat") == 1
    assert "TIE" not in page.sections["sweep"].split("Muon + QK-Norm")[1].split("Every run")[0]


def test_no_arm_is_called_the_best_where_seeds_disagree(write: Callable[..., pathlib.Path]):
    arms = synthetic_study.arms(32, muon_noqk={LOSS: 3.4}, adamw_qk={LOSS: 3.45})
    study = write(arms, noise={LOSS: 0.001})
    lead = sections_result.result(material.load(study)).blocks[0].text
    assert "is that of Muon, no QK-Norm" in lead
    rows = study / "runs" / "adamw_qk" / "seed_43" / "summary.json"
    other = {**json.loads(rows.read_text()), LOSS: 3.3}
    run = dataclasses.replace(material.load(study).study.runs["adamw_qk", 43], summary=other)
    found = material.load(study)
    found.study.runs["adamw_qk", 43] = run
    lead = sections_result.result(found).blocks[0].text
    assert "no arm has the lowest validation loss in every seed" in lead


def test_huge_numbers_have_two_digits():
    """A gamma that decay has brought to 0 has a quantile of 0, and a ratio without end."""
    assert number(1_826_598_409.12) == "1.8e+09" and number(-2e6, signed=True) == "-2.0e+06"
    assert number(999_999.994) == "999,999.99" and number(float("inf")) == "–"


def test_code_in_the_text_has_no_escapes(whole: pathlib.Path):
    text = (whole / "report" / "report.md").read_text()
    assert "`qkjax check`" in text and "`undecayed`" in text
    assert not re.search(r"`[^`\n]*\\_[^`\n]*`", text)
    assert not re.search(r"[^\W_]\\_[^\W_]", text) and "W_q^T W_k" in text  # nor have names
    assert "[+" in text and "\\[" not in text  # nor intervals
