"""What each hypothesis asks of a plan: arms, evaluations, scores; decided before a run is trained.

A hypothesis that a plan cannot answer leaves the corrected family by name (docs/statistics.md), so
that it costs the others nothing. The steps at which hypotheses look into runs stand here too.
"""

from collections.abc import Sequence

from qkjax.config import Config

ARMS = ("adamw_qk", "adamw_noqk", "muon_qk", "muon_noqk")
SHORT_RUN_STEP = 244  # 1M tokens at 4,096 a step, 16M at 65,536
PILOT_TOKENS = 25_000_000
NEEDED_ARMS = {
    "H1": ARMS,
    "H2": ARMS,
    "H3": ARMS,
    "H4": ("adamw_qk", "muon_qk", "muon_noqk"),
    "H5": ("adamw_qk", "muon_noqk"),
}


def growth_step(config: Config) -> int | None:
    """The step from which H3(c) measures growth; None where the plan goes without the clause.

    The evaluation of 25M tokens; the pilot ends there and goes without. At scale small the
    evaluation nearest to a quarter of the steps.
    """
    if config.scale == "pilot":
        return None
    if config.scale == "small":
        quarter = config.train.num_steps / 4
        return min(config.eval.steps, key=lambda step: abs(step - quarter))
    return PILOT_TOKENS // config.train.tokens_per_step


def too_short(config: Config, step: int) -> str:
    """Why a run cannot be looked into after `step` updates as an early one; "" if it can."""
    last = config.train.num_steps
    if step >= last:
        return f"budget too short: runs end at step {last:,}, they have to pass {step:,}"
    if step not in config.eval.steps:
        return f"budget too short: no evaluation at step {step:,}"
    return ""


def unanswerable(arms: Sequence[str], config: Config, scores: bool) -> dict[str, str]:
    """The hypotheses that a plan cannot answer, by name, and why.

    Args:
        arms: of the plan, controls included.
        config: of one of its runs: all have the same budget and evaluations.
        scores: whether runs are scored on downstream tasks.
    """
    found = {}
    for name, needed in NEEDED_ARMS.items():
        lacking = [arm for arm in needed if arm not in arms]
        if lacking:
            found[name] = f"the plan has no arm {' and no arm '.join(lacking)}"
    steps = [SHORT_RUN_STEP, growth_step(config)]
    why = [too_short(config, step) for step in steps if step is not None]
    if any(why):
        found.setdefault("H3", next(filter(None, why)))
    if not scores:
        found.setdefault("H5", "the plan has no downstream scores")
    return dict(sorted(found.items()))
