"""Repeats and resumes a run, and compares the bits, on your machine with your flags.

  qkjax determinism --config=configs/muon_qk.py:tiny --workdir=runs/determinism

Trains the config twice, and a third time from a checkpoint; keep train.tokens small. A run
keeps its latest two checkpoints, so that is the last one before the end, unless
--config.checkpoint.keep_all=true keeps one in the middle.
Exit code 0 if all three end with the same parameters and optimiser state, 2 if they differ:
the leaves are named, and determinism.json holds everything. On a GPU try it with and without
XLA_FLAGS=--xla_gpu_deterministic_ops=true.
"""

import pathlib

from absl import flags

from qkjax import errors
from qkjax.cli import command_line, config_flag, startup

FLAGS = flags.FlagValues()
_CONFIG = config_flag.define(FLAGS)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the three runs.", flag_values=FLAGS)


def main() -> None:
    """Reads the command line and does the work; ends the process."""
    command_line.run(_check, FLAGS, __doc__, parse=config_flag.parse, buckets=["config.data.dir"])


def _check() -> None:
    config = config_flag.read(_CONFIG)
    if not _WORKDIR.value:
        raise errors.UsageError("--workdir: missing. Name a directory for the three runs.")

    startup.check_memory_limit()

    from qkjax.trained import determinism

    outcome = determinism.check(config, config_flag.as_flags(FLAGS), pathlib.Path(_WORKDIR.value))
    if not outcome["equal"]:
        raise errors.UsageError(
            f"{_WORKDIR.value}: the runs differ, see determinism.json there. On a GPU set "
            "XLA_FLAGS=--xla_gpu_deterministic_ops=true; on a CPU this is a fault: report it."
        )
