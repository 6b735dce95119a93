"""How strongly a run decays the gammas of QK-Norm: rate, force, tau, and the noise of their steps.

AdamW moves gamma by about its rate a step for any gradient, and decays it by rate x force.
So |gamma| stays below 1 / force, and where no gradient holds it, it moves around its target with
the standard deviation sqrt(rate / (2 force)).
"""

import math
from collections.abc import Sequence

from qkjax import presets
from qkjax.config import GammaExposure, gamma_exposure
from qkjax.runs.results import RunResult

SAME = 0.01  # relative: rates and decays closer than this make twins
MOST_NOISE = 0.3  # above it the steps of gamma dominate and nothing is attributed


def words(found: GammaExposure) -> str:
    """The two numbers that say which decay an attribution is about."""
    return f"tau {found.tau:.3g}, force {found.weight_decay:.3g}"


def of_runs(runs: Sequence[RunResult]) -> GammaExposure | None:
    """The exposure that an arm's runs share; None without a run, or without learned gammas."""
    return gamma_exposure(runs[0].config) if runs else None


def same_rate(one: GammaExposure | None, other: GammaExposure | None) -> bool:
    """Whether two arms move their gammas alike, within 1%."""
    return bool(
        one and other and math.isclose(one.learning_rate, other.learning_rate, rel_tol=SAME)
    )


def is_pilot(found: GammaExposure | None) -> bool:
    """Whether a run decays its gammas as the original's pilot did, within 1% in tau and force."""
    return bool(
        found
        and math.isclose(found.tau, presets.PILOT_TAU, rel_tol=SAME)
        and math.isclose(found.weight_decay, presets.PILOT_FORCE, rel_tol=SAME)
    )
