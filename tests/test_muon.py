"""Muon against reference outputs, exact oracles, other layouts, and the optax contract."""

import doctest
import functools
import itertools
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qkjax import muon

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"
SHAPES = ("8x8", "4x8", "8x4", "16x24", "24x16", "1x8", "8x1", "33x17", "64x64")
FLOAT32_TOLERANCE = 5e-5  # what a correct float32 implementation needs, by golden/README.md
SAME_DIRECTION = 0.99  # least cosine of a correct bfloat16 result with the float32 one (README)
# Two bfloat16 results, each within acos(.99) of the float32 one, are within twice that angle.
BOTH_ROUNDED = float(np.cos(2 * np.arccos(SAME_DIRECTION)))

KELLER = {"learning_rate": 0.02, "weight_decay": 0.1, "coefficients": "quintic"}
SEED = {"learning_rate": 0.024}
TORCH = {"learning_rate": 0.002, "weight_decay": 0.1, "coefficients": "quintic", "scale": "rms"}
PUBLISHED = {"keller": "quintic", "seed": "polar_express"}


def golden(name):
    path = GOLDEN / name
    if not path.exists():
        pytest.skip(f"no golden vectors: {path.relative_to(ROOT.parent)} is absent")
    return np.load(path)


def kernel(matrix):
    """The [..., in, out] layout of a golden [..., out, in] matrix."""
    return np.swapaxes(np.asarray(matrix, np.float32), -1, -2)


def cosine(x, y):
    return np.vdot(x, y) / (np.linalg.norm(x) * np.linalg.norm(y))


def assert_same_size(x, y):
    """Within 10%; a wrong scale is off by 22% and more. One single value may be 30% off."""
    if 1 not in x.shape:
        assert 0.9 < np.linalg.norm(x) / np.linalg.norm(y) < 1.1, x.shape


@functools.cache
def trajectory(options, params_dtype=jnp.float32):
    """Parameters before and after, and momentum after, each of the three golden updates."""
    vectors = golden("small.npz")
    optimizer = muon.muon(**dict(options))
    params = {s: jnp.asarray(kernel(vectors[f"{s}/p0"]), params_dtype) for s in SHAPES}
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    history = [(jax.device_get(params), None)]
    for k in range(3):
        gradients = {s: jnp.asarray(kernel(vectors[f"{s}/g{k}"]), params_dtype) for s in SHAPES}
        params, state = step(params, state, gradients)
        history.append(jax.device_get((params, state[0].momentum)))
    return history


def golden_updates(vectors, kind, shape):
    p = [vectors[f"{shape}/p0"], *(vectors[f"{shape}/{kind}/p{k}"] for k in (1, 2, 3))]
    return [kernel(after - before) for before, after in itertools.pairwise(p)]


def our_updates(history, shape):
    p = [np.asarray(params[shape], np.float32) for params, _ in history]
    return [after - before for before, after in itertools.pairwise(p)]


@pytest.mark.parametrize(
    "kind, options",
    [
        ("keller_f32", KELLER),
        ("seed_f32", SEED),
        ("seed_f32_nonesterov", SEED | {"nesterov": False}),
    ],
)
def test_three_float32_updates_equal_the_reference(kind, options):
    vectors = golden("small.npz")
    history = trajectory(tuple(options.items()))
    for shape in SHAPES:
        for k in (1, 2, 3):
            params, momentum = history[k]
            # In units of one update, so that the tolerance is that of the orthogonalisation.
            np.testing.assert_allclose(
                params[shape] / options["learning_rate"],
                kernel(vectors[f"{shape}/{kind}/p{k}"]) / options["learning_rate"],
                rtol=0,
                atol=FLOAT32_TOLERANCE,
                err_msg=f"{shape} step {k}",
            )
            np.testing.assert_allclose(
                momentum[shape], kernel(vectors[f"{shape}/mu{k}"]), rtol=1e-6, atol=1e-9
            )


@pytest.mark.parametrize("kind, options", [("keller", KELLER), ("seed", SEED)])
def test_bfloat16_iteration_keeps_direction_and_size_of_the_float32_updates(kind, options):
    vectors = golden("small.npz")
    history = trajectory((*options.items(), ("dtype", jnp.bfloat16)))
    for shape in SHAPES:
        exact = golden_updates(vectors, f"{kind}_f32", shape)
        rounded = golden_updates(vectors, f"{kind}_bf16", shape)
        for k, update in enumerate(our_updates(history, shape)):
            assert cosine(update, exact[k]) >= SAME_DIRECTION, (shape, k)
            assert cosine(update, rounded[k]) >= BOTH_ROUNDED, (shape, k)
            assert_same_size(update, exact[k])


@pytest.mark.parametrize(
    "kind, options, dtype",
    [("seed_bf16params", SEED, jnp.bfloat16), ("torch213_match_rms_bf16", TORCH, jnp.float32)],
)
def test_reference_that_exists_in_bfloat16_only(kind, options, dtype):
    vectors = golden("small.npz")
    history = trajectory((*options.items(), ("dtype", jnp.bfloat16)), dtype)
    for shape in SHAPES:
        expected = golden_updates(vectors, kind, shape)
        for k, update in enumerate(our_updates(history, shape)):
            assert cosine(update, expected[k]) >= BOTH_ROUNDED, (shape, k)
            if dtype == jnp.float32:
                assert_same_size(update, expected[k])
            else:  # here the rounding of the parameters is as large as some updates
                momentum = np.float32(history[k + 1][1][shape])
                previous = np.float32(history[k][1][shape]) if k else 0.0
                reference = kernel(vectors[f"{shape}/{kind}/mu{k + 1}"])
                one_ulp = 2.0**-7 * (np.abs(reference) + np.abs(previous))
                assert (np.abs(momentum - reference) <= one_ulp).all(), (shape, k)
                assert history[k + 1][1][shape].dtype == dtype


@pytest.mark.parametrize("kind, coefficients", PUBLISHED.items())
def test_special_matrices_equal_the_reference(kind, coefficients):
    vectors = golden("special.npz")
    names = ("zero", "rank1", "tiny", "huge", "diag", "batched")
    inputs = {name: jnp.asarray(kernel(vectors[f"{name}/in"])) for name in names}
    exact, rounded = orthogonalize_tree(inputs, coefficients)
    for name in names:
        expected = kernel(vectors[f"{name}/{kind}_f32"])
        np.testing.assert_allclose(
            exact[name], expected, rtol=0, atol=FLOAT32_TOLERANCE, err_msg=name
        )
        assert np.isfinite(rounded[name]).all(), name
        # In bfloat16 rank1 drowns: its rounding errors are directions too, and are amplified.
        if name not in ("zero", "rank1"):
            assert cosine(rounded[name], expected) >= SAME_DIRECTION, name
    assert not exact["zero"].any() and not rounded["zero"].any()


def orthogonalize_tree(inputs, coefficients):
    """Results of the float32 and of the bfloat16 iteration; equal shapes as one compiled batch."""
    names = {}
    for name, u in inputs.items():
        names.setdefault(u.shape, []).append(name)

    @jax.jit
    def both(stacks):
        return tuple(
            [muon.orthogonalize(u, coefficients=coefficients, dtype=dtype) for u in stacks]
            for dtype in (jnp.float32, jnp.bfloat16)
        )

    results = jax.device_get(both([jnp.stack([inputs[n] for n in ns]) for ns in names.values()]))
    return tuple(
        {
            n: x
            for ns, stack in zip(names.values(), stacks, strict=True)
            for n, x in zip(ns, stack, strict=True)
        }
        for stacks in results
    )


def scalar_map(s, coefficients):
    """Where five steps send singular values `s` of a matrix whose other values are in `s` too."""
    safety = {"quintic": 1.0, "polar_express": 1.01}[coefficients]
    x = s / (safety * np.linalg.norm(s) + 1e-7)
    quintic = ((3.4445, -4.7750, 2.0315),) * 5
    polar = (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    )
    for a, b, c in {"quintic": quintic, "polar_express": polar}[coefficients]:
        x = a * x + b * x**3 + c * x**5
    return x


def matrix_with(singular_values, rows, columns, seed=0):
    """U, V and U diag(s) V^T in float64, U [rows, S] and V [columns, S] orthonormal."""
    rng = np.random.default_rng(seed)
    U = np.linalg.qr(rng.standard_normal([rows, len(singular_values)]))[0]
    V = np.linalg.qr(rng.standard_normal([columns, len(singular_values)]))[0]
    return U, V, (U * singular_values) @ V.T


@pytest.mark.parametrize(
    "coefficients, low, high", [("quintic", 0.68, 1.21), ("polar_express", 0.85, 1.15)]
)
def test_known_singular_values_follow_the_scalar_map(coefficients, low, high):
    s = np.geomspace(1.0, 0.006, 24)
    rank_deficient = np.concatenate([s[:8], np.zeros(16)])
    spectra = {"full": s, "deficient": rank_deficient}
    built = {
        (name, rows, columns): matrix_with(values, rows, columns)
        for name, values in spectra.items()
        for rows, columns in ((24, 24), (24, 40), (40, 24))
    }
    inputs = {str(key): jnp.asarray(u, jnp.float32) for key, (_, _, u) in built.items()}
    exact, rounded = orthogonalize_tree(inputs, coefficients)
    for key, (U, V, _) in built.items():
        expected = scalar_map(spectra[key[0]], coefficients)
        np.testing.assert_allclose(
            exact[str(key)], (U * expected) @ V.T, rtol=0, atol=FLOAT32_TOLERANCE
        )
        if key[0] == "full":  # every value is at least .003 of the norm, so the bands hold
            assert low <= expected.min() and expected.max() <= high
            values = np.linalg.svd(rounded[str(key)].astype(np.float64), compute_uv=False)
            assert low - 0.02 <= values.min() and values.max() <= high + 0.02


def test_stacked_leaves_are_independent_matrices():
    rng = np.random.default_rng(1)
    stack = jnp.asarray(rng.standard_normal([2, 3, 16, 24]) * 10.0 ** np.arange(3)[:, None, None])
    stack = stack.astype(jnp.float32)
    one = jax.jit(muon.orthogonalize)
    together = jax.jit(lambda tree: scaled_by_muon(tree))(
        {"stack": stack, "tall": stack.mT[:, ::-1], "other": stack[0, :, :, :20]}
    )
    for i in range(2):
        for j in range(3):
            expected = one(stack[i, j])
            np.testing.assert_allclose(
                together["stack"][i, j], expected, rtol=0, atol=FLOAT32_TOLERANCE
            )
            np.testing.assert_allclose(
                together["tall"][i, 2 - j], expected.T, rtol=0, atol=FLOAT32_TOLERANCE
            )
    np.testing.assert_allclose(
        together["other"][1], one(stack[0, 1, :, :20]), rtol=0, atol=FLOAT32_TOLERANCE
    )


def scaled_by_muon(gradients, **options):
    """The first update; without momentum, so that u is the gradient itself."""
    transformation = muon.scale_by_muon(momentum=0.0, nesterov=False, **options)
    return transformation.update(gradients, transformation.init(gradients))[0]


def test_transposition_is_bitwise():
    u = jnp.asarray(np.random.default_rng(2).standard_normal([2, 12, 20]), jnp.float32)
    # Not jitted: XLA may fuse a transposition into the norm's sum, which changes its order.
    wide, tall = muon.orthogonalize(u), muon.orthogonalize(jnp.array(u.mT))
    assert tall.shape == (2, 20, 12)
    np.testing.assert_array_equal(tall.mT, wide)
    for given, expected in ((u, wide), (u.mT, tall)):
        jitted = jax.jit(muon.orthogonalize)(given)
        np.testing.assert_allclose(jitted, expected, rtol=0, atol=FLOAT32_TOLERANCE)


@pytest.mark.parametrize(
    "scale, wide, tall",
    [("spectral", np.sqrt(40 / 10), 1.0), ("rms", 0.2 * np.sqrt(40), 0.2 * np.sqrt(40))],
)
def test_scale_reads_fan_in_from_the_second_last_axis(scale, wide, tall):
    ones = {"wide": jnp.ones([3, 10, 40]), "tall": jnp.ones([3, 40, 10])}
    scaled, _ = muon.scale_by_matrix_shape(scale).update(ones, optax.EmptyState())
    np.testing.assert_allclose(scaled["wide"], wide, rtol=1e-6)  # 10 in, 40 out
    np.testing.assert_allclose(scaled["tall"], tall, rtol=1e-6)  # 40 in, 10 out


def test_rms_scale_gives_updates_the_size_of_adamw():
    gradient = np.linalg.qr(np.random.default_rng(3).standard_normal([256, 64]))[0]
    updates, _ = muon.muon(1.0, scale="rms", coefficients="quintic").update(
        u := jnp.asarray(gradient, jnp.float32), muon.muon(1.0).init(u), u
    )
    one_value = scalar_map(np.ones(64), "quintic")[0]
    rms = float(jnp.sqrt(jnp.mean(updates**2)))
    assert rms == pytest.approx(0.2 * one_value, rel=1e-4)


@pytest.mark.parametrize("coefficients", muon.COEFFICIENTS)
def test_degenerate_gradients_stay_finite(coefficients):
    rng = np.random.default_rng(4)
    white = rng.standard_normal([16, 24]).astype(np.float32)
    inputs = {
        "zero": jnp.zeros([16, 24]),
        "rank1": jnp.asarray(np.outer(white[:, 0], white[0])),
        "huge": jnp.asarray(white * np.float32(1e17)),
        "norm_overflows": jnp.asarray(white * np.float32(1e37)),
        "tiny": jnp.asarray(white * np.float32(1e-18)),
        "subnormal": jnp.full([16, 24], 1e-40),
        "white": jnp.asarray(white),
    }
    for results in orthogonalize_tree(inputs, coefficients):
        for name, x in results.items():
            assert np.isfinite(x).all(), name
        assert not results["zero"].any()
        assert cosine(results["huge"], results["white"]) > 0.999  # size does not matter
        # eps damps a vanishing gradient instead of blowing it up: the slope at 0 is below 2000.
        assert np.abs(results["tiny"]).max() < 2000 * np.abs(inputs["tiny"]).max() / 1e-7


def test_exactly_low_rank_gradients_stay_low_rank():
    _, _, u = matrix_with(np.ones(4), 24, 24)
    values = np.linalg.svd(jax.jit(muon.orthogonalize)(jnp.asarray(u, jnp.float32)))[1]
    assert (values[:4] > 0.8).all() and (values[4:] < 1e-3).all()


def test_leaves_without_a_matrix_are_refused_by_name_and_shape():
    with pytest.raises(ValueError, match=r"blocks/norm/gamma: .*\(3,\)"):
        muon.muon(0.1).init({"blocks": {"norm": {"gamma": jnp.ones([3])}, "k": jnp.ones([2, 3])}})


@pytest.mark.parametrize(
    "options", [{"coefficients": "quintics"}, {"scale": "none"}], ids=lambda o: next(iter(o))
)
def test_unknown_words_are_refused_with_the_known_ones(options):
    with pytest.raises(ValueError, match=r"Choose one of (polar_express|quintic|spectral), "):
        muon.muon(0.1, **options)
    with pytest.raises(ValueError, match="quintics"):
        muon.orthogonalize(jnp.ones([2, 2]), coefficients="quintics")


PARAMS = {
    "stack": jnp.ones([2, 4, 6]),
    "block": {"kernel": jnp.ones([6, 4]), "half": jnp.ones([4, 6], jnp.bfloat16)},
}


def gradients_at(step):
    return jax.tree.map(
        lambda p: jnp.cos((step + 1.0) * jnp.arange(p.size)).reshape(p.shape).astype(p.dtype),
        PARAMS,
    )


def run(optimizer, steps, params=None):
    """Parameters after some updates with `gradients_at`."""
    params = PARAMS if params is None else params
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(gradients_at(step), state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_trees_close(x, y, tolerance=FLOAT32_TOLERANCE):
    assert jax.tree.structure(x) == jax.tree.structure(y)
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False, "momentum": 0.0},
        {"coefficients": "quintic", "scale": "rms"},
        {"dtype": jnp.bfloat16},
        {"weight_decay": 0.1},
        {"learning_rate": optax.linear_schedule(0.1, 0.0, 10)},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_state_and_updates_keep_structure_shapes_and_dtypes(options):
    optimizer = muon.muon(**{"learning_rate": 0.1, **options})
    state = jax.eval_shape(optimizer.init, PARAMS)
    updates, after = jax.eval_shape(optimizer.update, PARAMS, state, PARAMS)
    signature = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert signature(after) == signature(state)
    assert signature(updates) == signature(PARAMS)
    assert signature(state[0].momentum) == signature(PARAMS)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(after))


def test_momentum_and_eps_reach_the_update():
    optimizer = muon.muon(1.0, momentum=0.5, eps=1e9)
    updates, state = jax.jit(optimizer.update)(gradients_at(0), optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(state[0].momentum["stack"], 0.5 * gradients_at(0)["stack"])
    assert np.abs(updates["stack"]).max() < 1e-4  # a norm far below eps


def test_schedule_scales_step_by_step():
    rates = (0.3, 0.1)
    scheduled = run(muon.muon(lambda count: jnp.asarray(rates)[count]), 2)
    optimizer = muon.muon(1.0)
    state, params, update = optimizer.init(PARAMS), PARAMS, jax.jit(optimizer.update)
    for step, rate in enumerate(rates):
        updates, state = update(gradients_at(step), state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u, r=rate: r * u, updates))
    # Rounding of bfloat16 parameters of size 1 in another order.
    assert_trees_close(scheduled, params, 2.0**-7)
    assert_trees_close(scheduled["stack"], params["stack"])


def test_weight_decay_is_decoupled():
    plain, decayed = run(muon.muon(0.1), 1), run(muon.muon(0.1, weight_decay=0.5), 1)
    difference = plain["stack"] - decayed["stack"]
    np.testing.assert_allclose(difference, 0.1 * 0.5 * PARAMS["stack"], atol=1e-6)


def test_multi_steps_equals_one_update_with_the_mean_gradient():
    accumulated = run(optax.MultiSteps(muon.muon(0.1), every_k_schedule=2), 2)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, gradients_at(0), gradients_at(1))
    updates, _ = muon.muon(0.1).update(mean, muon.muon(0.1).init(PARAMS), PARAMS)
    expected = optax.apply_updates(PARAMS, updates)
    assert_trees_close(accumulated, expected, 2.0**-7)
    assert_trees_close(accumulated["stack"], expected["stack"])


def test_injected_hyperparameters_equal_plain_ones_and_can_be_changed():
    options = {"momentum": 0.9, "weight_decay": 0.1}
    injected = optax.inject_hyperparams(muon.muon, static_args=("dtype",))(0.1, **options)
    assert_trees_close(run(injected, 2), run(muon.muon(0.1, **options), 2), 2.0**-7)
    state = injected.init(PARAMS)
    state.hyperparams["learning_rate"] = jnp.float32(0.0)
    updates, _ = injected.update(gradients_at(0), state, PARAMS)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))


def test_mask_leaves_the_others_untouched():
    mask = {"stack": True, "block": {"kernel": False, "half": False}}
    optimizer = optax.masked(muon.muon(0.1), mask)
    updates, _ = optimizer.update(gradients_at(0), optimizer.init(PARAMS), PARAMS)
    alone, _ = muon.muon(0.1).update(
        u := gradients_at(0)["stack"], muon.muon(0.1).init(u), PARAMS["stack"]
    )
    np.testing.assert_allclose(updates["stack"], alone, rtol=0, atol=FLOAT32_TOLERANCE)
    np.testing.assert_array_equal(updates["block"]["kernel"], gradients_at(0)["block"]["kernel"])


EIGHT_DEVICES = """
    from qkjax import muon
    import jax, numpy as np
    import jax.numpy as jnp
    P = jax.sharding.PartitionSpec

    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, P("data"))
    rng = np.random.default_rng(5)
    shapes = {"wide": (8, 16, 24), "tall": (8, 24, 16), "more": (16, 16, 24)}
    g = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    optimizer = muon.muon(0.1, weight_decay=0.1)
    update = jax.jit(optimizer.update)
    expected, expected_state = update(g, optimizer.init(g), g)
    g_sharded = jax.device_put(g, sharding)
    state = jax.device_put(optimizer.init(g), sharding)
    text = update.lower(g_sharded, state, g_sharded).compile().as_text()
    assert not any(op in text for op in ("all-gather", "all-to-all", "collective-permute")), text
    updates, state = update(g_sharded, state, g_sharded)
    for name in g:
        assert updates[name].sharding.is_equivalent_to(sharding, 3), updates[name].sharding
        np.testing.assert_allclose(updates[name], expected[name], rtol=0, atol=5e-5 * 0.1)
        np.testing.assert_allclose(state[0].momentum[name], expected_state[0].momentum[name])
    print("agree")
"""


@pytest.mark.process
def test_eight_devices_agree_with_one_and_exchange_nothing():
    """A batch of matrices sharded over its leading axis is orthogonalised where it lies."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(EIGHT_DEVICES)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "agree", done.stderr


def test_docstring_example_runs():
    results = doctest.testmod(muon)
    assert results.attempted > 0 and results.failed == 0


# --------------------------------------------------------------------------------------------
# Leaves of other layouts than [..., in, out].

NUMBERS = {
    # Flax's DenseGeneral: queries [D, H, K] and outputs [H, K, D]; a stack on the last axis.
    "query": ((12, 3, 4), muon.DimensionNumbers((), (0,), (1, 2)), lambda x: x.reshape(12, 12)),
    "output": ((3, 4, 10), muon.DimensionNumbers((), (0, 1), (2,)), lambda x: x.reshape(12, 10)),
    "last": ((6, 9, 5), muon.DimensionNumbers((2,), (1,), (0,)), lambda x: x.transpose(2, 1, 0)),
}


@pytest.mark.parametrize("scale", muon.SCALES)
def test_dimension_numbers_say_which_axes_are_a_matrix(scale):
    """As the matrices themselves, laid out [..., in, out], over three steps."""
    rng = np.random.default_rng(3)
    leaves = {name: rng.standard_normal(shape, np.float32) for name, (shape, *_) in NUMBERS.items()}
    numbers = {name: row[1] for name, row in NUMBERS.items()}
    options = {"weight_decay": 0.1, "scale": scale}
    told = muon.muon(0.1, dimension_numbers={**numbers, "plain": None}, **options)
    plain = muon.muon(0.1, **options)
    leaves["plain"] = rng.standard_normal((7, 5), np.float32)
    as_matrices = {name: row[2] for name, row in NUMBERS.items()} | {"plain": lambda x: x}

    def laid_out(tree):
        return {name: as_matrices[name](x) for name, x in tree.items()}

    a, b = told.init(leaves), plain.init(laid_out(leaves))
    for step in range(3):
        gradients = {name: x + step for name, x in leaves.items()}
        ours, a = told.update(gradients, a, leaves)
        theirs, b = plain.update(laid_out(gradients), b, laid_out(leaves))
        for name, expected in theirs.items():
            assert ours[name].shape == leaves[name].shape
            np.testing.assert_allclose(laid_out(ours)[name], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "numbers",
    [
        ((), (0,), (1,)),
        ((0,), (1,), (1, 2)),
        ((0, 1, 2), (), ()),
        ((0,), (), (1, 2)),
        ((), (0,), (1, 3)),
    ],
)
def test_dimension_numbers_that_do_not_fit_are_refused(numbers):
    optimizer = muon.muon(0.1, dimension_numbers={"a": muon.DimensionNumbers(*numbers)})
    with pytest.raises(ValueError, match=r"^a: dimension numbers .*shape \(2, 3, 4\)"):
        optimizer.init({"a": jnp.zeros([2, 3, 4])})


@pytest.mark.parametrize(
    ("scale", "shape", "expected"),
    [
        ("mup", (512, 256), 0.5**0.5),
        ("mup", (1344, 512), (512 / 1344) ** 0.5),
        ("mup", (2, 8), 2.0),
    ],
)
def test_scale_mup_has_no_floor(scale, shape, expected):
    update = muon.scale_by_matrix_shape(scale).update({"a": jnp.ones(shape)}, optax.EmptyState())
    np.testing.assert_allclose(update[0]["a"], np.full(shape, expected), rtol=1e-6)
