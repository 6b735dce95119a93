"""Every parameter's rule, the schedule, and what Muon's granularity does to the updates."""

import dataclasses
import functools
import itertools
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import with_long

from qkjax import config as config_lib
from qkjax import errors, model, muon, optimizer, presets

FLOAT32_TOLERANCE = 5e-5  # of an orthogonalised matrix between correct implementations
KEY = "blocks/attention/key/kernel"
GRANULARITIES = ("separate", "merged", "per_head", "groups_of")
SMALL = {  # N 2, D 16, H 4, G 2, K 4, F 24, V 32
    "model.num_layers": 2,
    "model.d_model": 16,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 4,
    "model.d_ff": 24,
    "model.vocab_size": 32,
}


def resolved(optimizer_name, qk_norm, words="", **fields):
    """A resolved config; `fields` are dotted names with '__' for the dot."""
    given = config_lib.base(optimizer_name, qk_norm, words)
    with given.unlocked():
        given.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config_lib.resolve(given).for_platform("cpu")


def small(optimizer_name, qk_norm, words="tiny", **fields):
    return resolved(optimizer_name, qk_norm, words, **(SMALL | fields))


def routes_of(c):
    return optimizer.routing_table(model.parameter_shapes(c.model), c)


ADAMW_QK = """
    parameter                          shape        matrix  optimiser  peak_lr  weight_decay
    blocks/attention/key/kernel        22x512x256   -       adamw      0.0012   0.1
    blocks/attention/key_norm/gamma    22x64        -       adamw      0.0012   0
    blocks/attention/output/kernel     22x512x512   -       adamw      0.0012   0.1
    blocks/attention/query/kernel      22x512x512   -       adamw      0.0012   0.1
    blocks/attention/query_norm/gamma  22x64        -       adamw      0.0012   0
    blocks/attention/value/kernel      22x512x256   -       adamw      0.0012   0.1
    blocks/attention_norm/gamma        22x512       -       adamw      0.0012   0
    blocks/mlp/down/kernel             22x1344x512  -       adamw      0.0012   0.1
    blocks/mlp/gate/kernel             22x512x1344  -       adamw      0.0012   0.1
    blocks/mlp/up/kernel               22x512x1344  -       adamw      0.0012   0.1
    blocks/mlp_norm/gamma              22x512       -       adamw      0.0012   0
    embedding                          49152x512    -       adamw      0.0012   0
    final_norm/gamma                   512          -       adamw      0.0012   0
"""
ADAMW_NOQK = """
    parameter                       shape        matrix  optimiser  peak_lr  weight_decay
    blocks/attention/key/kernel     22x512x256   -       adamw      0.0012   0.1
    blocks/attention/output/kernel  22x512x512   -       adamw      0.0012   0.1
    blocks/attention/query/kernel   22x512x512   -       adamw      0.0012   0.1
    blocks/attention/value/kernel   22x512x256   -       adamw      0.0012   0.1
    blocks/attention_norm/gamma     22x512       -       adamw      0.0012   0
    blocks/mlp/down/kernel          22x1344x512  -       adamw      0.0012   0.1
    blocks/mlp/gate/kernel          22x512x1344  -       adamw      0.0012   0.1
    blocks/mlp/up/kernel            22x512x1344  -       adamw      0.0012   0.1
    blocks/mlp_norm/gamma           22x512       -       adamw      0.0012   0
    embedding                       49152x512    -       adamw      0.0012   0
    final_norm/gamma                512          -       adamw      0.0012   0
"""
MUON_QK = """
    parameter                          shape        matrix    optimiser  peak_lr  weight_decay
    blocks/attention/key/kernel        22x512x256   512x256   muon       0.012    0.01
    blocks/attention/key_norm/gamma    22x64        -         adamw      0.003    0
    blocks/attention/output/kernel     22x512x512   512x512   muon       0.012    0.01
    blocks/attention/query/kernel      22x512x512   512x512   muon       0.012    0.01
    blocks/attention/query_norm/gamma  22x64        -         adamw      0.003    0
    blocks/attention/value/kernel      22x512x256   512x256   muon       0.012    0.01
    blocks/attention_norm/gamma        22x512       -         adamw      0.003    0
    blocks/mlp/down/kernel             22x1344x512  1344x512  muon       0.012    0.01
    blocks/mlp/gate/kernel             22x512x1344  512x1344  muon       0.012    0.01
    blocks/mlp/up/kernel               22x512x1344  512x1344  muon       0.012    0.01
    blocks/mlp_norm/gamma              22x512       -         adamw      0.003    0
    embedding                          49152x512    -         adamw      0.003    0
    final_norm/gamma                   512          -         adamw      0.003    0
"""
MUON_NOQK = """
    parameter                       shape        matrix    optimiser  peak_lr  weight_decay
    blocks/attention/key/kernel     22x512x256   512x256   muon       0.012    0.01
    blocks/attention/output/kernel  22x512x512   512x512   muon       0.012    0.01
    blocks/attention/query/kernel   22x512x512   512x512   muon       0.012    0.01
    blocks/attention/value/kernel   22x512x256   512x256   muon       0.012    0.01
    blocks/attention_norm/gamma     22x512       -         adamw      0.003    0
    blocks/mlp/down/kernel          22x1344x512  1344x512  muon       0.012    0.01
    blocks/mlp/gate/kernel          22x512x1344  512x1344  muon       0.012    0.01
    blocks/mlp/up/kernel            22x512x1344  512x1344  muon       0.012    0.01
    blocks/mlp_norm/gamma           22x512       -         adamw      0.003    0
    embedding                       49152x512    -         adamw      0.003    0
    final_norm/gamma                512          -         adamw      0.003    0
"""
# The original's recipe: relu2, the merged matrix, decay on everything that AdamW updates.
MUON_QK_FROZEN_ORIGINAL = """
    parameter                          shape        matrix    optimiser  peak_lr  weight_decay
    blocks/attention/key/kernel        22x512x256   512x1536  muon       0.02     0
    blocks/attention/key_norm/gamma    22x64        -         frozen     0        0
    blocks/attention/output/kernel     22x512x512   512x1536  muon       0.02     0
    blocks/attention/query/kernel      22x512x512   512x1536  muon       0.02     0
    blocks/attention/query_norm/gamma  22x64        -         frozen     0        0
    blocks/attention/value/kernel      22x512x256   512x1536  muon       0.02     0
    blocks/attention_norm/gamma        22x512       -         adamw      0.006    0.2
    blocks/mlp/down/kernel             22x2048x512  2048x512  muon       0.02     0
    blocks/mlp/up/kernel               22x512x2048  512x2048  muon       0.02     0
    blocks/mlp_norm/gamma              22x512       -         adamw      0.006    0.2
    embedding                          49152x512    -         adamw      0.006    0.2
    final_norm/gamma                   512          -         adamw      0.006    0.2
"""


@pytest.mark.parametrize(
    "arm, expected",
    [
        (("adamw", "learned"), ADAMW_QK),
        (("adamw", "none"), ADAMW_NOQK),
        (("muon", "learned"), MUON_QK),
        (("muon", "none"), MUON_NOQK),
        (("muon", "learned", "frozen,original"), MUON_QK_FROZEN_ORIGINAL),
    ],
    ids="-".join,
)
def test_routing_table_of_each_arm(arm, expected):
    table = optimizer.format_routing_table(routes_of(resolved(*arm)))
    assert table == textwrap.dedent(expected).strip()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_controls_change_the_two_gammas_only(name):
    """Their rate, from tau 7.3 at force 0.2; 4,577 steps, 92 of them warm-up and 916 decay."""
    parent, frozen, decayed, undecayed, to_one = (
        routes_of(resolved(name, "learned", word))
        for word in ("", "frozen", "decayed", "undecayed", "to_one")
    )
    rate = 7.3 / 0.2 / (4577 - 91 / 2 - 915 / 2)
    for before, *after in zip(parent, frozen, decayed, undecayed, to_one, strict=True):
        if before.name.endswith(("query_norm/gamma", "key_norm/gamma")):
            assert after[0].rule == "frozen"
            for route, decay, target in zip(after[1:], (0.2, 0.0, 0.2), (0, 0, 1), strict=True):
                assert route.learning_rate == pytest.approx(rate)
                assert route == dataclasses.replace(
                    before,
                    learning_rate=route.learning_rate,
                    weight_decay=decay,
                    decay_target=target,
                )
        else:
            assert after == [before] * 4
    table = optimizer.format_routing_table(to_one)
    assert len(re.findall(r"gamma .* adamw +0\.00895925 +0\.2 to 1\n", table)) == 2


@pytest.mark.parametrize(
    "granularity, matrices",
    [
        ("merged", {"query": (512, 1536), "value": (512, 1536), "output": (512, 1536)}),
        ("per_head", {"query": (512, 64), "value": (512, 64), "output": (512, 512)}),
    ],
)
def test_table_names_the_matrix_that_is_orthogonalised(granularity, matrices):
    routes = {r.name: r for r in routes_of(resolved("muon", "none", muon__granularity=granularity))}
    for name, matrix in matrices.items():
        assert routes[f"blocks/attention/{name}/kernel"].matrix == matrix
    assert routes["blocks/mlp/down/kernel"].matrix == (1344, 512)


def test_recipe_original_without_muon_has_no_matrix_to_merge():
    assert {r.matrix for r in routes_of(resolved("adamw", "none", "original"))} == {None}


def test_unmatched_parameter_is_an_error_that_names_it():
    shapes = {"blocks": {"attention": {"bias": jnp.ones([2, 2])}}}
    with pytest.raises(errors.UsageError, match=r"^blocks/attention/bias: none of"):
        optimizer.routing_table(shapes, small("muon", "none"))
    with pytest.raises(errors.UsageError, match=r"^head/embedding: none of"):  # the whole name
        optimizer.routing_table({"head": {"embedding": jnp.ones([2])}}, small("muon", "none"))


def test_doubly_matched_parameter_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setitem(optimizer._GROUPS, "second", "embedding")
    with pytest.raises(errors.UsageError, match=r"^embedding: auxiliary and second of"):
        routes_of(small("muon", "none"))


def test_merging_kernels_of_unequal_rows_is_refused():
    c = small("muon", "none", muon__granularity="merged")
    c = dataclasses.replace(c, model=dataclasses.replace(c.model, num_heads=8))
    with pytest.raises(errors.UsageError, match=r"^muon.granularity: merged .*\(2, 32, 16\)"):
        routes_of(c)


def test_schedule_of_the_full_run():
    schedule = resolved("muon", "none").schedule
    assert dataclasses.astuple(schedule) == (4577, 92, 916)
    rate = optimizer.learning_rate(schedule, 0.012)
    rates = np.asarray(jax.jit(jax.vmap(rate))(jnp.arange(4578, dtype=jnp.int32)))
    expected = {0: 1 / 92, 45: 46 / 92, 91: 1, 92: 1, 3661: 1, 3662: 915 / 916, 4576: 1 / 916}
    for step, factor in expected.items():
        assert rates[step] == pytest.approx(0.012 * factor, rel=1e-6), step
    every = [0.012 * schedule.factor(step) for step in range(4577)]
    np.testing.assert_allclose(rates[:-1], every, rtol=1e-6)
    assert rates[-1] == 0 and rates.dtype == np.float32


def test_schedule_without_warmup_and_decay_is_constant():
    rate = optimizer.learning_rate(config_lib.Schedule(10, 0, 0), 0.5)
    assert [float(rate(step)) for step in (0, 9, 20)] == [0.5, 0.5, 0.5]
    after_the_end = optimizer.learning_rate(config_lib.Schedule(10, 0, 5), 0.5)(jnp.int32(12))
    assert float(after_the_end) == 0.0


def random_tree(c, seed, offset=0.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(offset + rng.standard_normal(s.shape), jnp.float32),
        model.parameter_shapes(c.model),
    )


@functools.cache
def two_updates(c):
    """Updates at steps 0 and 1 by name, parameters kept as they are, and the last state."""
    params = random_tree(c, 0, offset=1.0)
    transformation = optimizer.make_optimizer(c, params)
    state, update = transformation.init(params), jax.jit(transformation.update)
    updates = []
    for step in (0, 1):
        u, state = update(random_tree(c, step + 1), state, params)
        updates.append(by_name(u))
    return updates, state


def by_name(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}


ATTENTION = ("query", "key", "value", "output")
MLP = ("gate", "up", "down")


def kernels(tree):
    blocks = tree["blocks"]
    attention = {name: np.asarray(blocks["attention"][name]["kernel"]) for name in ATTENTION}
    return attention | {name: np.asarray(blocks["mlp"][name]["kernel"]) for name in MLP}


def matrices_of(kernel_by_name, granularity):
    """Views of the single matrices [in, out], by layer, head and loop; for merged, a copy."""
    found = {}
    for n in range(2):
        layer = {name: kernel[n] for name, kernel in kernel_by_name.items()}
        for name in MLP:
            found[n, name] = layer[name]
        if granularity == "merged":
            found[n, "attention"] = np.hstack([layer[name] for name in ATTENTION])
        for name in ATTENTION if granularity == "separate" else ():
            found[n, name] = layer[name]
        if granularity in ("per_head", "groups_of"):
            found[n, "output"] = layer["output"]
            width = 4 if granularity == "per_head" else 8  # of one head, or of two
            for name in ("query", "key", "value"):
                for start in range(0, layer[name].shape[1], width):
                    found[n, name, start] = layer[name][:, start : start + width]
    return found


def orthogonalize_float64(u):
    """Polar Express in numpy, on the matrix as it lies."""
    safety, steps = muon.newton_schulz("polar_express")
    x = np.asarray(u, np.float64)
    x = x / (safety * np.linalg.norm(x) + 1e-7)
    for a, b, c in np.asarray(steps, np.float64):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def factor_of(scale, granularity, key, matrix):
    """Of the whole kernel, or of the merged matrix. The kernels: D 16, H K 16, G K 8, F 24."""
    fan_in, fan_out = matrix.shape
    if key[1] in ("query", "key", "value") and granularity != "merged":
        fan_in, fan_out = 16, {"query": 16, "key": 8, "value": 8}[key[1]]
    if scale == "mup":
        return (fan_out / fan_in) ** 0.5
    if scale == "rms":
        return 0.2 * max(fan_in, fan_out) ** 0.5
    return max(1.0, fan_out / fan_in) ** 0.5


def constant_rate(granularity, scale="spectral"):
    return small(
        "muon",
        "none",
        muon__granularity=granularity,
        muon__group_heads=2 if granularity == "groups_of" else 1,
        muon__scale=scale,
        optimizer__clip_norm=0.0,
        optimizer__weight_decay=0.3,
        optimizer__warmup_fraction=0.0,
        optimizer__decay_fraction=0.0,
    )


@pytest.mark.parametrize("scale", muon.SCALES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_each_granularity_is_muon_on_its_own_matrices_one_by_one(granularity, scale):
    """Two steps against float64; scaled by the whole kernel's shape but for the merged matrix."""
    c = constant_rate(granularity, scale)
    updates, state = two_updates(c)
    params, first, second = (
        matrices_of(kernels(random_tree(c, seed, offset)), granularity)
        for seed, offset in ((0, 1.0), (1, 0.0), (2, 0.0))
    )
    for step, by_path in enumerate(updates):
        ours = {
            name: by_path[f"blocks/{'attention' if name in ATTENTION else 'mlp'}/{name}/kernel"]
            for name in (*ATTENTION, *MLP)
        }
        for key, update in matrices_of(ours, granularity).items():
            u = 0.05 * 1.95 * first[key]  # (1 - mu) g + mu (1 - mu) g
            if step:
                average = 0.95 * 0.05 * first[key] + 0.05 * second[key]
                u = 0.05 * second[key] + 0.95 * average
            factor = factor_of(scale, granularity, key, u)
            expected = factor * orthogonalize_float64(u) + 0.3 * params[key]
            np.testing.assert_allclose(
                update / -c.optimizer.learning_rate,
                expected,
                rtol=0,
                atol=2 * FLOAT32_TOLERANCE,  # the largest scale here is 2
                err_msg=str(key),
            )
    shapes = {
        "separate": {"blocks/attention/key/kernel": (2, 16, 8)},
        "merged": {"blocks/attention": (2, 16, 48)},
        "per_head": {KEY: (2, 2, 16, 4), "blocks/attention/output/kernel": (2, 16, 16)},
        "groups_of": {KEY: (2, 1, 16, 8), "blocks/attention/query/kernel": (2, 2, 16, 8)},
    }[granularity]
    momentum = {k.split("momentum/")[1]: x.shape for k, x in by_name(state).items() if "/mom" in k}
    assert shapes.items() <= momentum.items()


@pytest.mark.parametrize("scale", with_long(muon.SCALES, {"rms", "mup"}))
def test_granularities_take_steps_of_equal_size(scale):
    """White gradients at the 88M's shapes: the RMS of each kernel's update within 5%."""
    shapes = {"query": (512, 512), "key": (512, 256), "value": (512, 256), "output": (512, 512)}
    rng = np.random.default_rng(0)
    white = {name: rng.standard_normal((1, *shape)) for name, shape in shapes.items()}
    fields = {"model__num_layers": 1, "model__vocab_size": 8, "model__d_ff": 8}
    rms = {}
    for granularity in ("separate", "per_head", "groups_of"):
        c = resolved(
            "muon",
            "none",
            muon__granularity=granularity,
            muon__group_heads=2 if granularity == "groups_of" else 1,
            muon__scale=scale,
            optimizer__weight_decay=0.0,
            **fields,
        )
        gradients = jax.tree.map(jnp.zeros_like, random_tree(c, 0))
        for name, gradient in white.items():
            gradients["blocks"]["attention"][name]["kernel"] = jnp.float32(gradient)
        transformation = optimizer.make_optimizer(c, gradients)
        updates, _ = jax.jit(transformation.update)(
            gradients, transformation.init(gradients), gradients
        )
        rms[granularity] = [np.sqrt(np.mean(kernels(updates)[name] ** 2)) for name in shapes]
    for granularity in ("per_head", "groups_of"):
        np.testing.assert_allclose(rms[granularity], rms["separate"], rtol=0.05)
        assert rms[granularity][3] == rms["separate"][3]  # the output kernel stays whole


def test_every_muon_option_reaches_muon():
    options = {"momentum": 0.5, "nesterov": False, "coefficients": "quintic", "scale": "rms"}
    fields = {f"muon__{name}": value for name, value in options.items()}
    c = small("muon", "none", muon__dtype="bfloat16", optimizer__clip_norm=0.0, **fields)
    params, first, second = (
        kernels(random_tree(c, s, o)) for s, o in ((0, 1.0), (1, 0.0), (2, 0.0))
    )
    reference = muon.muon(
        optimizer.learning_rate(c.schedule, c.optimizer.learning_rate),
        weight_decay=c.optimizer.weight_decay,
        dtype=jnp.bfloat16,
        **options,
    )
    state, update = reference.init(params), jax.jit(reference.update)
    for gradients, ours in zip((first, second), two_updates(c)[0], strict=True):
        expected, state = update(gradients, state, params)
        for name, value in expected.items():
            path = f"blocks/{'attention' if name in ATTENTION else 'mlp'}/{name}/kernel"
            np.testing.assert_allclose(ours[path], value, rtol=1e-4, atol=1e-9, err_msg=path)


def test_granularities_differ_on_attention_and_agree_on_the_mlp():
    by_granularity = {g: two_updates(constant_rate(g))[0][0] for g in GRANULARITIES}
    for one, other in itertools.combinations(GRANULARITIES, 2):
        for name, update in by_granularity[one].items():
            differs = not np.allclose(update, by_granularity[other][name], rtol=0, atol=1e-6)
            in_attention = name.startswith("blocks/attention/")
            whole = name.endswith("output/kernel") and "merged" not in (one, other)
            if (one, other) == ("separate", "groups_of"):  # both key heads are one group
                whole = whole or name.endswith(("key/kernel", "value/kernel"))
            assert differs == (in_attention and not whole), (name, one, other)


def test_merged_keys_inherit_their_gradients_spectrum_and_separate_ones_do_not():
    """Q and K 10x smaller than V and O, rank 16 and 10% white noise."""
    fields = {"model.num_layers": 1, "model.vocab_size": 8, "model.d_ff": 8}
    rng = np.random.default_rng(0)

    def low_rank(rows, columns):
        signal = rng.standard_normal([rows, 16]) @ rng.standard_normal([16, columns])
        return 0.1 * (signal / signal.std() + 0.1 * rng.standard_normal([rows, columns]))

    gradient_by_name = {
        "query": low_rank(512, 512),
        "key": low_rank(512, 256),
        "value": rng.standard_normal([512, 256]),
        "output": rng.standard_normal([512, 512]),
    }
    pr, rms = {}, {}
    for granularity in ("merged", "separate"):
        c = resolved(
            "muon", "none", muon__granularity=granularity, optimizer__weight_decay=0.0, **fields
        )
        gradients = jax.tree.map(jnp.zeros_like, random_tree(c, 0))
        for name, gradient in gradient_by_name.items():
            gradients["blocks"]["attention"][name]["kernel"] = jnp.float32(gradient)[None]
        transformation = optimizer.make_optimizer(c, gradients)
        updates, _ = jax.jit(transformation.update)(
            gradients, transformation.init(gradients), gradients
        )
        update = by_name(updates)[KEY][0]
        values = np.linalg.svd(update[:, :64], compute_uv=False)  # of one head
        pr[granularity] = values.sum() ** 2 / (values**2).sum()
        rms[granularity] = np.sqrt((update**2).mean())
    assert pr["merged"] == pytest.approx(20, abs=1)
    assert pr["separate"] == pytest.approx(64, abs=1)
    assert rms["merged"] / rms["separate"] == pytest.approx(0.2, abs=0.03)


def test_adamw_with_equal_decays_is_optax_adamw():
    c = small("adamw", "learned", "tiny,original")
    assert {r.weight_decay for r in routes_of(c)} == {0.2}
    updates, _ = two_updates(c)
    reference = optax.adamw(c.optimizer.learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.2)
    params = random_tree(c, 0, offset=1.0)
    state, update = reference.init(params), jax.jit(reference.update)
    for step in range(2):
        expected, state = update(random_tree(c, step + 1), state, params)
        for name, value in by_name(expected).items():
            np.testing.assert_allclose(updates[step][name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_decay_acts_on_its_own_parameters_alone(name):
    decays = {"weight_decay": 0.5, "gamma_weight_decay": 0.3, "auxiliary_weight_decay": 0.1}
    plain, decayed = (
        two_updates(
            c := small(name, "learned", **{f"optimizer__{k}": v * on for k, v in decays.items()})
        )[0]
        for on in (0, 1)
    )
    params = by_name(random_tree(c, 0, offset=1.0))
    for route in routes_of(c):
        path = route.name
        decay = 0.1
        if path.endswith("kernel"):
            decay = 0.5
        elif "query_norm" in path or "key_norm" in path:
            decay = 0.3
        for step in (0, 1):
            rate = route.learning_rate * c.schedule.factor(step)
            difference = decayed[step][path] - plain[step][path]
            # Half an ulp of each update, which is no larger than three times the rate.
            np.testing.assert_allclose(
                difference, -rate * decay * params[path], rtol=1e-5, atol=rate * 1e-6, err_msg=path
            )


@pytest.mark.parametrize("word", ["decayed", "undecayed", "to_one"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_gamma_controls_against_float64(name, word):
    """Adam's own update at gamma's rate, and a decay towards the target, over five steps."""
    c = small(name, "learned", f"tiny,{word}", optimizer__clip_norm=0.0)
    o, gamma_of = c.optimizer, {}
    params = random_tree(c, 0, offset=1.0)
    for path, leaf in by_name(params).items():
        if "query_norm" in path or "key_norm" in path:
            gamma_of[path] = [np.float64(leaf), 0.0, 0.0]  # gamma, m, v
    assert len(gamma_of) == 2
    transformation = optimizer.make_optimizer(c, params)
    state, update = transformation.init(params), jax.jit(transformation.update)
    for step in range(5):
        gradients = random_tree(c, step + 1)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        rate = c.schedule.factor(step) * 0.3 / 0.2 / c.schedule.total()
        for path, (gamma, m, v) in gamma_of.items():
            g = np.float64(by_name(gradients)[path])
            m, v = o.beta1 * m + (1 - o.beta1) * g, o.beta2 * v + (1 - o.beta2) * g**2
            m_hat, v_hat = m / (1 - o.beta1 ** (step + 1)), v / (1 - o.beta2 ** (step + 1))
            pull = {"decayed": 0.2 * gamma, "undecayed": 0.0, "to_one": 0.2 * (gamma - 1)}[word]
            gamma = gamma - rate * (m_hat / (np.sqrt(v_hat) + o.eps) + pull)
            gamma_of[path] = [gamma, m, v]
            np.testing.assert_allclose(by_name(params)[path], gamma, rtol=2e-6, atol=2e-6)


def test_frozen_gammas_stay_out_of_the_clip_norm():
    """Callers of make_optimizer may hand in gradients of theirs."""
    for name in ("adamw", "muon"):
        c = small(name, "learned", "tiny,frozen")
        params, gradients = random_tree(c, 0, offset=1.0), random_tree(c, 1)
        transformation = optimizer.make_optimizer(c, params)
        state, update = transformation.init(params), jax.jit(transformation.update)
        _, plain = update(gradients, state, params)
        for norm in ("query_norm", "key_norm"):
            gradients["blocks"]["attention"][norm]["gamma"] *= 1e6
        _, after = update(gradients, state, params)
        for path, value in by_name(plain).items():
            np.testing.assert_array_equal(by_name(after)[path], value, err_msg=path)


def test_one_more_optimiser_is_one_entry(monkeypatch):
    """Named in the config, checked, made by its factory, at the rates of its entry."""
    entry = presets.Optimizer(
        factory=f"{__name__}:lion", rate=1e-4, decay={"fixed": 1.0, "original": 3.0}
    )
    with pytest.raises(errors.UsageError, match="'lion' is unknown"):
        small("lion", "none")
    monkeypatch.setitem(presets.OPTIMIZERS, "lion", entry)
    c = small("lion", "learned", "tiny,original", optimizer__clip_norm=0.0)
    assert (c.arm, c.optimizer.learning_rate, c.optimizer.weight_decay) == ("lion_qk", 1e-4, 3.0)
    assert {r.rule for r in routes_of(c)} == {"lion"}
    params = random_tree(c, 0, offset=1.0)
    updates = by_name(two_updates.__wrapped__(c)[0][0])
    gradients = by_name(random_tree(c, 1))
    for route in routes_of(c):
        expected = np.sign(gradients[route.name]) + route.weight_decay * by_name(params)[route.name]
        np.testing.assert_allclose(updates[route.name], -1e-4 * expected, rtol=1e-5, atol=1e-10)
    beside = dataclasses.replace(entry, auxiliary_rate=3e-3)
    monkeypatch.setitem(presets.OPTIMIZERS, "lion", beside)
    rules = {r.name: (r.rule, r.learning_rate) for r in routes_of(small("lion", "none"))}
    assert rules[KEY] == ("lion", 1e-4) and rules["embedding"] == ("adamw", 3e-3)


@pytest.mark.parametrize(
    ("factory", "found"),
    [
        ("my_optimizers:lion", "No module named 'my_optimizers'"),
        ("qkjax.optimizer:lion", "module 'qkjax.optimizer' has no attribute 'lion'"),
    ],
)
def test_a_factory_that_is_not_there_is_one_line(monkeypatch, factory, found):
    entry = presets.Optimizer(factory=factory, rate=1e-4, decay=0.0)
    monkeypatch.setitem(presets.OPTIMIZERS, "lion", entry)
    c = small("lion", "none")
    where = re.escape(f"OPTIMIZERS['lion'].factory is '{factory}': {found}. Name a function")
    with pytest.raises(errors.UsageError, match=where):
        optimizer.make_optimizer(c, model.parameter_shapes(c.model))


def lion(config, routes):
    peak = config.optimizer.learning_rate
    return optax.chain(
        optax.scale_by_lion(0.9, 0.99),
        optimizer.decay_each(routes, peak),
        optax.scale_by_learning_rate(optimizer.learning_rate(config.schedule, peak)),
    )


def test_frozen_gammas_have_no_update_and_no_state():
    for name in ("adamw", "muon"):
        c = small(name, "learned", "tiny,frozen")
        updates, state = two_updates(c)  # with gradients that are not zero
        for path, update in updates[1].items():
            is_frozen = "query_norm" in path or "key_norm" in path
            assert np.any(update) != is_frozen, path
        assert not [path for path in by_name(state) if "query_norm" in path or "key_norm" in path]
        assert [path for path in by_name(state) if "mlp_norm" in path]


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_clip_bounds_the_global_norm(clip_norm):
    c = small("muon", "none", optimizer__clip_norm=clip_norm)
    params = random_tree(c, 0)
    unit = by_name(random_tree(c, 1))
    unit = {name: g / np.sqrt(sum((g**2).sum() for g in unit.values())) for name, g in unit.items()}
    structure = jax.tree.structure(params)
    transformation = optimizer.make_optimizer(c, params)
    state, update = transformation.init(params), jax.jit(transformation.update)
    for norm in (8.0, 0.5):
        gradients = jax.tree.unflatten(structure, [g * norm for g in unit.values()])
        averages = by_name(update(gradients, state, params)[1])
        key = next(x for path, x in averages.items() if path.endswith("momentum/" + KEY))
        embedding = next(x for path, x in averages.items() if path.endswith("mu/embedding"))
        clipped = min(norm, clip_norm) if clip_norm else norm
        np.testing.assert_allclose(key, 0.05 * clipped * unit[KEY], rtol=1e-5)
        np.testing.assert_allclose(embedding, 0.1 * clipped * unit["embedding"], rtol=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_and_updates_keep_structure_shapes_and_dtypes(name, granularity):
    heads = 2 if granularity == "groups_of" else 1
    c = small(
        name,
        "learned",
        muon__granularity=granularity,
        muon__group_heads=heads if name == "muon" else 1,
        muon__dtype="bfloat16",
    )
    shapes = model.parameter_shapes(c.model)
    transformation = optimizer.make_optimizer(c, shapes)
    state = jax.eval_shape(transformation.init, shapes)
    updates, after = jax.eval_shape(transformation.update, shapes, state, shapes)
    assert jax.tree.map(signature, after) == jax.tree.map(signature, state)
    assert jax.tree.map(signature, updates) == jax.tree.map(signature, shapes)
    params_after = jax.eval_shape(optax.apply_updates, shapes, updates)
    assert jax.tree.map(signature, params_after) == jax.tree.map(signature, shapes)


def signature(x):
    return x.shape, x.dtype, getattr(x, "weak_type", False)
