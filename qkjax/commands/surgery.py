"""How many dimensions of its keys a trained model uses: validation loss with projected keys.

  qkjax surgery --workdir=runs/muon_qk
  qkjax surgery --workdir=runs/88m --layers=all --tokens=65536 --ranks=8,16,32

Writes rank_surgery/step_*.csv, .svg and .png in the run directory (step_*_post_rope.* with
--stage=post_rope, step_*_centred.* with --centring=centred) and prints the smallest rank that loses
at most 0.01 nat. The CSV appears when it is complete and is not overwritten; until then its rows
are in .part.json, and the same command resumes after them.
"""

import functools
import pathlib

from absl import flags

from qkjax import errors
from qkjax.cli import command_line, startup
from qkjax.report import drawing, figures

FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory.", flag_values=FLAGS)
_STEP = flags.DEFINE_integer(
    "step", None, "Step of the checkpoint. Default: the latest.", flag_values=FLAGS
)
_RANKS = flags.DEFINE_list(
    "ranks",
    None,
    "Numbers of directions to keep, such as 1,2,4,8. Default: powers of two up to head_dim.",
    flag_values=FLAGS,
)
_STAGE = flags.DEFINE_enum(
    "stage",
    "pre_rope",
    ["pre_rope", "post_rope"],
    "Stage at which the keys are projected.",
    flag_values=FLAGS,
)
_CENTRING = flags.DEFINE_enum(
    "centring",
    "raw",
    ["raw", "centred"],
    "centred: the mean key stays, the rest is projected.",
    flag_values=FLAGS,
)
_KINDS = flags.DEFINE_list(
    "kinds",
    ["top", "random"],
    "Directions: the strongest, or random ones.",
    flag_values=FLAGS,
)
_LAYERS = flags.DEFINE_list(
    "layers",
    ["all", "each"],
    "all: together; each: one at a time; or indices: one at a time.",
    flag_values=FLAGS,
)
_TOKENS = flags.DEFINE_integer(
    "tokens",
    None,
    "Validation tokens, 0 for all. Default: the run's eval.tokens.",
    flag_values=FLAGS,
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the random directions.", lower_bound=0, flag_values=FLAGS
)
_OUT = flags.DEFINE_string(
    "out", None, "The CSV file. Default: in the run directory.", flag_values=FLAGS
)
_FIGURES = flags.DEFINE_bool(
    "figures", True, "Draw .svg and .png beside the CSV.", flag_values=FLAGS
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "The run's dataset, if it was moved.", flag_values=FLAGS
)


def main() -> None:
    """Reads the command line and does the work; ends the process."""
    command_line.run(_measure, FLAGS, __doc__, buckets=["data_dir"])


def _measure() -> None:
    if not _WORKDIR.value:
        raise errors.UsageError("--workdir: missing. Name the run directory, --workdir=runs/NAME.")
    ranks = None if _RANKS.value is None else tuple(_rank(text) for text in _RANKS.value)

    startup.check_memory_limit()

    from qkjax.trained import rank_surgery  # jax and all

    request = rank_surgery.Request(
        step=_STEP.value,
        ranks=ranks,
        stage=_STAGE.value,
        centring=_CENTRING.value,
        layers=tuple(_LAYERS.value),
        kinds=tuple(_KINDS.value),
        tokens=_TOKENS.value,
        seed=_SEED.value,
        data_dir=_DATA_DIR.value,
        out=None if _OUT.value is None else pathlib.Path(_OUT.value).absolute(),
    )
    workdir = pathlib.Path(_WORKDIR.value).absolute()
    found = rank_surgery.measure(workdir, request, report=functools.partial(print, flush=True))
    if _FIGURES.value:
        figure = figures.rank_curves(found.rows, found.head_dim, found.title)
        drawing.save(figure, found.path.with_suffix(""), drawing.FORMATS)


def _rank(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise errors.UsageError(
            f"--ranks: {text!r} is not an integer. Give integers separated by commas."
        ) from None
