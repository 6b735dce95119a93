"""evaluation.py against float64: the loss, the spectra, batches and devices."""

import functools

import jax
import numpy as np
import pytest
import reference_model
import references
from small_model import QUICK, Measurer, learned, measured_config, measured_params, skewed_sequences

from qkjax import evaluation, model, sharding

T = 16
METRICS = tuple(
    f"pr/key/{stage}/{centring}"
    for stage in ("pre_rope", "post_rope")
    for centring in ("raw", "centred")
)


@functools.cache
def measured():
    """Eleven sequences in batches of three, so that the last batch has a padded row."""
    _, measure, params = learned()
    return measure(params, skewed_sequences(11))


def spectra_of(keys):
    """Singular values [layers, heads, K] of float64 keys [layers, n, heads, K], and the means."""
    keys = keys.swapaxes(1, 2)
    mean = keys.mean(axis=2, keepdims=True)
    return (
        np.linalg.svd(keys, compute_uv=False),
        np.linalg.svd(keys - mean, compute_uv=False),
        mean[:, :, 0],
    )


def assert_spectra(found, pre_keys, post_keys, num_tokens):
    """Arrays and metrics of an evaluation against float64 decompositions of the same keys."""
    for stage, keys in (("key_pre_rope", pre_keys), ("key_post_rope", post_keys)):
        raw, centred, mean = spectra_of(keys.astype(np.float64))
        for centring, sigma in (("raw", raw), ("centred", centred)):
            name = f"{stage}_{centring}"
            array = found.spectra[name]
            assert array.dtype == np.float32 and array.shape == sigma.shape
            assert (np.diff(array) <= 0).all()
            np.testing.assert_allclose(array, sigma, rtol=0, atol=1e-5 * sigma.max(), err_msg=name)
            ratio = references.participation_ratio(sigma)
            np.testing.assert_allclose(
                references.participation_ratio(array), ratio, rtol=1e-5, err_msg=name
            )
            metric = f"pr/{stage.replace('_', '/', 1)}/{centring}"
            by_layer = ratio.mean(axis=1)  # over heads, then layers
            assert found.metrics[metric] == pytest.approx(by_layer.mean(), rel=1e-5), metric
        np.testing.assert_allclose(
            found.spectra[f"{stage}_mean"], mean, rtol=0, atol=1e-5 * np.abs(keys).max()
        )
    assert found.spectra["num_tokens"] == num_tokens


def rotate_back(keys, base):
    """Pre-RoPE keys [T, K] of one head: minus the angles of `reference_model.rotate`."""
    half = keys.shape[-1] // 2
    turned = (keys[:, :half] + 1j * keys[:, half:]) * np.exp(
        -1j * np.outer(np.arange(len(keys)), base ** (-np.arange(half) / half))
    )
    return np.concatenate([turned.real, turned.imag], axis=-1)


def test_loss_and_spectra_agree_with_the_float64_reference():
    """Nothing is shared with the reference but the parameters; the last batch is partial."""
    (c, _, params), found = learned(), measured()
    exact = jax.tree.map(np.float64, params)
    sums, post = [], []
    for row in skewed_sequences(11):
        logits, keys = reference_model.logits(exact, row[:-1], c.model)
        denominator = np.log(np.exp(logits).sum(-1))
        sums.append((denominator - logits[np.arange(T), row[1:]]).sum())
        post.append(keys)
    post = np.concatenate(post, axis=1)  # [layers, 11 T, heads, K]
    pre = np.stack(
        [
            np.stack([rotate_back(keys[start : start + T, g], c.model.rope_base) for g in range(2)])
            for keys in post
            for start in range(0, 11 * T, T)
        ]
    )  # [layers 11, heads, T, K]
    pre = pre.reshape(2, 11, 2, T, 8).swapaxes(2, 3).reshape(2, 11 * T, 2, 8)
    assert_spectra(found, pre, post, 11 * T)

    np.testing.assert_allclose(found.validation["loss_sum"], sums, rtol=1e-6)
    np.testing.assert_array_equal(found.validation["count"], np.full(11, T, np.float32))
    assert found.metrics["val/loss"] == pytest.approx(np.sum(sums) / (11 * T), rel=1e-6)
    assert found.metrics["val/perplexity"] == pytest.approx(np.exp(np.sum(sums) / (11 * T)), 1e-5)
    ratios = [found.metrics[name] for name in METRICS]
    assert np.diff(np.sort(ratios)).min() > 0.05  # no two of them could be mixed up
    heads = references.participation_ratio(found.spectra["key_post_rope_raw"])
    assert heads.std() > 0.05  # nor heads and layers


def _pre_and_post(heads):
    return heads.key_pre_BTGK, heads.key_post_BTGK


def test_collapsed_keys_far_from_0_over_two_hundred_batches():
    """Keys dumped by the plain forward pass, decomposed in float64 at one go."""
    c = measured_config("none", 2)
    params = measured_params(c)
    params["embedding"] += 0.6  # every token shares a direction, which the keys multiply
    kernel = params["blocks"]["attention"]["key"]["kernel"]
    spread = 10.0 ** -np.arange(0, 4, 0.5, np.float32)  # 8 directions, down to 1/3000
    kernel[...] = (0.2 * kernel.reshape(2, 32, 2, 8) * spread).reshape(2, 32, 16) + 0.1
    sequences = skewed_sequences(401)
    dump = jax.jit(model.apply_with_probe, static_argnums=(2, 3))
    arguments = (params, sequences[:, :-1])
    compiled = dump.lower(*arguments, c.model.on("cpu"), _pre_and_post).compile(
        compiler_options=QUICK
    )
    pre, post = (np.asarray(keys).reshape(2, -1, 2, 8) for keys in compiled(*arguments)[1])
    assert pre.shape[1] == 401 * T
    _, centred, mean = spectra_of(pre.astype(np.float64))
    deviation = centred[..., 0] / np.sqrt(401 * T)
    assert (np.linalg.norm(mean, axis=-1) > 10 * deviation).all()
    assert (centred[..., 0] > 100 * centred[..., -1]).all()
    assert_spectra(Measurer(c)(params, sequences), pre, post, 401 * T)


def test_tokens_of_padded_rows_are_not_read():
    c, measure, params = learned()
    params = jax.device_put(params, sharding.replicated(measure.mesh))
    results = []
    for filling in (0, 63):
        tokens = skewed_sequences(measure.size)
        tokens[-1] = filling
        valid = np.arange(measure.size) < measure.size - 1
        statistics = evaluation.empty_statistics(c, measure.mesh)
        arguments = (params, statistics, tokens, valid)
        step = measure.evaluator._program("step", measure.size, *arguments)
        results.append(jax.device_get(step(*arguments)))
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert results[0][1][-1] == 0 and (results[0][1][:-1] > 0).all()


def measure_to(path):
    """The evaluation of `measured` on all devices, as arrays of an npz file."""
    found = measured()
    np.savez(
        path,
        devices=jax.device_count(),
        **found.spectra,
        **found.validation,
        **{k: v for k, v in found.metrics.items() if not k.startswith("perf/")},
    )


@pytest.mark.process
def test_1_and_8_devices_agree(on_devices, tmp_path):
    """Eight devices take the eleven sequences in one batch: other merges of the same keys."""
    code = "import sys; sys.path.insert(0, 'tests'); import test_evaluation; "
    code += "test_evaluation.measure_to({!r})"
    on_devices(code.format(str(tmp_path / "8.npz")), 8)
    measure_to(tmp_path / "1.npz")
    with np.load(tmp_path / "1.npz") as one, np.load(tmp_path / "8.npz") as eight:
        assert (one["devices"], eight["devices"]) == (1, 8)
        assert one.files == eight.files
        for name in one.files[1:]:
            limit = 2e-6 * np.abs(one[name]).max()  # a dozen roundings
            np.testing.assert_allclose(eight[name], one[name], rtol=0, atol=limit, err_msg=name)


def test_interrupted_evaluation_is_given_up():
    _, measure, params = learned()
    asked = []

    def after_the_second_batch():
        asked.append(None)
        return len(asked) > 2

    assert measure(params, skewed_sequences(40), after_the_second_batch) is None
    assert len(asked) == 3


def test_few_sequences_are_not_padded_to_a_whole_batch():
    c = measured_config("learned", 4)
    one = evaluation.Evaluator(c, jax.sharding.AbstractMesh((1,), ("data",)))
    eight = evaluation.Evaluator(c, jax.sharding.AbstractMesh((8,), ("data",)))
    assert [one.sequences_per_batch(n) for n in (1, 3, 4, 5)] == [1, 3, 4, 4]
    assert [eight.sequences_per_batch(n) for n in (1, 8, 9, 33)] == [8, 8, 16, 32]


def test_zero_keys_have_no_participation_ratio_and_a_loss():
    _, measure, params = learned()
    params = jax.tree.map(np.copy, params)
    params["blocks"]["attention"]["key"]["kernel"][1] = 0
    found = measure(params, skewed_sequences(4))
    assert np.isfinite(found.metrics["val/loss"])
    assert all(np.isnan(found.metrics[name]) for name in METRICS)
    heads = len(found.spectra["key_pre_rope_raw"][1])
    assert found.metrics["pr/undefined_heads"] == heads and heads > 0
    assert (found.spectra["key_pre_rope_raw"][1] == 0).all()
    assert (found.spectra["key_pre_rope_raw"][0] > 0).all()
