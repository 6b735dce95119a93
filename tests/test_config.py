"""config.py and presets.py: the study's numbers, the words, every check, the round trip."""

import ast
import dataclasses
import itertools
import json
import math
import pathlib
import re
import runpy
import typing

import ml_collections
import pytest

from qkjax import config as config_lib
from qkjax import errors, presets

ROOT = pathlib.Path(__file__).resolve().parents[1]
M = 1_000_000

# Written out once more: what every scale and recipe must give.
SHAPES = {  # layers, d_model, heads, kv heads, head_dim, vocabulary, sequence length
    "tiny": (4, 128, 4, 2, 32, 4096, 256),
    "small": (4, 256, 4, 2, 64, 8192, 256),
    "pilot": (22, 512, 8, 4, 64, 49152, 2048),
    "full": (22, 512, 8, 4, 64, 49152, 2048),
    "1b5": (32, 2048, 16, 8, 128, 49152, 2048),
}
BUDGETS = {  # tokens; eval at, every, tokens, final tokens (-1 none, 0 all); checkpoint every
    "tiny": (400_000, (20_000, 50_000, 100_000, 200_000), 0, 0, -1, 100_000),
    "small": (768_000, (62_464, 124_928, 249_856, 499_712, 768_000, 1_536_000), 0, 0, -1, 256_000),
    "pilot": (25 * M, (M // 2, M, 2 * M, 4 * M, 8 * M, 16 * M), 0, 1_048_576, 0, 5 * M),
    "full": (300 * M, (M, 4 * M, 8 * M, 16 * M, 25 * M), 10 * M, 1_048_576, 0, 10 * M),
    "1b5": (49 * M, (2 * M, 4 * M, 8 * M, 16 * M, 32 * M), 0, 262_144, -1, 5 * M),
}
BY_BOTH = {  # mlp, d_ff; tokens a step; AdamW's rate, Muon's, its auxiliary AdamW's
    ("tiny", "fixed"): ("swiglu", 352, 2_048, 1.2e-3, 0.012, 3e-3),
    ("small", "fixed"): ("swiglu", 704, 512, 1.2e-3, 0.012, 3e-3),
    ("small", "original"): ("relu2", 1024, 512, 6e-3, 0.024, 6e-3),
    ("pilot", "fixed"): ("swiglu", 1344, 65_536, 1.2e-3, 0.012, 3e-3),
    ("full", "fixed"): ("swiglu", 1344, 65_536, 1.2e-3, 0.012, 3e-3),
    ("1b5", "fixed"): ("relu2", 8192, 65_536, 1.2e-3, 0.012, 3e-3),
    ("tiny", "original"): ("relu2", 512, 2_048, 6e-3, 0.024, 6e-3),
    ("pilot", "original"): ("relu2", 2048, 4_096, 6e-3, 0.024, 6e-3),
    ("full", "original"): ("relu2", 2048, 4_096, 6e-4, 0.02, 6e-3),
    ("1b5", "original"): ("relu2", 8192, 65_536, 3e-3, 0.012, 3e-3),
}
# What depends on the recipe alone.
RECIPES = {
    "fixed": {
        "data.end_of_text": True,
        "model.norm_eps": 1e-6,
        "optimizer.clip_norm": 1.0,
        "optimizer.beta1": 0.9,
        "optimizer.beta2": 0.95,
        "optimizer.eps": 1e-8,
        "optimizer.auxiliary_weight_decay": 0.0,
        "optimizer.gamma_weight_decay": 0.0,
        "optimizer.warmup_fraction": 0.02,
        "optimizer.decay_fraction": 0.2,
        "muon.granularity": "separate",
        "muon.dtype": "auto",
    },
    "original": {
        "data.end_of_text": False,
        "model.norm_eps": 1.19e-7,
        "optimizer.clip_norm": 0.0,
        "optimizer.beta1": 0.9,
        "optimizer.beta2": 0.999,
        "optimizer.eps": 1e-8,
        "optimizer.auxiliary_weight_decay": 0.2,
        "optimizer.gamma_weight_decay": 0.2,
        "optimizer.warmup_fraction": 0.0,
        "optimizer.decay_fraction": 0.0,
        "muon.granularity": "merged",
        "muon.dtype": "bfloat16",
    },
}
MATRIX_DECAY = {
    ("adamw", "fixed"): 0.1,
    ("adamw", "original"): 0.2,
    ("muon", "fixed"): 0.01,
    ("muon", "original"): 0.0,
}
EVERYWHERE = {
    "seed": 42,
    "data.dir": "",
    "data.max_epochs": 4,
    "model.rope_base": 10_000.0,
    "model.dtype": "auto",
    "optimizer.gamma_decay_tau": 0.0,
    "muon.momentum": 0.95,
    "muon.nesterov": True,
    "muon.coefficients": "polar_express",
    "muon.scale": "spectral",
}


def overridden(optimizer="muon", qk_norm="none", words="tiny", **fields):
    """`fields` are dotted names with '__' for the dot."""
    given = config_lib.base(optimizer, qk_norm, words)
    given.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return given


def resolved(*args, **fields):
    return config_lib.resolve(overridden(*args, **fields))


def read(values, field):
    for name in field.split("."):
        values = getattr(values, name)
    return values


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("scale", "recipe"), BY_BOTH)
def test_table_of_scales_and_recipes(scale, recipe, optimizer):
    c = resolved(optimizer, "learned", f"{scale},{recipe}")
    m, mlp = c.model, BY_BOTH[scale, recipe]
    assert (c.scale, c.recipe, c.arm) == (scale, recipe, f"{optimizer}_qk")
    assert SHAPES[scale] == (
        m.num_layers,
        m.d_model,
        m.num_heads,
        m.num_kv_heads,
        m.head_dim,
        m.vocab_size,
        m.sequence_length,
    )
    assert (m.mlp, m.d_ff, c.train.tokens_per_step) == mlp[:3]
    adamw, muon, auxiliary = mlp[3:]
    rates = (c.optimizer.learning_rate, c.optimizer.adam_learning_rate)
    assert rates == ((adamw, None) if optimizer == "adamw" else (muon, auxiliary))
    assert c.optimizer.auxiliary_learning_rate == (adamw if optimizer == "adamw" else auxiliary)
    assert c.optimizer.weight_decay == MATRIX_DECAY[optimizer, recipe]
    assert c.optimizer.name == optimizer
    for field, expected in {**RECIPES[recipe], **EVERYWHERE}.items():
        assert read(c, field) == expected, field
    given = config_lib.base(optimizer, "learned", f"{scale},{recipe}")
    evaluation, checkpoint = given.eval, given.checkpoint
    assert BUDGETS[scale] == (
        given.train.tokens if (scale, recipe) != ("small", "original") else 768_000,
        evaluation.at_tokens,
        evaluation.every_tokens,
        evaluation.tokens,
        evaluation.final_tokens,
        checkpoint.every_tokens,
    )
    assert (c.train.tokens, c.eval.tokens, c.eval.final_tokens) == (
        given.train.tokens,
        BUDGETS[scale][3],
        BUDGETS[scale][4],
    )


def test_words_default_to_full_and_fixed():
    for words in ("", "full", "fixed", " fixed , full "):
        assert resolved("muon", "none", words) == resolved("muon", "none", "full,fixed")
    assert resolved("adamw", "none", "original,tiny") == resolved("adamw", "none", "tiny,original")


@pytest.mark.parametrize(
    ("words", "schedule"),
    [
        ("full", (4577, 92, 916)),
        ("full,original", (73_242, 0, 0)),
        ("pilot", (381, 8, 77)),
        ("pilot,original", (6_103, 0, 0)),
        ("1b5", (747, 15, 150)),
        ("tiny", (195, 4, 39)),
    ],
)
def test_whole_steps_of_run_warmup_and_decay(words, schedule):
    c = resolved("muon", "none", words)
    s = c.schedule
    assert (s.num_steps, s.warmup_steps, s.decay_steps) == schedule
    assert c.train.num_steps == s.num_steps


def test_schedule_factor_and_its_sum():
    s = config_lib.Schedule(num_steps=10, warmup_steps=4, decay_steps=5)
    factors = [0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert [s.factor(step) for step in range(10)] == pytest.approx(factors, rel=1e-15)
    assert s.total() == pytest.approx(sum(factors), rel=1e-15)
    constant = config_lib.Schedule(num_steps=7, warmup_steps=0, decay_steps=0)
    assert [constant.factor(step) for step in (0, 6)] == [1, 1] and constant.total() == 7


def test_full_run_is_measured_and_saved_at_the_study_s_steps():
    c = resolved("adamw", "learned", "full")
    every_10m = [10 * M * i // 65_536 for i in range(1, 30)]
    assert every_10m[0] == 152 and 4577 not in every_10m
    at = [M // 65_536, 61, 122, 244, 381]  # H3 reads steps 244 (16M) and 381 (25M)
    assert c.eval.steps == tuple(sorted({0, *at, *every_10m, 4577}))
    assert c.checkpoint.steps == (0, *every_10m, 4577)
    small = resolved("adamw", "learned", "small,original")
    assert small.eval.steps == (0, 122, 244, 488, 976, 1500, 3000, 6100)
    assert resolved("adamw", "learned", "small").eval.steps == small.eval.steps[:6]
    tiny = resolved("adamw", "learned", "tiny")
    assert tiny.eval.steps == (0, 9, 24, 48, 97, 195)
    assert tiny.checkpoint.steps == (0, 48, 97, 146, 195)


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"train__tokens": 1}, (0, 1)),  # floored, but at least one step
        ({"train__tokens": 2_047}, (0, 1)),
        ({"train__tokens": 4_095, "eval__at_tokens": (1, 10**9)}, (0, 1)),
        ({"train__tokens": 6_144, "eval__at_tokens": ()}, (0, 3)),
        ({"train__tokens": 6_144, "eval__at_tokens": (1,)}, (0, 1, 3)),  # never step 0 twice
        (
            {"train__tokens": 10_240, "eval__at_tokens": (), "eval__every_tokens": 4_096},
            (0, 2, 4, 5),
        ),
    ],
)
def test_evaluations_always_hold_step_0_and_the_last(fields, steps):
    c = resolved("muon", "none", "tiny", **fields)
    assert c.eval.steps == steps
    assert c.train.num_steps == steps[-1]
    assert {0, steps[-1]} <= set(c.checkpoint.steps)


@pytest.mark.parametrize("at", [(), (1, 77, 500, 640, 10**6)])
@pytest.mark.parametrize("every", [0, 1, 63, 64, 65, 128, 200, 640, 641])
def test_a_rule_of_steps_serves_as_their_tuple(at, every):
    """Ten steps of 64 tokens, against the steps one by one."""
    repeated = range(every, 10 * 64 + 1, every) if every else ()
    wanted = {max(1, tokens // 64) for tokens in (*at, *repeated)}
    expected = sorted({0, 10} | {step for step in wanted if step < 10})
    rule = config_lib.RepeatedSteps(10, 64, at, every)
    assert list(rule) == expected and len(rule) == len(expected)
    assert [step for step in range(-1, 12) if step in rule] == expected


def test_budgets_beyond_every_memory_resolve():
    """Steps are never listed where there are billions of them."""
    c = resolved("adamw", "learned", "full", train__tokens=10**14, eval__every_tokens=1)
    assert c.train.num_steps == 10**14 // 65_536
    assert len(c.eval.steps) == c.train.num_steps + 1 and 10**9 in c.eval.steps
    assert len(c.checkpoint.steps) == 10**14 // 10**7 + 1
    assert list(itertools.islice(c.checkpoint.steps, 3)) == [0, 152, 305]
    assert c.schedule.total() == pytest.approx(0.89 * c.train.num_steps)
    assert config_lib.from_dict(json.loads(json.dumps(c.to_dict()))) == c
    every = resolved("adamw", "learned", "full", eval__every_tokens=1)
    assert every.eval.steps == tuple(range(4578))


@pytest.mark.parametrize(
    ("arm", "words", "name"),
    [
        (("adamw", "learned"), "", "adamw_qk"),
        (("adamw", "none"), "", "adamw_noqk"),
        (("muon", "learned"), "original", "muon_qk"),
        (("muon", "none"), "original", "muon_noqk"),
        (("adamw", "learned"), "frozen", "adamw_qk_frozen"),
        (("muon", "learned"), "frozen,original", "muon_qk_frozen"),
        (("adamw", "learned"), "decayed", "adamw_qk_decayed"),
        (("muon", "learned"), "original,decayed", "muon_qk_decayed"),
        (("adamw", "learned"), "original,undecayed", "adamw_qk_undecayed"),
        (("muon", "none"), "merged", "muon_noqk_merged"),
        (("muon", "learned"), "merged,frozen", "muon_qk_frozen_merged"),
        (("muon", "none"), "per_head,clip", "muon_noqk_clip_per_head"),
        (("muon", "none"), "original,separate", "muon_noqk_separate"),
        (("muon", "learned"), "to_one,original", "muon_qk_to_one"),
        (("adamw", "learned"), "undecayed", "adamw_qk_undecayed"),
    ],
)
def test_arm_is_the_config_file_s_name_with_its_controls(arm, words, name):
    assert resolved(*arm, f"tiny,{words}").arm == name


def test_controls_set_what_they_say():
    for recipe, decay in (("fixed", 0.0), ("original", 0.2)):
        frozen = resolved("muon", "learned", f"tiny,{recipe},frozen")
        assert (frozen.model.qk_norm, frozen.optimizer.gamma_weight_decay) == ("frozen", 0)
        assert resolved("muon", "none", f"tiny,{recipe}").optimizer.gamma_weight_decay == 0
        assert frozen.optimizer.auxiliary_weight_decay == decay  # no control touches the others
    undecayed = resolved("adamw", "learned", "tiny,original,undecayed").optimizer
    assert (undecayed.gamma_weight_decay, undecayed.auxiliary_weight_decay) == (0, 0.2)
    grouped = resolved("muon", "none", "tiny", muon__granularity="groups_of", muon__group_heads=2)
    assert grouped.arm == "muon_noqk_groups_of_2"
    assert resolved("muon", "learned", "tiny", muon__scale="mup").arm == "muon_qk_mup"
    assert resolved("muon", "none", "tiny,merged", muon__scale="mup").arm == "muon_noqk_merged_mup"
    assert resolved("adamw", "none", "tiny", muon__scale="mup").arm == "adamw_noqk"
    merged = resolved("muon", "none", "tiny,merged")
    assert merged == dataclasses.replace(
        resolved("muon", "none", "tiny"),
        arm="muon_noqk_merged",
        muon=dataclasses.replace(merged.muon, granularity="merged"),
    )


@pytest.mark.parametrize(
    ("arm", "words", "message"),
    [
        (("muon", "none"), "tinyy", "unknown word 'tinyy' .* Did you mean 'tiny'"),
        (("muon", "none"), "undecay", "unknown word 'undecay' .* Did you mean 'undecayed'"),
        (
            ("muon", "none"),
            "zzz",
            "Known: scales tiny, small, pilot, full, 1b5; recipes fixed, original",
        ),
        (("muon", "none"), "tiny,full", "tiny and full exclude each other: at most one scale"),
        (
            ("muon", "none"),
            "original,fixed",
            "original and fixed exclude each other: at most one recipe",
        ),
        (("muon", "learned"), "frozen,decayed", "at most one control of gamma"),
        (("muon", "learned"), "original,decayed,undecayed", "at most one control of gamma"),
        (("muon", "none"), "separate", "'separate' changes nothing in recipe fixed"),
        (("muon", "none"), "original,separate,per_head", "at most one granularity of Muon"),
        (("adamw", "none"), "per_head", "'per_head' acts on Muon only"),
        (("adamw", "learned"), "tiny,clip", "'clip' .* configs/adamw_noqk.py:tiny,clip"),
        (("muon", "none"), "to_one", "'to_one' acts on QK-Norm"),
        (("lion", "none"), "tiny", "'lion' is unknown. .*presets.OPTIMIZERS"),
        (("muon", "none"), "original,merged", "'merged' changes nothing in recipe original"),
        (("adamw", "none"), "merged", "'merged' acts on Muon only"),
        (("adamw", "none"), "frozen", "'frozen' acts on QK-Norm.* configs/adamw_qk.py:frozen"),
        (("muon", "none"), "decayed", "'decayed' acts on QK-Norm"),
        (("muon", "none"), "original,undecayed", "'undecayed' acts on QK-Norm"),
    ],
)
def test_words_that_are_refused(arm, words, message):
    with pytest.raises(errors.UsageError, match=message):
        config_lib.base(*arm, words)


GAMMA_ARMS = [
    ("adamw", "tiny", {}),
    ("adamw", "full,original", {}),
    ("adamw", "tiny", {"optimizer__learning_rate": 7e-4, "train__tokens": 90_000}),
    ("muon", "small", {}),
    ("muon", "full", {"optimizer__adam_learning_rate": 1.5e-3}),
    ("muon", "tiny,original", {"optimizer__decay_fraction": 0.5}),
]


@pytest.mark.parametrize(("optimizer", "words", "fields"), GAMMA_ARMS)
def test_gamma_controls_share_exposure_and_differ_in_decay(optimizer, words, fields):
    """Force 0.2, and the rate whose sum times the force is tau, after all overrides."""
    arms = [
        resolved(optimizer, "learned", f"{words},{word}", **fields)
        for word in ("decayed", "undecayed", "to_one")
    ]
    tau = 0.3 if "tiny" in words else 7.3
    for c, (decay, target) in zip(arms, ((0.2, 0), (0, 0), (0.2, 1)), strict=True):
        o = c.optimizer
        assert (o.gamma_weight_decay, o.gamma_decay_target) == (decay, target)
        factors = (c.schedule.factor(step) for step in range(c.train.num_steps))
        assert 0.2 * o.rate_of_gamma * math.fsum(factors) == pytest.approx(tau, rel=1e-12)
    assert [c.arm.removeprefix(f"{optimizer}_qk") for c in arms] == [
        "_decayed",
        "_undecayed",
        "_to_one",
    ]
    parent = resolved(optimizer, "learned", words, **fields)
    for c in arms:  # nothing else is another than the parent's
        assert dataclasses.replace(c, arm=parent.arm, optimizer=parent.optimizer) == parent


def test_gamma_s_own_rate_ignores_all_others():
    a, b = (
        resolved("muon", "learned", "full,decayed", **{f"optimizer__{name}": 0.002}).optimizer
        for name in ("learning_rate", "adam_learning_rate")
    )
    assert a.gamma_learning_rate == b.gamma_learning_rate == pytest.approx(7.3 / 0.2 / 4074, 1e-3)


def test_the_original_s_pilot_has_the_exposure_of_the_control():
    """tau 7.3 at W 0.2: logits up to 200; at the recipe's own rate tau 7.3 would cap them at 3."""
    pilot = config_lib.gamma_exposure(resolved("adamw", "learned", "pilot,original"))
    assert pilot.tau == pytest.approx(7.3236) and pilot.summed_rate == pytest.approx(36.618)
    assert (pilot.largest, pilot.largest_logit) == (5, pytest.approx(200))
    assert pilot.noise == pytest.approx(math.sqrt(6e-3 / 0.4))
    control = config_lib.gamma_exposure(resolved("adamw", "learned", "pilot,original,to_one"))
    assert control.tau == pytest.approx(7.3) and control.target == 1
    assert control.largest_logit == pytest.approx(200)
    undecayed = config_lib.gamma_exposure(resolved("muon", "learned", "pilot,original,undecayed"))
    assert undecayed.tau == 0 and undecayed.largest_logit == math.inf
    assert undecayed.summed_rate == control.summed_rate
    for arm in ("frozen", "none"):
        assert config_lib.gamma_exposure(resolved("muon", "learned", model__qk_norm=arm)) is None


def test_a_rate_and_a_force_of_one_s_own():
    o = resolved(
        "adamw",
        "learned",
        "tiny",
        optimizer__gamma_learning_rate=0.01,
        optimizer__gamma_weight_decay=0.5,
    ).optimizer
    assert (o.rate_of_gamma, o.gamma_decay_tau) == (0.01, 0)
    c = resolved("adamw", "learned", "small,decayed", optimizer__gamma_weight_decay=0.4)
    assert config_lib.gamma_exposure(c).tau == pytest.approx(7.3)


def test_decay_that_would_carry_gamma_past_its_target_is_refused():
    with pytest.raises(errors.UsageError, match=r"gamma_weight_decay.* Train longer, or lower"):
        resolved("adamw", "learned", "full,decayed", train__tokens=7 * 65_536)
    with pytest.raises(errors.UsageError, match="gamma_weight_decay"):
        resolved("adamw", "learned", "tiny", optimizer__gamma_weight_decay=1 / 1.2e-3)
    resolved("adamw", "learned", "tiny", optimizer__gamma_weight_decay=0.99 / 1.2e-3)


def test_clip_word_sets_the_largest_logit():
    for words, limit in (("tiny", 30), ("small", 30), ("pilot", 100), ("full,original", 100)):
        parent, clip = (resolved("muon", "none", w) for w in (words, f"{words},clip"))
        assert clip.arm == "muon_noqk_clip" and parent.optimizer.qk_clip == 0
        assert clip.optimizer == dataclasses.replace(parent.optimizer, qk_clip=limit)
    assert resolved("adamw", "none", "tiny,clip").arm == "adamw_noqk_clip"


INVALID = {
    "profile.steps": (3, 2),
    "scale": "huge",
    "recipe": "mine",
    "mesh": "tensor",
    "seed": -1,
    "data.max_epochs": 0,
    "model.qk_norm": "layer",
    "model.mlp": "gelu",
    "model.num_layers": 0,
    "model.d_model": -8,
    "model.num_heads": 0,
    "model.num_kv_heads": 0,
    "model.head_dim": 0,
    "model.d_ff": 0,
    "model.vocab_size": 0,
    "model.sequence_length": 0,
    "model.norm_eps": 0.0,
    "model.rope_base": math.inf,
    "model.dtype": "float16",
    "model.unroll": -1,
    "model.remat": "everything",
    "model.attention": "flash",
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.0,
    "optimizer.weight_decay": -0.1,
    "optimizer.auxiliary_weight_decay": math.nan,
    "optimizer.gamma_weight_decay": math.inf,
    "optimizer.gamma_decay_tau": -1.0,
    "optimizer.gamma_decay_target": 0.5,
    "optimizer.gamma_learning_rate": -1.0,
    "optimizer.adam_learning_rate": 0.0,
    "optimizer.qk_clip": -1.0,
    "optimizer.qk_clip_sequences": 0,
    "optimizer.clip_norm": -1.0,
    "optimizer.beta1": 1.0,
    "optimizer.beta2": -0.5,
    "optimizer.eps": 0.0,
    "optimizer.warmup_fraction": 1.0,
    "optimizer.decay_fraction": math.nan,
    "muon.momentum": 1.0,
    "muon.coefficients": "cubic",
    "muon.granularity": "per_row",
    "muon.group_heads": 0,
    "muon.scale": "none",
    "muon.dtype": "float64",
    "train.tokens": 0,
    "train.tokens_per_step": -2_048,
    "train.microbatch_sequences": -1,
    "train.loss_chunk_tokens": 0,
    "eval.at_tokens": (4_096, -1),
    "eval.every_tokens": -1,
    "eval.tokens": -1,
    "eval.final_tokens": -2,
    "eval.batch_sequences": 0,
    "checkpoint.every_tokens": 0,
    "log.every_seconds": -1.0,
}


def leaves(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_mistake_is_in_one_message():
    given = overridden(**{k.replace(".", "__"): v for k, v in INVALID.items()})
    with pytest.raises(errors.UsageError) as caught:
        config_lib.resolve(given)
    message = str(caught.value)
    assert "\n" not in message
    for field, value in INVALID.items():
        assert f"{field} is {value!r}, it must be " in message, field
    # Nothing but a path and truth values can be set without a check.
    free = {
        "checkpoint.keep_all",
        "data.dir",
        "data.end_of_text",
        "determinism.gpu",
        "muon.nesterov",
    }
    assert set(leaves(given)) - INVALID.keys() == free


def test_fields_that_do_not_fit_together_are_told_with_mistakes_of_others():
    """But for rules that need a field which is wrong itself."""
    given = {"seed": -1, "model__head_dim": 31, "model__num_kv_heads": 0}
    given |= {"train__tokens_per_step": 2_049, "optimizer__qk_clip": 30.0, "optimizer__name": "x"}
    given |= {"optimizer__gamma_decay_target": 1.0, "optimizer__warmup_fraction": 0.9}
    with pytest.raises(errors.UsageError) as caught:
        config_lib.resolve(overridden("muon", "learned", **given))
    told = re.findall(r"(?:: |; )([\w.]+) is ", str(caught.value))
    assert sorted(told) == sorted(name.replace("__", ".") for name in given)
    assert "num_heads is" not in str(caught.value)


@pytest.mark.parametrize("field", ["optimizer.learning_rate", "optimizer.eps", "model.rope_base"])
def test_a_number_that_float32_does_not_hold_is_refused(field):
    """Else a step casts it to infinity, and the run counts as diverged."""
    given = overridden(**{field.replace(".", "__"): 1e300})
    with pytest.raises(errors.UsageError, match=f"{field} is 1e\\+300, it must be at most 3.4e"):
        config_lib.resolve(given)


@pytest.mark.parametrize("field", INVALID)
def test_every_mistake_alone_is_refused(field):
    given = overridden(**{field.replace(".", "__"): INVALID[field]})
    with pytest.raises(errors.UsageError, match=f"^config: {field} is "):
        config_lib.resolve(given)


@pytest.mark.parametrize(
    ("arm", "fields", "message"),
    [
        (("muon", "none"), {"model__head_dim": 31}, "model.head_dim is 31, .* even"),
        (("muon", "none"), {"model__num_kv_heads": 3}, "num_heads is 4, .* model.num_kv_heads = 3"),
        (
            ("muon", "none"),
            {"train__tokens_per_step": 2_049},
            "tokens_per_step is 2049, .* a multiple of model.sequence_length = 256",
        ),
        (("muon", "none"), {"optimizer__warmup_fraction": 0.9}, "warmup_fraction is 0.9"),
        (
            ("muon", "none"),
            {"model__d_model": 96, "muon__granularity": "merged"},
            "muon.granularity is 'merged', .* separate or per_head",
        ),
        (("muon", "none"), {"optimizer__adam_learning_rate": 0.0}, "adam_learning_rate is 0"),
        (
            ("adamw", "none"),
            {"optimizer__adam_learning_rate": 3e-3},
            "adam_learning_rate is 0.003, it must be left at its default",
        ),
        (
            ("adamw", "learned"),
            {"optimizer__gamma_learning_rate": 0.1, "optimizer__gamma_decay_tau": 1.0},
            "gamma_learning_rate is 0.1, it must be 0 with .*tau = 1",
        ),
        (
            ("adamw", "learned"),
            {"optimizer__gamma_decay_target": 1.0},
            "gamma_decay_target is 1.0, it must be 0 without .*gamma_weight_decay",
        ),
        (("muon", "learned"), {"optimizer__qk_clip": 30.0}, "qk_clip is 30.0, .*qk_norm=learned"),
        (("muon", "none"), {"muon__group_heads": 2}, "group_heads is 2, .* 1 unless"),
        (
            ("muon", "none"),
            {"muon__granularity": "groups_of", "muon__group_heads": 3},
            "group_heads is 3, .* a divisor of num_kv_heads = 2",
        ),
        (
            ("muon", "none"),
            {"muon__granularity": "groups_of"},
            "group_heads is 1, .* 2 or more: groups of one head are per_head",
        ),
        (
            ("muon", "none"),
            {"muon__granularity": "groups_of", "muon__group_heads": 2, "model__num_heads": 2},
            "granularity is 'groups_of', .* separate, which is the same if all 2 heads are one",
        ),
        (
            ("muon", "none"),
            {
                "muon__granularity": "per_head",
                "model__num_heads": 1,
                "model__num_kv_heads": 1,
            },
            "granularity is 'per_head', .* separate",
        ),
        (
            ("adamw", "none"),
            {"optimizer__gamma_weight_decay": 0.1},
            "gamma_weight_decay is 0.1, .* model.qk_norm=none",
        ),
        (("muon", "none"), {"optimizer__gamma_decay_tau": 7.3}, "gamma_decay_tau is 7.3"),
        (
            ("muon", "none"),
            {"train__tokens": 2**31 * 2048, "train__tokens_per_step": 2048},
            r"train.tokens is 4398046511104, .* less than 2\*\*31 steps .*tokens_per_step = 2048",
        ),
        (
            ("muon", "learned"),
            {"model__qk_norm": "frozen", "optimizer__gamma_weight_decay": 0.1},
            "gamma_weight_decay is 0.1, .* model.qk_norm=frozen",
        ),
    ],
)
def test_fields_that_do_not_fit_together(arm, fields, message):
    with pytest.raises(errors.UsageError, match=message):
        resolved(*arm, "tiny", **fields)


def test_granularity_of_adamw_arms_may_be_anything():
    c = resolved("adamw", "none", "tiny", model__d_model=96, muon__granularity="merged")
    assert c.arm == "adamw_noqk"


@pytest.mark.parametrize("words", ["tiny,decayed", "full,original", "1b5"])
def test_config_survives_json(words):
    for optimizer in ("adamw", "muon"):
        c = resolved(optimizer, "learned", words).for_platform("gpu")
        assert config_lib.from_dict(c.to_dict()) == c
        assert config_lib.from_dict(json.loads(json.dumps(c.to_dict()))) == c
        hash(c)  # jit takes it as a static argument


def stored(**changes):
    """A config.json of tiny with fields (dotted names with '__') replaced, or removed (None)."""
    values = json.loads(json.dumps(resolved("muon", "learned", "tiny").to_dict()))
    for name, value in changes.items():
        *sections, leaf = name.split("__")
        inside = values
        for section in sections:
            inside = inside[section]
        inside[leaf] = value
        if value is None:
            del inside[leaf]
    return values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__num_layers": "4"}, "model.num_layers is '4', it must be an integer, above 0"),
        ({"model__num_layers": -1}, "model.num_layers is -1, it must be above 0 and below 2"),
        ({"model__num_layers": 2**31}, "model.num_layers is 2147483648, .* below 2"),
        ({"model__num_layers": None}, "model.num_layers is missing"),
        ({"model__window": 128}, "model.window: no such field"),
        ({"model": 3}, "model.num_layers is missing; .* model: no such field"),
        ({"model": None}, "model.d_model is missing"),
        ({"arm": 7}, "arm is 7, it must be text"),
        ({"train__num_steps": True}, "train.num_steps is True, it must be an integer"),
        ({"eval__steps": [0, 9, 5]}, r"eval.steps is \[0, 9, 5\], it must be ascending steps"),
        ({"eval__steps": {"every": 1}}, "eval.steps is .* it must be ascending steps"),
        ({"recipe": ["seed"]}, "recipe is .* it must be text, one of fixed, original"),
        ({"optimizer__beta1": "x", "seed": 0.5}, "seed is 0.5, .*; optimizer.beta1 is 'x'"),
    ],
)
def test_a_stored_config_that_is_none_is_refused_by_file_and_field(changes, message):
    with pytest.raises(errors.UsageError, match=f"^runs/a/config.json: .*{message}") as caught:
        config_lib.from_dict(stored(**changes), where="runs/a/config.json")
    assert "\n" not in str(caught.value)


LATER = {
    "mesh": "data",
    "numerics_version": 1,
    "model.remat": "none",
    "optimizer.gamma_decay_target": 0.0,
    "optimizer.gamma_learning_rate": 0.0,
    "optimizer.qk_clip": 0.0,
    "optimizer.qk_clip_sequences": 4,
    "muon.group_heads": 1,
    "determinism.gpu": True,
}


def test_fields_that_came_later_are_filled_in_and_enter_no_fingerprint():
    """What they are filled with is what the code before did, for ever."""
    assert {n: f.absent for n, f in config_lib.FIELDS.items() if f.since} == LATER
    c = resolved("muon", "learned", "tiny")
    old = stored(**{name.replace(".", "__"): None for name in LATER})
    assert config_lib.from_dict(old) == c
    del old["determinism"]  # a section of later fields alone
    assert config_lib.from_dict(old) == c
    assert not LATER.keys() & c.fingerprinted().keys()
    changed = resolved("muon", "learned", "tiny", optimizer__gamma_learning_rate=0.01)
    assert changed.fingerprinted()["optimizer.gamma_learning_rate"] == 0.01
    assert c.model.unroll == 0 and c.fingerprinted()["model.unroll"] == 1  # as before 0 was auto
    unrolled = resolved("muon", "learned", "tiny", model__unroll=2)
    assert unrolled.fingerprinted()["model.unroll"] == 2


def test_the_control_decayed_of_before_has_a_name_of_its_own():
    """It decayed gamma at the arm's own rate, with a force of its own: not the control of today."""
    old = stored(
        arm="muon_qk_decayed_merged",
        optimizer__gamma_decay_tau=7.3,
        optimizer__gamma_weight_decay=1.49,
        optimizer__gamma_learning_rate=None,
    )
    c = config_lib.from_dict(old)
    assert c.arm == "muon_qk_decayed_1_merged" and c.optimizer.rate_of_gamma == 3e-3
    assert config_lib.from_dict(c.to_dict()) == c


def own_config(change):
    given = config_lib.base("muon", "none", "tiny")
    with given.ignore_type():
        change(given)
    return given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.model.__delattr__("d_ff"), "model.d_ff is missing, it must be an integer"),
        (lambda c: c.__delattr__("log"), "log.every_seconds is missing"),
        (lambda c: c.__setattr__("colour", 3), "colour: no such field"),
        (
            lambda c: c.optimizer.__setattr__("learing_rate", 0.1),
            "optimizer.learing_rate: no such field. Did you mean 'optimizer.learning_rate'",
        ),
        (lambda c: c.__setattr__("model", 3), "model is 3, it must be a section"),
    ],
)
def test_a_config_file_of_one_s_own_with_a_mistake(change, message):
    with pytest.raises(errors.UsageError, match=f"^config: .*{message}"):
        config_lib.resolve(own_config(change))


def test_values_of_a_wrong_type():
    given = config_lib.base("muon", "none", "tiny")
    with given.ignore_type():
        given.seed, given.model.mlp = "7", 3
        given.optimizer.beta1, given.muon.nesterov, given.eval.at_tokens = "x", 1, 7
    with pytest.raises(errors.UsageError) as caught:
        config_lib.resolve(given)
    for wrong in (
        "seed is '7', it must be an integer, from 0",
        "model.mlp is 3, it must be text, one of swiglu, relu2",
        "optimizer.beta1 is 'x', it must be a number, from 0 to below 1",
        "muon.nesterov is 1, it must be true or false",
        "eval.at_tokens is 7, it must be a tuple of integers, ",
    ):
        assert wrong in str(caught.value), wrong
    given = config_lib.base("muon", "none", "tiny")
    with given.ignore_type():
        given.log.every_seconds = 5  # an integer is a number
    assert repr(config_lib.resolve(given).log.every_seconds) == "5.0"


def test_auto_dtypes_are_settled_by_the_platform():
    c = resolved("muon", "none", "tiny")
    found = {
        p: (x.model.dtype, x.muon.dtype) for p in ("cpu", "gpu", "tpu") if (x := c.for_platform(p))
    }
    assert found == {
        "cpu": ("float32", "float32"),
        "gpu": ("bfloat16", "bfloat16"),
        "tpu": ("bfloat16", "bfloat16"),
    }
    asked = resolved("muon", "none", "tiny,original", model__dtype="float32").for_platform("tpu")
    assert (asked.model.dtype, asked.muon.dtype) == ("float32", "bfloat16")


# What resolve() makes of budgets, beside or in place of the fields as they were set.
DERIVED = {
    "arm",
    "numerics_version",
    "schedule",
    "train.num_steps",
    "train.sequences_per_step",
    "eval.steps",
    "checkpoint.steps",
}
BUDGET_FIELDS = {"eval.at_tokens", "eval.every_tokens", "checkpoint.every_tokens"}


def test_every_field_is_an_option_of_base_and_the_other_way_round():
    found = set()
    for field in dataclasses.fields(config_lib.Config):
        kind = typing.get_type_hints(config_lib.Config)[field.name]
        if dataclasses.is_dataclass(kind) and field.name not in DERIVED:
            found |= {f"{field.name}.{inner.name}" for inner in dataclasses.fields(kind)}
        else:
            found.add(field.name)
    assert found - DERIVED == set(leaves(config_lib.base("muon", "learned"))) - BUDGET_FIELDS


def test_no_option_has_a_hidden_default():
    """No `.get(...)` or getattr with a default on anything called config, c or given."""
    sources = [p for d in ("qkjax", "configs", "tools") for p in (ROOT / d).rglob("*.py")]
    assert len(sources) > 20
    hidden = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and _reads_with_default(node)
    ]
    assert not hidden


def _reads_with_default(call: ast.Call) -> bool:
    function = call.func
    if isinstance(function, ast.Attribute) and function.attr == "get":
        return _is_config(function.value)
    if isinstance(function, ast.Name) and function.id == "getattr" and len(call.args) == 3:
        return _is_config(call.args[0])
    return False


def _is_config(node: ast.expr) -> bool:
    """config, c, self.config, config.model, self._config.train, ..."""
    while isinstance(node, ast.Attribute):
        if node.attr in ("config", "_config"):
            return True
        node = node.value
    return isinstance(node, ast.Name) and node.id in ("config", "c", "given")


@pytest.mark.parametrize("arm", ["adamw_qk", "adamw_noqk", "muon_qk", "muon_noqk"])
def test_config_file_gives_its_arm_at_every_scale(arm):
    get_config = runpy.run_path(str(ROOT / "configs" / f"{arm}.py"))["get_config"]
    for scale in presets.SCALES:
        c = config_lib.resolve(get_config(scale))
        assert (c.arm, c.scale) == (arm, scale)
