"""Packs runs into small archives: python tools/airgapped/pack_results.py --workdir=STUDY --out=DIR

Everything that the report reads, spectra as float16 where that is harmless, no checkpoints unless
asked: at most 8 archives of 16 MiB. To unpack, with the archives of only one study in DIR:
for a in DIR/*.tar.gz; do tar -xzf $a -C STUDY; done
"""

import pathlib

from absl import flags

from qkjax import errors
from qkjax.cli import command_line

FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string("workdir", None, "Study or run directory.", flag_values=FLAGS)
_OUT = flags.DEFINE_string(
    "out", None, "Where the archives go; made where it is missing.", flag_values=FLAGS
)
_CHECKPOINTS = flags.DEFINE_bool(
    "checkpoints", False, "Pack each run's latest checkpoint too.", flag_values=FLAGS
)
_SPECTRA = flags.DEFINE_enum(
    "spectra", "all", ["all", "last"], "Of every evaluation, or the last.", flag_values=FLAGS
)
_ARCHIVES = flags.DEFINE_integer(
    "max_archives", 8, "Refuse to write more.", lower_bound=1, flag_values=FLAGS
)
_MEBIBYTES = flags.DEFINE_float(
    "max_mebibytes", 16, "Of each archive.", lower_bound=0, flag_values=FLAGS
)


def main() -> None:
    import packing

    workdir, out = _WORKDIR.value, _OUT.value
    if not workdir or not out:
        missing = "workdir" if not workdir else "out"
        raise errors.UsageError(f"--{missing}: missing. See --help.")
    paths = packing.pack(
        pathlib.Path(workdir),
        pathlib.Path(out),
        checkpoints=_CHECKPOINTS.value,
        spectra=_SPECTRA.value,
        limits=packing.Limits(_ARCHIVES.value, int(_MEBIBYTES.value * packing.MEBIBYTE)),
    )
    for path in paths:
        print(f"{path}  {path.stat().st_size / packing.MEBIBYTE:.1f} MiB")


if __name__ == "__main__":
    command_line.run(main, FLAGS, __doc__)
