"""What an evaluation measures, against float64 from vectors dumped by the numpy reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import reference_model
import references
import small_model
import small_run
from marks import with_long

from qkjax import attention, evaluation, model, sharding, train
from qkjax import config as config_lib
from qkjax.data import manifest as manifest_lib
from qkjax.data import pipeline
from qkjax.measures import moments, probes, ranks, spectral
from qkjax.runs.directory import RunDirectory

STEPS, N, H, G, K, T = 4, 2, 4, 2, 16, small_run.LENGTH
ARMS = {
    "adamw_qk": ("adamw", "learned", "tiny"),
    "adamw_noqk": ("adamw", "none", "tiny"),
    "muon_qk": ("muon", "learned", "tiny"),
    "muon_noqk": ("muon", "none", "tiny"),
}
PLACES = {"none": ("pre_rope", "post_rope")}
PLACES["learned"] = ("pre_norm", "post_norm", *PLACES["none"])
KERNELS = {"query": H, "key": G, "value": G, "output": H}  # and their heads


def stages(qk_norm):
    return [f"{side}_{place}" for side in ("key", "query") for place in PLACES[qk_norm]] + ["value"]


def heads_of(stage):
    return H if stage.startswith("query") else G


def array_shapes(qk_norm):
    """Every array of docs/run_directory.md, with its shape."""
    shapes = {"num_tokens": (), "wqk_singular_values": (N, H, K)}
    shapes |= {f"qk_pre_rope_{centring}": (N, H, K) for centring in ("raw", "centred")}
    shapes |= {f"weight_{name}": (N, heads, K) for name, heads in KERNELS.items()}
    for stage in stages(qk_norm):
        for what in ("raw", "centred", "mean"):
            shapes[f"{stage}_{what}"] = (N, heads_of(stage), K)
    for side in ("key", "query"):
        for what in ("mean", "p99", "max"):
            shapes[f"{side}_norm_{what}"] = (N, heads_of(side))
    shapes |= {name: (N, H) for name in ("max_logit", "entropy", "sink_mass")}
    shapes |= {name: (N, G) for name in ("aa", "aa_ratio", "overlap")}
    if qk_norm != "none":
        shapes |= {"gamma_q": (N, K), "gamma_k": (N, K)}
    return shapes


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    return small_run.make_dataset(tmp_path_factory.mktemp("probes") / "data")


@pytest.fixture(scope="session")
def runs(dataset, tmp_path_factory):
    """arm -> config and directory of a run of four steps, two kv heads."""

    @functools.cache
    def run(arm):
        optimizer, qk_norm, words = ARMS[arm]
        rate = {"optimizer__learning_rate": 0.02}
        if optimizer == "muon":
            rate["optimizer__adam_learning_rate"] = 0.05  # gammas well away from 1
        resolved = small_run.make_config(
            dataset,
            optimizer,
            qk_norm,
            words,
            model__num_heads=H,
            model__num_kv_heads=G,
            train__tokens=STEPS * small_run.TOKENS_PER_STEP,
            eval__at_tokens=(),
            eval__batch_sequences=3,
            **rate,
        )
        workdir = tmp_path_factory.mktemp(arm) / "run"
        train.train_and_evaluate(resolved, workdir)
        return resolved, workdir

    return run


def dumped(params, tokens_BT, c):
    """Queries and keys of every stage, and values, float64 [N, B, heads, T, K]."""
    layers = []
    x = params["embedding"][tokens_BT] * np.sqrt(c.d_model)
    for layer in range(N):
        block = {
            name: reference_model._layer(tree, layer) for name, tree in params["blocks"].items()
        }
        p = block["attention"]
        normed = reference_model.rms_norm(x, block["attention_norm"]["gamma"], c.norm_eps)
        split = {}
        for name in ("query", "key", "value"):
            heads = normed @ p[name]["kernel"]
            heads = heads.reshape(*tokens_BT.shape, -1, K)
            if f"{name}_norm" in p:
                split[f"{name}_pre_norm"] = heads.swapaxes(1, 2)
                ones = np.ones(K)
                split[f"{name}_post_norm"] = reference_model.rms_norm(
                    heads, ones, c.norm_eps
                ).swapaxes(1, 2)
                heads = reference_model.rms_norm(heads, p[f"{name}_norm"]["gamma"], c.norm_eps)
            if name == "value":
                split["value"] = heads.swapaxes(1, 2)
            else:
                split[f"{name}_pre_rope"] = heads.swapaxes(1, 2)
                split[f"{name}_post_rope"] = rotated(heads.swapaxes(1, 2), c.rope_base)
        layers.append(split)
        x = x + np.stack([reference_model._attention(p, row, c)[0] for row in normed])
        normed = reference_model.rms_norm(x, block["mlp_norm"]["gamma"], c.norm_eps)
        x = x + reference_model._mlp(block["mlp"], normed, c)
    return {name: np.stack([layer[name] for layer in layers]) for name in stages(c.qk_norm)}


def rotated(vectors, base):
    return np.stack(
        [reference_model.rotate(row, base) for row in vectors.reshape(-1, *vectors.shape[-2:])]
    ).reshape(vectors.shape)


def of_attention(q, k):
    """[..., H] largest causal logit, entropy in nats, sink; q [..., H, T, K], k [..., G, T, K]."""
    k = np.repeat(k, q.shape[-3] // k.shape[-3], axis=-3)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    causal = np.tri(q.shape[-2], dtype=bool)
    scores = np.where(causal, scores, -np.inf)
    p = reference_model.softmax(scores)
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)
    return scores.max(axis=(-2, -1)), entropy.mean(-1), p[..., 1:, 0].mean(-1)


def pr_cov(values):
    return values.sum(-1) ** 2 / (values**2).sum(-1)


def offline(params, tokens_BT, c):
    """Every array of an evaluation, float64, by the formulas of docs/science.md section 5."""
    found = {"num_tokens": np.float64(tokens_BT.size)}
    by_sequence = dumped(params, tokens_BT, c)
    merged = {}
    for name, vectors in by_sequence.items():
        rows = vectors.swapaxes(1, 2).reshape(N, vectors.shape[2], -1, K)
        found[f"{name}_mean"] = rows.mean(axis=2)
        merged[name] = rows - rows.mean(axis=2, keepdims=True)
        found[f"{name}_raw"] = np.linalg.svd(rows, compute_uv=False)
        found[f"{name}_centred"] = np.linalg.svd(merged[name], compute_uv=False)
        side, _, stage = name.partition("_")
        if stage == "post_rope":  # RoPE keeps lengths: the norms of either stage
            norms = np.linalg.norm(rows, axis=-1)
            found[f"{side}_norm_mean"] = norms.mean(-1)
            found[f"{side}_norm_p99"] = np.quantile(norms, 0.99, axis=-1, method="inverted_cdf")
            found[f"{side}_norm_max"] = norms.max(-1)
    chosen = slice(0, probes.ATTENTION_SEQUENCES)
    largest, entropy, sink = of_attention(
        by_sequence["query_post_rope"][:, chosen], by_sequence["key_post_rope"][:, chosen]
    )
    found["max_logit"], found["entropy"] = largest.max(axis=1), entropy.mean(axis=1)
    found["sink_mass"] = sink.mean(axis=1)
    for centring in ("raw", "centred"):  # of the whole [n, n] matrix
        q, k = (
            merged[name] + (found[f"{name}_mean"][:, :, None] if centring == "raw" else 0)
            for name in ("query_pre_rope", "key_pre_rope")
        )
        products = q @ np.repeat(k, H // G, axis=1).swapaxes(-1, -2)
        found[f"qk_pre_rope_{centring}"] = np.linalg.svd(products, compute_uv=False)[..., :K]

    keys = merged["key_pre_rope"]
    covariance = np.einsum("ngta,ngtb->ngab", keys, keys)
    rank = pr_cov(np.linalg.eigvalsh(covariance))
    found["aa_ratio"] = rank / pr_cov(np.diagonal(covariance, axis1=-2, axis2=-1))
    r0 = (rank + 2) / (K + 2)
    found["aa"] = np.where(r0 > 0.95, np.nan, (found["aa_ratio"] - r0) / (1 - r0))
    leading = np.linalg.svd(keys, full_matrices=False)[2][..., :8, :]
    overlap = (np.einsum("nak,nbk->nab", leading[:, 0], leading[:, 1]) ** 2).sum((1, 2)) / 8
    found["overlap"] = np.stack([overlap, overlap], axis=1)

    p = params["blocks"]["attention"]
    for name, heads in KERNELS.items():
        kernel = p[name]["kernel"]  # output: [N, heads K, D]
        kernel = kernel.swapaxes(1, 2) if name == "output" else kernel
        cut = [kernel[:, :, head * K : (head + 1) * K] for head in range(heads)]
        found[f"weight_{name}"] = np.linalg.svd(np.stack(cut, axis=1), compute_uv=False)
    kernels = {}
    for name, heads in (("query", H), ("key", G)):
        kernel = p[name]["kernel"].reshape(N, c.d_model, heads, K)
        if c.qk_norm != "none":
            found[f"gamma_{name[0]}"] = gamma = p[f"{name}_norm"]["gamma"]
            kernel = kernel * gamma[:, None, None]
        kernels[name] = np.repeat(kernel, H // heads, axis=2)
    products = np.einsum("nihk,njhk->nhij", kernels["query"], kernels["key"])
    found["wqk_singular_values"] = np.linalg.svd(products, compute_uv=False)[..., :K]
    return found


def offline_metrics(arrays, qk_norm):
    found = {}
    for stage in stages(qk_norm):
        of_mean = arrays["num_tokens"] * (arrays[f"{stage}_mean"] ** 2).sum(-1)
        of_all = (arrays[f"{stage}_raw"] ** 2).sum(-1)
        found[f"mean_share/{stage.replace('_', '/', 1)}"] = of_mean / of_all
        for centring in ("raw", "centred"):
            sigma = arrays[f"{stage}_{centring}"]
            for layer_head in np.ndindex(sigma.shape[:2]):
                values = references.measures(sigma[layer_head])
                for name, value in values.items():
                    metric = f"{name}/{stage.replace('_', '/', 1)}/{centring}"
                    found.setdefault(metric, []).append(value)
    found |= {
        "aa/key": arrays["aa"][np.isfinite(arrays["aa"])],
        "overlap/key": arrays["overlap"],
        "attention/max_logit": arrays["max_logit"].max(),
        "attention/entropy": arrays["entropy"],
        "norm/key": arrays["key_norm_mean"],
        "norm/query": arrays["query_norm_mean"],
        "norm/key_largest_layer": arrays["key_norm_mean"].mean(axis=1).max(),
        "norm/query_largest_layer": arrays["query_norm_mean"].mean(axis=1).max(),
        "sink/mass": arrays["sink_mass"],
        "sink/uniform": (1 / np.arange(2, T + 1)).mean(),
        "wqk/pr": pr_cov(arrays["wqk_singular_values"]),  # of sigma, not of sigma^2: pr
    }
    for centring in ("raw", "centred"):
        found[f"pr/qk/pre_rope/{centring}"] = pr_cov(arrays[f"qk_pre_rope_{centring}"])
    for name in KERNELS:
        found[f"weight/pr/{name}"] = pr_cov(arrays[f"weight_{name}"])
    for side in ("query", "key") if qk_norm != "none" else ():
        gamma = arrays[f"gamma_{side[0]}"]
        low, high = np.quantile(np.abs(gamma), [0.1, 0.9], axis=1)
        found[f"gamma/{side}_pr"] = pr_cov(np.abs(gamma))
        found[f"gamma/{side}_spread"] = np.median(high / low)
        found[f"gamma/{side}_negative"] = gamma < 0
    return {name: np.mean(values) for name, values in found.items()}


# Of each optimiser one arm, with and without QK-Norm, in every test run.
@pytest.mark.parametrize("arm", with_long(ARMS, {"adamw_noqk", "muon_qk"}))
def test_every_array_and_metric_of_a_run_equals_float64(runs, arm):
    resolved, workdir = runs(arm)
    c = resolved.model
    path = workdir / "checkpoints" / str(STEPS) / "params"
    params = jax.tree.map(np.float64, ocp.StandardCheckpointer().restore(path.absolute()))
    data = manifest_lib.load(resolved.data.dir)
    (batch,) = pipeline.read_validation(
        resolved.data.dir, data, num_tokens=0, sequences_per_batch=7
    )
    expected = offline(params, batch.tokens[:, :-1], c)
    with np.load(workdir / "spectra" / f"step_{STEPS:08d}.npz") as arrays:
        found = dict(arrays)
    shapes = array_shapes(c.qk_norm)
    assert {name: array.shape for name, array in found.items()} == shapes
    for name, array in found.items():
        assert array.dtype == np.float32, name
        assert name == "aa" or np.isfinite(array).all(), name
        limit = {"aa": 2e-4, "aa_ratio": 1e-4, "overlap": 2e-3}.get(name, 2e-5)
        if name.endswith("p99"):
            limit = 0.008
        scale = 1 if name in ("aa", "aa_ratio", "overlap") else np.abs(expected[name]).max()
        np.testing.assert_allclose(
            array, expected[name], rtol=0, atol=limit * scale, err_msg=f"{arm} {name}"
        )
        if name.endswith(("raw", "centred", "singular_values")):
            assert (array >= 0).all() and (np.diff(array) <= 0).all(), name
    assert (found["entropy"] > 0).all() and (found["entropy"] < np.log(T)).all()
    assert (found["overlap"] >= 0).all() and (found["overlap"] <= 1).all()
    assert found["aa_ratio"].max() <= 1 + 1e-5

    row = RunDirectory(workdir).read_metrics()[-1]
    metrics = offline_metrics(expected, c.qk_norm)
    families = ("mean_share/", "gamma/", "weight/", "sink/", "pr/", "norm/", "attention/")
    measured = {name for name in row if name.startswith(families)} - {"pr/undefined_heads"}
    assert measured <= metrics.keys()
    for name, value in metrics.items():
        if name.startswith("r90"):  # a count: one head may sit on the limit
            assert row[name] == pytest.approx(value, abs=0.5), name
        else:
            assert row[name] == pytest.approx(value, rel=2e-3 if "overlap" in name else 1e-4), name
    for stage in stages(c.qk_norm):
        for name in ranks.MEASURES:
            assert 1 <= row[f"{name}/{stage.replace('_', '/', 1)}/raw"] <= K
    assert row["perf/eval_probe_fraction"] < 1
    assert row["val/loss"] > 0


@functools.cache
def _stream_by_moments():
    """As test_spectral's long streams: 500 batches; means of 0 and 100 spreads."""
    heads = {
        (name, spreads): references.vectors(scales, spreads, seed)
        for seed, (name, scales) in enumerate(references.SPECTRA.items())
        for spreads in (0, 100)
    }
    add = jax.jit(lambda total, batch, valid: moments.merge(total, moments.moments(batch, valid)))
    total = moments.empty_moments((len(heads),), 64)
    for batch in range(references.NUM_BATCHES):
        rows = np.stack([vectors[batch] for vectors in heads.values()])  # [heads, 96, K]
        sequences = rows.reshape(-1, 2, 48, 64).swapaxes(0, 1)  # two of 48
        padded = np.concatenate([sequences, np.full_like(sequences[:1], np.nan)])
        total = add(total, padded, np.array([True, True, False]))
    return heads, total


@pytest.mark.parametrize("name", references.SPECTRA)
def test_moments_of_500_batches_agree_with_float64(name):
    heads, total = _stream_by_moments()
    factors = moments.to_factor(total)
    assert factors.r.dtype == factors.anchor.dtype == jnp.float32
    for head, (spectrum, spreads) in enumerate(heads):
        if spectrum != name:
            continue
        assert factors.count[head] == references.NUM_BATCHES * references.BATCH_ROWS
        for centred in (True, False):
            expected, sigma = references.spectrum(heads[spectrum, spreads], centred)
            found = spectral.singular_values(jax.tree.map(lambda x, h=head: x[h], factors), centred)
            ratio = float(ranks.participation_ratio(found))
            assert ratio == pytest.approx(expected, rel=1e-5), (spreads, centred)
            np.testing.assert_allclose(found / sigma[0], sigma / sigma[0], rtol=0, atol=1e-5)


def both_streams(rows):
    """The factors of rows [n, K], by float64 moments and by QR."""
    exact = moments.to_factor(moments.moments(rows[None, None], np.ones(1, bool)))
    merged = spectral.factor(rows[None])
    return [jax.tree.map(lambda x: x[0], f) for f in (exact, merged)]


TURN = np.linalg.qr(np.random.default_rng(1).standard_normal((64, 64)))[0]
DIRECTION = np.random.default_rng(2).standard_normal(64)


@pytest.mark.parametrize(
    ("spread", "turn", "mean", "limit"),
    [
        (1, np.eye(64), 0, 2e-8),  # the roundings of 26 bits, of which float32 vectors have 24
        (1, np.eye(64), 3 * DIRECTION, 2e-8),
        (np.logspace(0, -12, 64), np.eye(64), 0, 2e-8),  # each column has a scale of its own
        (np.logspace(0, -6, 64), TURN, 0, 2e-8),  # collapsed: eigenvalues from 1 to 1e-12
        (1e-3, np.eye(64), 100 * DIRECTION, 1e-10),  # near the last digits of float32: exact
        (1e-30, np.eye(64), 0, 2e-8),
        (1e15, np.eye(64), 0, 2e-8),
    ],
)
def test_digits_in_bfloat16_hold_what_float64_does(spread, turn, mean, limit):
    rng = np.random.default_rng(0)
    vectors = (rng.standard_normal((3, 2, 300, 64)) * spread) @ turn + mean
    vectors = vectors.astype(np.float32)
    valid = np.array([True, False, True])
    vectors[1] = np.nan
    found, same = (jax.device_get(moments.moments(vectors, valid, way)) for way in (True, False))
    rows = vectors[valid].astype(np.float64).swapaxes(0, 1).reshape(2, 600, 64)
    residues = rows - rows.mean(axis=1, keepdims=True)
    exact = np.einsum("hna,hnc->hac", residues, residues)
    sizes = np.sqrt(np.einsum("haa->ha", exact))
    error = np.abs(found.scatter - exact) / (sizes[:, :, None] * sizes[:, None, :])
    assert error.max() < limit
    np.testing.assert_array_equal(found.count, [600, 600])
    np.testing.assert_allclose(
        found.mean, rows.mean(axis=1), rtol=0, atol=1e-8 * np.abs(residues).max()
    )
    np.testing.assert_allclose(found.scatter, same.scatter, rtol=0, atol=2e-8 * exact.max())


def test_sums_of_digits_are_exact():
    """Integers of 14 bits, of two digits: 256 products of two digits are 2^24 at most."""
    rng = np.random.default_rng(0)
    half = rng.integers(-(2**14) + 1, 2**14, (256, 8))
    half[:, :6] = 64 * rng.integers(240, 256, (256, 6))  # large digits, odd sums
    rows = np.concatenate([half, -rng.permuted(half, axis=0)])  # a mean of 0
    found = moments.moments(rows[None, None].astype(np.float32), np.ones(1, bool), by_digits=True)
    np.testing.assert_array_equal(found.scatter[0], (rows.T @ rows).astype(np.float64))
    np.testing.assert_array_equal(found.mean[0], np.zeros(8))


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_digits_tell_of_vectors_that_are_not_finite(broken):
    vectors = np.ones((2, 3, 300, 8), np.float32)
    vectors[0, 1, 5, 2] = broken
    found = moments.moments(vectors, np.ones(2, bool), by_digits=True)
    np.testing.assert_array_equal(np.isnan(found.scatter).any(axis=(1, 2)), [False, True, False])
    np.testing.assert_array_equal(found.scatter[0], np.zeros((8, 8)))  # all vectors are equal


def test_identities_of_both_streams():
    rng = np.random.default_rng(0)
    orthonormal = np.linalg.qr(rng.standard_normal((256, 64)))[0].astype(np.float32)
    line = (rng.standard_normal((256, 1)) * rng.standard_normal(64)).astype(np.float32)
    skewed = (rng.standard_normal((256, 64)) / np.arange(1, 65)).astype(np.float32)
    turned = (skewed @ np.linalg.qr(rng.standard_normal((64, 64)))[0]).astype(np.float32)
    for way in range(2):
        pr = [
            float(ranks.participation_ratio(spectral.singular_values(both_streams(rows)[way], 0)))
            for rows in (orthonormal, line, skewed, 1000 * skewed, turned)
        ]
        assert pr[:2] == pytest.approx([64, 1], rel=1e-4)  # 63 zeros of 1e-7 each
        assert pr[3:] == pytest.approx([pr[2]] * 2, rel=1e-5)
    empty = moments.to_factor(moments.moments(skewed[None, None], np.zeros(1, bool)))
    assert not empty.count.any() and not empty.mean.any() and not empty.r.any()


def after_rope(rows):
    cos, sin = attention.rotary_tables(len(rows), rows.shape[-1], 10_000.0)
    return attention.apply_rotary(jnp.asarray(rows, jnp.float32)[None, :, None], cos, sin)[0, :, 0]


def raw_pr(rows):
    f = moments.to_factor(moments.moments(jnp.asarray(rows)[None], np.ones(1, bool)))
    return float(ranks.participation_ratio(spectral.singular_values(f, centred=False)))


@pytest.mark.long
def test_constant_keys_look_as_docs_metrics_says():
    """True rank 1; d 64, T 2048."""
    rng = np.random.default_rng(1)

    def constant(key):
        return np.broadcast_to(np.float32(key), (2048, 64))

    ones = constant(np.ones(64))
    assert raw_pr(ones) == pytest.approx(1, abs=1e-3)
    assert raw_pr(after_rope(ones)) == pytest.approx(33.18, abs=0.01)
    for _ in range(8):
        generic = constant(rng.standard_normal(64))
        assert raw_pr(generic) == pytest.approx(1, abs=1e-3)
        assert 20 < raw_pr(after_rope(generic)) < 34
    on_axes = [raw_pr(after_rope(constant(np.eye(64)[axis]))) for axis in range(64)]
    assert 1.1 < min(on_axes) < 1.3 and 1.9 < max(on_axes) <= 2.001


def test_planted_collapse_is_seen_by_the_measures_that_can():
    """Key weights of full rank, a generic rank 4, an axis-aligned rank 4, one head each."""
    values = config_lib.base("adamw", "none", "tiny")
    values.update_from_flattened_dict(
        {
            "model.num_layers": 1,
            "model.d_model": 64,
            "model.num_heads": 3,
            "model.num_kv_heads": 3,
            "model.head_dim": 64,
            "model.d_ff": 32,
            "model.vocab_size": 512,
            "model.sequence_length": 2048,
            "train.tokens_per_step": 2048,
            "eval.batch_sequences": 1,
        }
    )
    c = config_lib.resolve(values).for_platform("cpu")
    params = jax.tree.map(np.array, model.init(jax.random.key(0), c.model))
    rng = np.random.default_rng(2)
    axes, generic = (np.linalg.qr(rng.standard_normal((64, n)))[0] for n in (64, 4))
    key = params["blocks"]["attention"]["key"]["kernel"].reshape(64, 3, 64)
    key[:] = axes[:, None]  # every direction alike
    key[:, 1] = axes @ generic @ generic.T
    key[:, 2, 4:] = 0
    evaluator = evaluation.Evaluator(c, sharding.make_mesh())
    evaluator._compile = small_model.compile_quickly
    tokens = rng.integers(0, 512, (1, 2049)).astype(np.int32)
    batch = pipeline.ValidationBatch(tokens, np.ones(1, bool))
    params = jax.device_put(params, sharding.replicated(sharding.make_mesh()))
    found = evaluator(params, [batch], lambda: False).spectra
    pre, post = (pr_cov(found[f"key_{stage}_raw"][0]) for stage in ("pre_rope", "post_rope"))
    assert pre[0] > 50 and post[0] > 50
    assert (pre[1:] < 4.001).all()  # both
    assert 40 < post[1] < 50 and 5 < post[2] < 9  # about 44 and 7
    aa = found["aa"][0]
    assert abs(aa[0]) < 0.15 and abs(aa[1]) < 0.15 and aa[2] > 0.8


def _statistics(q, k, valid):
    return jax.jit(probes.attention_statistics)(
        q.astype(np.float32), k.astype(np.float32), np.asarray(valid)
    )


def test_attention_in_blocks_equals_the_whole_square():
    """600 queries: two whole blocks and a part; grouped heads; large logits; a row left out."""
    rng = np.random.default_rng(3)
    q, k = 4 * rng.standard_normal((3, 600, 4, 8)), 4 * rng.standard_normal((3, 600, 2, 8))
    q[1] *= 100  # would have the largest logits
    found = _statistics(q, k, [True, False, True])
    largest, entropy, sink = of_attention(q.swapaxes(1, 2), k.swapaxes(1, 2))
    np.testing.assert_allclose(found.max_logit, largest[[0, 2]].max(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.entropy, entropy[[0, 2]].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.sink_mass, sink[[0, 2]].mean(axis=0), rtol=1e-5)
    assert found.sequences == 2
    uniform = _statistics(np.zeros((1, 600, 2, 8)), np.ones((1, 600, 1, 8)), [True])
    exact = np.log(np.arange(1, 601)).mean()
    np.testing.assert_allclose(uniform.entropy, [exact] * 2, rtol=1e-5)
    np.testing.assert_array_equal(uniform.max_logit, [0, 0])
    np.testing.assert_allclose(uniform.sink_mass, [probes.uniform_sink(600)] * 2, rtol=1e-5)


@pytest.mark.parametrize(("length", "share"), [(2048, 0.0035), (512, 0.0114), (256, 0.0201)])
def test_uniform_attention_has_a_sink_of_its_own(length, share):
    assert probes.uniform_sink(length) == pytest.approx(share, abs=5e-5)


def test_attention_on_the_first_position_alone_is_all_sink():
    k = np.zeros((1, 40, 1, 8))
    k[:, 0] = 100
    found = _statistics(np.ones((1, 40, 2, 8)), k, [True])
    np.testing.assert_array_equal(found.sink_mass, [1, 1])


def test_attention_never_holds_a_whole_square():
    heads, length = 8, 2048
    shapes = [jax.ShapeDtypeStruct((4, length, n, 16), jnp.float32) for n in (heads, 4)]
    compiled = jax.jit(probes.attention_statistics).lower(
        *shapes, jax.ShapeDtypeStruct((4,), jnp.bool_)
    )
    temporary = compiled.compile().memory_analysis().temp_size_in_bytes
    assert temporary < heads * length * length * 4 / 2  # half of one sequence of the four


def test_attention_is_taken_from_the_first_sequences_alone():
    rows = jax.jit(probes.rows_of)
    valid = np.array([True, False, True, True, True, True])
    first = rows(valid, np.int32(0))
    np.testing.assert_array_equal(first.attention, [0, 2, 3, 4])
    assert first.attention_valid.all()
    second = rows(valid, np.int32(3))
    assert list(second.attention[:1]) == [0]
    np.testing.assert_array_equal(second.attention_valid, [True, False, False, False])
    assert not rows(valid, np.int32(4)).attention_valid.any()


@pytest.mark.parametrize("scale", [1, 1e-9, 1e9], ids=["usual", "below", "above"])
def test_norms_of_a_stream(scale):
    """Mean and largest are exact, p99 within 0.8%; outside 2^-20..2^20 the largest bounds it."""
    rng = np.random.default_rng(4)
    lengths = np.exp(rng.standard_normal((5, 2, 400, 3)))  # [batches, B, T, H]
    vectors = rng.standard_normal((*lengths.shape, 8))
    vectors *= scale * (lengths / np.linalg.norm(vectors, axis=-1))[..., None]
    valid = np.array([[True, True]] * 4 + [[True, False]])
    vectors[4, 1] = np.nan
    add = jax.jit(lambda total, *batch: probes._merge_norms(total, probes._norms(*batch)))
    total = probes._empty_norms((3,))
    for batch in zip(vectors.astype(np.float32), valid, strict=True):
        total = add(total, *batch)
    kept = (scale * lengths)[valid].reshape(-1, 3)
    assert list(total.count) == [9 * 400] * 3
    np.testing.assert_allclose(total.mean, kept.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(total.largest, kept.max(axis=0), rtol=1e-6)
    p99 = probes.norm_quantile(total)
    if scale == 1:
        np.testing.assert_allclose(p99, np.quantile(kept, 0.99, axis=0), rtol=0.008)
        assert (p99 < total.largest).all()
    else:
        assert (p99 <= total.largest).all() and (p99 > 0).all()
    broken = total._replace(mean=total.mean.at[0].set(jnp.nan))
    np.testing.assert_array_equal(np.isnan(probes.norm_quantile(broken)), [True, False, False])


def test_norms_are_counted_on_tpus_as_elsewhere(monkeypatch):
    rng = np.random.default_rng(5)
    vectors = (rng.standard_normal((3, 500, 2, 8)) ** 3).astype(np.float32)
    vectors[:, ::5] *= 1e-9  # below the bins
    vectors[:, 1::5] *= 1e9  # above them
    vectors[1] = np.nan
    valid = np.array([True, False, True])
    here = jax.jit(lambda *arguments: probes._norms(*arguments))(vectors, valid)
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *arguments, tpu, default: tpu(*arguments)
    )
    there = jax.jit(lambda *arguments: probes._norms(*arguments))(vectors, valid)
    assert here.histogram.sum() == 2 * 500 * 2
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_equal_norms_have_their_own_p99():
    vectors = np.full((1, 50, 2, 4), 0.7, np.float32)
    norms = probes._norms(vectors, np.ones(1, bool))
    np.testing.assert_allclose(probes.norm_quantile(norms), [1.4, 1.4], rtol=0.008)


def test_product_spectrum_without_the_product():
    rng = np.random.default_rng(5)
    for rows in (40, 5):  # more and fewer than K
        a, b = rng.standard_normal((2, 3, rows, 8))
        expected = np.linalg.svd(a @ b.swapaxes(-1, -2), compute_uv=False)[..., :8]
        triangles = (spectral.triangular(jnp.asarray(x, jnp.float32)) for x in (a, b))
        found = spectral.singular_values_of(spectral.product(*triangles))
        assert found.shape == (3, 8) and found.dtype == jnp.float32
        top = expected.max()
        np.testing.assert_allclose(found[..., : expected.shape[-1]], expected, atol=1e-6 * top)
        assert (found[..., rows:] < 1e-5 * top).all()


def _with_gammas(params, key, query):
    params = jax.tree.map(np.copy, params)
    attention = params["blocks"]["attention"]
    attention["key_norm"]["gamma"] = np.float32(key)
    attention["query_norm"]["gamma"] = np.float32(query)
    return params


def test_a_scale_that_queries_give_keys_changes_no_logit_and_no_product():
    """gamma_k *= c, gamma_q /= c: the keys' PR moves as one likes, that of q.k stays."""
    _, measure, params = small_model.learned()
    sequences = small_model.skewed_sequences(5)
    gammas = [
        params["blocks"]["attention"][f"{side}_norm"]["gamma"].astype(np.float64)
        for side in ("key", "query")
    ]
    c = np.tile(10.0 ** np.linspace(-2, 0, 4), 2)  # equal in the pairs that RoPE turns
    before = measure(params, sequences)
    after = measure(_with_gammas(params, gammas[0] * c, gammas[1] / c), sequences)
    kept = ["pr/qk/pre_rope/raw", "pr/qk/pre_rope/centred", "wqk/pr", "val/loss", "sink/mass"]
    kept += [f"weight/pr/{name}" for name in KERNELS] + ["attention/max_logit"]
    for place in ("pre_norm", "post_norm"):
        for side in ("key", "query"):
            kept += [f"pr/{side}/{place}/{centring}" for centring in ("raw", "centred")]
    for name in kept:
        assert after.metrics[name] == pytest.approx(before.metrics[name], rel=2e-5), name
    for name in ("pr/key/pre_rope/raw", "pr/key/post_rope/raw", "gamma/key_pr"):
        assert after.metrics[name] < 0.7 * before.metrics[name], name
    assert before.metrics["pr/qk/pre_rope/raw"] != before.metrics["pr/qk/pre_rope/centred"]


def test_gammas_of_zero_have_no_spread_and_negative_ones_are_counted():
    c, measure, params = small_model.learned()
    key = np.ones((2, c.model.head_dim))
    key[0, :2] = 0  # a quarter: the 10% quantile of layer 0
    key[1, :4] = [-3, -1, -1, -1]
    query = np.ones_like(key)
    sequences = small_model.skewed_sequences(3)
    found = measure(_with_gammas(params, key, query), sequences).metrics
    assert found["gamma/key_negative"] == pytest.approx(4 / 16)
    assert found["gamma/query_negative"] == 0
    low, high = np.quantile([1] * 7 + [3], [0.1, 0.9])
    assert found["gamma/key_spread"] == pytest.approx(high / low)  # of layer 1 alone
    assert found["gamma/query_spread"] == 1
    assert found["gamma/query_pr"] == pytest.approx(8)
    assert found["gamma/key_pr"] == pytest.approx((6 + 10**2 / 16) / 2)
    key[1, :2] = 0
    found = measure(_with_gammas(params, key, query), sequences)
    assert np.isnan(found.metrics["gamma/key_spread"])


@pytest.mark.long
def test_qr_factors_give_what_moments_give():
    """The way of TPUs, which have no float64: the same step with the other statistics."""
    c, measure, params = small_model.learned()
    tokens = small_model.skewed_sequences(3)
    valid = np.array([True, True, False])
    found = {}
    for platform, kind in (
        ("cpu", moments.Moments),
        ("cuda", moments.Moments),
        ("tpu", spectral.Factor),
    ):
        empty = probes.empty_statistics(c, platform)
        assert isinstance(empty.vectors, kind)
        if platform == "cuda":
            continue
        step = evaluation.make_eval_step(c, measure.mesh)
        arguments = (params, empty, tokens, valid)
        compiled = step.lower(*arguments).compile(compiler_options=small_model.QUICK)
        found[platform] = jax.device_get(
            jax.jit(evaluation.decompose)(compiled(*arguments)[0], params)
        )
    for name, array in found["cpu"].arrays.items():
        limit = 1e-4 if name in ("aa", "aa_ratio", "overlap") else 1e-5 * np.abs(array).max()
        np.testing.assert_allclose(
            found["tpu"].arrays[name], array, rtol=0, atol=limit, err_msg=name
        )
    with pytest.raises(TypeError, match="cannot be merged"):
        probes.merge(probes.empty_statistics(c, "cpu"), probes.empty_statistics(c, "tpu"))


def test_a_dead_head_leaves_the_measures_of_the_others():
    _, measure, params = small_model.learned()
    params = jax.tree.map(np.copy, params)
    params["blocks"]["attention"]["key"]["kernel"][1, :, :8] = 0  # layer 1, head 0 of 2
    found = measure(params, small_model.skewed_sequences(4))
    np.testing.assert_array_equal(np.isnan(found.spectra["aa"]), [[False, False], [True, False]])
    # Of two heads, the other has none left to be compared with.
    np.testing.assert_array_equal(
        np.isnan(found.spectra["overlap"]), [[False, False], [True, True]]
    )
    assert all(np.isfinite(found.metrics[name]) for name in ("aa/key", "overlap/key", "norm/key"))
    assert found.spectra["key_norm_max"][1, 0] == 0
    assert np.isfinite(found.spectra["entropy"]).all()


def test_probe_fraction_is_the_share_that_the_loss_alone_would_not_take(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(evaluation.time, "monotonic", lambda: now[0])

    def program(seconds):
        def run():
            now[0] += seconds
            return np.zeros(1)

        return run

    clock = evaluation._Clock(True)
    clock.time(program(3))
    clock.time(program(4))
    clock.time(program(1))  # what decomposes
    assert clock.probe_fraction(program(2), 2) == pytest.approx(1 - 2 * 2 / 8)


def test_probe_fraction_is_measured_once(monkeypatch):
    _, measure, params = small_model.learned()
    calls = []
    original = evaluation._Clock.probe_fraction
    monkeypatch.setattr(
        evaluation._Clock,
        "probe_fraction",
        lambda *arguments: calls.append(None) or original(*arguments),
    )
    evaluator = measure.evaluator
    monkeypatch.setattr(evaluator, "_probe_fraction", None)
    sequences = small_model.skewed_sequences(4)
    fractions = [measure(params, sequences).metrics["perf/eval_probe_fraction"] for _ in range(2)]
    assert fractions[0] == fractions[1] < 1 and len(calls) == 1
