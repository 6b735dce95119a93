"""A run directory without training: random parameters of some size, and numpy's losses of them."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import reference_model
import small_run
import synthetic_study

from qkjax import config as config_lib
from qkjax import files, model
from qkjax.data import manifest as manifest_lib
from qkjax.data import pipeline
from qkjax.runs import checkpoint
from qkjax.runs.directory import RunDirectory

STEP = small_run.STEPS


def random_params(run_config: config_lib.Config, seed: int = 0) -> model.Params:
    """Activations and logits of order 1, gammas that are not 1: every mistake shows."""
    chance = np.random.default_rng(seed)

    def leaf(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("gamma"):
            return chance.uniform(0.5, 1.5, shape).astype(np.float32)
        size = 0.2 if name == "embedding" else 1.5 / np.sqrt(shape[-2])
        return (chance.standard_normal(shape) * size).astype(np.float32)

    def fill(tree: Any, path: str = "") -> Any:
        if isinstance(tree, dict):
            return {name: fill(child, f"{path}/{name}".strip("/")) for name, child in tree.items()}
        return leaf(path, tree.shape)

    return fill(model.parameter_shapes(run_config.model))


def records(dataset: pathlib.Path) -> np.ndarray:
    """int [7, T+1]: the validation split."""
    batches = pipeline.read_validation(
        dataset, manifest_lib.load(dataset), num_tokens=0, sequences_per_batch=7
    )
    return next(iter(batches)).tokens


def reference_losses(params: model.Params, run_config: config_lib.Config) -> np.ndarray:
    """[7] float32 summed losses of the validation records, by numpy in float64."""
    wide = _map(params)
    sums = []
    for record in records(pathlib.Path(run_config.data.dir)):
        with np.errstate(all="ignore"):  # some tests give parameters that are not finite
            logits, _ = reference_model.logits(wide, record[:-1], run_config.model)
        log_sum = np.log(np.exp(logits).sum(-1))
        sums.append((log_sum - logits[np.arange(len(logits)), record[1:]]).sum())
    return np.array(sums, np.float32)


def _map(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _map(child) for name, child in tree.items()}
    return np.asarray(tree, np.float64)


def make(
    directory: pathlib.Path,
    dataset: pathlib.Path,
    qk_norm: str = "none",
    mlp: str = "swiglu",
    params: model.Params | None = None,
    losses: bool = True,
    **fields: Any,
) -> pathlib.Path:
    """Config, environment, one checkpoint, losses and summary, as a finished run leaves them.

    Without `losses` there is no validation/step_*.npz: numpy needs long for a large vocabulary.
    """
    values = {"model__mlp": mlp, "model__num_kv_heads": 2, "model__num_heads": 4}
    run_config = small_run.make_config(
        dataset, "muon", qk_norm, **{**values, "model__head_dim": 8, **fields}
    ).for_platform("cpu")
    params = random_params(run_config) if params is None else params
    directory.mkdir(parents=True)
    manifest = manifest_lib.load(dataset)
    fingerprint = manifest.fingerprint
    files.write_json(directory / "config.json", run_config.to_dict())
    files.write_json(directory / "environment.json", {"dataset_fingerprint": fingerprint})
    facts = {
        "config": run_config.to_dict(),
        "dataset_fingerprint": fingerprint,
        "data_order": pipeline.fingerprint(
            manifest, run_config.seed, run_config.train.sequences_per_step
        ),
        "wall_seconds": 1.0,
    }
    checkpoints = checkpoint.Checkpoints(directory / "checkpoints")
    checkpoints.save(STEP, params, {"count": np.zeros(1, np.float32)}, facts)
    checkpoints.wait()
    checkpoints.close()
    if losses:
        write_losses(directory, reference_losses(params, run_config))
    (directory / "metrics.jsonl").write_text(json.dumps({"step": STEP, "val/loss": 4.25}) + "\n")
    RunDirectory(directory).write_summary(
        {
            "arm": run_config.arm,
            "seed": run_config.seed,
            "step": STEP,
            "tokens": STEP * run_config.train.tokens_per_step,
            "params_sha256": checkpoint.digests(params)[1],
            "diverged": False,
            "diverged_step": None,
        }
    )
    return directory


def save_again(
    directory: pathlib.Path,
    step: int | None = None,
    params: model.Params | None = None,
    **fields: Any,
) -> None:
    """The run's latest parameters, or `params`, as its only checkpoint, with a changed config.

    Args:
        step: of the new checkpoint; that of the latest unless given.
        fields: of the config, in config.json and in the checkpoint; '__' stands for the dot.
    """
    run_directory = RunDirectory(directory)
    values = files.read_object(run_directory.config, "")
    for name, value in fields.items():
        section, _, field = name.partition("__")
        values[section][field] = value
    files.write_json(run_directory.config, values)
    synthetic_study.seal(directory)
    old = checkpoint.Checkpoints(run_directory.checkpoints, read_only=True)
    latest = old.steps()[-1]
    meta = old.meta(latest)
    if params is None:
        shapes = model.parameter_shapes(small_model(values))
        params = old.restore_params(latest, shapes)
    old.close()
    shutil.rmtree(run_directory.checkpoints)
    new = checkpoint.Checkpoints(run_directory.checkpoints)
    facts = {name: meta[name] for name in ("data_order", "dataset_fingerprint", "wall_seconds")}
    step = latest if step is None else step
    new.save(step, params, {"count": np.zeros(1, np.float32)}, {**facts, "config": values})
    new.wait()
    new.close()


def small_model(values: dict[str, Any]) -> config_lib.ModelConfig:
    """The model of a stored config, with attention that every machine has."""
    return dataclasses.replace(config_lib.from_dict(values).model, attention="xla")


def write_losses(directory: pathlib.Path, loss_sum: np.ndarray) -> None:
    """validation/step_*.npz with these sums."""
    path = directory / "validation" / f"step_{STEP:08d}.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez(path, loss_sum=loss_sum, count=np.full(len(loss_sum), small_run.LENGTH, np.float32))
