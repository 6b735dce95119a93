"""The dataset that a config asks for, checked before anything is computed."""

import contextlib
import dataclasses
import pathlib

from absl import logging

from qkjax import errors
from qkjax.cli import places
from qkjax.config import Config
from qkjax.data import manifest as manifest_lib
from qkjax.data import mirror, prepare, request

EMBEDDED_SCALES = ("tiny", "small")  # need no data.dir
# The version stands for what `prepare_embedded` makes; raise it with any change of that.
_EMBEDDED_VERSION = "embedded-v2"
_EMBEDDED_VOCABULARY = 4096  # needs no word in the folder's name


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A directory of shards and what is in it."""

    directory: pathlib.Path
    manifest: manifest_lib.Manifest


def require_directory(config: Config) -> None:
    """Refuses a config that needs data.dir and does not have it; needs no jax.

    Raises:
        UsageError: names the command that makes a dataset.
    """
    if not config.data.dir and config.scale not in EMBEDDED_SCALES:
        options = ["--preset=pilot" if config.scale == "pilot" else "--preset=study"]
        if config.model.sequence_length != request.PRESETS["study"]["sequence_length"]:
            options.append(f"--sequence_length={config.model.sequence_length}")
        if not config.data.end_of_text:
            options.append("--end_of_text=false")
        raise errors.UsageError(
            f"data.dir: scale {config.scale} needs a prepared dataset. Make one with `qkjax "
            f"prepare {' '.join(options)} --out=DIR`, then pass --config.data.dir=DIR."
        )


def open_dataset(config: Config, trained_on: str = "") -> Dataset:
    """The dataset of the config, checked against the model, the recipe and the budget.

    Every shard is hashed, at 1 to 2 GB a second: batches of other data cannot be told from these.

    Args:
        trained_on: fingerprint of the dataset that the run has on record, "" for a new run. A run
            on an earlier version of the embedded corpus keeps that version.
    Raises:
        UsageError: no dataset, a damaged one, or one that does not fit the config.
    """
    require_directory(config)
    if config.data.dir:
        directory = mirror.local_directory("data.dir", config.data.dir)
    else:
        directory = embedded_of_fingerprint(trained_on) or prepare.prepare_embedded(
            embedded_directory(config.model.vocab_size, config.data.end_of_text),
            vocab_size=config.model.vocab_size,
            end_of_text=config.data.end_of_text,
        )
    manifest = manifest_lib.load(directory)
    try:
        foreign = manifest_lib.verify_digests(manifest, directory, tables=False)
    except errors.UsageError as error:
        raise mirror.explained(error, config.data.dir, directory) from error
    if foreign:
        logging.warning("%s: not in dataset.json, so not read: %s", directory, ", ".join(foreign))
    where = directory / "dataset.json"
    for field, wanted, found in (
        ("model.sequence_length", config.model.sequence_length, manifest.sequence_length),
        ("model.vocab_size", config.model.vocab_size, manifest.tokenizer.vocab_size),
        ("data.end_of_text", config.data.end_of_text, manifest.end_of_text),
    ):
        if wanted != found:
            raise errors.UsageError(
                f"{where}: {field.split('.')[1]} is {found}, and the config's {field} is {wanted}. "
                f"Prepare another dataset or pass --config.{field}={found}."
            )
    passes = passes_over_data(config, manifest, config.train.num_steps)
    if passes > config.data.max_epochs:
        raise errors.UsageError(
            f"train.tokens: {config.train.tokens} tokens are {passes:.2f} passes over the "
            f"{manifest.splits['train'].num_tokens} training tokens of {where}. Prepare more "
            "text, train fewer tokens, or raise data.max_epochs."
        )
    if passes > 1:
        logging.warning("%s: this run passes %.2f times over its training split", where, passes)
    return Dataset(directory, manifest)


def embedded_directory(vocab_size: int, end_of_text: bool) -> pathlib.Path:
    """Where the embedded corpus lies: `embedded-v2[-VOCAB][-without-end-of-text]` in data/."""
    name = _EMBEDDED_VERSION
    if vocab_size != _EMBEDDED_VOCABULARY:
        name += f"-{vocab_size}"
    return places.data() / (name if end_of_text else f"{name}-without-end-of-text")


def embedded_of_fingerprint(fingerprint: str) -> pathlib.Path | None:
    """The finished embedded corpus, of any version, that a run was trained on; None without one."""
    if not fingerprint:
        return None
    for path in sorted(places.data().glob(f"embedded*/{manifest_lib.FILE_NAME}")):
        with contextlib.suppress(errors.UsageError):  # a damaged one is not it
            if manifest_lib.load(path.parent).fingerprint == fingerprint:
                return path.parent
    return None


def passes_over_data(config: Config, manifest: manifest_lib.Manifest, steps: int) -> float:
    """How often `steps` steps go through the training split."""
    return steps * config.train.sequences_per_step / manifest.splits["train"].num_sequences
