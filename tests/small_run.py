"""A run small enough for tests: 2 layers, 20 steps, real text through the real pipeline."""

import json
import os
import pathlib
import random
import signal
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from qkjax import config as config_lib
from qkjax import train
from qkjax.data import pipeline, prepare

LENGTH, VOCABULARY, TOKENS_PER_STEP, STEPS = 32, 300, 4 * 32, 20
# Of the runs of a study that `qkjax study` makes.
STUDY_OVERRIDES = (
    "model.num_layers=2",
    "model.d_model=32",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.head_dim=16",
    "model.d_ff=48",
    f"model.vocab_size={VOCABULARY}",
    f"model.sequence_length={LENGTH}",
    f"train.tokens_per_step={TOKENS_PER_STEP}",
    f"eval.at_tokens=({7 * TOKENS_PER_STEP},)",
    f"checkpoint.every_tokens={40 * TOKENS_PER_STEP}",
    "data.max_epochs=10",
)


def make_dataset(
    directory: pathlib.Path, *, end_of_text: bool = True, seed: int = 0
) -> pathlib.Path:
    """Short documents of made-up sentences: 160 training and 7 validation records."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("etaoinshrdlu", k=chance.randint(2, 7))) for _ in range(150)]
    source = directory.parent / f"{directory.name}.jsonl"
    with source.open("w") as file:
        for _ in range(400):
            sentence = " ".join(chance.choices(words, k=chance.randint(8, 14)))
            file.write(json.dumps({"text": sentence.capitalize() + "."}) + "\n")
    request = prepare.Request(
        sources=(f"jsonl:{source}",),
        tokenizer=f"train:{VOCABULARY}",
        sequence_length=LENGTH,
        train_tokens=160 * LENGTH,
        validation_tokens=7 * LENGTH,
        end_of_text=end_of_text,
    )
    prepare.prepare(request, directory, progress=lambda line: None)
    return directory


def make_config(
    dataset: pathlib.Path,
    optimizer: str = "muon",
    qk_norm: str = "none",
    words: str = "tiny",
    **fields: Any,
) -> config_lib.Config:
    """A resolved config; fields are dotted names with '__' for the dot."""
    values = config_lib.base(optimizer, qk_norm, words)
    values.data.dir = str(dataset)
    values.model.update(
        num_layers=2,
        d_model=32,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        d_ff=48,
        vocab_size=VOCABULARY,
        sequence_length=LENGTH,
    )
    values.train.tokens = STEPS * TOKENS_PER_STEP
    values.train.tokens_per_step = TOKENS_PER_STEP
    values.eval.at_tokens = (5 * TOKENS_PER_STEP, 9 * TOKENS_PER_STEP)
    values.checkpoint.every_tokens = 6 * TOKENS_PER_STEP
    values.log.every_seconds = 1e9
    for name, value in fields.items():
        section, _, field = name.rpartition("__")
        (values[section] if section else values)[field] = value
    return config_lib.resolve(values)


def command(dataset: pathlib.Path, workdir: pathlib.Path, *flags: str) -> list[str]:
    """`python -m qkjax.main` for the run of `make_config(dataset, "muon", "learned")`."""
    overrides = {
        "data.dir": dataset,
        "model.num_layers": 2,
        "model.d_model": 32,
        "model.num_heads": 2,
        "model.num_kv_heads": 1,
        "model.head_dim": 16,
        "model.d_ff": 48,
        "model.vocab_size": VOCABULARY,
        "model.sequence_length": LENGTH,
        "train.tokens": STEPS * TOKENS_PER_STEP,
        "train.tokens_per_step": TOKENS_PER_STEP,
        "eval.at_tokens": f"({5 * TOKENS_PER_STEP},{9 * TOKENS_PER_STEP})",
        "checkpoint.every_tokens": 6 * TOKENS_PER_STEP,
        "log.every_seconds": 0.0,
    }
    return [
        sys.executable,
        "-m",
        "qkjax.main",
        "--config=configs/muon_qk.py:tiny",
        *(f"--config.{name}={value}" for name, value in overrides.items()),
        f"--workdir={workdir}",
        *flags,
    ]


def rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on time."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith("perf/")}
        for line in lines
    ]


def identity(workdir: pathlib.Path, step: int = STEPS) -> tuple[str, str]:
    """Digests of parameters and optimiser state of a checkpoint."""
    from qkjax.runs import checkpoint

    meta = checkpoint.Checkpoints(workdir / "checkpoints", read_only=True).meta(step)
    return meta["params_sha256"], meta["opt_state_sha256"]


def run_with_signals(
    run_config: config_lib.Config,
    workdir: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    at_steps: Sequence[int],
) -> dict[str, Any]:
    """The run, stopped by SIGTERM when each of `at_steps` asks for its batch, and started again."""
    from qkjax.runs import signals

    original = pipeline.TrainLoader.__next__
    for step in at_steps:

        def stop_here(loader: pipeline.TrainLoader, step: int = step) -> pipeline.Batch:
            if loader.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(loader)

        with monkeypatch.context() as patch:
            patch.setattr(pipeline.TrainLoader, "__next__", stop_here)
            with pytest.raises(signals.Stopped) as stopped:
                train.train_and_evaluate(run_config, workdir)
        assert stopped.value.exit_code == 143
        assert (workdir / "checkpoints" / str(step + 1)).is_dir()  # the running step is finished
    return train.train_and_evaluate(run_config, workdir)
