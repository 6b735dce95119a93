"""The chunked loss against plain log_softmax: values, gradients, memory, sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkjax import losses

B, T, D, V = 3, 13, 16, 97


def _inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    hidden_BTD = rng.standard_normal((B, T, D)).astype(np.float32)
    table_VD = rng.standard_normal((V, D)).astype(np.float32)
    targets_BT = rng.integers(0, V, (B, T)).astype(np.int32)
    return jnp.asarray(hidden_BTD, dtype), jnp.asarray(table_VD, dtype), jnp.asarray(targets_BT)


def _reference(hidden_BTD, table_VD, targets_BT):
    """Float64 numpy: losses [B, T], gradients of their sum by hidden and by table."""
    hidden, table = np.asarray(hidden_BTD, np.float64), np.asarray(table_VD, np.float64)
    targets = np.asarray(targets_BT)
    logits = hidden @ table.T
    logits -= logits.max(axis=-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    position_losses = -np.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    by_logits = np.exp(log_p)
    np.put_along_axis(
        by_logits,
        targets[..., None],
        np.take_along_axis(by_logits, targets[..., None], axis=-1) - 1,
        axis=-1,
    )
    return position_losses, by_logits @ table, np.einsum("btv,btd->vd", by_logits, hidden)


def _relative_error(found, expected):
    found = np.asarray(found.astype(jnp.float32), np.float64)
    return np.abs(found - expected).max() / np.abs(expected).max()


# 1 token: chunks of one position; 15: T = 13 in chunks of 5 (padded); 10_000: one chunk of all.
@pytest.mark.parametrize("chunk_tokens", [1, 15, 39, 10_000])
def test_value_and_gradients_equal_the_plain_loss(chunk_tokens):
    hidden, table, targets = _inputs()
    position_losses, by_hidden, by_table = _reference(hidden, table, targets)

    def loss(hidden, table):
        return losses.next_token_loss(hidden, table, targets, chunk_tokens=chunk_tokens)

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, table)
    primal = jax.jit(loss)(hidden, table)
    sums = losses.token_losses(hidden, table, targets, chunk_tokens=chunk_tokens)

    assert value.dtype == jnp.float32 and value.shape == ()
    assert sums.dtype == jnp.float32 and sums.shape == (B,)
    assert abs(float(value) / position_losses.sum() - 1) < 1e-6
    assert abs(float(primal) / position_losses.sum() - 1) < 1e-6
    np.testing.assert_allclose(sums, position_losses.sum(axis=1), rtol=1e-6)
    assert _relative_error(gradients[0], by_hidden) < 1e-5
    assert _relative_error(gradients[1], by_table) < 1e-5


def test_gradients_scale_with_the_mean_and_with_a_following_function():
    hidden, table, targets = _inputs()
    position_losses, by_hidden, by_table = _reference(hidden, table, targets)

    def squared_mean(hidden, table):
        return (losses.next_token_loss(hidden, table, targets, chunk_tokens=15) / (B * T)) ** 2

    gradients = jax.grad(squared_mean, argnums=(0, 1))(hidden, table)
    scale = 2 * position_losses.mean() / (B * T)
    assert _relative_error(gradients[0], scale * by_hidden) < 1e-5
    assert _relative_error(gradients[1], scale * by_table) < 1e-5


def test_bfloat16_is_close_and_keeps_the_dtypes():
    hidden, table, targets = _inputs(jnp.bfloat16)
    position_losses, by_hidden, by_table = _reference(hidden, table, targets)
    master = table.astype(jnp.float32)  # a float32 table, as in training, gets a float32 gradient

    def loss(hidden, table):
        return losses.next_token_loss(hidden, table, targets, chunk_tokens=15)

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(hidden, table)
    _, master_gradients = jax.value_and_grad(loss, argnums=(0, 1))(hidden, master)
    assert value.dtype == jnp.float32
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.bfloat16]
    assert [g.dtype for g in master_gradients] == [jnp.bfloat16, jnp.float32]
    # The logits are accumulated in float32 from bfloat16 inputs: only gradients are rounded.
    assert abs(float(value) / position_losses.sum() - 1) < 1e-5
    for gradient, expected in zip(gradients, (by_hidden, by_table), strict=True):
        assert _relative_error(gradient, expected) < 2e-2


def test_large_logits_stay_finite():
    hidden, table, targets = _inputs()
    value, gradients = jax.value_and_grad(
        lambda h: losses.next_token_loss(h, table, targets, chunk_tokens=15)
    )(hidden * 1e4)
    position_losses, _, _ = _reference(hidden * 1e4, table, targets)
    assert abs(float(value) / position_losses.sum() - 1) < 1e-5
    assert np.isfinite(np.asarray(gradients)).all()


def test_memory_stays_far_below_the_full_logits():
    batch, length, dim, vocabulary = 4, 512, 32, 8192
    hidden = jax.ShapeDtypeStruct((batch, length, dim), jnp.float32)
    table = jax.ShapeDtypeStruct((vocabulary, dim), jnp.float32)
    targets = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    full_logits = batch * length * vocabulary * 4

    def loss(hidden, table, targets):
        return losses.next_token_loss(hidden, table, targets, chunk_tokens=256)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    memory = gradient.lower(hidden, table, targets).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.4 * full_logits
    memory = jax.jit(loss).lower(hidden, table, targets).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.3 * full_logits


def test_the_primal_alone_computes_no_gradient():
    hidden, table, targets = _inputs()

    def loss(hidden):
        return losses.next_token_loss(hidden, table, targets, chunk_tokens=15)

    def count_matmuls(function):
        return str(jax.make_jaxpr(function)(hidden)).count("dot_general")

    assert count_matmuls(loss) == 1
    assert count_matmuls(jax.grad(loss)) == 3


def test_wrong_shapes_and_chunks_are_refused():
    hidden, table, targets = _inputs()
    with pytest.raises(ValueError, match=r"\(3, 13, 16\), \(97, 16\) and \(3, 12\)"):
        losses.next_token_loss(hidden, table, targets[:, :-1], chunk_tokens=8)
    with pytest.raises(ValueError, match=r"\(97, 15\)"):
        losses.token_losses(hidden, table[:, :-1], targets, chunk_tokens=8)
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1, found 0"):
        losses.next_token_loss(hidden, table, targets, chunk_tokens=0)


_SHARDED = """
import numpy as np
from qkjax import losses
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(1)
hidden = rng.standard_normal((16, 21, 16)).astype(np.float32)
table = rng.standard_normal((97, 16)).astype(np.float32)
targets = rng.integers(0, 97, (16, 21)).astype(np.int32)

def loss(hidden, table, targets):
    return losses.next_token_loss(hidden, table, targets, chunk_tokens=64)

step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
one_value, one = step(hidden, table, targets)
rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
compiled = step.lower(
    jax.device_put(hidden, rows), jax.device_put(table, whole), jax.device_put(targets, rows)
).compile()
eight_value, eight = compiled(
    jax.device_put(hidden, rows), jax.device_put(table, whole), jax.device_put(targets, rows)
)
np.testing.assert_allclose(eight_value, one_value, rtol=1e-6)
np.testing.assert_allclose(eight[0], one[0], atol=1e-6)
np.testing.assert_allclose(eight[1], one[1], atol=1e-5)
assert eight[0].sharding.is_equivalent_to(rows, 3), eight[0].sharding
# The batch stays where it is: gathering hidden would show as an all-gather.
assert "all-gather" not in compiled.as_text()
print("equal on 8 devices")
"""


@pytest.mark.process
def test_eight_devices_agree_with_one(on_devices):
    assert "equal on 8 devices" in on_devices(_SHARDED, 8)


@pytest.mark.parametrize("size", [1.0, 60.0])
def test_gpus_sum_in_one_pass_over_the_logits(size, monkeypatch):
    """A maximum and a sum at once; exp(60 x 4) would overflow without the maximum."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, default, cuda: cuda(*arrays))
    hidden, table, targets = _inputs()
    expected, by_hidden, by_table = _reference(size * hidden, table, targets)

    def summed(hidden, table):
        return losses.next_token_loss(hidden, table, targets, chunk_tokens=10)

    found, gradients = jax.value_and_grad(summed, argnums=(0, 1))(size * hidden, table)
    assert abs(float(found) / expected.sum() - 1) < 1e-6
    for ours, theirs in zip(gradients, (by_hidden, by_table), strict=True):
        assert _relative_error(ours, theirs) < 1e-5
    apart = losses.token_losses(size * hidden, table, targets, chunk_tokens=10)
    np.testing.assert_allclose(apart, expected.sum(axis=1), rtol=1e-6)


def test_a_logit_that_is_not_finite_makes_the_loss_so_on_gpus(monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, default, cuda: cuda(*arrays))
    hidden, table, targets = _inputs()
    for value in (np.nan, np.inf):
        found = losses.token_losses(hidden.at[0, 0, 0].set(value), table, targets, chunk_tokens=10)
        assert np.isfinite(np.asarray(found)).tolist() == [False, True, True]
