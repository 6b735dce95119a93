"""train_step.py: the gradient, its accumulation and sharding, every control, non-finite steps."""

import functools

import jax
import numpy as np
import optax
import pytest
import reference_model
from small_model import Trainer, batch, by_name, initial_params, small

from qkjax import errors, model, optimizer, sharding, train_step
from qkjax.runs import checkpoint

QK_GAMMAS = {"blocks/attention/query_norm/gamma", "blocks/attention/key_norm/gamma"}
ATTENTION = {f"blocks/attention/{name}/kernel" for name in ("query", "key", "value", "output")}


@functools.cache
def trainer(*arm, **fields):
    """Compiled once for all tests."""
    return Trainer(small(*arm, **fields))


def unclipped(*arm):
    return trainer(*arm, optimizer__clip_norm=0.0)


@functools.cache
def gradient(qk_norm, microbatch_sequences=0):
    """The gradient that the step hands to the optimiser: what plain descent at rate 1 subtracts."""
    c = small("adamw", qk_norm, train__microbatch_sequences=microbatch_sequences)
    params = initial_params(c, scale=0.2)
    state, metrics = Trainer(c, optax.sgd(1.0)).run(params, 1)
    return jax.tree.map(np.subtract, params, state.params), metrics[0]


def reference_loss(c, params, tokens):
    """Mean loss in float64 by the numpy reference."""
    total = 0.0
    for row in tokens:
        logits, _ = reference_model.logits(params, row[:-1], c.model)
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= log_probabilities[np.arange(len(row) - 1), row[1:]].sum()
    return total / tokens[:, 1:].size


def test_loss_and_gradient_agree_with_the_float64_reference():
    c = small("adamw", "learned")
    params = jax.tree.map(np.float64, initial_params(c, scale=0.2))
    found, metrics = gradient("learned")
    assert metrics.loss == pytest.approx(reference_loss(c, params, batch(c)), rel=1e-6)
    noise = np.random.default_rng(1).standard_normal
    for name, leaf in by_name(found).items():  # the slope along one direction in each tensor
        direction = jax.tree.map(np.zeros_like, params)
        along = by_name(direction)[name]
        along[...] = noise(along.shape)
        h = 1e-5 / np.linalg.norm(along)
        ahead, behind = (
            reference_loss(
                c, jax.tree.map(lambda p, d, s=s: p + s * d, params, direction), batch(c)
            )
            for s in (h, -h)
        )
        limit = 1e-5 * np.linalg.norm(leaf) * np.linalg.norm(along)
        assert abs((leaf * along).sum() - (ahead - behind) / (2 * h)) < limit, name


def test_grad_norm_is_of_the_whole_gradient():
    found, metrics = gradient("learned")
    squares = sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(found))
    assert metrics.grad_norm == pytest.approx(np.sqrt(squares), rel=1e-5)


@pytest.mark.parametrize("microbatch_sequences", [8, 4])
def test_accumulated_gradient_is_the_same(microbatch_sequences):
    """2 and 4 passes against one. A sum of 256 tokens in another order: 256 roundings of 2^-24."""
    (whole, expected), (cut, found) = gradient("learned"), gradient("learned", microbatch_sequences)
    assert found.loss == pytest.approx(expected.loss, rel=256 * 2**-24)
    for name, leaf in by_name(whole).items():
        error = np.linalg.norm(by_name(cut)[name] - leaf) / np.linalg.norm(leaf)
        assert error < 256 * 2**-24, name


def test_blocks_that_are_computed_again_give_the_same_and_hold_less():
    kept, again = (trainer("adamw", "learned", model__remat=name) for name in ("none", "block"))
    params = initial_params(kept.config, scale=0.2)
    (one, [expected]), (two, [found]) = kept.run(params, 1), again.run(params, 1)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
    for name, leaf in by_name(one.opt_state).items():
        np.testing.assert_allclose(by_name(two.opt_state)[name], leaf, rtol=0, atol=1e-6)
    held = [t.compiled.memory_analysis().temp_size_in_bytes for t in (kept, again)]
    assert held[1] < held[0]


ARMS_OF_THE_MESH_TEST = (("adamw", "learned"), ("muon", "none"))


def three_steps(path):
    """Parameters and losses after three steps of two arms on all devices, into an npz file."""
    arrays = {}
    for arm in ARMS_OF_THE_MESH_TEST:
        c = small(*arm, train__microbatch_sequences=1)  # two passes on each of 8 devices
        trainer_here = Trainer(c)
        # Gradients are summed over the devices; activations stay where they are.
        assert "all-gather" not in trainer_here.compiled.as_text()
        state, metrics = trainer_here.run(initial_params(c), 3)
        arrays |= {f"{arm[0]}/{name}": leaf for name, leaf in by_name(state.params).items()}
        arrays[f"{arm[0]}-losses"] = np.array([m.loss for m in metrics])
        arrays[f"{arm[0]}-grad_norms"] = np.array([m.grad_norm for m in metrics])
    np.savez(path, devices=jax.device_count(), **arrays)


@pytest.mark.process
def test_1_and_8_devices_agree(on_devices, tmp_path):
    """Only the order of sums differs. Weights here are near 1 at most: 1e-6 is a few roundings."""
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_train_step as t; t.three_steps({!r})"
    )
    on_devices(code.format(str(tmp_path / "8.npz")), 8)
    three_steps(tmp_path / "1.npz")
    with np.load(tmp_path / "1.npz") as one, np.load(tmp_path / "8.npz") as eight:
        assert (one["devices"], eight["devices"]) == (1, 8)
        assert one.files == eight.files
        for name in one.files[1:]:
            if name.endswith(("losses", "grad_norms")):
                np.testing.assert_allclose(eight[name], one[name], rtol=1e-6, err_msg=name)
            else:
                np.testing.assert_allclose(eight[name], one[name], rtol=0, atol=1e-6, err_msg=name)
    start = by_name(initial_params(small("muon", "none")))
    with np.load(tmp_path / "8.npz") as eight:  # the weights moved far more than the tolerance
        for name, leaf in start.items():
            assert np.abs(eight[f"muon/{name}"] - leaf).max() > 1e-3, name


@pytest.mark.parametrize(
    ("make", "arm"),
    [
        (trainer, ("adamw", "learned")),
        (unclipped, ("muon", "none", "tiny,fixed")),
        (unclipped, ("muon", "learned", "tiny,original")),
    ],
)
def test_a_repeated_batch_is_learned(make, arm):
    t = make(*arm)
    state, metrics = t.run(initial_params(t.config), 30, repeated=True)
    losses = [m.loss for m in metrics]
    assert losses[0] == pytest.approx(np.log(64), abs=0.1)
    assert losses[-1] < losses[0] - 0.5
    assert state.step == 30 and state.finite
    assert all(m.finite and m.leaf_finite.all() for m in metrics)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_frozen_gammas_stay_1_and_out_of_the_norm(name):
    t = trainer(name, "learned", "tiny,frozen")
    params = initial_params(t.config, scale=0.2)
    state, metrics = t.run(params, 3)
    start, end = by_name(params), by_name(state.params)
    assert start.keys() == end.keys()
    for leaf in QK_GAMMAS:
        assert end[leaf].tobytes() == np.ones_like(end[leaf]).tobytes()
    for leaf in start.keys() - QK_GAMMAS:
        assert not np.array_equal(start[leaf], end[leaf]), leaf
    learned, _ = gradient("learned")  # at gamma 1 the two models have the same gradient
    squares = {leaf: np.square(g, dtype=np.float64).sum() for leaf, g in by_name(learned).items()}
    without = sum(square for leaf, square in squares.items() if leaf not in QK_GAMMAS)
    assert sum(squares.values()) > without * 1.0001
    assert metrics[0].grad_norm == pytest.approx(np.sqrt(without), rel=1e-5)


@pytest.mark.parametrize(
    ("arm", "recipe", "control", "leaves"),
    [
        (("adamw", "learned"), "fixed", "decayed", QK_GAMMAS),
        (("muon", "learned"), "fixed", "decayed", QK_GAMMAS),
        (("muon", "learned"), "fixed", "to_one", QK_GAMMAS),
        (("adamw", "learned"), "original", "undecayed", QK_GAMMAS),
        (("adamw", "learned"), "fixed", "undecayed", QK_GAMMAS),
        (("muon", "none"), "fixed", "merged", ATTENTION),
        (("muon", "none"), "original", "separate", ATTENTION),
        (("muon", "none"), "fixed", "per_head", ATTENTION - {"blocks/attention/output/kernel"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_control_changes_its_own_parameters_and_no_others(arm, recipe, control, leaves):
    """One update from the same state and batch; clipping off, which couples all gradients."""
    parent = unclipped(*arm, f"tiny,{recipe}")
    child = unclipped(*arm, f"tiny,{recipe},{control}")
    params = initial_params(parent.config, scale=0.2)
    (one, _), (other, _) = parent.run(params, 1), child.run(params, 1)
    one, other = by_name(one.params), by_name(other.params)
    assert one.keys() == other.keys()
    # Two programs may round differently; a control moves its parameters by a hundred times more.
    assert {name for name in one if np.abs(one[name] - other[name]).max() > 1e-5} == leaves
    if leaves == QK_GAMMAS:  # new = 1 - rate x (Adam's direction + decay x (1 - target))
        rates, pulls = [], []
        for c in (parent.config, child.config):
            o = c.optimizer
            rates.append(o.rate_of_gamma * c.schedule.factor(0))
            pulls.append(o.gamma_weight_decay * (1 - o.gamma_decay_target))
        assert rates[0] != rates[1]
        for name in leaves:
            direction = (1 - one[name]) / rates[0] - pulls[0]
            expected = 1 - rates[1] * (direction + pulls[1])
            # Near 1 each value is rounded by up to 2^-24; the parent's also becomes a direction.
            atol = (1 + rates[1] / rates[0]) * 2**-24
            np.testing.assert_allclose(other[name], expected, rtol=0, atol=atol)


def test_gamma_decay_reaches_nothing_else_in_later_steps():
    """Adam's moments do not see the decay, so after a step only gamma's own path differs."""
    t = unclipped("adamw", "learned", "tiny,original")
    state, _ = t.run(initial_params(t.config), 1)
    undecayed, _ = unclipped("adamw", "learned", "tiny,original,undecayed").run(
        initial_params(t.config), 1
    )
    moments = by_name(undecayed.opt_state)
    for name, leaf in by_name(state.opt_state).items():
        assert np.linalg.norm(leaf - moments[name]) <= 1e-6 * np.linalg.norm(leaf), name


def overflowing_params(c):
    """Finite loss, and one gradient that overflows: huge values times an output kernel of 0."""
    params = initial_params(c)
    attention = params["blocks"]["attention"]
    attention["value"]["kernel"] = np.full_like(attention["value"]["kernel"], 1e36)
    attention["output"]["kernel"] = np.zeros_like(attention["output"]["kernel"])
    params["final_norm"]["gamma"] = np.full_like(params["final_norm"]["gamma"], 1e3)
    return params


@pytest.mark.parametrize(
    ("make", "arm"),
    [(trainer, ("adamw", "learned")), (unclipped, ("muon", "none", "tiny,fixed"))],
)
def test_non_finite_gradient_changes_nothing_and_is_named(make, arm):
    """With clipping, which would spread the one bad gradient to all, and without."""
    t = make(*arm)
    state, _ = t.run(initial_params(t.config), 2)  # moments that could be spoiled
    params = overflowing_params(t.config)
    before = state._replace(params=params)
    kept, metrics = jax.device_get(t.step(jax.device_put(before), batch(t.config)))
    assert np.isfinite(metrics.loss) and not metrics.finite
    names = np.array(checkpoint.leaf_names(params))
    assert list(names[~metrics.leaf_finite]) == ["blocks/attention/output/kernel"]
    jax.tree.map(np.testing.assert_array_equal, kept, before._replace(finite=np.bool_(False)))
    assert kept.step == 2
    # From there on nothing changes, even where gradients are finite again.
    healthy = kept._replace(params=initial_params(t.config))
    after, metrics = jax.device_get(t.step(jax.device_put(healthy), batch(t.config)))
    assert metrics.leaf_finite.all() and not metrics.finite
    jax.tree.map(np.testing.assert_array_equal, after, healthy)


def test_a_norm_that_overflows_is_a_non_finite_step():
    """Every gradient is finite, the sum of their squares is not: clipping would make them 0."""
    t = trainer("adamw", "learned")
    params = overflowing_params(t.config)
    value = params["blocks"]["attention"]["value"]["kernel"]
    params["blocks"]["attention"]["value"]["kernel"] = np.full_like(value, 1e19)
    before = jax.device_get(t.state(params))
    after, metrics = jax.device_get(t.step(t.state(params), batch(t.config)))
    assert np.isfinite(metrics.loss) and metrics.leaf_finite.all()
    assert np.isinf(metrics.grad_norm) and not metrics.finite
    jax.tree.map(np.testing.assert_array_equal, after, before._replace(finite=np.bool_(False)))


@pytest.mark.parametrize(
    "fields",
    [
        {"learning_rate": 3e38, "weight_decay": 1e3},
        {"learning_rate": 1e3, "weight_decay": 3e38},
    ],
)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_update_beyond_float32_is_a_non_finite_step(name, fields):
    """Loss and gradients are finite; what the optimiser makes of them is not."""
    c = small(name, "none", **{f"optimizer__{field}": value for field, value in fields.items()})
    t = Trainer(c)
    params = initial_params(c)
    before = jax.device_get(t.state(params))
    after, metrics = jax.device_get(t.step(t.state(params), batch(c)))
    assert metrics.leaf_finite.all() and np.isfinite(metrics.grad_norm) and not metrics.finite
    names = np.array(checkpoint.leaf_names(params))
    assert "blocks/attention/query/kernel" in names[~metrics.updated_finite]
    jax.tree.map(np.testing.assert_array_equal, after, before._replace(finite=np.bool_(False)))


def test_non_finite_loss_changes_nothing():
    t = trainer("adamw", "learned")
    params = initial_params(t.config)
    params["embedding"][3, 5] = np.nan
    before = jax.device_get(t.state(params))
    after, metrics = jax.device_get(t.step(t.state(params), batch(t.config)))
    assert np.isnan(metrics.loss) and not metrics.finite and not metrics.leaf_finite.all()
    jax.tree.map(np.testing.assert_array_equal, after, before._replace(finite=np.bool_(False)))


def test_state_is_donated():
    t = trainer("adamw", "learned")
    state = t.state(initial_params(t.config))
    after, _ = t.step(state, batch(t.config))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_fresh_state_has_the_shapes_and_placement_that_are_announced():
    c, mesh = small("muon", "learned"), sharding.make_mesh()
    transformation = optimizer.make_optimizer(c, model.parameter_shapes(c.model))
    state = train_step.init_state(jax.random.key(0), c, transformation, mesh)
    shapes = train_step.state_shapes(c, transformation)
    assert jax.tree.structure(state) == jax.tree.structure(shapes)
    for name, leaf in by_name(state).items():
        expected = by_name(shapes)[name]
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype), name
        assert leaf.sharding.is_equivalent_to(sharding.replicated(mesh), leaf.ndim), name
    assert state.step == 0 and state.finite
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize(
    ("sequences", "microbatch", "passes"),
    [(32, 8, 1), (32, 4, 1), (32, 2, 2), (32, 1, 4), (32, 0, 1), (8, 0, 1), (48, 3, 2)],
)
def test_passes_over_8_devices(sequences, microbatch, passes):
    mesh = jax.sharding.AbstractMesh((8,), ("data",))
    assert sharding.microbatches(mesh, sequences, microbatch) == passes


@pytest.mark.parametrize(
    ("sequences", "microbatch", "message"),
    [
        (4, 0, "train.tokens_per_step: 4 sequences a step for 8 devices.*at most 4 devices"),
        (12, 0, "train.tokens_per_step: 12 sequences a step do not divide over 8 devices.*has 16"),
        (48, 4, "microbatch_sequences: 4 does not divide the 6 .* 8 devices.*one of .1, 2, 3, 6."),
    ],
)
def test_batches_that_do_not_divide_are_refused_with_the_numbers(sequences, microbatch, message):
    mesh = jax.sharding.AbstractMesh((8,), ("data",))
    with pytest.raises(errors.UsageError, match=message):
        sharding.microbatches(mesh, sequences, microbatch)
