"""Verdicts on synthetic studies whose truth is known."""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import synthetic_study
from synthetic_study import AA, LOGIT, LOSS, PR, PR_BEFORE

from qkjax import config as config_lib
from qkjax.measures import probes
from qkjax.verdicts import clauses, hypotheses, judgement, results, stability, statistics
from qkjax.verdicts import judge as verdicts

SUPPORTED, REFUTED, INCONCLUSIVE = "supported", "refuted", "inconclusive"
# Long enough for H3: evaluations at steps 244 and 381, the end at 610.
LONG = {"scale": "full", "fields": {"train__tokens": 40_000_000}}
QUIET = {PR: 0.4, PR_BEFORE: 0.4, LOSS: 0.0015, AA: 0.01, LOGIT: 0.5}
MUON_BEST = {LOSS: {244: 4.05, 610: 3.5}, PR: 52.0, PR_BEFORE: 44.0}
CLAIMED = synthetic_study.arms(  # all that the original study claims
    adamw_qk={LOSS: {244: 4.0, 610: 3.5}, PR: {381: 25.0, 610: 15.0}, PR_BEFORE: 20.0, AA: 0.5},
    adamw_noqk={LOSS: {244: 4.05, 610: 3.5}, PR: 44.0},
    muon_qk={LOSS: {244: 4.0, 610: 3.5}, PR: 40.0, PR_BEFORE: 28.0, AA: 0.1},
    muon_noqk=MUON_BEST,
)
Judge = Callable[..., judgement.Judgement]


@pytest.fixture
def judge(tmp_path: pathlib.Path) -> Judge:
    """Writes a study and judges it."""

    def of(arms: synthetic_study.Arms, **options: Any) -> judgement.Judgement:
        synthetic_study.write(tmp_path / "study", arms, **{"noise": QUIET, **options})
        return verdicts.judge(results.load_study(tmp_path / "study"))

    return of


def changed(**arms: dict[str, Any]) -> synthetic_study.Arms:
    """CLAIMED, with changes by arm."""
    return {arm: {**courses, **arms.get(arm, {})} for arm, courses in CLAIMED.items()}


def clause(judged: judgement.Judgement, name: str) -> judgement.Clause:
    found = [c for v in judged.verdicts for c in (*v.clauses, *v.shown) if c.name == name]
    assert len(found) == 1, name
    return found[0]


def statuses(judged: judgement.Judgement) -> list[str]:
    return [verdict.status for verdict in judged.verdicts[:4]]


# --------------------------------------------------------------------------------------------
# The rules.


@pytest.mark.parametrize(
    ("estimate", "interval", "status", "words"),
    [
        (5.0, (1.0, 9.0), SUPPORTED, "as predicted"),
        (3.2, (0.1, 6.3), SUPPORTED, "as predicted"),
        (-5.0, (-9.0, -1.0), REFUTED, "reversed"),
        (1.0, (0.5, 1.5), REFUTED, "real but negligible"),
        (0.1, (-1.0, 1.2), REFUTED, "no effect as large as claimed"),
        (3.1, (0.1, 6.1), INCONCLUSIVE, "below the smallest effect"),
        (5.0, (-1.0, 11.0), INCONCLUSIVE, "holds 0 and effects of interest"),
        (5.0, (0.0, 10.0), INCONCLUSIVE, "holds 0"),
        (1.6, (0.0, 3.2), INCONCLUSIVE, "holds 0"),
    ],
)
def test_superiority(estimate: float, interval: tuple, status: str, words: str):
    found = clauses.decide(estimate, interval, 3.2, judgement.SUPERIORITY)
    assert found[0] == status and words in found[1]


@pytest.mark.parametrize(
    ("interval", "status", "words"),
    [
        ((-0.9, -0.1), SUPPORTED, "better, and so not worse by the margin"),
        ((-0.1, 0.0099), SUPPORTED, "not worse by the margin of 0.01"),
        ((0.001, 0.0099), SUPPORTED, "worse, by less than the margin of 0.01"),
        ((0.0101, 0.1), REFUTED, "worse by more than the margin of 0.01"),
        ((-0.1, 0.01), INCONCLUSIVE, "the interval holds the margin of 0.01"),
        ((0.01, 0.1), INCONCLUSIVE, "the interval holds the margin of 0.01"),
        ((-0.1, 0.1), INCONCLUSIVE, "the interval holds the margin of 0.01"),
    ],
)
def test_non_inferiority(interval: tuple, status: str, words: str):
    middle = sum(interval) / 2
    found = clauses.decide(middle, interval, 0.01, judgement.NON_INFERIORITY)
    assert found == (status, words)


@pytest.mark.parametrize(
    ("estimate", "sesoi", "kind", "distance", "outcome"),
    [
        (5.0, 3.2, judgement.SUPERIORITY, 5.0, SUPPORTED),
        (3.0, 3.2, judgement.SUPERIORITY, 0.2, REFUTED),
        (-1.0, 0.0, judgement.SUPERIORITY, 1.0, REFUTED),
        (-0.02, 0.01, judgement.NON_INFERIORITY, 0.03, SUPPORTED),
        (0.045, 0.01, judgement.NON_INFERIORITY, 0.035, REFUTED),
    ],
)
def test_what_more_seeds_would_decide(
    estimate: float, sesoi: float, kind: str, distance: float, outcome: str
):
    """The interval that is needed, and the verdict that it would give were the estimate true."""
    found, words = clauses._were_it_true(estimate, sesoi, kind)
    assert found == pytest.approx(distance) and words == outcome
    half = 0.999 * distance
    assert clauses.decide(estimate, (estimate - half, estimate + half), sesoi, kind)[0] == outcome


# --------------------------------------------------------------------------------------------
# Whole studies.


def test_everything_that_was_claimed(judge: Judge):
    judged = judge(CLAIMED, **LONG)
    assert statuses(judged) == [SUPPORTED] * 4, [v.reason for v in judged.verdicts]
    assert all(verdict.holm_rejected for verdict in judged.verdicts[:4])
    assert [verdict.name for verdict in judged.verdicts] == ["H1", "H2", "H3", "H4", "H5"]
    assert judged.seeds_used == (42, 43, 44)
    h1 = clause(judged, "H1 post-RoPE")
    assert h1.estimate == pytest.approx((44 - 15 + 52 - 40) / 2, abs=1.5)
    assert set(h1.per_seed) == {42, 43, 44}
    assert sum(h1.per_seed.values()) / 3 == pytest.approx(h1.estimate)
    assert h1.sesoi == pytest.approx(3.2) and h1.pooled[0] < h1.estimate < h1.pooled[1]
    assert judged.verdict("H1").qualifier == ""
    h2 = clause(judged, "H2 interaction")
    assert h2.estimate == pytest.approx(math.log(44 / 15) - math.log(52 / 40), abs=0.1)
    assert h2.sesoi == pytest.approx(math.log(1.1))
    assert clause(judged, "H3(a)").estimate == pytest.approx(0.05, abs=0.003)
    assert clause(judged, "H3(b)").estimate == pytest.approx(math.log(52 / 15 / 2), abs=0.1)
    lead_at_25m = 60 + (52 - 60) * 381 / 610 - 25  # Muon's course is a line from 60
    assert clause(judged, "H3(c)").estimate == pytest.approx(52 - 15 - lead_at_25m, abs=1.5)
    assert clause(judged, "H4 PR against AdamW+QK").estimate == pytest.approx(52 - 15, abs=1.5)
    assert clause(judged, "H4 PR against Muon+QK").estimate == pytest.approx(52 - 40, abs=1.5)
    assert judged.verdict("H5").status == INCONCLUSIVE
    assert "no result" in judged.verdict("H5").reason


def test_p_of_a_hypothesis_is_its_largest(judge: Judge):
    h3 = judge(CLAIMED, **LONG).verdict("H3")
    assert h3.p == max(c.p for c in h3.clauses)


def test_judgement_is_json(judge: Judge):
    values = judge(CLAIMED, **LONG, missing=[("muon_noqk", 43)]).to_dict()
    back = json.loads(json.dumps(values, allow_nan=False))
    assert back["verdicts"][0]["clauses"][0]["per_seed"].keys() == {"42", "44"}


def test_null_study(judge: Judge):
    judged = judge(synthetic_study.arms(), **LONG)
    assert SUPPORTED not in statuses(judged)
    h1 = judged.verdict("H1")
    assert h1.status == REFUTED and "as large as claimed" in h1.reason
    assert not any(verdict.holm_rejected for verdict in judged.verdicts[:4])


def test_reversed_study(judge: Judge):
    judged = judge(synthetic_study.arms(adamw_qk={PR: 50.0}, muon_qk={PR: 50.0}), **LONG)
    assert judged.verdict("H1").status == REFUTED and "reversed" in judged.verdict("H1").reason
    assert judged.verdict("H1").p > 0.99


def test_negligible_effect(judge: Judge):
    judged = judge(
        synthetic_study.arms(adamw_qk={PR: 38.5}, muon_qk={PR: 38.5}), noise={**QUIET, PR: 0.1}
    )
    h1 = judged.verdict("H1")
    assert h1.status == REFUTED and "real but negligible" in h1.reason
    assert h1.holm_rejected  # real, but the verdict is not for p to make


def test_noisy_study_says_how_many_seeds_it_needs(judge: Judge):
    judged = judge(
        synthetic_study.arms(adamw_qk={PR: 35.0}, muon_qk={PR: 35.0}),
        noise={**QUIET, PR: 8.0},
        random_seed=2,
    )
    found = clause(judged, "H1 post-RoPE")
    assert judged.verdict("H1").status == found.status == INCONCLUSIVE
    assert found.pooled[0] < 0 < 3.2 < found.pooled[1]
    outcome = SUPPORTED if found.estimate >= 3.2 else REFUTED
    assert found.seeds_needed > 3
    assert f"{found.seeds_needed} seeds would decide it, as {outcome}, were" in found.reason


def test_one_seed_is_no_replication(judge: Judge):
    judged = judge(CLAIMED, seeds=[42], **LONG)
    assert statuses(judged) == [INCONCLUSIVE] * 4
    for verdict in judged.verdicts[:4]:
        assert "no replication" in verdict.reason
    found = clause(judged, "H1 post-RoPE")
    assert found.estimate == found.per_seed[42] and found.pooled is None and found.p is None
    finishes = clause(judged, "H4 finishes")  # a rule needs no interval
    assert (finishes.status, finishes.reason) == (SUPPORTED, "every run finished")
    assert finishes.sesoi is None
    assert any("no replication" in warning for warning in judged.warnings)


def test_equal_seeds_are_inconclusive(judge: Judge):
    judged = judge(CLAIMED, noise={}, **LONG)
    assert "MSE = 0" in judged.verdict("H1").reason
    assert judged.verdict("H1").status == INCONCLUSIVE


def test_a_pooled_verdict_that_the_pairs_do_not_share_is_said(judge: Judge):
    noise = {**QUIET, PR: {"adamw_qk": 4.0, "adamw_noqk": 0.1, "muon_qk": 0.1, "muon_noqk": 0.1}}
    judged = judge(CLAIMED, noise=noise, **LONG)
    found = clause(judged, "H4 PR against Muon+QK")
    assert found.paired[1] - found.paired[0] < (found.pooled[1] - found.pooled[0]) / 3
    wide = clause(
        judge(
            changed(adamw_noqk={PR: 21.0}, muon_noqk={**MUON_BEST, PR: 43.0}),
            noise={**QUIET, PR: {**noise[PR], "adamw_qk": 9.0}},
            **LONG,
        ),
        "H1 post-RoPE",
    )
    other = clauses.decide(wide.estimate, wide.paired, wide.sesoi, wide.kind)
    assert (other[0] != wide.status) == any("would say" in note for note in wide.notes)


def test_pairs_of_another_wording_alone_are_not_said():
    """Better by the pooled interval, not worse by the paired one: both support non-inferiority."""
    losses = np.full((3, 4), 3.5)
    losses[:, 3] += (-0.0045, -0.003, 0.0)
    found = statistics.contrast(losses, (-1.0, 0.0, 0.0, 1.0))
    assert found.pooled[1] < 0 < found.paired[1] < 0.01
    kind = judgement.NON_INFERIORITY
    status, words = clauses.decide(found.estimate, found.pooled, 0.01, kind)
    assert status == SUPPORTED and words.startswith("better")
    assert clauses._notes(found, status, words, 0.01, kind) == ()


def test_seeds_that_disagree_in_sign_are_said(judge: Judge):
    judged = judge(synthetic_study.arms(), noise={**QUIET, PR: 5.0})
    signs = {value > 0 for value in clause(judged, "H1 post-RoPE").per_seed.values()}
    assert len(signs) == 2
    assert any(w == "H1 post-RoPE: the seeds disagree in sign" for w in judged.warnings)


# --------------------------------------------------------------------------------------------
# Unfinished and diverged.


def test_a_seed_that_lacks_an_arm_is_left_out_and_named(judge: Judge):
    judged = judge(CLAIMED, seeds=[42, 43, 44, 45], missing=[("muon_qk", 44)], **LONG)
    assert judged.seeds_used == (42, 43, 45)
    assert any("seed 44" in w and "muon_qk (not started)" in w for w in judged.warnings)
    found = clause(judged, "H4 PR against AdamW+QK")  # both arms of it are there
    assert set(found.per_seed) == {42, 43, 44, 45}
    used = [found.per_seed[seed] for seed in judged.seeds_used]
    assert found.estimate == pytest.approx(sum(used) / 3)
    assert set(clause(judged, "H4 PR against Muon+QK").per_seed) == {42, 43, 45}


def test_a_control_that_is_missing_leaves_its_seed_out(judge: Judge):
    arms = {**CLAIMED, "adamw_qk_frozen": CLAIMED["adamw_qk"]}
    judged = judge(arms, missing=[("adamw_qk_frozen", 43)], **LONG)
    assert judged.seeds_used == (42, 44)


def test_an_arm_without_any_run(judge: Judge):
    missing = [("muon_noqk", seed) for seed in (42, 43, 44)]
    judged = judge(CLAIMED, missing=missing, **LONG)
    assert statuses(judged) == [INCONCLUSIVE] * 4 and judged.seeds_used == ()
    for verdict in judged.verdicts[:4]:
        assert "muon_noqk seed 42 (not started)" in verdict.reason
    assert clause(judged, "H4 finishes").status == INCONCLUSIVE


def test_a_study_without_any_run(judge: Judge):
    missing = [(arm, seed) for arm in synthetic_study.ARMS for seed in (42, 43, 44)]
    judged = judge(CLAIMED, missing=missing, **LONG)
    assert statuses(judged) == [INCONCLUSIVE] * 4
    assert clause(judged, "H1 post-RoPE").sesoi == pytest.approx(3.2)
    json.dumps(judged.to_dict(), allow_nan=False)


def test_a_diverged_arm_is_an_outcome(judge: Judge):
    diverged = {("adamw_noqk", seed): 100 for seed in (42, 43, 44)}
    judged = judge(CLAIMED, diverged=diverged, **LONG)
    assert judged.seeds_used == (42, 43, 44)  # never missing
    assert sum("adamw_noqk" in w and "diverged at step 101" in w for w in judged.warnings) == 3
    last_probe = 60 + (44 - 60) * 61 / 610  # step 61, the last evaluation before step 100
    expected = (last_probe - 15 + 52 - 40) / 2
    assert clause(judged, "H1 post-RoPE").estimate == pytest.approx(expected, abs=1.0)
    early = clause(judged, "H3(a)")  # its loss is the initial one: 10.8 against 4
    assert early.estimate == pytest.approx((10.8 - 4.0 + 0.05) / 2, abs=0.05)


def test_muon_that_diverges_refutes_its_alternative(judge: Judge):
    judged = judge(CLAIMED, diverged={("muon_noqk", 43): 300}, **LONG)
    assert judged.verdict("H4").status == REFUTED
    assert "H4 finishes: broken by seed 43" in judged.verdict("H4").reason
    assert clause(judged, "H4 finishes").p == 1.0


def test_a_rule_that_one_seed_alone_breaks_says_so(judge: Judge):
    judged = judge(CLAIMED, seeds=[42], diverged={("muon_noqk", 42): 300}, **LONG)
    assert clause(judged, "H4 finishes").reason == "broken by seed 42 (by rule, one seed)"
    assert judged.verdict("H4").status == REFUTED


def test_muon_that_diverges_refutes_even_where_another_seed_is_missing(judge: Judge):
    judged = judge(CLAIMED, diverged={("muon_noqk", 43): 300}, missing=[("muon_noqk", 44)], **LONG)
    assert clause(judged, "H4 finishes").status == REFUTED
    assert clause(judged, "H4 logits").status == INCONCLUSIVE


# --------------------------------------------------------------------------------------------
# Each hypothesis.


def test_h1_for_post_rope_only(judge: Judge):
    judged = judge(changed(**{arm: {PR_BEFORE: 30.0} for arm in CLAIMED}), **LONG)
    h1 = judged.verdict("H1")
    assert h1.status == SUPPORTED and h1.qualifier == "supported for post-RoPE PR only"
    assert h1.shown[0].status == REFUTED and h1.shown[0].kind == "shown"


def test_h1_is_not_saved_by_pre_rope(judge: Judge):
    judged = judge(changed(**{arm: {PR: 40.0} for arm in CLAIMED}), **LONG)
    assert judged.verdict("H1").status == REFUTED
    assert judged.verdict("H1").qualifier == ""


def test_sesoi_follows_head_dim(judge: Judge):
    judged = judge(synthetic_study.arms(32), scale="tiny")
    assert clause(judged, "H1 post-RoPE").sesoi == pytest.approx(1.6)


def test_h2_needs_the_axes_too(judge: Judge):
    judged = judge(changed(adamw_qk={**CLAIMED["adamw_qk"], AA: 0.12}), **LONG)
    assert clause(judged, "H2 interaction").status == SUPPORTED
    assert judged.verdict("H2").status == REFUTED
    assert judged.verdict("H2").reason.startswith("H2 axes: ")


def test_h2_whose_interactions_disagree_in_sign(judge: Judge):
    """20 to 12 is more in logarithms, 50 to 38 more in PR."""
    judged = judge(
        changed(
            adamw_noqk={PR: 20.0},
            adamw_qk={PR: 12.0, AA: 0.5},
            muon_noqk={PR: 50.0},
            muon_qk={PR: 38.0, AA: 0.1},
        ),
        noise={**QUIET, PR: 0.2},
        **LONG,
    )
    found = clause(judged, "H2 interaction")
    assert found.estimate > 0.1 and clause(judged, "H2 additive interaction").estimate < -3
    assert found.status == judged.verdict("H2").status == INCONCLUSIVE
    assert "other sign" in found.reason


def test_h3_of_a_short_budget(judge: Judge):
    judged = judge(CLAIMED)  # the pilot ends at 25M tokens, step 381
    assert clause(judged, "H3(a)").status != INCONCLUSIVE
    assert "budget too short" in clause(judged, "H3(c)").reason
    assert judged.verdict("H3").status != SUPPORTED


def test_h3_at_tiny(judge: Judge):
    judged = judge(synthetic_study.arms(32), scale="tiny")
    for name in ("H3(a)", "H3(c)"):
        assert clause(judged, name).status == INCONCLUSIVE
        assert "budget too short" in clause(judged, name).reason


def test_h3_without_the_evaluation(judge: Judge):
    fields = {"train__tokens": 40_000_000, "eval__at_tokens": (1_000_000, 25_000_000)}
    judged = judge(CLAIMED, scale="full", fields=fields)
    assert "no evaluation at step 244" in clause(judged, "H3(a)").reason
    assert clause(judged, "H3(c)").status == SUPPORTED


def test_h3_of_a_ratio_below_two(judge: Judge):
    judged = judge(changed(adamw_qk={**CLAIMED["adamw_qk"], PR: {381: 40.0, 610: 30.0}}), **LONG)
    assert clause(judged, "H3(b)").status == REFUTED  # 52 / 30 < 2
    assert judged.verdict("H3").status == REFUTED and "H3(b)" in judged.verdict("H3").reason


def test_h3_in_recipe_original_counts_the_same_steps(judge: Judge):
    fields = {"train__tokens": 26_000_000}  # 6,347 steps of 4,096; 25M tokens are 6,103
    courses = {LOSS: {244: 4.0, 6347: 3.5}, PR: {6103: 30.0, 6347: 20.0}}
    arms = synthetic_study.arms(
        adamw_qk=courses,
        muon_qk={LOSS: {244: 4.0, 6347: 3.5}},
        adamw_noqk={LOSS: {244: 4.1, 6347: 3.5}},
        muon_noqk={LOSS: {244: 4.1, 6347: 3.5}},
    )
    judged = judge(arms, scale="full", recipe="original", seeds=(42, 43), fields=fields)
    assert clause(judged, "H3(a)").estimate == pytest.approx(0.1, abs=0.01)
    lead_at_25m = 60 - 20 * 6103 / 6347 - 30
    assert clause(judged, "H3(c)").estimate == pytest.approx(20 - lead_at_25m, abs=1.0)


@pytest.mark.parametrize(
    ("step", "height", "status"),
    [(300, 1.2, REFUTED), (300, 0.4, SUPPORTED), (10, 9.0, SUPPORTED), (13, 9.0, REFUTED)],
)
def test_h4_spikes(judge: Judge, step: int, height: float, status: str):
    """Of 610 steps, 2% are the first 12; a falling loss lies below its running median."""
    judged = judge(CLAIMED, spikes={("muon_noqk", 43): (step, height)}, **LONG)
    found = clause(judged, "H4 spikes")
    assert found.status == status
    assert found.p == (0.0 if status == SUPPORTED else 1.0)
    if status == REFUTED:
        assert found.reason == "broken by seed 43"
        assert max(found.per_seed, key=found.per_seed.get) == 43
    assert (
        clause(judge(CLAIMED, spikes={("muon_qk", 43): (step, height)}, **LONG), "H4 spikes").status
        == SUPPORTED
    )


@pytest.mark.parametrize(
    ("course", "logits", "rise"),
    [
        (20.0, SUPPORTED, SUPPORTED),
        ({305: 70.0, 610: 70.0}, SUPPORTED, SUPPORTED),
        ({305: 40.0, 610: 60.0}, SUPPORTED, REFUTED),
        ({122: 120.0, 200: 20.0, 610: 20.0}, REFUTED, SUPPORTED),
        ({305: 104.0, 610: 104.0}, REFUTED, SUPPORTED),
    ],
)
def test_h4_logits(judge: Judge, course: Any, logits: str, rise: str):
    judged = judge(changed(muon_noqk={**MUON_BEST, LOGIT: course}), **LONG)
    assert clause(judged, "H4 logits").status == logits
    assert clause(judged, "H4 rise").status == rise
    assert judged.verdict("H4").status == (REFUTED if REFUTED in (logits, rise) else SUPPORTED)


def test_h4_rise_is_a_least_squares_line(judge: Judge):
    course = {305: 20.0, 457: 35.0, 458: 21.0, 610: 21.0}  # one high evaluation in the middle
    judged = judge(changed(muon_noqk={**MUON_BEST, LOGIT: course}), noise={}, **LONG)
    steps = [
        s
        for s in synthetic_study.make_config(
            "muon_noqk", 42, "full", train__tokens=40_000_000
        ).eval.steps
        if s >= 305
    ]
    logits = np.interp(steps, list(course), list(course.values()))
    slope, _ = np.polyfit(steps, logits, 1)
    assert len(steps) >= 3
    assert clause(judged, "H4 rise").estimate == pytest.approx(slope * (steps[-1] - steps[0]))


def test_h4_rise_leaves_out_evaluations_without_logits(tmp_path: pathlib.Path):
    arms = {"muon_noqk": {**CLAIMED["muon_noqk"], LOGIT: {305: 20.0, 610: 26.0}}}
    synthetic_study.write(tmp_path, arms, seeds=(42,), **LONG)
    run = results.load_study(tmp_path).runs["muon_noqk", 42]
    late = [probe for probe in run.probes if probe.step >= 305]
    assert len(late) > 2
    del late[1].metrics[LOGIT]
    steps = [probe.step for probe in late if probe is not late[1]]
    expected = 6 * (steps[-1] - steps[0]) / 305
    assert stability.logit_rise(run) == pytest.approx(expected)


def test_the_sequences_of_h4_are_those_of_the_evaluation():
    assert hypotheses.LOGIT_SEQUENCES == probes.ATTENTION_SEQUENCES


def test_h4_rise_of_one_evaluation_is_too_short(judge: Judge):
    judged = judge(synthetic_study.arms(32), scale="tiny")  # 195 steps, evaluated at 97 and 195
    assert "fewer than two evaluations" in clause(judged, "H4 rise").reason


def test_h4_of_a_worse_loss(judge: Judge):
    worse = {**MUON_BEST, LOSS: {244: 4.05, 610: 3.55}}
    judged = judge(changed(muon_noqk=worse), **LONG)
    found = clause(judged, "H4 loss against AdamW+QK")
    assert found.status == judged.verdict("H4").status == REFUTED
    assert found.kind == "non-inferiority" and found.p > 0.99
    assert found.estimate == pytest.approx(0.05, abs=0.003)
    assert sum("validation sequences" in note for note in found.notes) == 3
    assert clause(judged, "H4 loss against AdamW+QK, second half").estimate == pytest.approx(
        0.05, abs=0.02
    )


def test_h4_of_a_loss_that_is_not_known_well_enough(judge: Judge):
    judged = judge(CLAIMED, noise={**QUIET, LOSS: 0.02}, **LONG)
    found = clause(judged, "H4 loss against AdamW+QK")
    assert found.status == judged.verdict("H4").status == INCONCLUSIVE
    assert found.seeds_needed > 3


def test_holm_can_withhold_a_verdict(judge: Judge):
    """H1 alone has p between 0.025 / 4 and 0.025: its interval is above 0, Holm says no."""
    arms = synthetic_study.arms(adamw_qk={PR: 32.0}, muon_qk={PR: 32.0})
    for random_seed in range(200):
        judged = judge(arms, noise={**QUIET, PR: 4.0}, random_seed=random_seed)
        if 0.00625 < (judged.verdict("H1").p or 1.0) < 0.025:
            break
    h1 = judged.verdict("H1")
    assert clause(judged, "H1 post-RoPE").status == SUPPORTED
    assert h1.status == INCONCLUSIVE and h1.holm_rejected is False
    assert "not after Holm's correction" in h1.reason


# --------------------------------------------------------------------------------------------
# Attribution.


def with_controls(
    frozen: float,
    decayed: float,
    recipe: str = "fixed",
    optimizers: tuple[str, ...] = ("adamw", "muon"),
) -> synthetic_study.Arms:
    """None 50, learned gamma without decay 46."""
    undecayed = "" if recipe == "fixed" else "_undecayed"
    pr = {"noqk": 50.0, "qk_frozen": frozen, f"qk{undecayed}": 46.0}
    pr["qk_decayed" if recipe == "fixed" else "qk"] = decayed
    names = {f"{o}_{name}": {PR: x} for o in optimizers for name, x in pr.items()}
    return synthetic_study.arms(**names)


def test_what_decay_explains(judge: Judge):
    judged = judge(with_controls(frozen=47.0, decayed=20.0))
    for found, optimizer in zip(judged.attributions, ("adamw", "muon"), strict=True):
        assert found.optimizer == optimizer and found.status == SUPPORTED
        assert found.explained_by_decay is True and "explained by decay" in found.reason
        assert [part.estimate for part in found.parts] == pytest.approx([3, 1, 26], abs=1.5)
        whole = sum(part.estimate for part in found.parts)
        assert whole == pytest.approx(found.total.estimate)


def test_the_arms_that_serve_are_named(judge: Judge):
    fixed = judge(with_controls(frozen=47.0, decayed=20.0)).attributions[1]
    assert fixed.roles == {
        "none": "muon_noqk",
        "frozen": "muon_qk_frozen",
        "undecayed": "muon_qk",
        "decayed": "muon_qk_decayed",
    }
    arms = with_controls(47.0, 20.0, "original", ("adamw",))
    original = judge(arms, recipe="original", seeds=(42, 43)).attributions[0]
    assert (original.roles["undecayed"], original.roles["decayed"]) == (
        "adamw_qk_undecayed",
        "adamw_qk",
    )


def test_pairs_that_disagree_in_the_attribution_are_said(judge: Judge):
    judged = judge(with_controls(frozen=46.5, decayed=20.0), noise={**QUIET, PR: 3.0})
    parts = [part for found in judged.attributions for part in found.parts]
    said = [(part.name, note) for part in parts for note in part.notes]
    assert any("the seeds disagree in sign" in note for _, note in said)
    assert all(f"attribution, {name}: {note}" in judged.warnings for name, note in said)


def test_parts_may_cancel(judge: Judge):
    """Normalisation costs 20, the learned gamma wins back 16, decay costs 16 of the 20."""
    judged = judge(with_controls(frozen=30.0, decayed=30.0))
    parts = [part.estimate for part in judged.attributions[0].parts]
    assert parts == pytest.approx([20, -16, 16], abs=1.5)
    assert [part.status for part in judged.attributions[0].parts] == [SUPPORTED, REFUTED, SUPPORTED]
    assert judged.attributions[0].explained_by_decay is True


def test_half_is_the_border_of_the_explanation(judge: Judge):
    below = judge(with_controls(frozen=47.0, decayed=43.5), noise={**QUIET, PR: 0.01})
    assert below.attributions[0].explained_by_decay is False  # 2.5 of 6.5
    assert "not explained" in below.attributions[0].reason
    above = judge(with_controls(frozen=47.0, decayed=41.5), noise={**QUIET, PR: 0.01})
    assert above.attributions[0].explained_by_decay is True  # 4.5 of 8.5


def test_nothing_is_attributed_where_nothing_is_lost(judge: Judge):
    judged = judge(with_controls(frozen=50.0, decayed=50.0))
    assert judged.attributions[0].status == REFUTED
    assert judged.attributions[0].explained_by_decay is None


def test_attribution_without_its_arms(judge: Judge):
    judged = judge(CLAIMED, **LONG)
    assert judged.attributions[0].status == INCONCLUSIVE
    assert "the plan has no arm adamw_qk_decayed" in judged.attributions[0].reason
    arms = with_controls(frozen=47.0, decayed=20.0)
    del arms["muon_qk_frozen"]
    judged = judge(arms)
    assert judged.attributions[1].status == SUPPORTED  # decay needs no frozen arm
    assert "muon_qk_frozen" in judged.attributions[1].parts[0].reason


def test_in_the_original_pilot_the_parent_is_the_decayed_arm(judge: Judge):
    arms = with_controls(47.0, 20.0, "original", ("adamw",))
    judged = judge(arms, recipe="original", seeds=(42, 43))
    assert judged.attributions[0].explained_by_decay is True
    assert judged.attributions[0].total.estimate == pytest.approx(30, abs=1.5)
    assert judged.attributions[0].parts[2].estimate == pytest.approx(26, abs=1.5)


def test_elsewhere_in_recipe_original_the_parent_is_not(judge: Judge):
    """At tiny's 195 steps gamma's tau is 0.23."""
    judged = judge(with_controls(47.0, 20.0, "original"), scale="tiny", recipe="original")
    assert judged.attributions[0].status == INCONCLUSIVE
    assert "the plan has no arm adamw_qk_decayed" in judged.attributions[0].reason


# --------------------------------------------------------------------------------------------
# H5.


@pytest.fixture
def judge_items(tmp_path: pathlib.Path) -> Judge:
    """Writes a study, downstream results of it, and judges both."""

    def of(
        right: dict[str, float],
        seeds: tuple[int, ...] = (42, 43, 44),
        edit: Callable[[pathlib.Path], None] | None = None,
        **options: Any,
    ) -> judgement.Judgement:
        synthetic_study.write(tmp_path, CLAIMED, seeds=seeds, noise=QUIET)
        synthetic_study.write_downstream(tmp_path, right, seeds=seeds, **options)
        if edit:
            edit(tmp_path / "downstream")
        return verdicts.judge(results.load_study(tmp_path))

    return of


def test_h5_of_a_better_arm(judge_items: Judge):
    judged = judge_items({"muon_noqk": 0.36, "adamw_qk": 0.28}, items=2_000)
    h5 = judged.verdict("H5")
    assert h5.status == SUPPORTED and h5.holm_rejected is None and h5.p < 1e-6
    found = h5.clauses[0]
    assert found.estimate == pytest.approx(8.0, abs=2.0) and found.unit == "points"
    assert set(found.per_seed) == {42, 43, 44}
    assert sum("McNemar" in note for note in found.notes) == 3
    assert any("power: at " in note for note in found.notes)
    assert clause(judged, "H5 HellaSwag gold endings").status == SUPPORTED


def test_h5_of_equal_arms(judge_items: Judge):
    judged = judge_items({"muon_noqk": 0.3, "adamw_qk": 0.3})
    assert judged.verdict("H5").status in (INCONCLUSIVE, REFUTED)
    assert judged.verdict("H5").p > 0.01


def test_h5_of_a_worse_arm(judge_items: Judge):
    judged = judge_items({"muon_noqk": 0.28, "adamw_qk": 0.36}, items=2_000)
    assert judged.verdict("H5").status == REFUTED
    assert "reversed" in judged.verdict("H5").reason


def test_h5_needs_mcnemar_too(judge_items: Judge):
    """Few items that Muon wins with every seed, more that it loses with one of three."""

    def edit(folder: pathlib.Path) -> None:
        for arm in ("muon_noqk", "adamw_qk"):
            for number, seed in enumerate((42, 43, 44)):
                path = folder / arm / f"seed_{seed}.items.jsonl"
                items = [json.loads(line) for line in path.read_text().splitlines()]
                for item in items:
                    index = item["index"]
                    won, lost = index < 60, 100 <= index < 190 and number == 0
                    right = int(won if arm == "muon_noqk" else lost)
                    item["acc"] = right
                    if "acc_norm" in item:
                        item["acc_norm"] = right
                path.write_text("".join(json.dumps(item) + "\n" for item in items))

    judged = judge_items({"muon_noqk": 0.3, "adamw_qk": 0.3}, edit=edit)
    found = judged.verdict("H5").clauses[0]
    assert found.estimate == pytest.approx(100 * (3 * 60 - 90) / 3000) and found.pooled[0] > 0
    assert found.p > 0.9  # 60 items for Muon, 90 against it
    assert found.status == INCONCLUSIVE
    assert found.reason.startswith("above 0, but McNemar's test does not agree (p 0.99")


def test_h5_of_one_seed(judge_items: Judge):
    judged = judge_items({"muon_noqk": 0.36, "adamw_qk": 0.28}, seeds=(42,))
    found = judged.verdict("H5").clauses[0]
    assert found.status == INCONCLUSIVE and "no replication" in found.reason
    assert found.pooled[0] > 0 and found.p < 1e-6 and found.paired is None


def test_h5_refuses_the_sample(judge_items: Judge):
    judged = judge_items({"muon_noqk": 0.9, "adamw_qk": 0.1}, sample=True)
    h5 = judged.verdict("H5")
    assert h5.status == INCONCLUSIVE and "only a sample" in h5.reason
    assert all(c.estimate is None for c in (*h5.clauses, *h5.shown))
    assert sum("measured on a sample of the items" in w for w in judged.warnings) == 6


def test_h5_refuses_other_items(judge_items: Judge):
    def edit(folder: pathlib.Path) -> None:
        path = folder / "adamw_qk" / "seed_43.items.jsonl"
        path.write_text(path.read_text().replace(f"{7:064x}", "f" * 64))

    judged = judge_items({"muon_noqk": 0.36, "adamw_qk": 0.28}, edit=edit)
    h5 = judged.verdict("H5")
    assert h5.status == INCONCLUSIVE
    assert "adamw_qk seed 43 answered other items" in h5.reason


def test_h5_pairs_items_by_index_not_by_line(judge_items: Judge):
    def edit(folder: pathlib.Path) -> None:
        path = folder / "adamw_qk" / "seed_43.items.jsonl"
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))

    plain = judge_items({"muon_noqk": 0.36, "adamw_qk": 0.28})
    assert judge_items({"muon_noqk": 0.36, "adamw_qk": 0.28}, edit=edit) == plain


def test_h5_correlation_within_an_optimiser(judge_items: Judge):
    """PR: Muon 52 and 40, AdamW 44 and 15; the scores follow it under Muon and not under AdamW."""
    judged = judge_items({"muon_noqk": 0.5, "muon_qk": 0.2, "adamw_noqk": 0.2, "adamw_qk": 0.5})
    muon, adamw = (
        clause(judged, f"H5 HellaSwag acc_norm with PR, {name}") for name in ("Muon", "AdamW")
    )
    assert muon.status == SUPPORTED and muon.estimate > 0.9 and "n = 6" in muon.reason
    assert adamw.status == REFUTED and adamw.estimate < -0.9
    assert muon.kind == adamw.kind == "shown"


def test_resolved_configs_are_those_of_the_presets():
    """The helper's arms are what the configs call them."""
    for arm in (*synthetic_study.ARMS, "adamw_qk_frozen", "muon_qk_decayed", "muon_noqk_merged"):
        found = synthetic_study.make_config(arm, 42)
        assert isinstance(found, config_lib.Config) and found.arm == arm
