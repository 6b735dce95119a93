"""The rows of metrics.jsonl at Weights & Biases, of a run that is trained with --wandb.

wandb takes the rows of ascending steps and none twice. So each row is sent when the next one is
there, once nothing is added to it any more, and wandb.json in the run directory holds how far they
went. A resumed run sends what wandb lacks of the rows up to its checkpoint, then its own.
"""

import json
import os
import pathlib
import secrets
from collections.abc import Mapping
from typing import Any

from qkjax import errors, files
from qkjax.runs import environment
from qkjax.runs.directory import RunDirectory
from qkjax.runs.tensorboard import MetricWriter, ScalarsOnly

_PROJECT = "qkjax"  # unless WANDB_PROJECT or wandb's own settings name one
# Of a network that does not answer; what was not uploaded stays in the run directory.
_SECONDS_TO_START, _SECONDS_TO_FINISH = 60.0, 60.0
_STOPPED = 1  # exit code of a run that has not ended
_RECORD: dict[str, files.Types] = {"id": str, "step": int}
_RECORD_BYTES = 64
_AGAIN = "Remove it, and the run is sent to wandb as a new one."


class WandbWriter(ScalarsOnly, MetricWriter):
    """CLU's MetricWriter that sends scalars to one run of Weights & Biases."""

    def __init__(self, workdir: str | os.PathLike[str], resume_step: int = -1) -> None:
        """Starts wandb's run of this directory, or continues it.

        Its config is config.json with the commit of environment.json; nothing else of the
        machine, the command line or the environment is sent.

        Args:
            resume_step: step of the restored checkpoint; -1 where nothing was restored. Rows of
                metrics.jsonl up to it are sent where wandb has none of that step.
        Raises:
            UsageError: wandb.json or another file of the run is damaged.
            StorageError: wandb.json cannot be written.
            Exception: of wandb, which did not start.
        """
        import wandb

        self._directory = RunDirectory(workdir)
        self._record = _Record(self._directory.path / "wandb.json")
        self._held: tuple[int, dict[str, Any]] | None = None
        self._run: Any
        settings = wandb.Settings(
            console="off",  # as everything here: metrics alone
            disable_code=True,
            finish_timeout=_SECONDS_TO_FINISH,
            init_timeout=_SECONDS_TO_START,
            silent=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            reinit="create_new",  # beside one that a notebook may have open
            project=wandb.setup().settings.project or _PROJECT,
            dir=os.fspath(self._directory.path),
            id=self._record.id,
            resume="allow",
            name="/".join(self._directory.path.absolute().parts[-2:]),
            config=_config(self._directory),
            allow_val_change=True,  # by --allow_config_change
            settings=settings,
        )
        # Of a run that was killed, the server knows what has reached it; offline nobody does.
        self._sent = self._record.step if self._run.offline else self._run.step - 1
        for row in self._directory.read_metrics():
            if row["step"] <= resume_step:
                self.write_scalars(row["step"], {k: v for k, v in row.items() if k != "step"})
        where = f"{self._directory.path / 'wandb'}, for `wandb sync`"
        print(f"wandb      {where if self._run.offline else self._run.url}", flush=True)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Sends the row before this one; what is not finite is left out, as in metrics.jsonl."""
        if step <= self._sent:
            return
        held: dict[str, Any] = {}
        if self._held is not None and self._held[0] == step:
            held = self._held[1]
        else:
            self._send()
        self._held = int(step), {**held, **files.plain(scalars)}

    def _send(self) -> None:
        if self._held is None:
            return
        (step, row), self._held = self._held, None
        self._sent = step
        self._run.log({name: value for name, value in row.items() if value is not None}, step=step)
        self._record.write(step)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Does nothing: the run has its config from the start."""

    def flush(self) -> None:
        """Does nothing: wandb uploads, or writes to the disk, in a process of its own."""

    def close(self) -> None:
        """Ends wandb's run, as finished where summary.json says so, with the numbers in it.

        The last row of a stopped run stays here: resumed, the run may have more to say of it.
        """
        if self._run is None:
            return
        exit_code = _STOPPED
        try:
            summary = self._directory.read_summary()
            if summary is not None:
                self._send()
                self._run.summary.update({k: v for k, v in summary.items() if v is not None})
                exit_code = errors.NonFiniteError.exit_code if summary["diverged"] else 0
        finally:
            run, self._run = self._run, None
            run.finish(exit_code=exit_code)


class _Record:
    """wandb.json: the id of wandb's run, and the last step that was sent; -1 for none."""

    def __init__(self, path: pathlib.Path) -> None:
        """Reads the file, or makes one with a new id."""
        self._path = path
        record = files.read_object(path, _AGAIN) or {"id": secrets.token_hex(5), "step": -1}
        files.need(path, "", record, _RECORD, _AGAIN)
        self.id, self.step = record["id"], record["step"]
        files.replace(path, self._bytes())

    def _bytes(self) -> bytes:
        text = json.dumps({"id": self.id, "step": self.step})
        return text.ljust(_RECORD_BYTES - 1).encode() + b"\n"

    def write(self, step: int) -> None:
        """In place and without a sync, as there is one for every row."""
        self.step = step
        with open(self._path, "r+b", buffering=0) as file:
            file.write(self._bytes())


def _config(directory: RunDirectory) -> dict[str, Any]:
    """What wandb shows as the run's config; values that look like secrets are masked."""
    git = (directory.read_environment() or {}).get("git", {})
    values = {**directory.need_config().to_dict(), "commit": git.get("sha")}
    return _masked(values | {"commit_is_dirty": git.get("dirty")})


def _masked(values: Mapping[str, Any]) -> dict[str, Any]:
    masked: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            masked[name] = _masked(value)
        elif isinstance(value, str):
            [pair] = environment.mask_secrets([f"{name}={value}"])
            masked[name] = pair.partition("=")[2]
        else:
            masked[name] = value
    return masked
