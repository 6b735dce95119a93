"""What a run shows on the terminal: a banner, a line now and then, a line per evaluation."""

import collections
import math
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from qkjax import flops
from qkjax.config import Config, gamma_exposure
from qkjax.data import manifest as manifest_lib

PR = "pr/key/post_rope/raw"  # the number that the original study published
UNDEFINED = "pr/undefined_heads"  # how many heads have none
_WINDOW = 20  # steps that a rate is averaged over
_WAIT_WARNING = 0.2  # share of the time that the device may wait for data
_LOSSES = 100  # training losses that the next one is held against
_FEWEST_LOSSES = 20  # with fewer, none is called a spike
_SPIKE = 6.0  # standard deviations above their mean


def banner(
    config: Config,
    num_parameters: int,
    devices: Sequence[jax.Device],
    dataset: manifest_lib.Manifest,
    workdir: pathlib.Path,
    start: int,
) -> str:
    """What is about to be trained from step `start` on, in a few lines; the treatment first."""
    o, steps, tokens_per_step = (
        config.optimizer,
        config.train.num_steps,
        config.train.tokens_per_step,
    )
    auxiliary = "" if o.adam_learning_rate is None else f" and {o.adam_learning_rate:g}"
    return "\n".join(
        (
            f"arm        {config.arm}",
            f"qk_norm    {config.model.qk_norm}",
            f"gamma      {_gamma(config)}",
            f"recipe     {config.recipe}, scale {config.scale}, seed {config.seed}",
            f"optimiser  {o.name}, learning rate {o.learning_rate:g}{auxiliary}",
            f"model      {num_parameters:,} parameters, {config.model.mlp}, {config.model.dtype}",
            f"devices    {len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
            f"data       {dataset.name}, fingerprint {dataset.fingerprint[:12]}",
            f"step       {tokens_per_step:,} tokens",
            f"steps      {steps:,}, in all {steps * tokens_per_step:,} tokens",
            f"start      {f'resumed after step {start}' if start else 'from scratch'}",
            f"workdir    {workdir}",
        )
    )


def _gamma(config: Config) -> str:
    """What the run does to gamma_q and gamma_k."""
    found = gamma_exposure(config)
    if found is None:
        return "none is learned"
    words = f"learning rate {found.learning_rate:.4g}, summed {found.summed_rate:.4g}"
    if not found.weight_decay:
        return f"{words}; no decay (tau 0)"
    return (
        f"{words}; decay W = {found.weight_decay:.4g} to {found.target:g}: tau {found.tau:.3g}, "
        f"1/W {found.largest:.3g}, sqrt(head_dim)/W^2 {found.largest_logit:.3g}, "
        f"noise {found.noise:.2g}"
    )


class Progress:
    """Rates of the running process, and the lines that show them."""

    def __init__(
        self, config: Config, num_parameters: int, device_kind: str, num_devices: int
    ) -> None:
        self._config = config
        self._work = flops.training_flops_per_token(config.model, num_parameters)
        peak = flops.peak_flops(device_kind)
        self._peak = None if peak is None else peak * num_devices
        self._first: tuple[int, float] | None = None  # step and time of the first read
        self._waits: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._warned = False
        self._reads: collections.deque[tuple[int, float]] = collections.deque(maxlen=_WINDOW)
        self._losses: collections.deque[float] = collections.deque(maxlen=_LOSSES)
        self._shown = -math.inf
        self._pr: float | None = None

    def restart_clock(self, step: int) -> None:
        """Leaves out of the next rates what happened up to now (an evaluation, a save)."""
        self._reads.clear()
        self._reads.append((step, time.monotonic()))

    def rates(self, step: int, data_wait: float) -> dict[str, float | None]:
        """perf/* after reading `step`, over the last steps; data_wait of this step in seconds.

        Over several steps, because what one step takes cannot be seen from the host: it is read
        while the next is under way.
        """
        now = time.monotonic()
        since_step, since = self._reads[0]
        self._reads.append((step, now))
        pace = max(now - since, 1e-9) / (step - since_step)  # seconds a step
        self._waits.append(data_wait / pace)
        if len(self._waits) == _WINDOW and not self._warned:
            share = sum(self._waits) / _WINDOW
            if share > _WAIT_WARNING:
                self._warned = True
                logging.warning("the device waits for data %.0f%% of the time", 100 * share)
        speed = self._config.train.tokens_per_step / pace
        return {
            "perf/tokens_per_second": speed,
            "perf/mfu": None if self._peak is None else speed * self._work / self._peak,
            "perf/data_wait": min(1.0, data_wait / pace),
        }

    def remember_loss(self, loss: float | None) -> None:
        """Takes a training loss from before the resume, so that spikes are found as without it."""
        if loss is not None:
            self._losses.append(float(np.float32(loss)))  # the row has fewer digits

    def watch_loss(self, step: int, loss: float) -> None:
        """Warns of a training loss far above the last 100. Nothing is skipped: it is a result.

        While the loss falls fast its spread is wide, and only large spikes are seen.
        """
        if len(self._losses) >= _FEWEST_LOSSES:
            mean, spread = statistics.fmean(self._losses), statistics.pstdev(self._losses)
            if loss > mean + _SPIKE * spread:
                logging.warning(
                    "step %d: the training loss %.4f is a spike, z-score %.1f against the last %d "
                    "(mean %.4f); training continues",
                    step,
                    loss,
                    (loss - mean) / max(spread, 1e-12),
                    len(self._losses),
                    mean,
                )
        self._losses.append(loss)

    def show_step(self, step: int, row: Mapping[str, Any]) -> None:
        """One line every `log.every_seconds`, and after the last step.

        What is not known is left out: PR before an evaluation, MFU of a device of unknown peak, the
        time left before a rate is known.
        """
        now = time.monotonic()
        self._first = self._first or (step, now)
        last = step == self._config.train.num_steps
        if now - self._shown < self._config.log.every_seconds and not last:
            return
        self._shown = now
        parts = [
            f"step {step}/{self._config.train.num_steps}",
            f"tokens {row['tokens']:,}",
            f"loss {_number(row['train/loss'], 4)}",
        ]
        if self._pr is not None:
            parts.append(f"PR {self._pr:.1f}")
        parts.append(f"{row['perf/tokens_per_second']:,.0f} tokens/s")
        if row["perf/mfu"] is not None:
            parts.append(f"MFU (PaLM) {row['perf/mfu']:.1%}")
        print("  ".join(parts + self._left(step, now)), flush=True)

    def show_evaluation(self, step: int, row: Mapping[str, Any]) -> None:
        """One line an evaluation."""
        self._pr = row[PR]
        if row[UNDEFINED]:
            logging.warning(
                "step %d: the keys of %d heads are all 0 or not finite: they have no PR, and "
                "means over heads are null",
                step,
                row[UNDEFINED],
            )
        print(
            f"eval {step}/{self._config.train.num_steps}  "
            f"val/loss {_number(row['val/loss'], 4)}  "
            f"PR of keys: post-RoPE raw {_number(row[PR], 2)}, "
            f"pre-RoPE centred {_number(row['pr/key/pre_rope/centred'], 2)} "
            f"of {self._config.model.head_dim}  ({row['perf/eval_seconds']:.1f} s)",
            flush=True,
        )

    def _left(self, step: int, now: float) -> list[str]:
        """Time left, at the average pace since the first step (evaluations included)."""
        assert self._first is not None
        first_step, first_time = self._first
        if step == first_step:
            return []
        pace = (now - first_time) / (step - first_step)
        seconds = round(pace * (self._config.train.num_steps - step))
        return [f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"]


def _number(value: float | None, digits: int) -> str:
    return "null" if value is None else f"{value:.{digits}f}"
