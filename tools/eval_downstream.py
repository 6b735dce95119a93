"""HellaSwag 10-shot and LAMBADA 0-shot of a run or an exported directory, scored by lm-eval.

  python tools/eval_downstream.py --workdir=runs/muon_qk --data_dir=tasks --out=muon_qk.json
  python tools/eval_downstream.py --model=exports/muon_qk --data_dir=tasks --out=muon_qk_hf.json

--workdir is scored under JAX without torch, --model by lm-eval's own Hugging Face model. Without
--data_dir the tasks come from the hub; with it there is no network. Writes --out and, beside it, a
line for every item (.items.jsonl). What --limit gives is a sample. See docs/evaluation.md.
"""

import functools
import pathlib

from absl import flags

from qkjax import errors
from qkjax.cli import command_line

_MODEL = flags.DEFINE_string("model", None, "A directory of tools/export_hf.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Or the run directory, of a finished run.")
_STEP = flags.DEFINE_integer("step", None, "The run's checkpoint; the latest unless given.")
_BACKEND = flags.DEFINE_enum(
    "backend", None, ["hf", "jax"], "jax for --workdir, hf for --model unless given."
)
_TASKS = flags.DEFINE_list("tasks", ["hellaswag", "lambada"], "Names, separated by commas.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "The tasks' files; from the hub unless given.")
_DATASET_DIR = flags.DEFINE_string("dataset_dir", None, "The run's dataset, where it has moved.")
_LIMIT = flags.DEFINE_integer("limit", None, "Only the first items of each task: a sample.")
_OUT = flags.DEFINE_string("out", None, "The JSON file to write; it must not exist.")


def main() -> None:
    if not _OUT.value:
        raise errors.UsageError("--out: missing. Name a new file, --out=results/NAME.json.")

    from qkjax.tasks import downstream  # jax and all

    def path(value: str | None) -> pathlib.Path | None:
        return pathlib.Path(value).expanduser().absolute() if value else None

    request = downstream.Request(
        tasks=tuple(_TASKS.value),
        out=pathlib.Path(_OUT.value).expanduser().absolute(),
        model=path(_MODEL.value),
        workdir=path(_WORKDIR.value),
        step=_STEP.value,
        backend=_BACKEND.value,
        data_dir=path(_DATA_DIR.value),
        dataset_dir=_DATASET_DIR.value,
        limit=_LIMIT.value,
    )
    downstream.run(request, report=functools.partial(print, flush=True))


if __name__ == "__main__":
    command_line.run(main)
