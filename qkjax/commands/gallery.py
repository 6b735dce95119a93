"""Models and runs on one page: qkjax gallery DIR DIR ... --out=DIR

Each DIR is a directory of qkjax measure, or a run. Writes index.html (one page that opens offline),
gallery.csv (every evaluation and number) and figures/*.svg. Needs the extra [report]. What the
numbers can and cannot say is on the page and in docs/models.md.
"""

import functools

from absl import flags

from qkjax import errors
from qkjax.cli import command_line

FLAGS = flags.FlagValues()
_OUT = flags.DEFINE_string("out", "", "Directory to write into.", flag_values=FLAGS)


def main() -> None:
    """Reads the command line and does the work; ends the process."""
    command_line.run(_make, FLAGS, __doc__, positionals=["DIR..."])


def _make(*workdirs: str) -> None:
    from qkjax.observatory import gallery

    if not _OUT.value:
        raise errors.UsageError("--out: missing. Name a directory, --out=gallery.")
    gallery.make_gallery(workdirs, _OUT.value, functools.partial(print, flush=True))
