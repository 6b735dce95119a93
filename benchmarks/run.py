"""Measures speed on this machine, ours against what could be used instead, in one interleaved run.

  python benchmarks/run.py step --shape=small                 # one core, CPU time, against torch
  python benchmarks/run.py step --platform=gpu --shape=full   # wall time
  python benchmarks/run.py run [--shape=full --data_dir=DATASET]
  python benchmarks/run.py data [--source=docstrings] [--tokenizer=train:4096]

Each variant has a process of its own, the same weights and the same tokens; what they compute first
must agree before a time is taken. Ratios are medians over rounds of blocks A B C C B A.
Variants with torch need `pip install -e '.[bench]'`. docs/performance.md has the method.
"""

import functools
import json
import pathlib
import sys
import tempfile

from absl import flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import data, interleave, subjects, table
from qkjax import errors
from qkjax.cli import command_line

FLAGS = flags.FlagValues()
_SHAPE = flags.DEFINE_enum(
    "shape", "tiny", subjects.SHAPES, "Shape of the model.", flag_values=FLAGS
)
_ARM = flags.DEFINE_enum("arm", "adamw_qk", subjects.ARMS, "Arm of the study.", flag_values=FLAGS)
_SEQUENCES = flags.DEFINE_integer(
    "sequences", None, "Sequences of a step. Default: by shape.", 1, flag_values=FLAGS
)
_PLATFORM = flags.DEFINE_enum(
    "platform", "cpu", subjects.PLATFORMS, "Platform to measure on.", flag_values=FLAGS
)
_VARIANTS = flags.DEFINE_list(
    "variants", [], "Only these variants. Default: the usual ones.", flag_values=FLAGS
)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 5, "Number of measurements of each variant.", 1, flag_values=FLAGS
)
_BLOCK_SECONDS = flags.DEFINE_float(
    "block_seconds", 1.0, "Shortest block of the reference, in seconds.", 0.0, flag_values=FLAGS
)
_OUT = flags.DEFINE_string("out", None, "JSON file for the figures.", flag_values=FLAGS)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", "", "run: the dataset. Default: the embedded one, at tiny.", flag_values=FLAGS
)
_SOURCE = flags.DEFINE_string(
    "source", "docstrings", "data: the text source, as for prepare_data.py.", flag_values=FLAGS
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", "train:4096", "data: the tokenizer, as for prepare_data.py.", flag_values=FLAGS
)
_CHARACTERS = flags.DEFINE_integer(
    "characters", 40_000_000, "data: number of characters of the source.", 1, flag_values=FLAGS
)
_SEQUENCE_LENGTH = flags.DEFINE_integer(
    "sequence_length", 2048, "data: tokens of a record.", 1, flag_values=FLAGS
)


def main(subject: str) -> None:
    out = None if _OUT.value is None else pathlib.Path(_OUT.value)
    if out is not None and not out.parent.is_dir():
        raise errors.UsageError(f"--out: no folder {out.parent}. Make it first.")
    report = functools.partial(print, flush=True)
    with tempfile.TemporaryDirectory(prefix="qkjax-benchmark-") as name:
        folder = pathlib.Path(name)
        if subject == "data":
            figures = data.measure(
                data.Request(
                    _SOURCE.value,
                    _TOKENIZER.value,
                    _CHARACTERS.value,
                    _SEQUENCE_LENGTH.value,
                    _ROUNDS.value,
                ),
                folder,
                report,
            )
        else:
            request = interleave.Request(
                subject=subject,
                variants=tuple(subjects.choose_variants(subject, _PLATFORM.value, _VARIANTS.value)),
                config=subjects.make_config(
                    _SHAPE.value, _ARM.value, _PLATFORM.value, _SEQUENCES.value, _DATA_DIR.value
                ),
                platform=_PLATFORM.value,
                rounds=_ROUNDS.value,
                block_seconds=_BLOCK_SECONDS.value,
            )
            measured = interleave.measure(request, folder, report)
            report(f"\n{table.format_table(measured)}")
            figures = measured.to_dict()
    if out is not None:
        out.write_text(json.dumps({"subject": subject, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    command_line.run(main, FLAGS, __doc__, positionals=["SUBJECT"])
