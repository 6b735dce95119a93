"""A run as a directory that stock Hugging Face classes load, with no custom code.

  qkjax export --workdir=runs/muon_qk --out=exports/muon_qk
  qkjax export --workdir=runs/muon_qk --out=exports/muon_qk --verify

Needs no torch; --verify does (pip install -e '.[export]'): it compares logits and losses of the
directory with the run's, writes the verdict into the model card, and exits with 2 if they differ.
"""

import functools
import pathlib

from absl import flags

from qkjax import errors
from qkjax.cli import command_line, startup

FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a finished run.", flag_values=FLAGS)
_STEP = flags.DEFINE_integer(
    "step", None, "Step of the checkpoint. Default: the latest.", flag_values=FLAGS
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "The directory to create, here or at gs:// or s3://; it must not exist.",
    flag_values=FLAGS,
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Type of the stored tensors.", flag_values=FLAGS
)
_VERIFY = flags.DEFINE_bool(
    "verify", False, "Compare the directory with the run.", flag_values=FLAGS
)
_VERIFY_SEQUENCES = flags.DEFINE_integer(
    "verify_sequences",
    8,
    "Number of validation sequences to compare.",
    lower_bound=1,
    flag_values=FLAGS,
)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "The run's dataset, if it was moved.", flag_values=FLAGS
)


def main() -> None:
    """Reads the command line and does the work; ends the process."""
    command_line.run(_export, FLAGS, __doc__, buckets=["out", "data_dir"])


def _export() -> None:
    if not _WORKDIR.value:
        raise errors.UsageError("--workdir: missing. Name the run directory, --workdir=runs/NAME.")
    if not _OUT.value:
        raise errors.UsageError("--out: missing. Name a new directory, --out=exports/NAME.")

    startup.check_memory_limit()

    from qkjax import buckets
    from qkjax.export import directory  # jax and all

    request = directory.Request(
        workdir=pathlib.Path(_WORKDIR.value).absolute(),
        out=pathlib.Path(_OUT.value).absolute(),
        step=_STEP.value,
        dtype=_DTYPE.value,
        data_dir=_DATA_DIR.value,
        verify_sequences=_VERIFY_SEQUENCES.value if _VERIFY.value else 0,
    )
    report = functools.partial(print, flush=True)
    if buckets.is_address(_OUT.value):
        directory.export_to_bucket(request, _OUT.value, report)
    else:
        directory.export(request, report)
