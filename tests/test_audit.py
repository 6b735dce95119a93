"""What decays which parameter: any optax transformation, our arms, public recipes, the command."""

import doctest
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from qkjax import audit, model, optimizer
from qkjax import config as config_lib
from qkjax.runs.directory import RunDirectory

import jax  # isort: skip
import jax.numpy as jnp  # isort: skip
import optax  # isort: skip

ROOT = pathlib.Path(__file__).resolve().parents[1]
PARAMS = {"gamma": jnp.ones(4), "kernel": jax.ShapeDtypeStruct((4, 8), jnp.float32)}
STEPS = 40
RATES = optax.warmup_cosine_decay_schedule(0.0, 8e-3, 10, STEPS, 8e-4)
SUMMED = sum(float(RATES(step)) for step in range(STEPS))


def table(transformation, steps=STEPS):
    rows = audit.decay_table(transformation, PARAMS, steps=steps)
    assert [(row.name, row.shape) for row in rows] == [("gamma", (4,)), ("kernel", (4, 8))]
    return {row.name: row for row in rows}


def test_adamw_decays_everything_and_with_a_mask_what_the_mask_says():
    rows = table(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATES, weight_decay=0.2)))
    for row in rows.values():
        assert row.tau == pytest.approx(0.2 * SUMMED, rel=1e-5)
        assert (row.target, row.proportional, row.first) == (0.0, True, 0.0)
        assert row.last == pytest.approx(0.2 * float(RATES(STEPS - 1)), rel=1e-5)
        assert row.left == pytest.approx(np.exp(-0.2 * SUMMED), rel=1e-5)
    rows = table(optax.adamw(RATES, weight_decay=0.2, mask={"gamma": False, "kernel": True}))
    assert (rows["gamma"].tau, rows["gamma"].target, rows["gamma"].left) == (0.0, None, 1.0)
    assert rows["kernel"].tau == pytest.approx(0.2 * SUMMED, rel=1e-5)


def test_the_muon_of_optax_decays_by_two_numbers():
    muon = optax.contrib.muon(RATES, weight_decay=0.1, adam_weight_decay=0.3)
    rows = table(muon)
    assert rows["kernel"].tau == pytest.approx(0.1 * SUMMED, rel=1e-5)
    assert rows["gamma"].tau == pytest.approx(0.3 * SUMMED, rel=1e-5)


def test_other_forms_of_decay():
    through_sgd = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.01))
    assert table(through_sgd)["gamma"].tau == pytest.approx(0.5 * 0.01 * STEPS, rel=1e-5)
    through_adam = optax.chain(optax.add_decayed_weights(0.5), optax.adam(0.01))
    row = table(through_adam)["gamma"]  # its size is lost: as strong at 2 as at 1
    assert not row.proportional and np.isnan(row.tau) and row.target is None

    def pull(updates, state, params):
        towards_1 = jax.tree.map(lambda u, p: u - 0.01 * (p - 1), updates, params)
        return towards_1, state

    to_one = optax.GradientTransformation(lambda _: optax.EmptyState(), pull)
    row = table(to_one, steps=3)["kernel"]
    assert (row.target, row.tau) == (1.0, pytest.approx(0.03, rel=1e-4))
    assert table(optax.set_to_zero())["gamma"].target is None


def test_decay_that_remembers_is_followed_step_by_step():
    """States that are no counters, and a counter that starts again."""
    momentum = optax.chain(optax.add_decayed_weights(0.5), optax.trace(0.9), optax.scale(-0.001))
    row = table(momentum)["gamma"]
    pulls = [0.0005 * (1 - 0.9 ** (step + 1)) / 0.1 for step in range(STEPS)]
    assert row.tau == pytest.approx(sum(pulls), rel=1e-4)
    assert (row.first, row.last) == pytest.approx((pulls[0], pulls[-1]), rel=1e-4)
    every_fourth = optax.MultiSteps(optax.adamw(RATES, weight_decay=0.2), 4)
    expected = 0.2 * sum(float(RATES(step)) for step in range(STEPS // 4))
    assert table(every_fourth.gradient_transformation())["kernel"].tau == pytest.approx(expected)


@pytest.mark.parametrize(
    ("transformation", "at_a_time"),
    [
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATES, weight_decay=0.2)), 1),
        (optax.contrib.muon(RATES, weight_decay=0.1, adam_weight_decay=0.3), 7),
        (optax.lion(RATES, weight_decay=0.2), STEPS),
    ],
)
def test_updates_side_by_side_are_those_one_after_the_other(transformation, at_a_time, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(audit, "_by_count", lambda *_: (None, False))
        one_by_one = table(transformation)
    monkeypatch.setattr(audit, "_MOST_ELEMENTS", at_a_time * (4 + 4 * 8))
    monkeypatch.setattr(jax.lax, "scan", None)  # they need no other way
    side_by_side = table(transformation)
    for name, row in one_by_one.items():
        assert side_by_side[name][:2] == row[:2]
        np.testing.assert_allclose(side_by_side[name][2:5], row[2:5], rtol=1e-6)
        assert side_by_side[name][5:] == row[5:] == (0.0, True)


@pytest.mark.parametrize(
    ("name", "qk_norm", "words"),
    [
        ("adamw", "learned", "pilot,original"),
        ("adamw", "learned", "tiny,fixed"),
        ("adamw", "learned", "tiny,original,to_one"),
        ("adamw", "none", "tiny,original"),
        ("muon", "learned", "tiny,original"),
        ("muon", "none", "tiny,fixed"),
    ],
)
def test_our_arms_decay_as_their_routing_table_says(name, qk_norm, words):
    config = config_lib.resolve(config_lib.base(name, qk_norm, words)).for_platform("cpu")
    shapes = model.parameter_shapes(config.model)
    routes = {r.name: r for r in optimizer.routing_table(shapes, config)}
    rows = audit.of_config(config)
    assert {row.name for row in rows} == routes.keys()
    factors = sum(
        float(optimizer.learning_rate(config.schedule, 1.0)(s))
        for s in range(config.schedule.num_steps)
    )
    for row in rows:
        route = routes[row.name]
        expected = factors * route.learning_rate * route.weight_decay
        assert row.tau == pytest.approx(expected, rel=1e-3), row.name
        to_one = "to_one" in words and row.name.endswith(("query_norm/gamma", "key_norm/gamma"))
        assert row.target == (float(to_one) if expected else None), row.name


def test_a_gamma_that_no_gradient_holds_keeps_what_tau_says():
    """The table against training itself: the real update, step by step, with zero gradients."""
    config = config_lib.resolve(config_lib.base("adamw", "learned", "tiny,original"))
    tau = {row.name: row.tau for row in audit.of_config(config)}["blocks/attention/key_norm/gamma"]
    gamma = {"blocks": {"attention": {"key_norm": {"gamma": jnp.full((1, 2), 3.0)}}}}
    transformation = optimizer.make_optimizer(config.for_platform("cpu"), gamma)
    zeros = jax.tree.map(jnp.zeros_like, gamma)

    @jax.jit
    def train(params):
        def step(carry, _):
            updates, state = transformation.update(zeros, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        start = (params, transformation.init(params))
        return jax.lax.scan(step, start, None, length=config.schedule.num_steps)[0][0]

    [left] = jax.tree.leaves(train(gamma))
    rate = config.optimizer.learning_rate * config.optimizer.gamma_weight_decay
    np.testing.assert_allclose(left, 3 * np.exp(-tau), rtol=tau * rate)  # (1 - k)^n and e^-nk
    assert tau > 0


def test_recipes_are_what_their_scripts_and_our_own_configs_give():
    taus = {name: recipe.tau for name, recipe in audit.RECIPES.items()}
    assert taus["olmo2-32b"] == pytest.approx(25.6, abs=0.05)
    assert taus["olmo3-7b"] == pytest.approx(19.7, abs=0.05)
    assert taus["original-300m"] == pytest.approx(8.8, abs=0.05)
    assert taus["original-300m-muon"] == pytest.approx(88, abs=0.2)
    assert taus["nanochat"] == taus["qkjax"] == 0
    assert all(
        "2026-" in r.source or "qkjax" in r.source or "docs/" in r.source
        for r in audit.RECIPES.values()
    )
    for name, words in (("original-pilot", "pilot,original"), ("qkjax", "full,fixed")):
        config = config_lib.resolve(config_lib.base("adamw", "learned", words))
        rows = {row.name: row.tau for row in audit.of_config(config)}
        assert rows["blocks/attention/key_norm/gamma"] == pytest.approx(taus[name], rel=1e-3)
        assert config.schedule.num_steps == audit.RECIPES[name].steps


@pytest.mark.parametrize(
    ("tau", "target", "words"),
    [
        (0.0, None, "Nothing pulls"),
        (0.3, 0.0, "key PR ends higher"),
        (1.0, 0.0, "3.3 of 64 lower at 2.4"),
        (7.3, 0.0, "17 to 21 lower at 7.3"),
        (25.6, 0.0, "Above all measured values"),
        (7.3, 1.0, "has not been measured"),
        (float("nan"), None, "not proportional"),
    ],
)
def test_what_is_known_is_said_with_its_strength(tau, target, words):
    said = audit.what_is_known(tau, target)
    assert words in said
    assert ("a hypothesis" in said) == (target == 0.0)


def call(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.process
def test_the_command_audits_a_config_a_run_and_recipes(tmp_path):
    config = config_lib.resolve(config_lib.base("adamw", "learned", "tiny,original"))
    RunDirectory.make(tmp_path / "run").record_config(config, "0" * 64)
    tool = "tools/audit_decay.py"
    by_config = call(tool, "--config=configs/adamw_qk.py:tiny,original")
    by_run = call(tool, f"--workdir={tmp_path / 'run'}")
    assert by_config.stdout == by_run.stdout and by_run.returncode == 0
    assert re.search(
        r"key_norm/gamma +tau 0\.\d+: e\^-tau 0\.\d+ of the distance from 0", by_run.stdout
    )
    done = call(tool, "--recipe=all")
    assert done.stdout.count("  source    ") == len(audit.RECIPES)
    for wrong in ((), ("--recipe=olmo9",), ("--recipe=all", "--workdir=x")):
        done = call(tool, *wrong)
        assert done.returncode == 2 and done.stderr.startswith("ERROR: --"), wrong
        assert done.stderr.count("\n") == 1


@pytest.mark.process
def test_the_example_runs_as_it_stands():
    done = call("examples/audit_my_optimizer.py")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"key_norm/gamma +tau (\d\.\d+)", done.stdout) == ["0.200", "0.000"]
    assert "norm/scale" in done.stdout


def test_the_example_of_the_docstring():
    results = doctest.testmod(audit)
    assert results.attempted >= 4 and results.failed == 0
