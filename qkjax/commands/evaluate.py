"""HellaSwag 10-shot and LAMBADA 0-shot of a run or an exported directory, scored by lm-eval.

  qkjax evaluate --workdir=runs/muon_qk --data_dir=tasks --out=muon_qk.json
  qkjax evaluate --model=exports/muon_qk --data_dir=tasks --out=muon_qk_hf.json

--workdir is scored under JAX without torch, --model by lm-eval's own Hugging Face model. Without
--data_dir the tasks come from the hub; with it there is no network. Writes --out and, beside it, a
line for every item (.items.jsonl). With --limit the result is a sample. See docs/evaluation.md.
"""

import functools
import pathlib

from absl import flags

from qkjax import errors
from qkjax.cli import command_line, startup

FLAGS = flags.FlagValues()
_MODEL = flags.DEFINE_string("model", None, "A directory of qkjax export.", flag_values=FLAGS)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Or the directory of a finished run.", flag_values=FLAGS
)
_STEP = flags.DEFINE_integer(
    "step", None, "Step of the run's checkpoint. Default: the latest.", flag_values=FLAGS
)
_BACKEND = flags.DEFINE_enum(
    "backend",
    None,
    ["hf", "jax"],
    "Default: jax for --workdir, hf for --model.",
    flag_values=FLAGS,
)
_TASKS = flags.DEFINE_list(
    "tasks", ["hellaswag", "lambada"], "Names of tasks, separated by commas.", flag_values=FLAGS
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Directory of the tasks' files. Default: from the hub.", flag_values=FLAGS
)
_DATASET_DIR = flags.DEFINE_string(
    "dataset_dir", None, "The run's dataset, if it was moved.", flag_values=FLAGS
)
_LIMIT = flags.DEFINE_integer(
    "limit", None, "Only the first items of each task: a sample.", flag_values=FLAGS
)
_OUT = flags.DEFINE_string(
    "out", None, "The JSON file to write; it must not exist.", flag_values=FLAGS
)


def main() -> None:
    """Reads the command line and does the work; ends the process."""
    command_line.run(_evaluate, FLAGS, __doc__)


def _evaluate() -> None:
    if not _OUT.value:
        raise errors.UsageError("--out: missing. Name a new file, --out=results/NAME.json.")

    startup.check_memory_limit()

    from qkjax.tasks import downstream  # jax and all

    def path(value: str | None) -> pathlib.Path | None:
        return pathlib.Path(value).absolute() if value else None

    request = downstream.Request(
        tasks=tuple(_TASKS.value),
        out=pathlib.Path(_OUT.value).absolute(),
        model=path(_MODEL.value),
        workdir=path(_WORKDIR.value),
        step=_STEP.value,
        backend=_BACKEND.value,
        data_dir=path(_DATA_DIR.value),
        dataset_dir=_DATASET_DIR.value,
        limit=_LIMIT.value,
    )
    downstream.run(request, report=functools.partial(print, flush=True))
