"""model.py and attention.py: counts, the numpy reference, causality, every qk_norm, bfloat16."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_model

from qkjax import attention, flops, model
from qkjax import config as config_lib

SMALL = dataclasses.replace(
    config_lib.resolve(config_lib.base("muon", "none", "tiny")).for_platform("cpu").model.on("cpu"),
    num_layers=2,
    d_model=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    d_ff=40,
    vocab_size=97,
    sequence_length=32,
)
# Compiled whole: eager layers and initialisers would compile operation by operation.
init = jax.jit(model.init, static_argnums=1)
logits = jax.jit(model.logits, static_argnums=2)
apply_with_probe = jax.jit(model.apply_with_probe, static_argnums=(2, 3))


def small(**changes) -> config_lib.ModelConfig:
    return dataclasses.replace(SMALL, **changes)


def wide(**changes) -> config_lib.ModelConfig:
    """Enough values in every matrix to measure their deviation."""
    return small(d_model=64, d_ff=256, vocab_size=500, **changes)


def random_params(c: config_lib.ModelConfig, seed: int = 0) -> model.Params:
    """Parameters at which every part matters: larger matrices than at initialisation, gammas
    away from 1."""
    normal = np.random.default_rng(seed).standard_normal

    def value(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        is_matrix = len(leaf.shape) == 3 or leaf.shape[0] == c.vocab_size
        values = normal(leaf.shape, np.float32)
        return 0.16 * values if is_matrix else 1 + 0.3 * values

    return jax.tree.map(value, model.parameter_shapes(c))


def tokens(c: config_lib.ModelConfig, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, c.vocab_size, (batch, length), np.int32)


@pytest.mark.parametrize(
    ("words", "qk_norm", "expected"),
    [
        ("full", "none", 87_906_816),
        ("full", "learned", 87_909_632),
        ("full,original", "none", 88_627_712),
        ("full,original", "learned", 88_630_528),
        ("1b5", "learned", 1_577_199_616),
        ("1b5", "none", 1_577_191_424),
    ],
)
def test_parameter_counts(words: str, qk_norm: str, expected: int):
    resolved = config_lib.resolve(config_lib.base("adamw", qk_norm, words)).for_platform("cpu")
    assert flops.num_parameters(resolved.model) == expected


@pytest.mark.parametrize("mlp", ["swiglu", "relu2"])
@pytest.mark.parametrize("qk_norm", ["none", "learned", "frozen"])
def test_agrees_with_the_numpy_reference(qk_norm: str, mlp: str):
    c = small(qk_norm=qk_norm, mlp=mlp)
    params = random_params(c)
    batch = tokens(c, 2, 29)
    found = logits(params, batch, c)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for row in range(2):
        expected, _ = reference_model.logits(exact, np.asarray(batch[row]), c)
        assert np.abs(expected).max() > 3  # the comparison would be empty at tiny logits
        np.testing.assert_allclose(found[row], expected, atol=1e-4)


def _all(heads: model.HeadVectors) -> model.HeadVectors:
    return heads


def _keys(heads: model.HeadVectors) -> jax.Array:
    return heads.key_pre_BTGK  # RoPE would hide a rounding


def test_probe_sees_the_keys_of_the_reference():
    c = small(qk_norm="learned")
    params = random_params(c)
    batch = tokens(c, 1, 29)
    _, seen = apply_with_probe(params, batch, c, _all)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    _, keys = reference_model.logits(exact, np.asarray(batch[0]), c)
    np.testing.assert_allclose(seen.key_post_BTGK[:, 0], keys, atol=1e-4)
    assert not np.allclose(seen.key_pre_BTGK, seen.key_post_BTGK, atol=1e-2)


def test_probe_takes_float32_accumulators_under_bfloat16():
    c32, c16 = small(), small(dtype="bfloat16")
    params = random_params(c32)
    _, keys = apply_with_probe(params, tokens(c16, 1, 29), c16, _keys)
    assert keys.dtype == jnp.float32
    rounded = keys.astype(jnp.bfloat16).astype(jnp.float32)
    assert (rounded != keys).mean() > 0.9  # rounded keys would be bfloat16 numbers


def test_a_logit_depends_on_no_later_token():
    c = small(qk_norm="learned")
    params = random_params(c)
    length = 23

    def score(embedded, position):
        """The logits of one position, as a function of what is embedded at every position."""
        table = jnp.asarray(params["embedding"]).at[jnp.arange(length)].set(embedded)
        return model.logits({**params, "embedding": table}, jnp.arange(length)[None], c)[
            0, position, length:
        ].sum()

    embedded = params["embedding"][:length]
    gradient = jax.jit(jax.grad(score))
    for position in range(length):
        reach = np.abs(np.asarray(gradient(embedded, position))).max(axis=1)
        assert (reach[: position + 1] > 0).all()
        assert (reach[position + 1 :] == 0).all()


def plain_attention(q, k, v):
    """The formula, float32 and with the whole square."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    sharing = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, sharing, axis=2), jnp.repeat(v, sharing, axis=2)
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tri(q.shape[1], dtype=bool), scores, -jnp.inf)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v)


def attention_inputs(length: int, heads: int, kv_heads: int) -> list[np.ndarray]:
    """q, k, v, and a weight of each output, at B 2, K 16."""
    normal = np.random.default_rng(0).standard_normal
    numbers = (heads, kv_heads, kv_heads, heads)
    return [normal((2, length, n, 16), np.float32) for n in numbers]


def value_and_gradients(function, q, k, v, weight):
    """The output, and the gradients of its weighted sum by q, k and v."""

    def weighted(*args):
        out = function(*args)
        return (out.astype(jnp.float32) * weight).sum(), out

    gradient = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))
    (_, out), gradients = gradient(q, k, v)
    return out, *gradients


def errors_against_the_formula(implementation: str, inputs: list[np.ndarray], dtype: str):
    """Largest error of the output and of each gradient, relative to the largest value there."""
    q, k, v, weight = inputs
    rounded = [jnp.asarray(x, dtype) for x in (q, k, v)]
    attend = functools.partial(attention.causal_attention, implementation=implementation)
    found = value_and_gradients(attend, *rounded, weight)
    assert all(f.dtype == jnp.dtype(dtype) for f in found)
    expected = value_and_gradients(plain_attention, *rounded, weight)
    return [
        float(jnp.abs(f.astype(jnp.float32) - e).max() / jnp.abs(e).max())
        for f, e in zip(found, (x.astype(jnp.float32) for x in expected), strict=True)
    ]


@pytest.mark.parametrize("length", [1, 2, 127, 300, 2048])
@pytest.mark.parametrize("implementation", ["xla", "blocked"])
def test_attention_agrees_with_the_formula_and_its_gradients(implementation: str, length: int):
    inputs = attention_inputs(length, 4, 2)
    assert max(errors_against_the_formula(implementation, inputs, "float32")) < 1e-5


@pytest.mark.parametrize("length", [1, 300, 2048])
@pytest.mark.parametrize("implementation", ["xla", "blocked"])
def test_attention_agrees_in_bfloat16(implementation: str, length: int):
    inputs = attention_inputs(length, 4, 2)
    assert max(errors_against_the_formula(implementation, inputs, "bfloat16")) < 2e-2


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 1), (6, 2)])
@pytest.mark.parametrize("implementation", ["xla", "blocked"])
def test_query_heads_share_keys_and_values(implementation: str, heads: int, kv_heads: int):
    inputs = attention_inputs(150, heads, kv_heads)
    assert max(errors_against_the_formula(implementation, inputs, "float32")) < 1e-5


@pytest.mark.parametrize("implementation", ["xla", "blocked"])
def test_attention_stays_finite_at_large_scores(implementation: str):
    q, k, v, weight = attention_inputs(150, 2, 2)
    # Scores of some hundreds: exp would overflow without the maximum. They are rounded to 3e-5.
    found = errors_against_the_formula(implementation, [10 * q, 10 * k, v, weight], "float32")
    assert max(found) < 1e-4


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU's kernels, computed on this machine."""
    kernels = pytest.importorskip(
        "jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel"
    )
    call = kernels.pl.pallas_call
    monkeypatch.setattr(
        kernels.pl,
        "pallas_call",
        lambda *args, **options: call(*args, **{**options, "interpret": True}),
    )
    kernels._splash_attention.clear_cache()  # what was traced for a TPU
    yield
    kernels._splash_attention.clear_cache()


def test_splash_attention_agrees_with_the_formula_and_its_gradients(interpreted):
    """Five blocks: before, on and behind the diagonal."""
    inputs = attention_inputs(640, 4, 2)
    assert max(errors_against_the_formula("splash", inputs, "float32")) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads"),
    [(2, 4, 2), (127, 3, 3), (300, 4, 1), (1024, 6, 2)],  # padded, one block, two of 512
)
def test_splash_attention_takes_every_length_and_sharing(interpreted, length, heads, kv_heads):
    inputs = attention_inputs(length, heads, kv_heads)
    assert max(errors_against_the_formula("splash", inputs, "float32")) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("length", [300, 2048])
def test_splash_attention_agrees_in_bfloat16(interpreted, length):
    inputs = attention_inputs(length, 4, 2)
    assert max(errors_against_the_formula("splash", inputs, "bfloat16")) < 2e-2


@pytest.mark.long
def test_splash_attention_stays_finite_at_large_scores(interpreted):
    q, k, v, weight = attention_inputs(150, 2, 2)
    found = errors_against_the_formula("splash", [10 * q, 10 * k, v, weight], "float32")
    assert max(found) < 1e-4


def test_gradients_on_tpus_compute_attention_once():
    """Rematerialised layers keep what the kernel gave: one forward call, two backward."""
    c = small(dtype="bfloat16", attention="splash", sequence_length=128)
    batch = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    gradient = jax.jit(jax.grad(lambda params, batch: model.apply(params, batch, c).sum()))
    lowered = gradient.trace(model.parameter_shapes(c), batch).lower(lowering_platforms=("tpu",))
    calls = re.findall(r'kernel_name = "(splash_\w+)"', lowered.as_text())
    assert sorted(calls) == [
        "splash_mha_dkv_no_residuals",
        "splash_mha_dq_no_residuals",
        "splash_mha_fwd_residuals",
    ]


def test_attention_lowers_to_fused_kernels_for_cuda(monkeypatch):
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    # The only questions to a real device: the version of its cuDNN, and its compute capability.
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91_200)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in attention_inputs(128, 4, 2))

    def value(q, k, v):
        return attention.causal_attention(q, k, v, implementation="cudnn").sum()

    lowered = jax.jit(jax.grad(value)).trace(q, k, v).lower(lowering_platforms=("cuda",))
    assert "__cudnn$fmhaSoftmax" in lowered.as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in lowered.as_text()


def test_cuda_gradients_compute_attention_once(monkeypatch):
    """Rematerialised layers keep what the fused kernel gave: one forward, one backward call."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91_200)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    c = small(dtype="bfloat16", attention="cudnn", sequence_length=128)
    shapes = model.parameter_shapes(c)
    batch = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    gradient = jax.jit(jax.grad(lambda params, batch: model.apply(params, batch, c).sum()))
    text = gradient.trace(shapes, batch).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") == 1
    assert text.count("@__cudnn$fmhaSoftmaxBackward(") == 1


@pytest.mark.parametrize("implementation", ["xla", "blocked"])
def test_gradients_keep_linear_layers_and_attention_alone(implementation: str):
    """Scores are computed twice, once a pass; linear layers once, beside their two gradients."""
    c = small(attention=implementation)
    params, batch = random_params(c), tokens(c, 2, 29)
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: model.apply(p, batch, c).sum()))(params)
    # 7 linear layers: forward, by input, by kernel. Attention: 2 forward; 1 again and 4 backward;
    # tiles before the diagonal and those on it are two pieces of code.
    pieces = 2 if implementation == "blocked" else 1
    assert str(jaxpr).count("dot_general") == 7 * 3 + pieces * (2 + 5)


def test_attention_is_chosen_by_platform_and_refused_by_name():
    def chosen(wanted: str, platform: str, dtype: str) -> str:
        return small(attention=wanted, dtype=dtype).on(platform).attention

    assert chosen("auto", "cpu", "float32") == "blocked"
    assert chosen("auto", "gpu", "bfloat16") == "cudnn"
    assert chosen("auto", "gpu", "float32") == "xla"  # cuDNN's kernels have none
    assert chosen("auto", "tpu", "bfloat16") == "splash"
    assert chosen("auto", "tpu", "float32") == "xla"
    assert chosen("blocked", "tpu", "bfloat16") == "blocked"
    named = config_lib.OPTIONS["model.attention"].bound
    assert set(named.names) == {"auto", *attention.IMPLEMENTATIONS}
    q, k, v, _ = attention_inputs(2, 1, 1)
    for name in ("flash", "auto"):  # what the model computes with is settled before
        with pytest.raises(ValueError, match=f"'{name}' is unknown"):
            attention.causal_attention(q, k, v, implementation=name)


def test_unroll_is_chosen_by_platform_and_kept_by_number():
    def chosen(unroll: int, platform: str, num_layers: int = 22) -> int:
        return small(unroll=unroll, num_layers=num_layers).on(platform).unroll

    assert chosen(0, "cpu") == chosen(0, "tpu") == 1
    assert chosen(0, "gpu") == 22
    assert chosen(0, "gpu", num_layers=32) == 1  # minutes of compilation
    assert chosen(4, "gpu") == chosen(4, "cpu") == 4
    assert chosen(99, "cpu") == 22


def test_what_no_platform_has_settled_runs_everywhere():
    params = random_params(small())
    batch = tokens(small(), 1, 29)
    np.testing.assert_array_equal(
        logits(params, batch, small(attention="auto", unroll=0)),
        logits(params, batch, small(attention="xla", unroll=1)),
    )


def test_arms_of_a_seed_share_initial_values():
    key = jax.random.key(3)
    none = init(key, wide(qk_norm="none", mlp="swiglu"))
    learned = init(key, wide(qk_norm="learned", mlp="swiglu"))
    frozen = init(key, wide(qk_norm="frozen", mlp="swiglu"))
    relu2 = init(key, wide(qk_norm="none", mlp="relu2"))
    assert jax.tree.structure(learned) == jax.tree.structure(frozen)
    for other in (learned, frozen):
        gammas = {
            other["blocks"]["attention"].pop(name)["gamma"].sum().item()
            for name in ("query_norm", "key_norm")
        }
        assert gammas == {2 * 16.0}
        jax.tree.map(np.testing.assert_array_equal, none, other)
    del none["blocks"]["mlp"]["gate"]
    jax.tree.map(np.testing.assert_array_equal, none, relu2)
    another = init(jax.random.key(4), wide())
    assert not np.array_equal(another["embedding"], none["embedding"])


def test_initial_values_are_normal_with_deviation_002():
    params = init(jax.random.key(0), wide())
    for leaf in jax.tree.leaves(params):
        if leaf.ndim == 1 or (leaf.ndim == 2 and leaf.shape[0] == 2):
            assert (leaf == 1).all()
        else:
            assert abs(float(leaf.std()) / 0.02 - 1) < 0.03
    query = params["blocks"]["attention"]["query"]["kernel"]
    assert not np.array_equal(query[0], query[1])  # each layer has values of its own


def test_bfloat16_is_close_to_float32():
    c = small(qk_norm="learned")
    params = init(jax.random.key(3), c)
    batch = tokens(c, 2, 29)
    exact = logits(params, batch, c)
    rough = logits(params, batch, small(qk_norm="learned", dtype="bfloat16"))
    assert rough.dtype == jnp.float32
    error = np.abs(np.asarray(exact - rough))
    assert 0 < error.max() < 0.03 * float(jnp.abs(exact).max())


def test_unrolled_layers_are_the_same_model():
    params = random_params(small())
    batch = tokens(small(), 1, 29)
    np.testing.assert_allclose(
        logits(params, batch, small()),
        logits(params, batch, small(unroll=2)),
        atol=1e-5,
    )
