"""The numbers of the study: scales, recipes, controls, and what each word sets.

docs/science.md section 4 as tables. `qkjax.config` turns them into a config.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from qkjax import errors

SCALES = ("tiny", "pilot", "full", "1b5")
RECIPES = ("fixed", "original")
# Recipes by the names that they had in files written before; fingerprints keep those names.
FORMER_RECIPES = {"seed": "original"}
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
    ("tiny", "original"): ("relu2", 512),
    ("pilot", "fixed"): ("swiglu", 1344),
    ("pilot", "original"): ("relu2", 2048),
    ("full", "fixed"): ("swiglu", 1344),
    ("full", "original"): ("relu2", 2048),
    ("1b5", "fixed"): ("relu2", 8192),
    ("1b5", "original"): ("relu2", 8192),
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
    ("tiny", "original"): 2_048,
    ("pilot", "fixed"): 65_536,
    ("pilot", "original"): 4_096,
    ("full", "fixed"): 65_536,
    ("full", "original"): 4_096,
    ("1b5", "fixed"): 65_536,
    ("1b5", "original"): 65_536,
}

# AdamW's rate; Muon's rate and that of its auxiliary AdamW.
RATES: dict[tuple[str, str], tuple[float, float, float]] = {
    ("tiny", "fixed"): (1.2e-3, 0.012, 3e-3),
    ("pilot", "fixed"): (1.2e-3, 0.012, 3e-3),
    ("full", "fixed"): (1.2e-3, 0.012, 3e-3),
    ("1b5", "fixed"): (1.2e-3, 0.012, 3e-3),
    ("tiny", "original"): (6e-3, 0.024, 6e-3),
    ("pilot", "original"): (6e-3, 0.024, 6e-3),
    ("full", "original"): (6e-4, 0.02, 6e-3),
    ("1b5", "original"): (3e-3, 0.012, 3e-3),
}

# The rows of docs/science.md section 4 that depend on the recipe alone.
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
    "original": {
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


def split_words(words: str, known: tuple[str, ...], listing: str) -> list[str]:
    """The words after a config's colon, separated by commas.

    Args:
        known: every word that there is.
        listing: the known words, as the refusal names them.
    Raises:
        UsageError: an unknown word, or the former name of one.
    """
    given = [word.strip() for word in (words or "").split(",") if word.strip()]
    for word in given:
        if word in FORMER_RECIPES:
            raise errors.UsageError(
                f"--config: the recipe {word!r} is called {FORMER_RECIPES[word]!r} now. "
                f"Write {FORMER_RECIPES[word]!r} after the colon."
            )
        if word not in known:
            raise errors.UsageError(
                f"--config: unknown word {word!r} after the colon.{suggest(word, known)} "
                f"Known: {listing}."
            )
    return given


def with_present_recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    """A stored config or study plan with the present name of its recipe."""
    recipe = values.get("recipe")
    words = values.get("words")  # of a study plan: "tiny,seed"
    renamed: dict[str, Any] = {}
    if isinstance(recipe, str):
        renamed["recipe"] = FORMER_RECIPES.get(recipe, recipe)
    if isinstance(words, str):
        renamed["words"] = ",".join(FORMER_RECIPES.get(word, word) for word in words.split(","))
    return {**values, **renamed}


def former_recipe(recipe: str) -> str:
    """The first name of a recipe, as fingerprints have it."""
    return next((old for old, new in FORMER_RECIPES.items() if new == recipe), recipe)


def parse_words(words: str, optimizer: str, qk_norm: str) -> tuple[str, str, frozenset[str]]:
    """(scale, recipe, controls) of the words after the colon of an arm's config file.

    Raises:
        UsageError: an unknown word, two that exclude each other, or one without effect.
    """
    listing = (
        f"scales {', '.join(SCALES)}; recipes {', '.join(RECIPES)}; controls {', '.join(CONTROLS)}"
    )
    given = split_words(words, WORDS, listing)
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
    for word, no_op_recipe in (("undecayed", "fixed"), ("merged", "original")):
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
