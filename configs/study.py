"""The study: which arms, controls, seeds, learning rates and budgets. One file, one command.

    python tools/run_study.py --config=configs/study.py:tiny,quick --workdir=studies/quick
    python tools/run_study.py --config=configs/study.py --config.data_dir=data/study --workdir=DIR
    python tools/run_study.py --config=configs/study.py:pilot,original --dry_run

Words after the colon: a scale (tiny, pilot, full), a recipe (fixed, original), and `quick`: one
seed, half the tokens, no sweep, no controls. Fields: `qkjax.study.plan_config.StudyConfig`.
"""

import ml_collections

from qkjax.study import plan_config

M = 1_000_000
RUN_TOKENS = {"tiny": 200_000, "pilot": 25 * M, "full": 300 * M}
SWEEP_TOKENS = {"tiny": 100_000, "pilot": 5 * M, "full": 20 * M}
CONTROLS = {  # none at tiny
    "fixed": (
        "adamw_qk_frozen",
        "adamw_qk_decayed",
        "muon_qk_frozen",
        "muon_qk_decayed",
        "muon_noqk_merged",
    ),
    "original": ("adamw_qk_frozen", "adamw_qk_undecayed", "muon_qk_frozen", "muon_qk_undecayed"),
}
# In recipe original the arms themselves decay their gammas, at pilot and 4,096 tokens a step just
# as strongly as `decayed`: then they are the decayed arms, and no second ones are trained.
OPTIONAL_CONTROLS = {"fixed": (), "original": ("adamw_qk_decayed", "muon_qk_decayed")}


def get_config(words: str = "") -> ml_collections.ConfigDict:
    """The study at the scale and recipe that `words` name."""
    scale, recipe, quick = plan_config.parse_words(words)
    config = ml_collections.ConfigDict()
    config.scale, config.recipe, config.quick = scale, recipe, quick
    config.arms = ("adamw_qk", "adamw_noqk", "muon_qk", "muon_noqk")
    has_controls = scale != "tiny" and not quick
    config.controls = CONTROLS[recipe] if has_controls else ()
    config.optional_controls = OPTIONAL_CONTROLS[recipe] if has_controls else ()
    config.seeds = (42,) if quick else (42, 137)
    config.tokens = RUN_TOKENS[scale] // 2 if quick else RUN_TOKENS[scale]
    config.sweep = ml_collections.ConfigDict()
    # Recipe original runs at its own rates. 0 tokens: no sweep.
    config.sweep.tokens = 0 if quick or recipe == "original" else SWEEP_TOKENS[scale]
    config.sweep.seed = 7  # never a seed of the study
    config.sweep.factors = (1.0, 2.0) if scale == "tiny" else (0.25, 0.5, 1.0, 2.0, 4.0)
    config.sweep.extend = scale != "tiny"  # by one rate, where the best is at an edge
    config.surgery = ml_collections.ConfigDict()
    config.surgery.tokens = 0 if quick else 65_536  # of each rank; 0: no rank surgery
    config.surgery.ranks = ()  # 1, 2, 4 and every eighth of head_dim
    config.data_dir = ""
    config.overrides = ()  # ("train.tokens_per_step=65536",): given to every run
    config.export = not quick
    config.downstream = "hub" if scale == "full" else ""  # "hub", a folder of files, "" = none
    return config
