"""A whole run against the bare steps in it, on the study's schedule of evaluations.

One repetition is what lies between two evaluations of the full study: 153 steps (10M tokens at
65,536 a step), one evaluation with all measures on a tenth of these tokens, one checkpoint.
Smaller shapes keep these proportions.
"""

import dataclasses
import gc
import pathlib
import tempfile
from typing import Any

import numpy as np

from benchmarks import jax_work
from qkjax import config as config_lib
from qkjax import model, train
from qkjax.config import Config
from qkjax.data import dataset as dataset_lib
from qkjax.data import pipeline
from qkjax.runs.directory import RunDirectory

STEPS = 153
_EVALUATED = 0.1  # tokens, of those trained in between


class Steps(jax_work.Step):
    """The run's program on its first batch, again and again."""

    def load(self, settings: Config, spec: dict[str, Any]) -> tuple[model.Params, np.ndarray]:
        data = dataset_lib.open_dataset(settings)
        loader = pipeline.TrainLoader(
            data.directory,
            data.manifest,
            seed=settings.seed,
            sequences_per_step=settings.train.sequences_per_step,
        )
        params = model.init(train.initialisation_key(settings.seed), settings.model)
        return params, next(iter(loader)).tokens

    def repeat(self, times: int) -> None:
        super().repeat(times * STEPS)


class Run(jax_work.JaxWork):
    """`train_and_evaluate` in a fresh run directory, from its first line to its summary."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._settings = config_lib.from_dict(spec["config"])
        self._folder = pathlib.Path(spec["inputs"]).parent

    def first(self) -> dict[str, float]:
        row = self.train(intervals=0)[-1]
        return {"loss": row["train/loss"], "grad_norm": row["train/grad_norm"]}

    def repeat(self, times: int) -> None:
        self.train(times)

    def train(self, intervals: int) -> list[dict[str, Any]]:
        """Rows of a run of one step more than the intervals have, so that 0 is the start alone."""
        with tempfile.TemporaryDirectory(dir=self._folder) as workdir:
            train.train_and_evaluate(lengthen(self._settings, intervals), workdir)
            gc.collect()  # the device's memory, before the next run wants it
            return RunDirectory(workdir).read_metrics()


class Start(Run):
    """What a run does once: data, compiled programs, evaluation and checkpoint of step 0."""

    def repeat(self, times: int) -> None:
        del times  # a run has one start, however long it is
        self.train(intervals=0)


def lengthen(settings: Config, intervals: int) -> Config:
    """A run of `intervals` intervals, each with one evaluation and one checkpoint, and a step."""
    t, length = settings.train, settings.model.sequence_length
    steps = intervals * STEPS + 1
    ends = tuple(range(STEPS, steps, STEPS))
    evaluated = max(1, round(_EVALUATED * STEPS * t.tokens_per_step / length)) * length
    return dataclasses.replace(
        settings,
        train=dataclasses.replace(t, num_steps=steps, tokens=steps * t.tokens_per_step),
        schedule=dataclasses.replace(settings.schedule, num_steps=steps),
        eval=dataclasses.replace(
            settings.eval, steps=(0, *ends), tokens=evaluated, final_tokens=-1
        ),
        checkpoint=dataclasses.replace(settings.checkpoint, steps=(0, *ends, steps)),
    )
