"""The numbers of the study: scales, recipes, controls, optimisers, and what each word sets.

The tables of docs/science.md section 4; the fields of `qkjax.config` take their defaults from here.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from qkjax import errors

SCALES = ("tiny", "small", "pilot", "full", "1b5")
RECIPES = ("fixed", "original")
# Recipes by the names that they had in files written before; fingerprints keep those names.
FORMER_RECIPES = {"seed": "original"}
GAMMA_CONTROLS = ("frozen", "decayed", "undecayed", "to_one")  # of an arm with QK-Norm
GRANULARITY_CONTROLS = ("merged", "separate", "per_head")  # of a Muon arm
CONTROLS = (*GAMMA_CONTROLS, "clip", *GRANULARITY_CONTROLS)
WORDS = (*SCALES, *RECIPES, *CONTROLS)
# Set by the words after the config's colon; as overrides they would only relabel the run.
WORD_FIELDS = ("scale", "recipe")

# How the original's 25M pilot decayed its gammas: tau = sum of lr x decay over the run, and the
# force W, the decay itself. The gamma controls have both (at tiny a tau of its own).
PILOT_TAU = 7.3
PILOT_FORCE = 0.2
TINY_TAU = 0.3

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
    "small": {
        "num_layers": 4,
        "d_model": 256,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "vocab_size": 8192,
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
    ("small", "fixed"): ("swiglu", 704),
    ("small", "original"): ("relu2", 1024),
    ("pilot", "fixed"): ("swiglu", 1344),
    ("pilot", "original"): ("relu2", 2048),
    ("full", "fixed"): ("swiglu", 1344),
    ("full", "original"): ("relu2", 2048),
    ("1b5", "fixed"): ("relu2", 8192),
    ("1b5", "original"): ("relu2", 8192),
}

# What depends on the scale alone.
BUDGETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "at_tokens": (20_000, 50_000, 100_000, 200_000),
        "every_tokens": 0,
        "eval_tokens": 0,
        "final_tokens": -1,
        "checkpoint_tokens": 100_000,
    },
    "small": {
        "at_tokens": (62_464, 124_928, 249_856, 499_712, 768_000, 1_536_000),
        "every_tokens": 0,
        "eval_tokens": 0,
        "final_tokens": -1,
        "checkpoint_tokens": 256_000,
    },
    "pilot": {
        "at_tokens": (500_000, 1_000_000, 2_000_000, 4_000_000, 8_000_000, 16_000_000),
        "every_tokens": 0,
        "eval_tokens": 1_048_576,
        "final_tokens": 0,
        "checkpoint_tokens": 5_000_000,
    },
    "full": {
        "at_tokens": (1_000_000, 4_000_000, 8_000_000, 16_000_000, 25_000_000),
        "every_tokens": 10_000_000,
        "eval_tokens": 1_048_576,
        "final_tokens": 0,
        "checkpoint_tokens": 10_000_000,
    },
    "1b5": {
        "at_tokens": (2_000_000, 4_000_000, 8_000_000, 16_000_000, 32_000_000),
        "every_tokens": 0,
        "eval_tokens": 262_144,
        "final_tokens": -1,
        "checkpoint_tokens": 5_000_000,
    },
}

# Tokens of a run, and of a step.
TOKENS: dict[tuple[str, str], tuple[int, int]] = {
    ("tiny", "fixed"): (400_000, 2_048),
    ("tiny", "original"): (400_000, 2_048),
    ("small", "fixed"): (768_000, 512),
    ("small", "original"): (3_123_200, 512),
    ("pilot", "fixed"): (25_000_000, 65_536),
    ("pilot", "original"): (25_000_000, 4_096),
    ("full", "fixed"): (300_000_000, 65_536),
    ("full", "original"): (300_000_000, 4_096),
    ("1b5", "fixed"): (49_000_000, 65_536),
    ("1b5", "original"): (49_000_000, 65_536),
}

# A number of every recipe and scale, or by recipe, or by recipe and then by scale.
Table = float | Mapping[str, float] | Mapping[str, float | Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """One optimiser of block matrices: how it is made, and its rates and decay by default."""

    factory: str  # "module:function" of (Config, list[Route]), which returns its transformation
    rate: Table  # peak
    decay: Table  # of the matrices
    # Peak rate of the AdamW that updates the embedding and the gammas; None: the optimiser updates
    # every parameter itself, at its own rate.
    auxiliary_rate: Table | None = None


# One more optimiser is one more entry, and a config file that names it.
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(
        factory="qkjax.optimizer:adamw",
        rate={
            "fixed": 1.2e-3,
            "original": {"tiny": 6e-3, "small": 6e-3, "pilot": 6e-3, "full": 6e-4, "1b5": 3e-3},
        },
        decay={"fixed": 0.1, "original": 0.2},
    ),
    "muon": Optimizer(
        factory="qkjax.optimizer:muon_of_matrices",
        rate={
            "fixed": 0.012,
            "original": {
                "tiny": 0.024,
                "small": 0.024,
                "pilot": 0.024,
                "full": 0.02,
                "1b5": 0.012,
            },
        },
        decay={"fixed": 0.01, "original": 0.0},
        auxiliary_rate={
            "fixed": 3e-3,
            "original": {"tiny": 6e-3, "small": 6e-3, "pilot": 6e-3, "full": 6e-3, "1b5": 3e-3},
        },
    ),
}

# What depends on the recipe alone.
RECIPE_RULES: dict[str, dict[str, Any]] = {
    "fixed": {
        "end_of_text": True,
        "norm_eps": 1e-6,
        "clip_norm": 1.0,
        "beta2": 0.95,
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
        "auxiliary_decay": 0.2,
        "gamma_decay": 0.2,
        "warmup_fraction": 0.0,
        "decay_fraction": 0.0,
        "granularity": "merged",
        "newton_schulz_dtype": "bfloat16",
    },
}


# Largest logit of a head that QK-Clip leaves alone; at the two small scales logits stay lower.
CLIP_LOGIT = {"tiny": 30.0, "small": 30.0, "pilot": 100.0, "full": 100.0, "1b5": 100.0}


@dataclasses.dataclass(frozen=True)
class Choice:
    """What an arm's config file and the words after its colon choose; defaults depend on it."""

    scale: str
    recipe: str
    optimizer: str  # a name of OPTIMIZERS
    qk_norm: str  # of the config file: "none" or "learned"
    controls: frozenset[str]

    @property
    def rules(self) -> dict[str, Any]:
        """The rules of the recipe."""
        return RECIPE_RULES[self.recipe]

    @property
    def gamma_is_decayed(self) -> bool:
        """The parent's gammas are: learned, and under no control of their own."""
        return self.qk_norm == "learned" and not self.controls & set(GAMMA_CONTROLS)

    @property
    def gamma_tau(self) -> float:
        """The tau at which a gamma control's rate is derived; 0 where there is no such control."""
        if not self.controls & {"decayed", "undecayed", "to_one"}:
            return 0.0
        return TINY_TAU if self.scale == "tiny" else PILOT_TAU

    @property
    def gamma_force(self) -> float:
        """Weight decay of gamma_q and gamma_k."""
        if self.controls & {"decayed", "to_one"}:
            return PILOT_FORCE
        return float(self.rules["gamma_decay"]) if self.gamma_is_decayed else 0.0

    @property
    def granularity(self) -> str:
        """The granularity of Muon."""
        named = self.controls & set(GRANULARITY_CONTROLS)
        return next(iter(named), str(self.rules["granularity"]))

    @property
    def rate(self) -> float:
        """Peak learning rate of the matrices."""
        return self._number(OPTIMIZERS[self.optimizer].rate)

    @property
    def auxiliary_rate(self) -> float | None:
        """Peak learning rate of the auxiliary AdamW, where there is one."""
        table = OPTIMIZERS[self.optimizer].auxiliary_rate
        return None if table is None else self._number(table)

    @property
    def decay(self) -> float:
        """Weight decay of the matrices."""
        return self._number(OPTIMIZERS[self.optimizer].decay)

    def _number(self, table: Table) -> float:
        by_scale = table[self.recipe] if isinstance(table, Mapping) else table
        return by_scale[self.scale] if isinstance(by_scale, Mapping) else by_scale


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


def parse_words(words: str, optimizer: str, qk_norm: str) -> Choice:
    """What the words after the colon of an arm's config file choose.

    Args:
        optimizer, qk_norm: of the config file.
    Raises:
        UsageError: an unknown word or optimiser, two words that exclude each other, or one
            without effect.
    """
    if optimizer not in OPTIMIZERS:
        raise errors.UsageError(
            f"optimizer.name: {optimizer!r} is unknown.{suggest(optimizer, tuple(OPTIMIZERS))} "
            f"Known: {', '.join(OPTIMIZERS)}; add an entry to presets.OPTIMIZERS."
        )
    listing = (
        f"scales {', '.join(SCALES)}; recipes {', '.join(RECIPES)}; controls {', '.join(CONTROLS)}"
    )
    given = split_words(words, WORDS, listing)
    scale = _only_one(given, SCALES, "scale", default="full")
    recipe = _only_one(given, RECIPES, "recipe", default="fixed")
    _only_one(given, GAMMA_CONTROLS, "control of gamma", default="")
    _only_one(given, GRANULARITY_CONTROLS, "granularity of Muon", default="")
    for word in given:
        if word in GAMMA_CONTROLS and qk_norm == "none":
            raise errors.UsageError(
                f"--config: the word {word!r} acts on QK-Norm's gammas, and this arm has none. "
                f"Use configs/{optimizer}_qk.py:{words}."
            )
        if word == "clip" and qk_norm != "none":
            raise errors.UsageError(
                "--config: the word 'clip' scales queries down, which QK-Norm undoes. "
                f"Use configs/{optimizer}_noqk.py:{words}."
            )
        if word in GRANULARITY_CONTROLS and optimizer != "muon":
            raise errors.UsageError(
                f"--config: the word {word!r} acts on Muon only. Use a muon config or leave it out."
            )
        if word == RECIPE_RULES[recipe]["granularity"]:
            raise errors.UsageError(
                f"--config: the word {word!r} changes nothing in recipe {recipe}, whose default "
                "it is. Leave it out."
            )
    return Choice(scale, recipe, optimizer, qk_norm, frozenset(given) & frozenset(CONTROLS))


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
