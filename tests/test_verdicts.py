"""Verdicts on synthetic studies whose truth is known."""

import dataclasses
import json
import math
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import synthetic_study
from scipy import stats
from synthetic_study import AA, LOGIT, LOSS, PR, PR_BEFORE

from qkjax import config as config_lib
from qkjax import errors
from qkjax.measures import probes
from qkjax.trained import rank_curves
from qkjax.verdicts import clauses, hypotheses, items, judgement, results, rules, stability
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


NEGLIGIBLE, OPPOSITE = judgement.NEGLIGIBLE, judgement.OPPOSITE
TOO_SMALL, NOT_TWICE = judgement.TOO_SMALL, judgement.NOT_TWICE


def word(kind: str, estimate: float, interval: tuple[float, float], limit: float) -> str:
    ends = (np.float64(interval[0]), np.float64(interval[1]))
    return judgement.WORDS[int(rules.decide(kind, np.float64(estimate), ends, limit))]


@pytest.mark.parametrize(
    ("estimate", "interval", "expected"),
    [
        (5.0, (1.0, 9.0), SUPPORTED),
        (3.2, (0.1, 6.3), SUPPORTED),
        (-5.0, (-6.0, -4.0), OPPOSITE),
        (-5.0, (-9.0, -3.2), TOO_SMALL),  # up to -SESOI, not beyond it
        (-5.0, (-9.0, -1.0), TOO_SMALL),
        (1.0, (0.5, 1.5), NEGLIGIBLE),
        (-1.0, (-1.5, -0.5), NEGLIGIBLE),  # below 0, and a fifth of what is of interest
        (0.1, (-1.0, 1.2), NEGLIGIBLE),
        (0.1, (-3.2, 3.1), TOO_SMALL),
        (-2.0, (-7.0, 3.0), TOO_SMALL),
        (3.1, (0.1, 6.1), INCONCLUSIVE),
        (5.0, (-1.0, 11.0), INCONCLUSIVE),
        (5.0, (0.0, 10.0), INCONCLUSIVE),
        (1.6, (0.0, 3.2), INCONCLUSIVE),
    ],
)
def test_superiority(estimate: float, interval: tuple[float, float], expected: str):
    assert word(judgement.SUPERIORITY, estimate, interval, 3.2) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (2.01, 3.0, SUPPORTED),
        (1.93, 1.97, NOT_TWICE),
        (1.7, 2.2, INCONCLUSIVE),
        (0.5, 0.9, OPPOSITE),
        (0.5, 0.95, NOT_TWICE),  # below 1, but not by the smallest effect of interest
    ],
)
def test_a_ratio_against_twice(low: float, high: float, expected: str):
    interval = (math.log(low), math.log(high))
    assert word(judgement.RATIO, sum(interval) / 2, interval, math.log(2)) == expected


@pytest.mark.parametrize(
    ("interval", "expected", "words"),
    [
        ((-0.9, -0.1), SUPPORTED, "better, and so not worse by the margin"),
        ((-0.1, 0.0099), SUPPORTED, "not worse by the margin of 0.01"),
        ((0.001, 0.0099), SUPPORTED, "worse, but by less than the margin of 0.01"),
        ((0.0101, 0.1), judgement.WORSE, "worse by more than the margin of 0.01"),
        ((-0.1, 0.01), INCONCLUSIVE, "the interval contains the margin of 0.01"),
        ((0.01, 0.1), INCONCLUSIVE, "the interval contains the margin of 0.01"),
        ((-0.1, 0.1), INCONCLUSIVE, "the interval contains the margin of 0.01"),
    ],
)
def test_non_inferiority(interval: tuple[float, float], expected: str, words: str):
    middle, kind = sum(interval) / 2, judgement.NON_INFERIORITY
    assert word(kind, middle, interval, 0.01) == expected
    assert clauses._why(expected, kind, middle, interval, 0.01) == words


@pytest.mark.parametrize(
    ("codes", "strict", "expected"),
    [
        ((SUPPORTED, SUPPORTED), (SUPPORTED, SUPPORTED), SUPPORTED),
        ((SUPPORTED, SUPPORTED), (INCONCLUSIVE, SUPPORTED), SUPPORTED),  # correction has its say
        ((SUPPORTED, INCONCLUSIVE), (SUPPORTED, INCONCLUSIVE), INCONCLUSIVE),
        ((SUPPORTED, NEGLIGIBLE), (SUPPORTED, TOO_SMALL), TOO_SMALL),  # the word at 97.5%
        ((SUPPORTED, TOO_SMALL), (SUPPORTED, INCONCLUSIVE), INCONCLUSIVE),  # refuted alone
        ((OPPOSITE, NOT_TWICE), (INCONCLUSIVE, NOT_TWICE), NOT_TWICE),
    ],
)
def test_a_hypothesis_of_two_clauses(codes: tuple, strict: tuple, expected: str):
    code = rules.judge_hypothesis(
        *(np.array([rules.CODES[word] for word in words]) for words in (codes, strict))
    )
    assert judgement.WORDS[int(code)] == expected


# --------------------------------------------------------------------------------------------
# Whole studies.


def test_everything_that_was_claimed(judge: Judge):
    judged = judge(CLAIMED, **LONG)
    assert statuses(judged) == [SUPPORTED] * 4, [v.reason for v in judged.verdicts]
    assert judged.headline == "H1, H2, H3, H4 supported."
    assert [verdict.level for verdict in judged.verdicts] == [
        0.025,  # passed on by the other side, as theirs by H1
        pytest.approx(0.025 / 3),
        pytest.approx(0.0125),
        0.025,
        None,
    ]
    assert all("passed on by the other side" in v.correction for v in judged.verdicts[:4])
    assert [verdict.name for verdict in judged.verdicts] == ["H1", "H2", "H3", "H4", "H5"]
    assert judged.seeds_used == (42, 43, 44)
    h1 = clause(judged, "H1 post-RoPE")
    assert h1.estimate == pytest.approx((44 - 15 + 52 - 40) / 2, abs=1.5)
    assert set(h1.per_seed) == {42, 43, 44}
    assert sum(h1.per_seed.values()) / 3 == pytest.approx(h1.estimate)
    assert h1.sesoi == pytest.approx(3.2) and h1.deciding[0] < h1.estimate < h1.deciding[1]
    assert h1.deciding == max(h1.pooled, h1.paired, key=lambda ends: ends[1])
    assert h1.family == tuple(synthetic_study.ARMS)
    assert h1.level == "two-sided 95%, one-sided .025"
    headline = "post-RoPE raw: supported; pre-RoPE centred: supported"
    assert judged.verdict("H1").headline == headline
    h2 = clause(judged, "H2 interaction")
    assert h2.estimate == pytest.approx(math.log(44 / 15) - math.log(52 / 40), abs=0.1)
    assert h2.sesoi == pytest.approx(math.log(1.1))
    assert clause(judged, "H3(a)").estimate == pytest.approx(0.05, abs=0.003)
    assert clause(judged, "H3(b)").estimate == pytest.approx(math.log(52 / 15), abs=0.1)
    assert re.fullmatch(r"3\.\d+ times, 95% [\d.]+ to [\d.]+", clause(judged, "H3(b)").said)
    lead_at_25m = 60 + (52 - 60) * 381 / 610 - 25  # Muon's course is a line from 60
    assert clause(judged, "H3(c)").estimate == pytest.approx(52 - 15 - lead_at_25m, abs=1.5)
    assert clause(judged, "H4 PR against AdamW+QK").estimate == pytest.approx(52 - 15, abs=1.5)
    assert clause(judged, "H4 PR against Muon+QK").estimate == pytest.approx(52 - 40, abs=1.5)
    h5 = judged.verdict("H5")
    assert h5.status == INCONCLUSIVE and "no result" in h5.reason
    assert h5.correction == "not part of this study: the plan has no downstream scores"


def test_p_of_a_hypothesis_is_the_largest_of_its_contrasts(judge: Judge):
    judged = judge(CLAIMED, **LONG)
    for name in ("H3", "H4"):
        verdict = judged.verdict(name)
        contrasts = [c for c in verdict.clauses if c.kind != judgement.RULE]
        assert verdict.p == max(c.p for c in contrasts)
    rules_of_h4 = [c for c in judged.verdict("H4").clauses if c.kind == judgement.RULE]
    assert len(rules_of_h4) == 4
    assert all(c.p is None and c.level == "by rule, no p" for c in rules_of_h4)


def test_a_seed_without_an_arm_enters_no_contrast(judge: Judge):
    judged = judge(CLAIMED, **LONG, missing=[("muon_noqk", 43)])
    assert judged.verdicts[0].clauses[0].per_seed.keys() == {42, 44}


def test_null_study(judge: Judge):
    judged = judge(synthetic_study.arms(), **LONG)
    assert SUPPORTED not in statuses(judged)
    h1 = judged.verdict("H1")
    assert h1.word == NEGLIGIBLE and "negligible" in h1.reason


def test_the_opposite(judge: Judge):
    judged = judge(synthetic_study.arms(adamw_qk={PR: 50.0}, muon_qk={PR: 50.0}), **LONG)
    assert judged.verdict("H1").word == OPPOSITE
    assert judged.verdict("H1").headline.startswith("post-RoPE raw: the opposite; ")
    assert judged.verdict("H1").p > 0.99


def test_negligible_effect(judge: Judge):
    judged = judge(
        synthetic_study.arms(adamw_qk={PR: 38.5}, muon_qk={PR: 38.5}), noise={**QUIET, PR: 0.1}
    )
    h1 = judged.verdict("H1")
    assert h1.word == NEGLIGIBLE
    assert h1.p < 0.0125  # real, but the verdict is not for p to make


def test_a_loss_a_fifth_of_the_sesoi_is_negligible_and_not_reversed(judge: Judge):
    """-0.0018 nat, 95% about -0.0024 to -0.0012, against 0.01."""
    early = {LOSS: {244: 4.0, 610: 3.5}}
    worse = {LOSS: {244: 4.0018, 610: 3.5}}
    judged = judge(
        synthetic_study.arms(adamw_qk=worse, muon_qk=worse, adamw_noqk=early, muon_noqk=early),
        noise={**QUIET, LOSS: 0.0003},
        **LONG,
    )
    found = clause(judged, "H3(a)")
    assert found.deciding[1] < 0 and found.word == NEGLIGIBLE
    assert re.fullmatch(r"-0\.00\d\d nat, 95% -0\.00\d\d to -0\.00\d\d", found.said)
    assert found.reason == f"{found.said}: negligible"


def test_noisy_study_says_how_many_seeds_it_needs(judge: Judge):
    judged = judge(
        synthetic_study.arms(adamw_qk={PR: 35.0}, muon_qk={PR: 35.0}),
        noise={**QUIET, PR: 8.0},
        random_seed=2,
    )
    found = clause(judged, "H1 post-RoPE")
    assert judged.verdict("H1").status == found.status == INCONCLUSIVE
    assert found.deciding[0] < 0 < 3.2 < found.deciding[1]
    assert found.seeds_needed > 3
    said = f"{found.seeds_needed} seeds for 80% power if this estimate were the truth"
    assert found.reason.endswith(said)


def test_one_seed_decides_nothing(judge: Judge):
    judged = judge(CLAIMED, seeds=[42], **LONG)
    assert statuses(judged) == [INCONCLUSIVE] * 4
    assert judged.headline == "One seed: nothing is decided."
    for verdict in judged.verdicts:
        assert verdict.reason == "one seed: nothing is decided"
    found = clause(judged, "H1 post-RoPE")
    assert found.estimate == found.per_seed[42] and found.deciding is None and found.p is None
    assert found.reason == f"{found.said}; one seed: nothing is decided"
    finishes = clause(judged, "H4 finishes")  # a rule needs no interval
    assert (finishes.status, finishes.reason) == (SUPPORTED, "every run finished")
    assert finishes.sesoi is None
    assert any("one seed" in warning for warning in judged.warnings)


def test_equal_seeds_are_inconclusive(judge: Judge):
    judged = judge(CLAIMED, noise={}, **LONG)
    assert "MSE = 0" in judged.verdict("H1").reason
    assert judged.verdict("H1").status == INCONCLUSIVE


@pytest.mark.parametrize(("noisy", "decides"), [("muon_noqk", "paired"), ("adamw_noqk", "pooled")])
def test_one_noisy_arm_widens_what_it_is_part_of(judge: Judge, noisy: str, decides: str):
    """In the contrast its own pairs say so; beside it the pooled error guards against luck."""
    quiet = dict.fromkeys(synthetic_study.ARMS, 0.2)
    judged = judge(CLAIMED, noise={**QUIET, PR: {**quiet, noisy: 4.0}}, seeds=SIX, **LONG)
    found = clause(judged, "H4 PR against Muon+QK")
    assert found.deciding == getattr(found, decides) and found.pooled != found.paired


def test_controls_lend_no_quiet_to_the_four_arms(judge: Judge):
    """A contrast of the arms is the same to the digit with five controls beside them."""
    alone = judge(CLAIMED, **LONG)
    controls = {f"adamw_qk_{word}": {} for word in ("frozen", "decayed")}
    arms = {**CLAIMED, **{name: CLAIMED["adamw_qk"] for name in controls}}
    noise = {
        m: {**dict.fromkeys(CLAIMED, sd), **dict.fromkeys(controls, 0.0)} for m, sd in QUIET.items()
    }
    beside = judge(arms, noise=noise, **LONG)
    for verdict in beside.verdicts[:4]:
        for found in verdict.clauses:
            assert not set(found.family) & set(controls)
    assert clause(beside, "H1 post-RoPE").family == clause(alone, "H1 post-RoPE").family


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


def test_a_control_that_is_missing_leaves_its_seed_out_of_its_own_family_alone(judge: Judge):
    arms = {**CLAIMED, "adamw_qk_frozen": CLAIMED["adamw_qk"], "muon_noqk_merged": MUON_BEST}
    judged = judge(arms, missing=[("muon_noqk_merged", 43)], **LONG)
    assert judged.seeds_used == (42, 43, 44)
    assert clause(judged, "H1 post-RoPE").seeds == (42, 43, 44)
    merged = [found for found in judged.controls if "muon_noqk_merged" in found.name]
    assert [found.seeds for found in merged] == [(42, 44), (42, 44)]
    assert all(found.family == ("muon_noqk", "muon_noqk_merged") for found in merged)
    assert all("outside the corrected family" in found.level for found in merged)


def test_extra_seeds_enter_the_families_that_have_them_whole(judge: Judge):
    """Two more seeds for the gamma controls of AdamW, one for an arm of H4 alone."""
    controls = ("frozen", "undecayed", "decayed")
    gamma = ("adamw_noqk", *(f"adamw_qk_{control}" for control in controls))
    arms = CLAIMED | {arm: CLAIMED["adamw_qk"] for arm in gamma[1:]}
    extra = {arm: [7001, 7002] for arm in gamma} | {"muon_noqk": [7003]}
    judged = judge(arms, extra_seeds=extra, missing=[("adamw_qk_frozen", 7002)], **LONG)
    assert judged.seeds_used == (42, 43, 44)
    left_out = [warning for warning in judged.warnings if "left out" in warning]
    assert left_out == [
        "seed 7002 is left out of AdamW's attribution, it lacks adamw_qk_frozen (not started)"
    ]
    for name in ("H1 post-RoPE", "H4 PR against Muon+QK"):
        assert clause(judged, name).seeds == (42, 43, 44)
        assert set(clause(judged, name).per_seed) == {42, 43, 44}
    adamw = judged.attributions[0]
    assert adamw.total.seeds == (42, 43, 44, 7001)
    used = [adamw.total.per_seed[seed] for seed in adamw.total.seeds]
    assert adamw.total.estimate == pytest.approx(sum(used) / 4)
    low, high = adamw.total.paired
    half = stats.t.ppf(0.975, 3) * np.std(used, ddof=1) / 2
    assert (high - low) / 2 == pytest.approx(half)
    assert clause(judged, "H4 finishes").seeds == (42, 43, 44, 7003)  # a rule asks every run


def test_seeds_that_an_attribution_leaves_out_are_named(tmp_path: pathlib.Path):
    """Also where its decayed arm is the parent, and has no run yet that would show it."""
    arms = CLAIMED | {"adamw_qk_frozen": CLAIMED["adamw_qk"]}
    missing = [("adamw_qk_frozen", 43), *(("muon_qk", seed) for seed in (42, 43, 44))]
    synthetic_study.write(tmp_path, arms, noise=QUIET, missing=missing, **LONG)
    study = results.load_study(tmp_path)
    twins = {"left_out": {"muon_qk_decayed": "muon_qk"}}
    judged = verdicts.judge(dataclasses.replace(study, plan={**study.plan, **twins}))
    assert any(
        "seed 43 is left out of AdamW's attribution, it lacks adamw_qk_frozen" in warning
        for warning in judged.warnings
    )
    assert judged.attributions[1].roles["decayed"] == "muon_qk"
    assert "no seed has every arm" in judged.attributions[1].reason


def test_an_arm_without_any_run(judge: Judge):
    """The runs that there are are counted once; an extra seed of some arms completes nothing."""
    missing = [("adamw_qk", 44), *(("muon_noqk", seed) for seed in (42, 43, 44))]
    extra = {"adamw_qk": [7001], "adamw_noqk": [7001]}
    judged = judge(CLAIMED, missing=missing, extra_seeds=extra, **LONG)
    assert statuses(judged) == [INCONCLUSIVE] * 4 and judged.seeds_used == ()
    counts = "runs of 3 seeds: adamw_qk 2, adamw_noqk 3, muon_qk 3, muon_noqk 0"
    for verdict in judged.verdicts[:4]:
        assert verdict.reason.count(f"no seed has every arm; {counts}") == 1
    assert judged.verdicts[2].reason.startswith("H3(a), H3(b), H3(c): no seed")
    assert "missing: muon_noqk seed 42 (not started)" in judged.verdicts[3].reason
    assert clause(judged, "H4 finishes").status == INCONCLUSIVE


def test_a_study_without_any_run(judge: Judge):
    missing = [(arm, seed) for arm in synthetic_study.ARMS for seed in (42, 43, 44)]
    judged = judge(CLAIMED, missing=missing, **LONG)
    assert statuses(judged) == [INCONCLUSIVE] * 4
    assert clause(judged, "H1 post-RoPE").sesoi == pytest.approx(3.2)


def test_an_arm_that_diverged_wholly_is_a_count_below_four_seeds(judge: Judge):
    diverged = {(arm, seed): 100 for arm in ("adamw_noqk", "muon_noqk") for seed in (42, 43, 44)}
    judged = judge(CLAIMED, diverged=diverged, **LONG)
    assert judged.seeds_used == (42, 43, 44)  # never missing
    assert sum("adamw_noqk" in w and "diverged at step 101" in w for w in judged.warnings) == 3
    for name in ("H1 post-RoPE", "H3(a)"):
        found = clause(judged, name)
        assert found.word == INCONCLUSIVE and found.estimate is None and found.p is None
        assert "adamw_noqk: 3 of 3 diverged; muon_noqk: 3 of 3 diverged" in found.reason
        assert "with fewer than four seeds this is only a count" in found.reason
        assert found.level == "by rule, no p"
    assert set(clause(judged, "H3(a)").per_seed.values()) == {None}  # nothing is imputed


SIX = (42, 43, 44, 45, 46, 47)


@pytest.mark.parametrize(
    ("arm", "loss", "pr"),
    [("muon_noqk", judgement.BY_RULE, judgement.BY_RULE), ("muon_qk", SUPPORTED, SUPPORTED)],
)
def test_a_side_that_diverged_wholly_is_the_worse_one_from_four_seeds(
    judge: Judge, arm: str, loss: str, pr: str
):
    diverged = {(arm, seed): 300 for seed in SIX[:4]}
    judged = judge(CLAIMED, diverged=diverged, seeds=SIX[:4], **LONG)
    found = clause(judged, "H4 loss against Muon+QK")
    assert found.word == loss and "Fisher's one-sided p 0.0143" in found.reason
    assert found.word_at_975 == INCONCLUSIVE  # .0143 is above .0125
    assert clause(judged, "H4 PR against Muon+QK").word == pr
    mixed = clause(judged, "H2 interaction")  # one of two arms of a side
    assert mixed.word == INCONCLUSIVE and mixed.reason == f"{arm}: 4 of 4 diverged"


def test_a_run_that_diverges_elsewhere_keeps_the_other_verdicts(judge: Judge):
    """Muon is .12 nat better, and one seed of an arm without weight diverges."""
    arms = changed(muon_noqk={**MUON_BEST, LOSS: {244: 4.05, 610: 3.38}})
    whole = judge(arms, **LONG)
    found = judge(arms, diverged={("adamw_noqk", 43): 300}, **LONG)
    assert found.verdict("H4").status == whole.verdict("H4").status == SUPPORTED
    for name in ("H4 loss against AdamW+QK", "H4 PR against Muon+QK", "H3(b)"):
        ours, before = clause(found, name), clause(whole, name)
        assert ours.estimate == before.estimate and ours.paired == before.paired
        assert ours.family == ("adamw_qk", "muon_qk", "muon_noqk") and ours.word == SUPPORTED
        assert ours.seeds == (42, 43, 44)
    assert clause(found, "H1 post-RoPE").reason == "adamw_noqk: 1 of 3 diverged"
    # At step 244 it had not diverged: its loss there counts like any other.
    assert clause(found, "H3(a)").word == clause(whole, "H3(a)").word == SUPPORTED
    assert clause(found, "H3(a)").estimate == clause(whole, "H3(a)").estimate


def test_a_number_that_is_not_finite_leaves_the_family_not_the_contrast(
    judge: Judge, tmp_path: pathlib.Path
):
    judge(CLAIMED, **LONG)
    path = tmp_path / "study" / "runs" / "adamw_noqk" / "seed_43" / "summary.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "pr_final/key/post_rope/raw": None}))
    synthetic_study.seal(path.parent)
    judged = verdicts.judge(results.load_study(tmp_path / "study"))
    found = clause(judged, "H4 PR against Muon+QK")
    assert found.word == SUPPORTED and "adamw_noqk" not in found.family
    assert clause(judged, "H1 post-RoPE").reason == "no finite value of adamw_noqk seed 43"


def test_muon_that_diverges_refutes_its_alternative(judge: Judge):
    judged = judge(CLAIMED, diverged={("muon_noqk", 43): 300}, **LONG)
    assert judged.verdict("H4").status == REFUTED
    assert "H4 finishes, H4 spikes: broken by seed 43" in judged.verdict("H4").reason
    assert clause(judged, "H4 finishes").p is None
    assert judged.verdict("H4").word == judgement.BY_RULE


def test_a_rule_that_one_seed_alone_breaks_says_so(judge: Judge):
    judged = judge(CLAIMED, seeds=[42], diverged={("muon_noqk", 42): 300}, **LONG)
    assert clause(judged, "H4 finishes").reason == "broken by seed 42 (by rule, one seed)"
    assert judged.verdict("H4").reason == "one seed: nothing is decided"


def test_a_broken_rule_decides_nothing_before_two_seeds_have_every_arm(judge: Judge):
    """An unfinished study is not decided by less than a finished one of one seed."""
    absent = [("muon_qk", seed) for seed in (42, 43, 44)]
    judged = judge(CLAIMED, diverged={("muon_noqk", 43): 300}, missing=absent, **LONG)
    assert clause(judged, "H4 finishes").status == REFUTED
    verdict = judged.verdict("H4")
    assert verdict.word == INCONCLUSIVE and "no seed has every arm" in verdict.reason
    assert (
        judge(CLAIMED, missing=absent[:2], **LONG).verdict("H4").reason
        == "one seed: nothing is decided"
    )


def test_a_rule_that_every_arm_breaks_says_so(judge: Judge):
    """As batches of two sequences do, whose losses jump by more than the limit."""
    arms = ("adamw_qk", "adamw_noqk", "muon_qk", "muon_noqk")
    spikes = {(arm, seed): (300, 1.0) for arm in arms for seed in (42, 43, 44)}
    words = "; so it is by every run of the other arms, which it does not tell apart"
    found = clause(judge(CLAIMED, spikes=spikes, **LONG), "H4 spikes")
    assert found.word == judgement.BY_RULE
    assert found.reason == f"broken by seed 42 and seed 43 and seed 44{words}"
    spikes.pop(("adamw_qk", 44))
    found = clause(judge(CLAIMED, spikes=spikes, **LONG), "H4 spikes")
    assert found.reason == "broken by seed 42 and seed 43 and seed 44"


def test_muon_that_diverges_refutes_even_where_another_seed_is_missing(judge: Judge):
    judged = judge(CLAIMED, diverged={("muon_noqk", 43): 300}, missing=[("muon_noqk", 44)], **LONG)
    assert clause(judged, "H4 finishes").status == REFUTED
    assert clause(judged, "H4 logits").status == INCONCLUSIVE


# --------------------------------------------------------------------------------------------
# Each hypothesis.


def test_h1_carries_both_measures(judge: Judge):
    """Post-RoPE supported, pre-RoPE 15 the other way: the headline has both."""
    before = {"adamw_qk": 45.0, "adamw_noqk": 30.0, "muon_qk": 45.0, "muon_noqk": 30.0}
    judged = judge(changed(**{arm: {PR_BEFORE: x} for arm, x in before.items()}), **LONG)
    h1 = judged.verdict("H1")
    assert h1.status == SUPPORTED
    assert h1.headline == "post-RoPE raw: supported; pre-RoPE centred: the opposite"
    assert h1.shown[0].word == OPPOSITE and len(h1.shown) == 1


def test_h1_is_not_saved_by_pre_rope(judge: Judge):
    judged = judge(changed(**{arm: {PR: 40.0} for arm in CLAIMED}), **LONG)
    assert judged.verdict("H1").status == REFUTED
    assert judged.verdict("H1").headline.startswith("post-RoPE raw: negligible; pre-RoPE")


def test_sesoi_follows_head_dim(judge: Judge):
    judged = judge(synthetic_study.arms(32), scale="tiny")
    assert clause(judged, "H1 post-RoPE").sesoi == pytest.approx(1.6)


def test_h2_needs_the_axes_too(judge: Judge):
    judged = judge(changed(adamw_qk={**CLAIMED["adamw_qk"], AA: 0.12}), **LONG)
    assert clause(judged, "H2 interaction").status == SUPPORTED
    assert judged.verdict("H2").status == REFUTED
    assert judged.verdict("H2").reason.startswith("H2 axes: ")


def test_h2_is_decided_on_the_scale_of_ratios(judge: Judge):
    """The original's own effects: +0.17 in ln PR, -4.6 in PR."""
    judged = judge(
        changed(
            adamw_noqk={PR: 32.8},
            adamw_qk={PR: 16.2, AA: 0.5},
            muon_noqk={PR: 51.2},
            muon_qk={PR: 30.0, AA: 0.1},
        ),
        noise={**QUIET, PR: 0.1},
        **LONG,
    )
    found = clause(judged, "H2 interaction")
    assert found.estimate == pytest.approx(0.171, abs=0.03) and found.word == SUPPORTED
    assert found.said.startswith("1.1") and " times, 95% " in found.said
    additive = clause(judged, "H2 additive interaction")
    assert additive.estimate == pytest.approx(-4.6, abs=0.5) and additive.word == OPPOSITE
    assert judged.verdict("H2").word == SUPPORTED


def test_h3_at_pilot_goes_without_growth(judge: Judge):
    judged = judge(CLAIMED)  # the pilot ends at 25M tokens, step 381
    assert [found.name for found in judged.verdict("H3").clauses] == ["H3(a)", "H3(b)"]
    assert judged.verdict("H3").left_out == ""


def test_h3_of_a_run_that_ends_at_the_probe(judge: Judge):
    judged = judge(CLAIMED, scale="full", fields={"train__tokens": 381 * 65_536})
    assert "budget too short: runs end at step 381" in clause(judged, "H3(c)").reason
    assert judged.verdict("H3").status != SUPPORTED


def test_a_hypothesis_that_the_plan_cannot_answer_leaves_the_family_by_name(judge: Judge):
    judged = judge(synthetic_study.arms(32, adamw_qk={AA: 0.5}, muon_qk={AA: 0.1}), scale="tiny")
    for name in ("H3(a)", "H3(c)"):
        assert clause(judged, name).status == INCONCLUSIVE
        assert "budget too short" in clause(judged, name).reason
    h3 = judged.verdict("H3")
    assert h3.left_out == "budget too short: runs end at step 195, they have to pass 244"
    assert h3.correction == f"left out of the family: {h3.left_out}" and h3.level is None
    assert "by Holm over H2, H4 at 0.0125" in judged.verdict("H2").correction
    assert judged.verdict("H1").level == 0.0125


def test_a_rehearsal_has_words_and_decides_nothing(judge: Judge):
    arms = synthetic_study.arms(32, adamw_qk={PR: 10.0}, muon_qk={PR: 10.0})
    judged = judge(arms, scale="tiny", noise={PR: 0.2, PR_BEFORE: 0.2})
    h1 = judged.verdict("H1")
    assert judged.rehearsal and h1.word == SUPPORTED
    assert h1.headline.startswith("rehearsal: post-RoPE raw: supported; ")
    assert judged.headline == "A rehearsal: nothing is decided."
    assert not judge(CLAIMED, **LONG).rehearsal


def test_h3_without_the_evaluation(judge: Judge):
    fields = {"train__tokens": 40_000_000, "eval__at_tokens": (1_000_000, 25_000_000)}
    judged = judge(CLAIMED, scale="full", fields=fields)
    assert "no evaluation at step 244" in clause(judged, "H3(a)").reason
    assert clause(judged, "H3(c)").status == SUPPORTED


@pytest.mark.parametrize(
    ("ratio", "noise", "expected", "said"),
    [
        (1.95, 0.1, NOT_TWICE, r"1\.9\d times, 95% 1\.9\d? to 1\.9\d?: not twice"),
        (
            1.95,
            2.0,
            INCONCLUSIVE,
            r"[12]\.\d+ times, 95% 1\.\d+ to 2\.\d+: the interval contains 2",
        ),
        (0.85, 0.1, OPPOSITE, r"0\.8\d+ times, 95% 0\.8\d+ to 0\.8\d+: the opposite"),
    ],
)
def test_h3_is_spoken_of_as_a_ratio(
    judge: Judge, ratio: float, noise: float, expected: str, said: str
):
    pr = {381: 40.0, 610: 30.0}
    judged = judge(
        changed(
            adamw_qk={**CLAIMED["adamw_qk"], PR: pr}, muon_noqk={**MUON_BEST, PR: 30.0 * ratio}
        ),
        noise={**QUIET, PR: noise},
        **LONG,
    )
    found = clause(judged, "H3(b)")
    assert found.word == expected
    assert re.match(said, found.reason), found.reason


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
    assert found.status == status and found.p is None
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
    assert found.kind == "non-inferiority" and found.p > 0.99 and found.word == judgement.WORSE
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


def test_correction_can_withhold_a_verdict(judge: Judge):
    """H1 alone has p between 0.0125 and 0.025: its interval is above 0, the level says no."""
    arms = synthetic_study.arms(adamw_qk={PR: 32.0}, muon_qk={PR: 32.0})
    for random_seed in range(300):
        judged = judge(arms, noise={**QUIET, PR: 3.0}, random_seed=random_seed)
        if 0.0125 < (judged.verdict("H1").p or 1.0) < 0.025:
            break
    h1 = judged.verdict("H1")
    assert clause(judged, "H1 post-RoPE").status == SUPPORTED
    assert h1.word == INCONCLUSIVE and h1.level == 0.0125
    assert h1.reason.startswith("supported alone, not after correction for 4 (p 0.0")
    said = "post-RoPE raw: inconclusive (supported alone, not after correction for 4); "
    assert h1.headline.startswith(said)


def test_a_clause_refuted_at_95_alone_does_not_refute(judge: Judge):
    arms = synthetic_study.arms(adamw_qk={PR: 40.5}, muon_qk={PR: 40.5})
    for random_seed in range(300):
        judged = judge(arms, noise={**QUIET, PR: 1.0}, random_seed=random_seed)
        found = clause(judged, "H1 post-RoPE")
        if found.status == REFUTED and found.word_at_975 == INCONCLUSIVE:
            break
    h1 = judged.verdict("H1")
    assert h1.word == INCONCLUSIVE
    assert h1.reason.startswith("H1 post-RoPE refuted alone, at 95% but not at 97.5% (")


# --------------------------------------------------------------------------------------------
# Attribution.


# 1,220 steps: enough for gamma's steps not to dominate at tau 7.3 and force 0.2.
ATTRIBUTED = {"scale": "full", "fields": {"train__tokens": 80_000_000}}


def with_controls(
    frozen: float,
    decayed: float,
    recipe: str = "fixed",
    optimizers: tuple[str, ...] = ("adamw", "muon"),
) -> synthetic_study.Arms:
    """None 50, learned gamma without decay 46, the same pulled to one 45."""
    pr = {"noqk": 50.0, "qk_frozen": frozen, "qk_undecayed": 46.0, "qk_to_one": 45.0}
    pr["qk_decayed" if recipe == "fixed" else "qk"] = decayed
    names = {f"{o}_{name}": {PR: x} for o in optimizers for name, x in pr.items()}
    return synthetic_study.arms(**names)


def test_what_decay_explains(judge: Judge):
    judged = judge(with_controls(frozen=47.0, decayed=20.0), **ATTRIBUTED)
    for found, optimizer in zip(judged.attributions, ("adamw", "muon"), strict=True):
        assert found.optimizer == optimizer and found.status == SUPPORTED
        assert found.share == "decay explains more than half" and found.share in found.reason
        assert "outside the corrected family" in found.reason
        assert [part.estimate for part in found.parts] == pytest.approx([3, 1, 26], abs=1.5)
        whole = sum(part.estimate for part in found.parts)
        assert whole == pytest.approx(found.total.estimate)
        half = found.parts[2].estimate - found.total.estimate / 2
        assert found.half.estimate == pytest.approx(half) and found.half.deciding[0] > 0
        assert set(found.total.family) == set(found.roles.values()) and len(found.roles) == 5
        assert [clause.estimate for clause in found.beside] == pytest.approx([1], abs=1.5)
        assert "decayed at tau 7.3, force 0.2 costs" in found.total.text


def test_the_arms_that_serve_are_named(judge: Judge):
    fixed = judge(with_controls(frozen=47.0, decayed=20.0), **ATTRIBUTED).attributions[1]
    assert fixed.roles == {
        "none": "muon_noqk",
        "frozen": "muon_qk_frozen",
        "undecayed": "muon_qk_undecayed",
        "decayed": "muon_qk_decayed",
        "to_one": "muon_qk_to_one",
    }
    arms = with_controls(47.0, 20.0, "original", ("adamw",))
    found = judge(arms, recipe="original", seeds=(42, 43)).attributions[0]
    assert (found.roles["undecayed"], found.roles["decayed"]) == ("adamw_qk_undecayed", "adamw_qk")


def test_a_parent_of_another_rate_is_no_twin(judge: Judge):
    """It does not decay its gammas either, but moves them a fifth as fast as the controls do."""
    arms = with_controls(frozen=47.0, decayed=20.0)
    del arms["adamw_qk_undecayed"]
    found = judge(arms, **ATTRIBUTED).attributions[0]
    assert found.roles["undecayed"] == ""
    assert found.share == "" and "the plan has no arm adamw_qk_undecayed" in found.reason


def test_steps_of_gamma_that_dominate_attribute_nothing(judge: Judge):
    """At the 381 steps of pilot in recipe fixed, rate 0.1: |gamma| wanders by 0.5."""
    found = judge(with_controls(frozen=47.0, decayed=20.0)).attributions[0]
    assert found.total.word == SUPPORTED and found.share == ""
    assert found.reason.startswith("dominated by step noise (sd of gamma 0.5")


def test_a_control_decayed_of_before_is_shown_by_another_name(judge: Judge, tmp_path: pathlib.Path):
    """Its decay was stronger and its rate the parent's, which is then its twin; never pooled."""
    arms = with_controls(frozen=47.0, decayed=20.0)
    judge(arms, **ATTRIBUTED)
    paths = sorted((tmp_path / "study" / "runs" / "adamw_qk_decayed").glob("*/config.json"))
    for path in paths:
        values = json.loads(path.read_text())
        values["optimizer"].update(gamma_weight_decay=5.7, gamma_learning_rate=0.0)
        path.write_text(json.dumps(values))
        synthetic_study.seal(path.parent)
    study = results.load_study(tmp_path / "study")
    assert "adamw_qk_decayed_1" in study.arms and "adamw_qk_decayed" not in study.arms
    assert study.plan["parents"]["adamw_qk_decayed_1"] == "adamw_qk"
    found = verdicts.judge(study).attributions[0]
    assert found.roles["decayed"] == "adamw_qk_decayed_1"
    assert "force 5.7" in found.parts[2].text
    values["optimizer"]["gamma_learning_rate"] = 0.03  # one seed of the new kind
    paths[1].write_text(json.dumps({**values, "seed": 43}))
    synthetic_study.seal(paths[1].parent)
    with pytest.raises(errors.UsageError, match="expected adamw_qk_decayed_1 with seed 43"):
        results.load_study(tmp_path / "study")


def test_pairs_that_disagree_in_the_attribution_are_said(judge: Judge):
    judged = judge(with_controls(frozen=46.5, decayed=20.0), noise={**QUIET, PR: 3.0}, **ATTRIBUTED)
    parts = [part for found in judged.attributions for part in found.parts]
    said = [(part.name, note) for part in parts for note in part.notes]
    assert any("the seeds disagree in sign" in note for _, note in said)
    assert all(f"attribution, {name}: {note}" in judged.warnings for name, note in said)


def test_parts_may_cancel(judge: Judge):
    """Normalisation costs 20, the learned gamma wins back 16, decay costs 16 of the 20."""
    judged = judge(with_controls(frozen=30.0, decayed=30.0), **ATTRIBUTED)
    parts = [part.estimate for part in judged.attributions[0].parts]
    assert parts == pytest.approx([20, -16, 16], abs=1.5)
    words = [part.word for part in judged.attributions[0].parts]
    assert words == [SUPPORTED, OPPOSITE, SUPPORTED]
    assert judged.attributions[0].share == "decay explains more than half"


@pytest.mark.parametrize(
    ("decayed", "noise", "share"),
    [
        (43.5, 0.01, "decay explains less than half"),  # 2.5 of 6.5
        (41.5, 0.01, "decay explains more than half"),  # 4.5 of 8.5
        (41.5, 1.0, r"share undecided \(\d\d%\)"),
    ],
)
def test_half_is_the_border_of_the_explanation(
    judge: Judge, decayed: float, noise: float, share: str
):
    judged = judge(
        with_controls(frozen=47.0, decayed=decayed), noise={**QUIET, PR: noise}, **ATTRIBUTED
    )
    assert re.fullmatch(share, judged.attributions[0].share)
    assert judged.attributions[0].reason.startswith(judged.attributions[0].share)


def test_nothing_is_attributed_where_nothing_is_lost(judge: Judge):
    judged = judge(with_controls(frozen=50.0, decayed=50.0), **ATTRIBUTED)
    assert judged.attributions[0].status == REFUTED
    assert judged.attributions[0].share == ""
    assert judged.attributions[0].reason.startswith("not attributed, A is refuted: negligible")


def test_attribution_without_its_arms(judge: Judge):
    judged = judge(CLAIMED, **LONG)
    assert judged.attributions[0].status == INCONCLUSIVE
    assert "the plan has no arm adamw_qk_decayed" in judged.attributions[0].reason
    arms = with_controls(frozen=47.0, decayed=20.0)
    del arms["muon_qk_frozen"]
    judged = judge(arms, **ATTRIBUTED)
    assert judged.attributions[1].status == SUPPORTED  # decay needs no frozen arm
    assert "muon_qk_frozen" in judged.attributions[1].parts[0].reason


def test_in_the_original_pilot_the_parent_is_the_decayed_arm(judge: Judge):
    arms = with_controls(47.0, 20.0, "original", ("adamw",))
    judged = judge(arms, recipe="original", seeds=(42, 43))
    assert judged.attributions[0].share == "decay explains more than half"
    assert "decayed at tau 7.32, force 0.2 costs" in judged.attributions[0].total.text
    assert judged.attributions[0].total.estimate == pytest.approx(30, abs=1.5)
    assert judged.attributions[0].parts[2].estimate == pytest.approx(26, abs=1.5)


def test_elsewhere_in_recipe_original_the_parent_is_not(judge: Judge):
    """At tiny's 195 steps gamma's tau is 0.23."""
    judged = judge(with_controls(47.0, 20.0, "original"), scale="tiny", recipe="original")
    assert judged.attributions[0].status == INCONCLUSIVE
    assert "the plan has no arm adamw_qk_decayed" in judged.attributions[0].reason


# --------------------------------------------------------------------------------------------
# Functional rank; a control that never acted.


def write_surgery(study: pathlib.Path, used: dict[str, int], seeds: tuple[int, ...]) -> None:
    """surgery/: by arm the fewest directions within 0.01 nat, one more or less by seed."""
    for arm, rank in used.items():
        for number, seed in enumerate(seeds):
            least = rank + number % 2
            measured = rank_curves.Row(
                "all", "pre_rope", "centred", "top", least, None, 4096, f"{arm}-{seed}", 3.5, 0.01
            )
            rows = [
                measured._replace(rank=least - 1, delta=0.0101),
                measured,
                measured._replace(rank=1, centring="raw", delta=0.0),
                measured._replace(rank=1, params_sha256="earlier parameters", delta=0.0),
            ]
            path = study / "surgery" / arm / f"seed_{seed}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(rank_curves.to_csv(rows))


def test_functional_rank_is_shown_beside_h1_and_h4(judge: Judge, tmp_path: pathlib.Path):
    judged = judge(CLAIMED, **LONG)
    assert not [c for v in judged.verdicts for c in v.shown if "functional" in c.name]
    used = {"adamw_qk": 10, "adamw_noqk": 20, "muon_qk": 14, "muon_noqk": 30}
    write_surgery(tmp_path / "study", used, (42, 43, 44))
    found = verdicts.judge(results.load_study(tmp_path / "study"))
    trap = clause(found, "H1 functional rank")
    assert trap.estimate == pytest.approx((20 - 10 + 30 - 14) / 2) and trap.unit == "directions"
    assert trap in found.verdict("H1").shown and trap.sesoi == pytest.approx(3.2)
    against = clause(found, "H4 functional rank against AdamW+QK")
    assert against.estimate == pytest.approx(20) and against in found.verdict("H4").shown
    assert found.verdict("H1").word == judged.verdict("H1").word  # shown, it decides nothing


def test_a_control_that_is_its_parent_bit_for_bit_has_no_contrast(judge: Judge, tmp_path):
    arms = {**CLAIMED, "muon_noqk_merged": MUON_BEST}
    assert "bit for bit" not in judge(arms, **LONG).controls[0].reason
    for path in (tmp_path / "study" / "runs" / "muon_noqk_merged").glob("*/summary.json"):
        synthetic_study.edit_sealed(path, '"muon_noqk_merged-', '"muon_noqk-')
    for found in verdicts.judge(results.load_study(tmp_path / "study")).controls:
        assert found.word == INCONCLUSIVE
        assert found.reason.startswith("equal to muon_noqk bit for bit: the clip never acted")
        assert found.estimate is None and found.deciding is None


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
    assert h5.status == SUPPORTED and h5.level is None
    assert h5.correction.startswith("outside the corrected family")
    found = h5.clauses[0]
    assert found.estimate == pytest.approx(8.0, abs=2.0) and found.unit == "points"
    assert set(found.per_seed) == {42, 43, 44}
    assert sum("McNemar" in note for note in found.notes) == 3
    assert any("power: at " in note for note in found.notes)
    assert found.deciding == found.pooled == pytest.approx(found.paired)


def test_h5_is_decided_by_its_own_two_arms(judge_items: Judge):
    """No seed has every arm: what H1 to H4 lack takes nothing from it."""
    scores = {"muon_noqk": 0.36, "adamw_qk": 0.28}

    def lose(downstream: pathlib.Path) -> None:
        shutil.rmtree(downstream.parent / "runs" / "adamw_noqk")

    judged = judge_items(scores, items=2_000, edit=lose)
    assert judged.seeds_used == () and judged.verdict("H5").status == SUPPORTED
    assert judged.verdict("H4").status == INCONCLUSIVE


def test_h5_of_equal_arms(judge_items: Judge):
    judged = judge_items({"muon_noqk": 0.3, "adamw_qk": 0.3})
    assert judged.verdict("H5").status in (INCONCLUSIVE, REFUTED)
    assert judged.verdict("H5").word != OPPOSITE


def test_h5_of_a_worse_arm(judge_items: Judge):
    judged = judge_items({"muon_noqk": 0.28, "adamw_qk": 0.36}, items=2_000)
    assert judged.verdict("H5").status == REFUTED
    assert judged.verdict("H5").word == OPPOSITE


def test_h5_needs_its_items_to_agree():
    """Better over seeds, but the items of one seed fall the other way."""
    found = judgement.Clause("H5", "", judgement.SUPERIORITY, "points", 1.0, word=SUPPORTED)
    first = np.zeros((3, 100))
    first[:, :10] = 1
    second = np.zeros((3, 100))
    assert items._agreed(found, first, second) == found
    second[2, 50:61] = 1
    disagree = items._agreed(found, first, second)
    assert disagree.word == INCONCLUSIVE and "the items of a seed disagree" in disagree.reason
    opposite = dataclasses.replace(found, word=OPPOSITE)
    assert items._agreed(opposite, second, first).word == INCONCLUSIVE
    small = dataclasses.replace(found, word=NEGLIGIBLE)  # McNemar: 10 of 10 items, p .001
    assert items._agreed(small, first, np.zeros((3, 100))).word == INCONCLUSIVE
    assert items._agreed(small, second, second).word == NEGLIGIBLE


def test_h5_of_one_seed(judge_items: Judge):
    judged = judge_items({"muon_noqk": 0.36, "adamw_qk": 0.28}, seeds=(42,))
    found = judged.verdict("H5").clauses[0]
    assert found.status == INCONCLUSIVE and found.reason.endswith("; one seed: nothing is decided")
    assert found.deciding is None and found.p is None
    assert any("McNemar p" in note for note in found.notes)


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


def test_h5_correlation_counts_arms_and_decides_nothing(judge_items: Judge):
    """PR: Muon 52 and 40, AdamW 44 and 15; six runs of two arms are a sample of two."""
    judged = judge_items({"muon_noqk": 0.5, "muon_qk": 0.2, "adamw_noqk": 0.2, "adamw_qk": 0.5})
    for name in ("Muon", "AdamW"):
        found = clause(judged, f"H5 HellaSwag acc_norm with PR, {name}")
        assert found.word == INCONCLUSIVE and found.level == "decides nothing"
        assert "n = 2 arms" in found.reason


def test_resolved_configs_are_those_of_the_presets():
    """The helper's arms are what the configs call them."""
    for arm in (*synthetic_study.ARMS, "adamw_qk_frozen", "muon_qk_decayed", "muon_noqk_merged"):
        found = synthetic_study.make_config(arm, 42)
        assert isinstance(found, config_lib.Config) and found.arm == arm
