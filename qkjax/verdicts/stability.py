"""What H4 asks of every run by rule: divergence, spikes of the loss, attention logits.

Each takes one run and returns the number that has to stay below a limit; None where the run is
too short to have one, infinity where a value was not finite.
"""

import math

import numpy as np

from qkjax.runs.results import RunResult

MAX_LOGIT = "attention/max_logit"
WINDOW = 100  # steps of the running median
SETTLED = 0.02  # of training, before which a spike is no spike


def divergences(run: RunResult) -> float:
    """1 where a step was not finite, else 0."""
    return float(run.diverged)


def highest_spike(run: RunResult) -> float | None:
    """Largest training loss above the median of the up to 100 steps before it, nat.

    Of the steps after 2% of training; the median may reach back before them.
    """
    rows = [row for row in run.rows if "train/loss" in row]
    steps = np.array([row["step"] for row in rows])
    losses = np.array(
        [math.nan if row["train/loss"] is None else row["train/loss"] for row in rows], np.float64
    )
    settled = steps > SETTLED * run.config.train.num_steps
    settled[:1] = False  # nothing before it
    if not settled.any():
        return None
    if not np.isfinite(losses).all():
        return math.inf
    medians = np.full(len(losses), math.nan)
    for place in range(1, min(WINDOW, len(losses))):
        medians[place] = np.median(losses[:place])
    if len(losses) > WINDOW:
        windows = np.lib.stride_tricks.sliding_window_view(losses[:-1], WINDOW)
        medians[WINDOW:] = np.median(windows, axis=1)
    return float((losses - medians)[settled].max())


def highest_logit(run: RunResult) -> float | None:
    """Largest attention logit of any evaluation, the pass after the last step included."""
    values = [probe.metrics[MAX_LOGIT] for probe in run.probes if MAX_LOGIT in probe.metrics]
    if not values:
        return None
    if not run.diverged:
        values.append(run.value(MAX_LOGIT))
    return max(math.inf if value is None or math.isnan(value) else value for value in values)


def logit_rise(run: RunResult) -> float | None:
    """Rise of the largest logit over the last half, by least squares through its evaluations.

    slope x (last step - first step) of the evaluations at or after half of the steps; with two of
    them the last minus the first.
    """
    half = run.config.train.num_steps / 2
    late = [
        (p.step, p.metrics[MAX_LOGIT])
        for p in run.probes
        if p.step >= half and MAX_LOGIT in p.metrics
    ]
    if len(late) < 2:
        return None
    if any(value is None for _, value in late):
        return math.inf
    steps, logits = np.array(late, np.float64).T
    centred = steps - steps.mean()
    return float(centred @ logits / (centred @ centred) * (steps[-1] - steps[0]))
