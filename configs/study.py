"""The study: which arms, controls, seeds, learning rates and budgets. One file, one command.

    qkjax study --config=configs/study.py:tiny,quick --workdir=studies/quick
    qkjax study --config=configs/study.py --config.data_dir=data/study --workdir=DIR
    qkjax study --config=configs/study.py:pilot,original --dry_run

Words after the colon: a scale (tiny, small, pilot, full), a recipe (fixed, original), and `quick`:
one seed, half the tokens, no sweep, no controls. Fields: `qkjax.study.plan_config.StudyConfig`.
"""

import ml_collections

from qkjax import presets
from qkjax.study import plan_config

M = 1_000_000
SWEEP_TOKENS = {"tiny": 100_000, "small": 256_000, "pilot": 5 * M, "full": 20 * M}
FACTORS = {"tiny": (1.0, 2.0)}  # of the base rate; elsewhere five, a factor 2 apart
ARMS = ("adamw_qk", "adamw_noqk", "muon_qk", "muon_noqk")
# At pilot and 4,096 tokens a step the arms of recipe original decay their gammas exactly as
# `decayed` does: then they serve as the decayed arms, and no further ones are trained.
DECAYED = ("adamw_qk_decayed", "muon_qk_decayed")
# The published study of laptop size (docs/log.md) also compares variants of Muon, and has a fourth
# seed for the arms that differ in gamma. It is executed run by run: --only says which runs.
LEVERS = ("muon_noqk_separate", "muon_noqk_per_head", "muon_noqk_clip")
FOURTH_SEED = 1001


def controls(scale: str, recipe: str) -> tuple[str, ...]:
    """The controls of the four arms, except `DECAYED`; none at tiny."""
    if scale == "tiny":
        return ()
    words = ["frozen"]
    # At pilot, recipe fixed has 381 steps: the exposure of these controls needs a rate of gamma at
    # which its noise is larger than any effect (docs/science.md).
    if (scale, recipe) != ("pilot", "fixed"):
        words += ["undecayed", "to_one"]
    of_gamma = [f"{arm}_{word}" for arm in ("adamw_qk", "muon_qk") for word in words]
    if (scale, recipe) == ("small", "original"):
        return (*of_gamma, *LEVERS)
    return (*of_gamma, *(["muon_noqk_merged"] if recipe == "fixed" else []))


def extra_seeds(scale: str, recipe: str) -> dict[str, tuple[int, ...]]:
    """Extra seeds of some arms, beside those that every arm has."""
    if (scale, recipe) != ("small", "original"):
        return {}
    of_gamma = [f"adamw_qk_{word}" for word in ("frozen", "undecayed", "to_one")]
    return dict.fromkeys(("adamw_noqk", "adamw_qk", *of_gamma), (FOURTH_SEED,))


def get_config(words: str = "") -> ml_collections.ConfigDict:
    """The study at the scale and recipe that `words` name."""
    scale, recipe, quick = plan_config.parse_words(words)
    config = ml_collections.ConfigDict()
    config.scale, config.recipe, config.quick = scale, recipe, quick
    config.arms = ARMS
    config.controls = () if quick else controls(scale, recipe)
    config.optional_controls = DECAYED if "adamw_qk_to_one" in config.controls else ()
    config.seeds = (42,) if quick else plan_config.SEEDS[scale]
    config.extra_seeds = ml_collections.ConfigDict({} if quick else extra_seeds(scale, recipe))
    tokens = 200_000 if scale == "tiny" else presets.TOKENS[scale, recipe][0]
    config.tokens = tokens // 2 if quick else tokens
    config.sweep = ml_collections.ConfigDict()
    # Recipe original runs at its own rates. 0 tokens: no sweep.
    config.sweep.tokens = 0 if quick or recipe == "original" else SWEEP_TOKENS[scale]
    config.sweep.seed = 7  # never a seed of the study
    config.sweep.factors = FACTORS.get(scale, (0.25, 0.5, 1.0, 2.0, 4.0))
    # By one rate, if the best one is at an edge.
    config.sweep.extend = scale not in ("tiny", "small")
    config.surgery = ml_collections.ConfigDict()
    config.surgery.tokens = 0 if quick else 65_536  # of each rank; 0: no rank surgery
    config.surgery.ranks = ()  # 1, 2, 4 and every eighth of head_dim
    config.data_dir = ""
    config.overrides = ()  # ("train.tokens_per_step=65536",): given to every run
    config.export = not quick
    config.downstream = "hub" if scale == "full" else ""  # "hub", a folder of files, "" = none
    return config
