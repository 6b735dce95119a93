"""The plan of a study: which steps, in which order, what they train, what they cost."""

import collections
import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import types

import jax
import ml_collections
import pytest
from synthetic_study import make_plan

from qkjax import config as config_lib
from qkjax import errors, files, flops, model
from qkjax.cli import children
from qkjax.runs.directory import RunDirectory
from qkjax.study import plan, plan_cost
from qkjax.targets import target

ROOT = pathlib.Path(__file__).resolve().parents[1]
ARMS = ["adamw_qk", "adamw_noqk", "muon_qk", "muon_noqk"]
PLACES = ("runs", "exports", "downstream", "surgery")  # what a seed of an arm adds to a plan


def counts(study: plan.Plan) -> dict[str, int]:
    return dict(collections.Counter(step.kind for step in study.steps))


def refusal(words: str, **fields) -> str:
    with pytest.raises(errors.UsageError) as refused:
        make_plan(words, **fields)
    return str(refused.value)


def test_full_is_twenty_sweep_runs_twelve_runs_and_the_controls():
    study = make_plan("full")
    assert counts(study) == {
        "dataset": 1,
        "sweep": 20,
        "extension": 4,
        "choice": 4,
        "run": 3 * (4 + 9),
        "export": 39,
        "downstream": 39,
        "surgery": 39,
        "report": 1,
    }
    assert list(study.arms) == [
        *ARMS,
        "adamw_qk_frozen",
        "adamw_qk_undecayed",
        "adamw_qk_to_one",
        "muon_qk_frozen",
        "muon_qk_undecayed",
        "muon_qk_to_one",
        "muon_noqk_merged",
        "adamw_qk_decayed",
        "muon_qk_decayed",
    ]
    assert study.study.seeds == (42, 137, 256)
    assert study.grid("muon_qk") == (0.003, 0.006, 0.012, 0.024, 0.048)
    assert study.grid("adamw_noqk") == (0.0003, 0.0006, 0.0012, 0.0024, 0.0048)
    run = study.run_config(study.step("runs/muon_qk_frozen/seed_137"), 0.024)
    assert (run.arm, run.seed, run.train.num_steps) == ("muon_qk_frozen", 137, 4577)
    assert run.optimizer.adam_learning_rate == 0.006  # by the same factor
    short = study.run_config(study.step("sweep/adamw_qk/lr_0.0003"), 0.0003)
    assert (short.seed, short.train.num_steps, short.eval.steps) == (7, 305, (0, 305))
    assert short.optimizer.learning_rate == 0.0003


def test_rank_surgery_is_a_step_of_every_final_run():
    study = make_plan("tiny")
    step = study.step("surgery/muon_qk/seed_137")
    assert step.needs == ("runs/muon_qk/seed_137",) and step.name in study.step("report").needs
    assert study.surgery_ranks("muon_qk") == (1, 2, 4, 8, 12, 16, 20, 24, 28, 32)  # of 32
    assert make_plan("full").surgery_ranks("muon_qk") == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    assert make_plan("tiny", surgery__ranks=(3, 5)).surgery_ranks("muon_qk") == (3, 5)
    assert "rank surgery: 8 runs, forward passes only, at most 5,767,168 tokens" in (
        plan_cost.describe(study, {})
    )
    other = make_plan("tiny", surgery__tokens=1_024).step(step.name)
    assert other.fingerprint != step.fingerprint  # by its budget
    without = plan.without_surgery(study)
    assert "surgery" not in counts(without) and without.to_dict()["surgery"] is None
    assert without.steps == make_plan("tiny", surgery__tokens=0).steps
    assert "surgery.tokens is -1" in refusal("tiny", surgery__tokens=-1)
    assert "surgery.ranks is (0,)" in refusal("tiny", surgery__ranks=(0,))


def test_recipe_original_has_its_own_controls_and_no_sweep():
    study = make_plan("full,original")
    assert counts(study) == {
        "dataset": 1,
        "run": 3 * 12,
        "export": 36,
        "downstream": 36,
        "surgery": 36,
        "report": 1,
    }
    assert set(study.arms) - set(ARMS) == {
        f"{arm}_{word}"
        for arm in ("adamw_qk", "muon_qk")
        for word in ("frozen", "undecayed", "to_one", "decayed")
    }
    assert study.left_out == {}


def test_the_pilots_arms_in_recipe_original_are_their_own_decayed_controls():
    """At 4,096 tokens a step their tau is 7.32; at 65,536 it is 0.46 and the controls are real."""
    study = make_plan("pilot,original")
    assert study.left_out == {"adamw_qk_decayed": "adamw_qk", "muon_qk_decayed": "muon_qk"}
    assert "left out: muon_qk_decayed, because muon_qk trains the same" in plan_cost.describe(
        study, {}
    )
    assert study.to_dict()["controls"] == [
        "adamw_qk_frozen",
        "adamw_qk_undecayed",
        "adamw_qk_to_one",
        "muon_qk_frozen",
        "muon_qk_undecayed",
        "muon_qk_to_one",
    ]
    larger = make_plan("pilot,original", overrides=("train.tokens_per_step=65536",))
    assert larger.left_out == {}
    assert {"adamw_qk_decayed", "muon_qk_decayed"} < set(larger.arms)
    asked = refusal("pilot,original", controls=("muon_qk_decayed",))
    assert "muon_qk_decayed and muon_qk would train the same" in asked
    # The same decay at another rate of gamma is another arm.
    rates = ("optimizer.gamma_learning_rate=0.012",)
    other = make_plan(
        "pilot,original", arms=("adamw_qk",), overrides=rates, controls=(), optional_controls=()
    )
    assert other.arms["adamw_qk"].config.optimizer.rate_of_gamma == 0.012


@pytest.mark.parametrize(
    ("words", "expected", "tokens", "seeds"),
    [
        (
            "tiny",
            {"sweep": 8, "choice": 4, "run": 8, "export": 8, "downstream": 8, "surgery": 8},
            200_000,
            2,
        ),
        ("tiny,quick", {"run": 4, "downstream": 4}, 100_000, 1),
        (
            "pilot",
            {
                "sweep": 20,
                "extension": 4,
                "choice": 4,
                **dict.fromkeys(("run", "export", "downstream", "surgery"), 21),
            },
            25_000_000,
            3,
        ),
        (
            "small",
            {
                "sweep": 20,
                "choice": 4,
                **dict.fromkeys(("run", "export", "downstream", "surgery"), 39),
            },
            768_000,
            3,
        ),
        (
            "small,original",
            dict.fromkeys(("run", "export", "downstream", "surgery"), 44),
            3_123_200,
            3,
        ),
    ],
)
def test_scales(words, expected, tokens, seeds):
    study = make_plan(words)
    assert counts(study) == {"dataset": 1, **expected, "report": 1}
    assert (study.study.tokens, len(study.study.seeds)) == (tokens, seeds)


def test_tiny_sweeps_two_points_of_100k_tokens_without_extension():
    study = make_plan("tiny")
    assert study.grid("muon_noqk") == (0.012, 0.024) and study.study.sweep.tokens == 100_000
    assert not any(step.kind == plan.EXTENSION for step in study.steps)


def test_every_step_needs_only_earlier_ones_and_the_report_all():
    study = make_plan("full")
    seen: set[str] = set()
    for step in study.steps:
        assert set(step.needs) <= seen, step.name
        seen.add(step.name)
    assert set(study.steps[-1].needs) == seen - {"report"}
    assert study.step("runs/muon_noqk_merged/seed_42").needs == (
        "dataset",
        "sweep/muon_noqk/choice",
    )
    assert study.step("sweep/muon_qk/choice").needs[-1] == "sweep/muon_qk/extension"


def test_fingerprints_follow_what_a_result_depends_on():
    def changed(**fields) -> set[str]:
        other = make_plan("full", **fields)
        return {s.name for s in study.steps if s.fingerprint != other.step(s.name).fingerprint}

    study = make_plan("full")
    assert make_plan("full").fingerprint == study.fingerprint
    assert changed(data_dir="elsewhere") == set()  # data may move
    assert changed(overrides=("log.every_seconds=1",)) == set()
    runs = changed(tokens=200_000_000)
    assert "runs/muon_qk/seed_42" in runs and "exports/muon_qk/seed_42" in runs
    assert not any(name.startswith("sweep/") for name in runs)
    assert len(changed(overrides=("model.norm_eps=1e-5",))) == len(study.steps) - 1  # the dataset
    longer = {"sweep__tokens": 30_000_000}
    assert len(changed(**longer)) == len(study.steps) - 1


@pytest.mark.process
def test_the_command_of_a_step_trains_its_config(tmp_path):
    """Through the real command line: what qkjax.main prints is what the plan has resolved."""
    overrides = (
        "eval.at_tokens=(4096,8192)",
        "optimizer.clip_norm=0.5",
        "checkpoint.keep_all=true",
    )
    study = make_plan("tiny", overrides=overrides, data_dir=str(tmp_path))
    for name, rate in (("sweep/muon_qk/lr_0.024", 0.024), ("runs/adamw_qk/seed_137", None)):
        step = study.step(name)
        arguments = study.arguments(step, tmp_path / "run", rate)
        done = subprocess.run(
            [*children.command(*arguments), "--print_config"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        expected = files.plain(study.run_config(step, rate).to_dict())
        assert json.loads(done.stdout) == expected
        assert f"--workdir={tmp_path / 'run'}" in arguments


MISTAKES = {
    "an arm that is none": ({"arms": ("muon_qkk",)}, "no arm 'muon_qkk'. Did you mean 'muon_qk'?"),
    "a study as an arm": ({"arms": ("study",)}, "no arm 'study'"),
    "a path as an arm": ({"arms": ("../configs/muon_qk",)}, "no arm '../configs/muon_qk'"),
    "an arm twice": ({"arms": ("muon_qk", "muon_qk")}, "arms and controls has an entry twice"),
    "a control alone": (
        {"arms": ("muon_noqk",), "controls": ("muon_qk_frozen",)},
        "muon_qk_frozen belongs to muon_qk, which is not among arms (muon_noqk)",
    ),
    "a tuning seed that is reported": ({"sweep__seed": 42}, "sweep.seed 42 is also one of seeds"),
    "no seeds": ({"seeds": ()}, "seeds is ()"),
    "a grid that descends": ({"sweep__factors": (2.0, 1.0)}, "sweep.factors is (2.0, 1.0)"),
    "an override of the plan's": (
        {"overrides": ("train.tokens=5",)},
        "train.tokens is set by the plan itself",
    ),
    "an override without a value": (
        {"overrides": ("model.d_ff",)},
        "'model.d_ff' must be FIELD=VALUE",
    ),
    "an override of nothing": (
        {"overrides": ("model.dff=3",)},
        "no field 'model.dff'. Did you mean 'model.d_ff'?",
    ),
    "an override of another type": (
        {"overrides": ("model.d_ff=3.5",)},
        "model.d_ff=3.5 is not of type int",
    ),
    "an override that makes it another arm": (
        {"overrides": ("muon.granularity=merged",)},
        "configs/muon_qk.py: trains the arm muon_qk_merged, but the study calls it muon_qk.",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused(mistake):
    fields, expected = MISTAKES[mistake]
    assert expected in refusal("tiny", **fields)


def test_several_mistakes_are_listed_at_once():
    found = refusal("tiny", tokens=0, seeds=(), sweep__tokens=-1)
    assert all(field in found for field in ("tokens is 0", "seeds is ()", "sweep.tokens is -1"))


@pytest.mark.parametrize(
    ("grid", "best", "expected"),
    [
        ((1.0, 2.0, 4.0), 2.0, None),
        ((1.0, 2.0, 4.0), 1.0, 0.5),
        ((1.0, 2.0, 4.0), 4.0, 8.0),
        ((0.012, 0.024), 0.012, 0.006),
        ((1.0,), 1.0, None),
    ],
)
def test_a_grid_goes_on_by_its_own_ratio(grid, best, expected):
    assert plan.extended_rate(grid, best) == expected


def test_the_grid_of_muon_with_rms_scale_is_that_of_adamw():
    study = make_plan("full", overrides=("muon.scale=rms",))
    assert study.grid("muon_qk") == study.grid("adamw_qk")
    run = study.run_config(study.step("sweep/muon_qk/lr_0.0006"), 0.0006)
    assert run.optimizer.adam_learning_rate == 0.0015  # half of its base, as the grid's factor


def test_recipes_differ_in_the_rows_of_their_tables():
    """docs/science.md section 4, at tiny: these rows and no other."""
    rows = plan_cost.recipe_differences(make_plan("tiny").study)
    adamw, muon, qk = "adamw_qk, adamw_noqk", "muon_qk, muon_noqk", "adamw_qk, muon_qk"
    assert sorted(rows) == sorted(
        [
            ("data.end_of_text", True, False, "all"),
            ("model.mlp", "swiglu", "relu2", "all"),
            ("model.d_ff", 352, 512, "all"),
            ("model.norm_eps", 1e-6, 1.19e-7, "all"),
            ("optimizer.learning_rate", 1.2e-3, 6e-3, adamw),
            ("optimizer.learning_rate", 0.012, 0.024, muon),
            ("optimizer.adam_learning_rate", 3e-3, 6e-3, muon),
            ("optimizer.weight_decay", 0.1, 0.2, adamw),
            ("optimizer.weight_decay", 0.01, 0.0, muon),
            ("optimizer.auxiliary_weight_decay", 0.0, 0.2, "all"),
            ("optimizer.gamma_weight_decay", 0.0, 0.2, qk),
            ("optimizer.clip_norm", 1.0, 0.0, "all"),
            ("optimizer.beta2", 0.95, 0.999, "all"),
            ("optimizer.warmup_fraction", 0.02, 0.0, "all"),
            ("optimizer.decay_fraction", 0.2, 0.0, "all"),
            ("muon.granularity", "separate", "merged", muon),
            ("muon.dtype", "auto", "bfloat16", muon),
        ]
    )
    full = plan_cost.recipe_differences(make_plan("full").study)
    assert {row[0] for row in full} - {row[0] for row in rows} == {"train.tokens_per_step"}


@pytest.mark.parametrize("scale", ["tiny", "pilot", "1b5"])
@pytest.mark.parametrize(("optimizer", "qk_norm"), [("adamw", "none"), ("muon", "learned")])
@pytest.mark.parametrize("recipe", ["fixed", "original"])
def test_parameters_are_those_of_the_model(scale, optimizer, qk_norm, recipe):
    run = config_lib.resolve(config_lib.base(optimizer, qk_norm, f"{scale},{recipe}")).for_platform(
        "cpu"
    )
    leaves = jax.tree.leaves(model.parameter_shapes(run.model))
    assert flops.num_parameters(run.model) == sum(leaf.size for leaf in leaves)


def test_costs_of_a_run():
    study = make_plan("full")
    cost = plan_cost.cost(study, study.step("runs/muon_noqk/seed_42"))
    assert cost.tokens == 4577 * 65_536
    assert cost.flop == pytest.approx(cost.tokens * (6 * 87_906_816 + 12 * 22 * 512 * 2048))
    evaluations = len(study.run_config(study.step("runs/muon_noqk/seed_42"), None).eval.steps)
    assert cost.evaluated == evaluations * 1_048_576
    assert cost.whole_passes == 1  # after the last step
    assert cost.disk == 4 * 12 * 87_906_816
    tiny = make_plan("tiny", overrides=("eval.tokens=4096",))
    assert plan_cost.cost(tiny, tiny.step("runs/muon_qk/seed_42")).evaluated == 5 * 4096
    assert "evaluations of 229,376 tokens\n" in plan_cost.describe(tiny, {})
    quick = make_plan("full,quick")
    assert " tokens and 4 passes over the whole validation split\n" in plan_cost.describe(quick, {})


def test_the_time_comes_from_finished_runs_or_is_said_to_be_unknown(tmp_path):
    study = make_plan("tiny")
    unknown = plan_cost.describe(study, {})
    assert "time: no rate is known yet" in unknown and "\nh100  " in unknown
    training = [plan_cost.cost(study, s).flop for s in study.steps if s.kind in plan.TRAINING]
    found = re.findall(r"([128]) (\d+):(\d\d):(\d\d)", unknown)
    seconds = {int(n): 3600 * int(h) + 60 * int(m) + int(s) for n, h, m, s in found}
    assert seconds[1] == pytest.approx(sum(training) / 65e9, abs=1)
    assert seconds[1] / 8 < seconds[8] < seconds[2] < seconds[1]
    for arm, diverged, took in (("adamw_qk", False, 10.0), ("muon_qk", True, 1.0)):
        directory = tmp_path / "sweep" / arm / "lr_1"
        directory.mkdir(parents=True)
        RunDirectory(directory).write_summary(
            {
                "arm": arm,
                "seed": 1,
                "step": 9,
                "tokens": 20_000,
                "params_sha256": "0" * 64,
                "diverged": diverged,
                "diverged_step": 10 if diverged else None,
                "wall_seconds": took,
            },
        )
    rates = plan_cost.measured_rates(tmp_path)
    assert rates == {"adamw_qk": 2_000.0}
    tokens = 97 * 2048 * 8 + 48 * 2048 * 8

    def total(rates: dict[str, float]) -> list[str]:
        lines = plan_cost.describe(study, rates).splitlines()
        return next(line.split() for line in lines if line.startswith("all "))

    assert total(rates)[1] == f"{tokens:,}" and total(rates)[-1] == "0:19:48"
    assert total({**rates, "muon_qk": 4_000.0})[-1] == "0:17:19"  # a quarter of it twice as fast


def test_rates_on_a_target_come_from_one_compilation_for_arms_that_compute_alike(monkeypatch):
    compiled = []

    def compile_arm(config, aim):
        compiled.append(config.arm)
        return types.SimpleNamespace(hours=2.0 if config.optimizer.name == "muon" else 1.0)

    monkeypatch.setattr(plan_cost.estimate, "make", compile_arm)
    study, aim = make_plan("tiny", controls=("muon_qk_frozen",)), target.parse("h100:8")
    rates = plan_cost.rates_on(study, aim)
    assert rates.keys() == study.arms.keys()
    assert len(compiled) == len(set(compiled)) < len(rates)  # frozen gammas are learned ones
    run = study.arms["adamw_qk"].config.train
    assert rates["adamw_qk"] == 2 * rates["muon_qk"] == run.num_steps * 2_048 / 3600
    text = plan_cost.describe(study, rates, aim, 2.0)
    seconds = text.split("\nall ")[1].split("\n")[0].split()[-1].split(":")
    hours = sum(int(part) / 60**i for i, part in enumerate(seconds))
    shown = text.split("\ncost: ")[1].split(" at 2 an hour")[0]
    assert float(shown.replace(",", "")) == pytest.approx(hours * 8 * 2.0, rel=1e-3)
    assert "time on h100:8, compiled, not run, at least: 66%" in text


def test_lines_for_a_scheduler_say_what_they_wait_for():
    study = make_plan("tiny")
    command = ["python", "tools/run_study.py", "--config=configs/study.py:tiny", "--workdir=a b"]
    lines = plan.shell_lines(study, command, "/home/me")
    assert len(lines) == len(study.steps)
    number = {step.name: i for i, step in enumerate(study.steps, start=1)}
    run = lines[number["runs/muon_qk/seed_42"] - 1]
    assert run.startswith("cd /home/me && python tools/run_study.py ")
    assert "'--workdir=a b' --only=runs/muon_qk/seed_42  # " in run
    choice = number["sweep/muon_qk/choice"]
    assert run.endswith(f"# line {number['runs/muon_qk/seed_42']}, stage 4, after 1,{choice}")
    assert lines[0].endswith("--only=dataset  # line 1, stage 1, after none")


@pytest.mark.process
def test_the_command_line_shows_the_plan_and_its_mistakes():
    def call(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "tools/run_study.py", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    shown = call("--config=configs/study.py:tiny", "--config.arms=muon_qk,adamw_qk", "--dry_run")
    assert shown.returncode == 0, shown.stderr
    assert "24 steps:" in shown.stdout and "runs/adamw_qk/seed_137" in shown.stdout
    assert "muon.granularity" in shown.stdout
    printed = call(
        "--config=configs/study.py:tiny",
        "--config.seeds=3",
        "--config.extra_seeds={'muon_qk': (8, 9), 'adamw_qk': 8}",
        "--workdir=w",
        "--print_commands",
        "--wandb",
        "--config.overrides=('eval.tokens=4096',)",
    )
    again = printed.stdout.splitlines()[0].partition(" && ")[2].partition(" --only")[0]
    repeated = subprocess.run(  # every flag survives the shell
        ["bash", "-c", f"{again} --print_commands"], cwd=ROOT, capture_output=True, text=True
    )
    assert repeated.stdout == printed.stdout and "seed_3" in printed.stdout
    assert all(" --wandb --only=" in line for line in printed.stdout.splitlines())
    assert "runs/muon_qk/seed_9" in printed.stdout
    for arguments, expected in (
        (("--config=configs/study.py:tinny", "--dry_run"), "Did you mean 'tiny'?"),
        (("--config=configs/muon_qk.py", "--dry_run"), "not the config of a study"),
        (("--config=configs/study.py:tiny", "--config.arm=x"), "Did you mean 'arms'?"),
        (
            ("--config=configs/study.py:tiny", "--dry_run", "--price_per_hour=2"),
            "--price_per_hour: is the price of a target's hours",
        ),
        (("--dry_run",), "--config: missing. Pass a config file, such as --config=configs/study"),
        (("--config=configs/study.py:tiny",), "--workdir: missing"),
    ):
        refused = call(*arguments)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert refused.stderr.startswith("ERROR: ") and expected in refused.stderr


def test_extra_seeds_are_runs_of_their_arms_alone():
    bare = make_plan("small")
    extra = {"muon_noqk": (7001, 7002), "muon_qk_frozen": 7001}
    study = make_plan("small", extra_seeds=ml_collections.ConfigDict(extra))
    added = {step.name for step in study.steps} - {step.name for step in bare.steps}
    runs = ["muon_noqk/seed_7001", "muon_qk_frozen/seed_7001", "muon_noqk/seed_7002"]
    assert [s.name.partition("/")[2] for s in study.steps if s.kind == "run"][-3:] == runs
    assert added == {f"{kind}/{run}" for run in runs for kind in PLACES}
    assert {s.fingerprint for s in bare.steps if s.kind == "run"} < {
        s.fingerprint for s in study.steps
    }
    recorded = study.to_dict()
    assert recorded["extra_seeds"] == {"muon_noqk": [7001, 7002], "muon_qk_frozen": [7001]}
    assert recorded["seeds"] == [42, 137, 256] and bare.to_dict()["extra_seeds"] == {}
    words = plan_cost.describe(study, {})
    assert f"{'run':<10} {42:>5} " in words and "exports: 42," in words


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"muon": (7,)}, "extra_seeds names muon, which is not among arms and controls"),
        ({"muon_qk": (42,)}, "extra_seeds of muon_qk has a seed twice, or one of seeds"),
        ({"muon_qk": (8, 8)}, "extra_seeds of muon_qk has a seed twice, or one of seeds"),
        ({"muon_qk": (-8,)}, "extra_seeds of muon_qk is (-8,), it must be integers from 0"),
        ({"muon_qk": (7,)}, "sweep.seed 7 is also one of seeds or extra_seeds"),
    ],
)
def test_extra_seeds_that_would_mislead_are_refused(extra, expected):
    assert expected in refusal("small", extra_seeds=ml_collections.ConfigDict(extra))


def test_extra_seeds_of_an_arm_that_is_left_out_name_its_twin():
    extra = ml_collections.ConfigDict({"muon_qk_decayed": (9,)})
    said = refusal("pilot,original", extra_seeds=extra)
    assert "muon_qk_decayed is left out of the plan, because muon_qk trains the same" in said


@pytest.mark.process
def test_a_studys_config_is_no_config_of_a_run():
    done = subprocess.run(
        [sys.executable, "-m", "qkjax.main", "--config=configs/study.py:tiny", "--workdir=x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "configs/study.py:tiny is not the config of a run" in done.stderr


def test_plans_are_data():
    study = make_plan("tiny")
    values = study.to_dict()
    assert values["fingerprint"] == study.fingerprint
    assert values["steps"][1] == files.plain(dataclasses.asdict(study.steps[1]))
