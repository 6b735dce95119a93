"""Text from a run's model: qkjax generate --workdir=runs/muon_qk --prompt="The cell"

  qkjax generate --workdir=runs/muon_qk --prompt="The cell" --temperature=0
  qkjax generate --workdir=runs/muon_qk --prompt="" --seed=3     # starts a document

Prints the prompt and its continuation; the number of tokens, the speed and the reason for the end
go to stderr. The same seed gives the same text. The run need not be finished.
"""

import functools
import pathlib
import sys

from absl import flags

from qkjax import errors
from qkjax.cli import command_line, startup

FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string("workdir", None, "The run directory.", flag_values=FLAGS)
_STEP = flags.DEFINE_integer(
    "step", None, "Step of the checkpoint. Default: the latest.", flag_values=FLAGS
)
_PROMPT = flags.DEFINE_string(
    "prompt", None, "The text to continue; empty: start a document.", flag_values=FLAGS
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.8, "0: always the most probable token.", flag_values=FLAGS
)
_TOP_P = flags.DEFINE_float(
    "top_p",
    0.95,
    "Draw from the most probable tokens that together have this probability.",
    flag_values=FLAGS,
)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "Stop after N new tokens.", flag_values=FLAGS)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0, flag_values=FLAGS)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "The run's dataset, if it was moved.", flag_values=FLAGS
)


def main() -> None:
    """Reads the command line and does the work; ends the process."""
    command_line.run(_generate, FLAGS, __doc__, texts=["prompt"], buckets=["data_dir"])


def _generate() -> None:
    if not _WORKDIR.value:
        raise errors.UsageError("--workdir: missing. Name the run directory, --workdir=runs/NAME.")
    if _PROMPT.value is None:
        raise errors.UsageError('--prompt: missing. Give the text to continue, --prompt="...".')

    startup.check_memory_limit()

    from qkjax.trained import generation  # jax and all

    request = generation.Request(
        workdir=pathlib.Path(_WORKDIR.value).absolute(),
        prompt=_PROMPT.value,
        max_tokens=_MAX_TOKENS.value,
        sampling=generation.Sampling(_TEMPERATURE.value, _TOP_P.value, _SEED.value),
        step=_STEP.value,
        data_dir=_DATA_DIR.value,
    )
    generation.run(
        request,
        write=functools.partial(print, end="", flush=True),
        report=functools.partial(print, file=sys.stderr, flush=True),
    )
