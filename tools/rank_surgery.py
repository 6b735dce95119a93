"""How many dimensions of its keys a trained model uses: validation loss with projected keys.

  python tools/rank_surgery.py --workdir=runs/muon_qk
  python tools/rank_surgery.py --workdir=runs/88m --layers=all --tokens=65536 --ranks=8,16,32

Writes rank_surgery/step_*.csv, .svg and .png in the run directory (step_*_post_rope.* with
--stage=post_rope) and prints the smallest rank that loses at most 0.01 nat. Files that are there
already are not overwritten.
"""

import functools
import pathlib

from absl import flags

from qkjax import errors
from qkjax.cli import command_line
from qkjax.report import drawing, figures

_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; the latest unless given.")
_RANKS = flags.DEFINE_list(
    "ranks", None, "Directions kept, such as 1,2,4,8; powers of two up to head_dim unless given."
)
_STAGE = flags.DEFINE_enum(
    "stage", "pre_rope", ["pre_rope", "post_rope"], "Where the keys are projected."
)
_LAYERS = flags.DEFINE_list(
    "layers", ["all", "each"], "all: together; each: one at a time; or indices: one at a time."
)
_TOKENS = flags.DEFINE_integer(
    "tokens", None, "Validation tokens, 0 for all; the run's eval.tokens unless given."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the random directions.", lower_bound=0)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "The run's dataset, where it has moved.")


def main() -> None:
    if not _WORKDIR.value:
        raise errors.UsageError("--workdir: missing. Name the run directory, --workdir=runs/NAME.")
    ranks = None if _RANKS.value is None else tuple(_rank(text) for text in _RANKS.value)

    from qkjax.trained import rank_surgery  # jax and all

    request = rank_surgery.Request(
        step=_STEP.value,
        ranks=ranks,
        stage=_STAGE.value,
        layers=tuple(_LAYERS.value),
        tokens=_TOKENS.value,
        seed=_SEED.value,
        data_dir=_DATA_DIR.value,
    )
    workdir = pathlib.Path(_WORKDIR.value).expanduser().absolute()
    found = rank_surgery.measure(workdir, request, report=functools.partial(print, flush=True))
    figure = figures.rank_curves(found.rows, found.head_dim, found.title)
    drawing.save(figure, found.path.with_suffix(""), drawing.FORMATS)


def _rank(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise errors.UsageError(
            f"--ranks: {text!r} is not an integer. Give integers separated by commas."
        ) from None


if __name__ == "__main__":
    command_line.run(main)
