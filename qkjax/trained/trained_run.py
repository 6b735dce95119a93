"""A run directory opened for use: config, verified parameters of one step, dataset, tokenizer."""

import contextlib
import dataclasses
import pathlib
from typing import Any

from qkjax import errors, model
from qkjax.config import Config
from qkjax.data import dataset as dataset_lib
from qkjax.data import manifest as manifest_lib
from qkjax.data import mirror
from qkjax.data import tokenizer as tokenizer_lib
from qkjax.runs import checkpoint
from qkjax.runs.directory import RunDirectory


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """One checkpoint of a run, with all that says what it is."""

    workdir: pathlib.Path
    config: Config
    step: int  # updates done
    params: model.Params  # numpy, float32, finite
    params_sha256: str
    dataset: dataset_lib.Dataset
    tokenizer: tokenizer_lib.Tokenizer
    environment: dict[str, Any]  # environment.json
    summary: dict[str, Any] | None  # summary.json; None: the run is not finished

    @property
    def identity(self) -> dict[str, Any]:
        """Which checkpoint of which run this is, for results that are kept elsewhere."""
        return {
            "arm": self.config.arm,
            "seed": self.config.seed,
            "step": self.step,
            "params_sha256": self.params_sha256,
            "dataset_fingerprint": self.dataset.manifest.fingerprint,
            "scale": self.config.scale,
            "recipe": self.config.recipe,
        }


def open_run(
    workdir: pathlib.Path,
    *,
    step: int | None = None,
    data_dir: str | None = None,
    finished: bool = True,
    data_flag: str = "--data_dir",
) -> TrainedRun:
    """Opens a run; writes nothing in it. Of the dataset, only manifest and tokenizer are read.

    Args:
        step: of the checkpoint; None takes the latest.
        data_dir: where the run's dataset lies now; None: where the run found it.
        finished: refuse a run without summary.json.
        data_flag: what the command calls data_dir, for messages.
    Raises:
        UsageError: no run, an unfinished one, no such checkpoint or a damaged one, parameters
            that are not finite, another dataset than the run's, another vocabulary.
    """
    directory = RunDirectory(workdir)
    config = directory.need_config()
    summary = directory.read_summary()
    if finished and summary is None:
        raise errors.UsageError(
            f"{workdir}: the run is not finished, expected summary.json in it. "
            "Run its qkjax.main command again until it is done."
        )
    environment = directory.need_environment()
    trained_on = environment["dataset_fingerprint"]
    dataset = _open_dataset(workdir, config, trained_on, data_dir, data_flag)
    tokenizer = tokenizer_lib.of_dataset(dataset.manifest, dataset.directory)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise errors.UsageError(
            f"{dataset.directory}: its tokenizer has {tokenizer.vocab_size} tokens, and the model "
            f"of {workdir} has {config.model.vocab_size}. "
            f"Give the directory of the run's own dataset as {data_flag}=DIR."
        )
    fingerprint = dataset.manifest.fingerprint
    if fingerprint != trained_on:
        raise errors.UsageError(
            f"{dataset.directory}: another dataset than the run's, fingerprint "
            f"{fingerprint[:12]}, expected {trained_on[:12]}. "
            f"Give the directory of the run's own dataset as {data_flag}=DIR."
        )
    params, meta = _restore(directory, config, trained_on, step)
    directory.check_files()
    return TrainedRun(
        workdir=workdir,
        config=config,
        step=meta["step"],
        params=params,
        params_sha256=meta["params_sha256"],
        dataset=dataset,
        tokenizer=tokenizer,
        environment=environment,
        summary=summary,
    )


def _open_dataset(
    workdir: pathlib.Path, config: Config, trained_on: str, data_dir: str | None, data_flag: str
) -> dataset_lib.Dataset:
    directory = config.data.dir if data_dir is None else data_dir
    if not directory:
        # The embedded corpus, made where it is missing.
        return dataset_lib.open_dataset(config, trained_on)
    field = "data.dir" if data_dir is None else data_flag
    place = mirror.local_directory(field, directory)
    if not (place / manifest_lib.FILE_NAME).is_file():
        raise errors.UsageError(
            f"{directory}: no dataset.json there, expected the dataset of {workdir}. "
            f"If it was moved, give {data_flag}=DIR."
        )
    return dataset_lib.Dataset(place, manifest_lib.load(place))


def _restore(
    directory: RunDirectory, config: Config, trained_on: str, step: int | None
) -> tuple[model.Params, dict[str, Any]]:
    """Verified parameters and meta of a step; None: of the latest."""
    where = directory.checkpoints
    with contextlib.closing(checkpoint.Checkpoints(where, read_only=True)) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise errors.UsageError(f"{where}: no checkpoint there. Let the run save one.")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise errors.UsageError(
                f"--step: {where} has no checkpoint of step {step}. Give one of {steps}."
            )
        meta = checkpoints.meta(step)
        directory.check_checkpoint(meta, config, trained_on)
        shapes = model.parameter_shapes(config.model)
        return checkpoints.restore_params(step, shapes), meta
