"""How strongly a run decays the gammas of QK-Norm: rate, force, tau, and the noise of their steps.

AdamW moves gamma by about its rate a step for any gradient, and decays it by rate x force.
So |gamma| stays below 1 / force, and where no gradient holds it, it wanders about its target with
the standard deviation sqrt(rate / (2 force)).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from qkjax import presets
from qkjax.config import Config
from qkjax.runs.results import RunResult

SAME = 0.01  # relative: rates and decays closer than this make twins
MOST_NOISE = 0.3  # above it the steps of gamma dominate and nothing is attributed


class Exposure(NamedTuple):
    """Of the gammas of queries and keys, learned ones."""

    rate: float  # peak
    force: float  # the decay coefficient
    tau: float  # sum over steps of rate x decay

    def __str__(self) -> str:
        return f"tau {self.tau:.3g}, force {self.force:.3g}"

    @property
    def step_noise(self) -> float:
        """sqrt(rate / 2W); infinite without decay."""
        return math.sqrt(self.rate / (2 * self.force)) if self.force else math.inf


def of_config(config: Config) -> Exposure:
    """The exposure that a run has."""
    optimizer = config.optimizer
    rate = optimizer.rate_of_gamma
    force = optimizer.gamma_weight_decay
    return Exposure(rate, force, rate * force * config.schedule.total())


def of_runs(runs: Sequence[RunResult]) -> Exposure | None:
    """Of the first of an arm's runs: they share it; None without one."""
    return of_config(runs[0].config) if runs else None


def same_rate(one: Exposure | None, other: Exposure | None) -> bool:
    """Whether two arms move their gammas alike, within 1%."""
    return bool(one and other and math.isclose(one.rate, other.rate, rel_tol=SAME))


def is_pilot(found: Exposure | None) -> bool:
    """Whether a run decays its gammas as the original's pilot did, within 1% in tau and force."""
    return bool(
        found
        and math.isclose(found.tau, presets.PILOT_TAU, rel_tol=SAME)
        and math.isclose(found.force, presets.PILOT_FORCE, rel_tol=SAME)
    )
