"""after_update.py: hooks, and QK-Clip against the numpy reference."""

import json

import jax
import numpy as np
import pytest
import reference_model
from small_model import Trainer, batch, by_name, initial_params, small

from qkjax import after_update, sharding

LIMIT = 2.0


def clipped(name="muon", **fields):
    return small(name, "none", **{"optimizer__qk_clip": LIMIT, **fields})


def large_params(c):
    """Logits of some heads above the limit, of others below or never above 0."""
    params = initial_params(c, scale=0.2)
    query = params["blocks"]["attention"]["query"]["kernel"]
    by_head = query.reshape(2, 32, 4, 8)
    by_head *= np.array([[6.0, 0.1, 1.0, 2.0], [0.2, 3.0, 0.5, 8.0]])[:, None, :, None]
    return params


def expected_logits(c, params, tokens):
    """[layers, heads] in float64, of the first sequences of the batch."""
    wide = jax.tree.map(np.float64, params)
    looked_at = tokens[: c.optimizer.qk_clip_sequences, :-1]
    return np.max([reference_model.largest_logits(wide, row, c.model) for row in looked_at], axis=0)


def expected_factors(largest):
    return np.where(np.isfinite(largest) & (largest > LIMIT), LIMIT / largest, 1.0)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_several_steps_against_the_reference(name):
    """Query heads are scaled by what the reference says, nothing else moves, moments stay."""
    c = clipped(name, optimizer__learning_rate=0.05)
    with_clip, without = Trainer(c), Trainer(small(name, "none", optimizer__learning_rate=0.05))
    state = jax.device_get(with_clip.state(large_params(c)))
    seen = set()
    for step in range(4):
        tokens = batch(c, step)
        largest = expected_logits(c, state.params, tokens)
        factors = expected_factors(largest)
        plain, _ = jax.device_get(without.step(jax.device_put(state), tokens))
        state, _ = jax.device_get(with_clip.step(jax.device_put(state), tokens))
        assert with_clip.rows["train/max_logit"] == pytest.approx(largest.max(), rel=1e-5)
        assert with_clip.rows["train/clipped_heads"] == (factors < 1).sum()
        seen |= {bool(f < 1) for f in factors.ravel()}
        ours, theirs = (by_name(s.params) for s in (state, plain))
        path = "blocks/attention/query/kernel"
        scaled = theirs[path].reshape(2, 32, 4, 8) * factors[:, None, :, None]
        np.testing.assert_allclose(ours.pop(path), scaled.reshape(2, 32, 32), rtol=1e-5, atol=1e-8)
        for leaf, value in ours.items():
            np.testing.assert_array_equal(value, theirs[leaf], err_msg=leaf)
        jax.tree.map(np.testing.assert_array_equal, state.opt_state, plain.opt_state)
    assert seen == {False, True}


def test_factors_of_negative_and_non_finite_logits():
    largest = np.float32([-50.0, 0.0, 2.0, 2.5, 1e30, np.inf, np.nan, -np.inf])
    factors = np.asarray(after_update.clip_factors(largest, LIMIT))
    np.testing.assert_array_equal(factors, np.float32([1, 1, 1, 0.8, 2e-30, 1, 1, 1]))


def test_logits_below_zero_are_the_largest_where_all_are():
    """Every query against every key: one vector, and its negative."""
    c = clipped()
    ones = np.ones((1, 5, 2, 8), np.float32)
    vectors = after_update.model.HeadVectors(None, -np.repeat(ones, 2, 2), None, ones, None)
    found = np.asarray(after_update._largest_by_head(vectors))
    np.testing.assert_allclose(found, np.full(4, -8 / np.sqrt(8)), rtol=1e-6)
    assert c.model.num_heads == 4


def test_only_the_first_sequences_are_looked_at():
    c = clipped(optimizer__qk_clip_sequences=3)
    params, mesh = large_params(c), sharding.make_mesh()
    tokens = batch(c)
    factors = jax.jit(lambda p, t: after_update.max_logits(p, t, c, mesh))
    found = np.asarray(factors(params, after_update._first(tokens, c, mesh)))
    np.testing.assert_allclose(found, expected_logits(c, params, tokens), rtol=1e-5)
    tokens[3:] = 0  # others do not matter
    np.testing.assert_allclose(found, expected_logits(c, params, tokens), rtol=1e-5)
    assert not np.allclose(found, expected_logits(clipped(), params, batch(c)), rtol=1e-3)


def test_queries_in_blocks_see_what_one_block_sees(monkeypatch):
    rng = np.random.default_rng(0)
    query = rng.standard_normal((2, 16, 4, 8), np.float32)
    key = rng.standard_normal((2, 16, 2, 8), np.float32)
    vectors = after_update.model.HeadVectors(None, query, None, key, None)
    whole = np.asarray(after_update._largest_by_head(vectors))
    monkeypatch.setattr(after_update, "_QUERY_BLOCK", 5)
    np.testing.assert_allclose(after_update._largest_by_head(vectors), whole, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_clip_that_never_acts_keeps_its_parent_s_bits(name):
    with_clip, without = (
        Trainer(clipped(name, optimizer__qk_clip=1e30)),
        Trainer(small(name, "none")),
    )
    params = initial_params(without.config, scale=0.2)
    (one, _), (other, _) = with_clip.run(params, 4), without.run(params, 4)
    assert with_clip.rows["train/clipped_heads"] == 0
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_step_that_is_not_finite_is_not_clipped():
    """The state that is saved is the last finite one, as it was."""
    t = Trainer(clipped())
    params = large_params(t.config)
    params["embedding"][3, 5] = np.nan
    after, _ = t.run(params, 1)
    assert not after.finite
    jax.tree.map(np.testing.assert_array_equal, after.params, params)
    params["embedding"][3, 5] = 0.0
    state = t.state(params)._replace(finite=np.bool_(False))
    after, _ = jax.device_get(t.step(jax.device_put(state), batch(t.config)))
    assert t.rows["train/clipped_heads"] > 0
    jax.tree.map(np.testing.assert_array_equal, after.params, params)


def test_one_more_hook_needs_no_other_change(monkeypatch):
    def halve(config, mesh):
        def apply(params, total):
            return {**params, "embedding": params["embedding"] / 2}, {"train/halved": total}

        return after_update.Hook(lambda params, tokens: tokens.sum(), apply)

    c = small("adamw", "none")
    params = initial_params(c)
    plain, _ = Trainer(c).run(params, 1)
    monkeypatch.setitem(after_update.HOOKS, "halve", halve)
    t = Trainer(c)
    halved, _ = t.run(params, 1)
    np.testing.assert_array_equal(halved.params["embedding"], plain.params["embedding"] / 2)
    assert t.rows == {"train/halved": batch(c).sum()}


ON_DEVICES = """
import json, sys
sys.path.insert(0, "tests")
import jax, numpy as np
import test_after_update as t
c = t.clipped()
trainer = t.Trainer(c)
state, metrics = trainer.run(t.large_params(c), 1)
tokens = jax.device_put(t.batch(c), t.sharding.batch_sharding(trainer.mesh))
def factors(params, tokens):
    first = t.after_update._first(tokens, c, trainer.mesh)
    return t.after_update.clip_factors(
        t.after_update.max_logits(params, first, c, trainer.mesh), t.LIMIT
    )
found = jax.jit(factors)(t.large_params(c), tokens)
print(json.dumps([jax.device_count(), np.asarray(found).tolist(),
                  state.params["blocks"]["attention"]["query"]["kernel"].tolist()]))
"""


@pytest.mark.process
def test_one_and_eight_devices_clip_alike(on_devices):
    """Four sequences over eight devices, and over one."""
    one, eight = (json.loads(on_devices(ON_DEVICES, devices=n)) for n in (1, 8))
    assert (one[0], eight[0]) == (1, 8)
    factors = np.array(one[1])
    assert (factors < 1).any() and (factors == 1).any()
    np.testing.assert_allclose(eight[1], factors, rtol=1e-6)
    np.testing.assert_allclose(eight[2], one[2], rtol=0, atol=1e-5)
