"""A run exported: every file of the directory, put there as a whole or not at all."""

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable

from qkjax import buckets, errors, files
from qkjax.data import tokenizer as tokenizer_lib
from qkjax.export import card, hf, verify
from qkjax.trained import trained_run
from qkjax.trained.trained_run import TrainedRun

# Of an export, as `write` names them.
_FILES = frozenset(
    {
        hf.CONFIG_FILE,
        "generation_config.json",
        hf.RECORD_FILE,
        hf.WEIGHTS_FILE,
        tokenizer_lib.FILE_NAME,
        "tokenizer_config.json",
        "README.md",
    }
)


@dataclasses.dataclass(frozen=True)
class Request:
    """What to export; None stands for the default."""

    workdir: pathlib.Path
    out: pathlib.Path
    step: int | None = None  # of the checkpoint; the latest
    dtype: str = "float32"  # of the tensors, one of hf.DTYPES
    data_dir: str | None = None  # where the dataset lies now; where the run found it
    verify_sequences: int = 0  # validation sequences to verify with; 0 = no verification


def export(request: Request, report: Callable[[str], None] = print) -> None:
    """Writes the directory; where asked, verifies it and writes the verdict into its model card.

    Args:
        report: gets a line for everything that is done.
    Raises:
        UsageError: what `open_run` refuses, an `out` that exists, a package that is missing; or
            the directory does not compute what the run's model does: it stays, its card says so.
        StorageError: the disk failed; nothing has appeared under the final name.
    """
    out = request.out
    if out.exists() or out.is_symlink():
        raise errors.UsageError(
            f"--out: {out} already exists, and no export is overwritten. "
            "Give a new directory, or move this one away."
        )
    if request.verify_sequences < 0:
        raise errors.UsageError(
            f"--verify_sequences: {request.verify_sequences}, expected 1 or more. Give another."
        )
    hf.require_safetensors()
    if request.verify_sequences:
        verify.require_torch()
    run = trained_run.open_run(request.workdir, step=request.step, data_dir=request.data_dir)
    write(run, out, request.dtype)
    report(f"{out}: {hf.architecture(run.config.model)}, {request.dtype}, step {run.step}")
    if not request.verify_sequences:
        return
    verdict = verify.verify(out, run, request.verify_sequences, report)
    text = card.render(run, request.dtype, verdict.table())
    files.replace(out / "README.md", text.encode())
    if verdict.failed:
        raise errors.UsageError(
            f"{out}: verification failed: {'; '.join(verdict.failed)}. Do not use this directory "
            "(its README.md says so); report the numbers above with the versions of torch, "
            "transformers and jax."
        )
    report("verified")


def export_to_bucket(request: Request, address: str, report: Callable[[str], None] = print) -> None:
    """As `export`, into a temporary directory that is then copied into a bucket, config.json last.

    What an interrupted copy left there is overwritten; a finished export, or anything else, never.

    Args:
        request: its `out` is not used.
        address: gs://BUCKET/FOLDER or s3://BUCKET/FOLDER.
    Raises:
        UsageError: as `export`, and then nothing is copied; the folder is not empty; there is no
            such bucket, or access is denied.
        StorageError: the disk failed, or the bucket cannot be reached.
    """
    target = buckets.open_folder("--out", address)
    names = target.names()
    if hf.CONFIG_FILE in names or not _FILES.issuperset(names):
        raise errors.UsageError(
            f"--out: {target.address} already holds {', '.join(names[:5])}, and exports overwrite "
            "nothing. Give a new folder, or remove this one."
        )
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "export")

        def told(line: str) -> None:
            report(line.replace(str(out), target.address))

        try:
            export(dataclasses.replace(request, out=out), told)
        except errors.UsageError as error:
            raise errors.UsageError(str(error).replace(str(out), target.address)) from error
        last = out / hf.CONFIG_FILE
        target.store([path for path in out.iterdir() if path != last], last, report)
    report(f"{target.address}: copied")


def write(run: TrainedRun, out: pathlib.Path, dtype: str = "float32") -> None:
    """Writes every file into a hidden directory beside `out`, syncs them, and renames it.

    A kill leaves at most that hidden directory, `.NAME.tmp-PID`, which may be deleted.

    Raises:
        UsageError: the stock class cannot hold the model.
        StorageError: the disk failed.
    """
    config = hf.config_json(run.config.model, eos_id=run.tokenizer.eos_id, dtype=dtype)
    tensors = hf.to_tensors(run.params, run.config.model, dtype=dtype)
    texts = {
        hf.CONFIG_FILE: _json(config),
        "generation_config.json": _json({k: v for k, v in config.items() if k.endswith("_id")}),
        hf.RECORD_FILE: _json(
            {**run.identity, "dtype": dtype, "end_of_text": run.dataset.manifest.end_of_text}
        ),
        **_tokenizer_files(run),
        "README.md": card.render(run, dtype).encode(),
    }
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had our id
        temporary.mkdir()
        try:
            hf.save_tensors(tensors, temporary / hf.WEIGHTS_FILE)
            for name, content in texts.items():
                (temporary / name).write_bytes(content)
            usual = (temporary / hf.CONFIG_FILE).stat().st_mode
            (temporary / hf.WEIGHTS_FILE).chmod(usual)  # safetensors makes it the owner's alone
            for path in temporary.iterdir():
                files.sync_path(path)
            files.sync_directory(temporary)
            files.move(temporary, out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise files.storage_error(out, error) from error


def _tokenizer_files(run: TrainedRun) -> dict[str, bytes]:
    """The tokenizer of training, and what both transformers 4 and 5 read.

    tokenizer.json is the dataset's own, byte for byte unless it would add tokens that training did
    not have.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # what 5 writes itself, 4 cannot load
        "model_max_length": run.config.model.sequence_length,
        "model_input_names": ["input_ids", "attention_mask"],  # no token types: generate refuses
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": run.tokenizer.eos_token for name in ("bos", "eos", "pad")},
    }
    pre_tokenizer = json.loads(run.tokenizer.content).get("pre_tokenizer") or {}
    if "add_prefix_space" in pre_tokenizer:  # transformers would set its own default instead
        config["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
    return {
        tokenizer_lib.FILE_NAME: tokenizer_lib.without_additions(run.tokenizer.content),
        "tokenizer_config.json": _json(config),
    }


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
