"""What --dry_run says that seeds can decide."""

import dataclasses
import pathlib
import subprocess

import numpy as np
import pytest
import synthetic_study
from synthetic_study import LOSS, PR

from qkjax.cli import children
from qkjax.study import plan, questions
from qkjax.verdicts import power, results


def lines(study: plan.Plan) -> list[str]:
    return list(power.describe(study))


def cells(text: list[str], name: str) -> list[list[tuple[int, int, int]]]:
    """Of each row of a hypothesis: (supported, refuted, inconclusive) by S, at effects and none."""
    found = []
    for line in text:
        if line.strip().startswith(f"{name} "):
            shares = line.replace("/ ", "/").replace("/ ", "/").split()
            found.append(
                [tuple(int(x) for x in cell.split("/")) for cell in shares if cell.count("/") == 2]
            )
    return found


def test_full_says_what_each_number_of_seeds_decides():
    text = lines(synthetic_study.make_plan("full"))
    for name in ("H1", "H2", "H3", "H4", "H5", "A adamw", "A muon"):
        rows = cells(text, name)
        assert len(rows) == len(power.SHARED)
        for row in rows:
            assert len(row) == 2 * len(power.SEEDS)
            assert all(abs(sum(cell) - 100) <= 1 for cell in row)
            assert all(supported <= 4 for supported, _, _ in row[len(power.SEEDS) :])
            gained = [supported for supported, _, _ in row[: len(power.SEEDS)]]
            assert gained == sorted(gained)
    h1 = cells(text, "H1")[0]
    assert 30 < h1[0][0] < 70 and h1[1][0] > 97
    assert "assumed: PR 1.47, " in text[1] and "--power_from=STUDY" in text[1]
    assert "H1 3," in text[-2]
    assert text[-1].startswith("  this plan, 3 seeds (42, 137, 256): likely to decide H1")
    assert "too few for H2" in text[-1]


def test_the_original_design_of_two_seeds_says_what_it_can_decide():
    text = lines(synthetic_study.make_plan("full", seeds=(42, 137)))
    assert text[-1].startswith(
        "  this plan, 2 seeds (42, 137): likely to decide nothing; too few for H1, H2"
    )


def test_in_the_original_pilot_the_parent_is_the_decayed_arm():
    design = power.Design.of(synthetic_study.make_plan("pilot,original"))
    assert design.attributed["muon"][:2] == ("muon_noqk", "muon_qk")
    assert "muon_qk_frozen" in design.attributed["muon"] and design.pilot
    assert power.Design.of(synthetic_study.make_plan("tiny")).attributed == {}


def test_a_rehearsal_and_one_seed_say_so():
    tiny = lines(synthetic_study.make_plan("tiny"))
    assert tiny[-1] == "  this plan, 2 seeds (42, 137): a rehearsal, nothing is decided"
    left_out = [line for line in tiny if "left out" in line]
    assert left_out == [
        "  H3: left out, budget too short: runs end at step 97, they have to pass 244",
        "  H5: left out, the plan has no downstream scores",
    ]
    assert not cells(tiny, "H3") and cells(tiny, "H2")
    one = lines(synthetic_study.make_plan("tiny,quick"))
    assert one[-1] == "  this plan: one seed: nothing is decided"


def test_a_plan_without_a_question_says_so():
    text = lines(synthetic_study.make_plan("tiny", arms=("muon_qk", "adamw_qk")))
    assert text[-1] == "  this plan answers none of H1 to H5"


def test_a_hypothesis_that_leaves_the_family_costs_the_others_nothing():
    """Holm over two hypotheses instead of three: more power for each of them."""
    design = power.Design(("H1", "H2", "H3", "H4"), {}, False, 64, pilot=False)
    spread = power.Spread(power.assumed(64))
    whole = design.simulate(True, spread, 5)["H4"].supported
    smaller = dataclasses.replace(design, family=("H1", "H4")).simulate(True, spread, 5)["H4"]
    assert smaller.supported > whole + 0.03


@pytest.mark.parametrize("words", ["tiny", "full", "pilot,original"])
def test_study_json_names_what_the_plan_cannot_answer(words: str):
    study = synthetic_study.make_plan(words)
    found = study.to_dict()["unanswerable"]
    assert found == study.unanswerable()
    assert ("H3" in found) == (words == "tiny")
    assert ("H5" in found) == (words != "full")


@pytest.mark.parametrize(
    ("fields", "name", "why"),
    [
        ({"arms": ("muon_qk", "muon_noqk"), "controls": ()}, "H1", "no arm adamw_qk and no arm"),
        ({"arms": ("adamw_qk", "muon_qk", "muon_noqk"), "controls": ()}, "H2", "no arm adamw_noqk"),
        ({"overrides": ("eval.at_tokens=(1000000,)",)}, "H3", "no evaluation at step 244"),
        ({"tokens": 16_000_000}, "H3", "runs end at step 244, they have to pass 244"),
        ({"downstream": ""}, "H5", "no downstream scores"),
    ],
)
def test_why_a_plan_cannot_answer(fields: dict, name: str, why: str):
    fields = {**fields, "optional_controls": ()}
    assert why in synthetic_study.make_plan("full", **fields).unanswerable()[name]


def test_growth_is_measured_from_a_quarter_of_the_steps_at_small():
    config = synthetic_study.make_config("muon_qk", 42, "pilot")
    assert questions.growth_step(config) is None
    assert questions.growth_step(synthetic_study.make_config("muon_qk", 42, "full")) == 381
    evaluated = dataclasses.replace(config.eval, steps=(0, 61, 122, 244, 381))
    small = dataclasses.replace(config, scale="small", eval=evaluated)
    assert small.train.num_steps == 381
    assert questions.growth_step(small) == 122  # nearest to 95


def test_noise_is_as_wide_and_as_shared_as_it_says():
    spread = power.Spread({"PR": 2.0}, shared=0.5, factors={"muon_noqk": 4.0})
    chance = np.random.default_rng(0)
    values = power.draw("PR", questions.ARMS, {}, spread, 3, chance, 20_000).reshape(-1, 4)
    assert values.std(axis=0) == pytest.approx([2, 2, 2, 8], rel=0.02)
    shares = np.corrcoef(values.T)
    assert shares[0, 2] == pytest.approx(0.5, abs=0.02)  # both QK arms
    assert shares[0, 1] == pytest.approx(0, abs=0.02) == shares[1, 3]
    heavy = power.Spread({"PR": 2.0}, freedom=5)
    tails = power.draw("PR", questions.ARMS, {}, heavy, 3, chance, 20_000)
    assert tails.std() == pytest.approx(2, rel=0.03)
    assert np.mean((tails / 2) ** 4) > 4  # a normal has 3


@pytest.mark.process
def test_the_command_takes_spreads_from_a_finished_study(tmp_path: pathlib.Path):
    noise = {PR: 3.0, LOSS: 0.05}
    synthetic_study.write(
        tmp_path / "before", synthetic_study.arms(32), seeds=(1, 2, 3), noise=noise, scale="tiny"
    )

    def dry_run(study: str) -> subprocess.CompletedProcess:
        flags = ("--config=configs/study.py:tiny", "--dry_run", f"--power_from={tmp_path / study}")
        return subprocess.run(
            children.command("study", *flags),
            cwd=synthetic_study.ROOT,
            capture_output=True,
            text=True,
        )

    done = dry_run("before")
    assert done.returncode == 0, done.stderr
    known = power.measured(results.load_study(tmp_path / "before"), 32)
    assert f"from before: PR {known['PR']:.3g}" in done.stdout
    assert "aa 0.03" in done.stdout and "assumed:" in done.stdout  # equal in all: not known
    missing = dry_run("nothing")
    assert missing.returncode == 2 and "study.json: no such file" in missing.stderr
