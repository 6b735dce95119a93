"""Studies of real runs in which an arm, or one seed of it, diverges: the other verdicts stay."""

import pathlib
import re
import shutil

import pytest
import small_run

from qkjax import errors, train
from qkjax.cli import config_flag
from qkjax.report import report
from qkjax.study import plan, states
from qkjax.verdicts import judge, judgement, results

pytest.importorskip("matplotlib", reason="matplotlib is absent: pip install -e '.[report]'")
pytestmark = pytest.mark.long
ROOT = pathlib.Path(__file__).resolve().parents[1]
SEEDS, STEPS = (3, 4), 20
WILD, RATE = "adamw_noqk", 1e30  # the arm that diverges, and why


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """Three studies of the same runs: all sound, an arm diverged, one seed of it diverged."""
    folder = tmp_path_factory.mktemp("diverged")
    values = config_flag.load(ROOT / "configs" / "study.py", "tiny")
    values.seeds, values.sweep.tokens, values.surgery.tokens = SEEDS, 0, 0
    values.tokens, values.export = STEPS * small_run.TOKENS_PER_STEP, False
    values.data_dir = str(small_run.make_dataset(folder / "dataset"))
    values.overrides = small_run.STUDY_OVERRIDES
    planned = plan.make_plan(values)
    sound, wild, one = (folder / name for name in ("sound", "wild", "one"))
    states.settle_plan(planned, sound)
    for step in planned.steps:
        if step.kind == plan.RUN:
            train.train_and_evaluate(planned.run_config(step, None), sound / step.name)
    for other in (wild, one):
        shutil.copytree(sound, other)
    for seed in SEEDS:
        step = planned.step(f"runs/{WILD}/seed_{seed}")
        shutil.rmtree(wild / step.name)
        with pytest.raises(errors.NonFiniteError, match="counts as diverged"):
            train.train_and_evaluate(planned.run_config(step, RATE), wild / step.name)
    shutil.rmtree(one / "runs" / WILD / "seed_4")
    shutil.copytree(wild / "runs" / WILD / "seed_4", one / "runs" / WILD / "seed_4")
    return {"sound": sound, "wild": wild, "one": one}


def clauses(study: pathlib.Path) -> dict[str, judgement.Clause]:
    judged = judge.judge(results.load_study(study))
    return {c.name: c for v in judged.verdicts for c in (*v.clauses, *v.shown)}


@pytest.mark.parametrize(("name", "count"), [("wild", 2), ("one", 1)])
def test_contrasts_without_the_arm_keep_estimate_and_interval(studies, name: str, count: int):
    before, after = clauses(studies["sound"]), clauses(studies[name])
    without = [
        "H2 axes",
        *(f"H4 {what} against {arm}" for what in ("PR", "loss") for arm in ("AdamW+QK", "Muon+QK")),
    ]
    for clause in without:
        ours, theirs = after[clause], before[clause]
        assert ours.estimate == theirs.estimate and ours.paired == theirs.paired
        assert theirs.family == ("adamw_qk", "adamw_noqk", "muon_qk", "muon_noqk")
        assert ours.family == ("adamw_qk", "muon_qk", "muon_noqk")  # out of the others' error
        assert ours.seeds == SEEDS and ours.deciding is not None and ours.p is not None
        assert ours.word != judgement.INCONCLUSIVE or "% power if this" in ours.reason
    for clause in ("H1 post-RoPE", "H1 pre-RoPE", "H2 interaction"):  # named by rule
        assert after[clause].reason == f"{WILD}: {count} of 2 diverged"
        assert after[clause].estimate is None and after[clause].level == "by rule, no p"
    assert {name for name, c in after.items() if c.word == judgement.SUPPORTED} >= {"H4 finishes"}


def test_the_report_names_it_and_shows_the_rest(studies):
    name, count = "wild", 2
    report.make_report(studies[name])
    text = (studies[name] / "report" / "report.md").read_text()
    first = text.partition("## Warnings")[0]
    assert f"AdamW, no QK-Norm: {count} of 2 runs diverged.**" in first
    assert f"| AdamW, no QK-Norm ({count} of 2 diverged) |" in first
    assert text.count("diverged at step 2. This is an outcome: the run enters no mean") == count
    assert "undecidable" not in text
    shown = clauses(studies[name])["H4 loss against AdamW+QK"]
    assert shown.said in text and re.search(r"nat, 95% [-+.\d]+ to [-+.\d]+$", shown.said)
    numbers = (studies[name] / "report" / "results.csv").read_text()
    assert f"clause,H4 loss against AdamW+QK,,,estimate,{shown.estimate!r}\n" in numbers
    assert numbers.count(",,diverged,true\n") == count
