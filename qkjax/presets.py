"""The numbers of the study: scales, recipes, controls, and what each word sets.

DESIGN.md section 3 and SCIENCE.md section 4 as tables. `qkjax.config` turns them into a config.
"""

import difflib
from typing import Any

from qkjax import errors

SCALES = ("tiny", "pilot", "full", "1b5")
RECIPES = ("fixed", "seed")
CONTROLS = ("frozen", "decayed", "undecayed", "merged")
WORDS = (*SCALES, *RECIPES, *CONTROLS)
# Set by the words after the config's colon; as overrides they would only relabel the run.
WORD_FIELDS = ("scale", "recipe")

# The tau = sum of lr x decay over a run at which the original's 25M pilot decayed its gammas.
PILOT_TAU = 7.3

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "num_layers": 4,
        "d_model": 128,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
        "vocab_size": 4096,
        "sequence_length": 256,
    },
    "pilot": {
        "num_layers": 22,
        "d_model": 512,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 64,
        "vocab_size": 49152,
        "sequence_length": 2048,
    },
    "1b5": {
        "num_layers": 32,
        "d_model": 2048,
        "num_heads": 16,
        "num_kv_heads": 8,
        "head_dim": 128,
        "vocab_size": 49152,
        "sequence_length": 2048,
    },
}
SHAPES["full"] = SHAPES["pilot"]

MLP: dict[tuple[str, str], tuple[str, int]] = {
    ("tiny", "fixed"): ("swiglu", 352),
    ("tiny", "seed"): ("relu2", 512),
    ("pilot", "fixed"): ("swiglu", 1344),
    ("pilot", "seed"): ("relu2", 2048),
    ("full", "fixed"): ("swiglu", 1344),
    ("full", "seed"): ("relu2", 2048),
    ("1b5", "fixed"): ("relu2", 8192),
    ("1b5", "seed"): ("relu2", 8192),
}

BUDGETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "tokens": 400_000,
        "at_tokens": (20_000, 50_000, 100_000, 200_000),
        "every_tokens": 0,
        "eval_tokens": 0,
        "final_tokens": -1,
        "checkpoint_tokens": 100_000,
    },
    "pilot": {
        "tokens": 25_000_000,
        "at_tokens": (500_000, 1_000_000, 2_000_000, 4_000_000, 8_000_000, 16_000_000),
        "every_tokens": 0,
        "eval_tokens": 1_048_576,
        "final_tokens": 0,
        "checkpoint_tokens": 5_000_000,
    },
    "full": {
        "tokens": 300_000_000,
        "at_tokens": (1_000_000, 4_000_000, 8_000_000, 16_000_000, 25_000_000),
        "every_tokens": 10_000_000,
        "eval_tokens": 1_048_576,
        "final_tokens": 0,
        "checkpoint_tokens": 10_000_000,
    },
    "1b5": {
        "tokens": 49_000_000,
        "at_tokens": (2_000_000, 4_000_000, 8_000_000, 16_000_000, 32_000_000),
        "every_tokens": 0,
        "eval_tokens": 262_144,
        "final_tokens": -1,
        "checkpoint_tokens": 5_000_000,
    },
}

TOKENS_PER_STEP: dict[tuple[str, str], int] = {
    ("tiny", "fixed"): 2_048,
    ("tiny", "seed"): 2_048,
    ("pilot", "fixed"): 65_536,
    ("pilot", "seed"): 4_096,
    ("full", "fixed"): 65_536,
    ("full", "seed"): 4_096,
    ("1b5", "fixed"): 65_536,
    ("1b5", "seed"): 65_536,
}

# AdamW's rate; Muon's rate and that of its auxiliary AdamW.
RATES: dict[tuple[str, str], tuple[float, float, float]] = {
    ("tiny", "fixed"): (1.2e-3, 0.012, 3e-3),
    ("pilot", "fixed"): (1.2e-3, 0.012, 3e-3),
    ("full", "fixed"): (1.2e-3, 0.012, 3e-3),
    ("1b5", "fixed"): (1.2e-3, 0.012, 3e-3),
    ("tiny", "seed"): (6e-3, 0.024, 6e-3),
    ("pilot", "seed"): (6e-3, 0.024, 6e-3),
    ("full", "seed"): (6e-4, 0.02, 6e-3),
    ("1b5", "seed"): (3e-3, 0.012, 3e-3),
}

# The rows of SCIENCE.md section 4 that depend on the recipe alone.
RECIPE_RULES: dict[str, dict[str, Any]] = {
    "fixed": {
        "end_of_text": True,
        "norm_eps": 1e-6,
        "clip_norm": 1.0,
        "beta2": 0.95,
        "adamw_decay": 0.1,
        "muon_decay": 0.01,
        "auxiliary_decay": 0.0,
        "gamma_decay": 0.0,
        "warmup_fraction": 0.02,
        "decay_fraction": 0.2,
        "granularity": "separate",
        "newton_schulz_dtype": "auto",
    },
    "seed": {
        "end_of_text": False,
        "norm_eps": 1.19e-7,
        "clip_norm": 0.0,
        "beta2": 0.999,
        "adamw_decay": 0.2,
        "muon_decay": 0.0,
        "auxiliary_decay": 0.2,
        "gamma_decay": 0.2,
        "warmup_fraction": 0.0,
        "decay_fraction": 0.0,
        "granularity": "merged",
        "newton_schulz_dtype": "bfloat16",
    },
}


def parse_words(words: str, optimizer: str, qk_norm: str) -> tuple[str, str, frozenset[str]]:
    given = [word.strip() for word in (words or "").split(",") if word.strip()]
    for word in given:
        if word not in WORDS:
            hint = suggest(word, WORDS)
            raise errors.UsageError(
                f"--config: unknown word {word!r} after the colon.{hint} "
                f"Known: scales {', '.join(SCALES)}; recipes {', '.join(RECIPES)}; "
                f"controls {', '.join(CONTROLS)}."
            )
    scale = _only_one(given, SCALES, "scale", default="full")
    recipe = _only_one(given, RECIPES, "recipe", default="fixed")
    _only_one(given, ("frozen", "decayed", "undecayed"), "control of gamma", default="")
    for word in set(given) & {"frozen", "decayed", "undecayed"}:
        if qk_norm == "none":
            raise errors.UsageError(
                f"--config: the word {word!r} acts on QK-Norm's gammas, and this arm has none. "
                f"Use configs/{optimizer}_qk.py:{words}."
            )
    if "merged" in given and optimizer != "muon":
        raise errors.UsageError(
            "--config: the word 'merged' acts on Muon only. Use a muon config or leave it out."
        )
    for word, no_op_recipe in (("undecayed", "fixed"), ("merged", "seed")):
        if word in given and recipe == no_op_recipe:
            raise errors.UsageError(
                f"--config: the word {word!r} changes nothing in recipe {recipe}, whose default "
                "it is. Leave it out."
            )
    return scale, recipe, frozenset(given) & frozenset(CONTROLS)


def _only_one(given: list[str], known: tuple[str, ...], what: str, default: str) -> str:
    found = [word for word in given if word in known]
    if len(found) > 1:
        raise errors.UsageError(
            f"--config: {' and '.join(found)} exclude each other: at most one {what}."
        )
    return found[0] if found else default


def suggest(word: str, known: tuple[str, ...]) -> str:
    """' Did you mean X?' for a near miss, else ''."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
