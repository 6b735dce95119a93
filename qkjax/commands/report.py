"""The report of a study: qkjax report --workdir=STUDY

Writes into STUDY/report: index.html, one page that needs nothing else; report.md, the same as text;
results.csv, the numbers of runs, sweep, scores and verdicts; figures/*.svg. A study that is not
finished has a report too: it says what is missing. Runs that cannot be compared are refused. Prints
the path of the page last.
"""

from absl import flags

from qkjax import errors
from qkjax.cli import command_line

FLAGS = flags.FlagValues()
_WORKDIR = flags.DEFINE_string("workdir", "", "Study directory, of qkjax study.", flag_values=FLAGS)
_OUT = flags.DEFINE_string(
    "out", "", "Directory for the report. Default: STUDY/report.", flag_values=FLAGS
)


def main() -> None:
    """Reads the command line and does the work; ends the process."""
    command_line.run(_report, FLAGS, __doc__)


def _report() -> None:
    from qkjax.report import report

    if not _WORKDIR.value:
        raise errors.UsageError("--workdir: missing, expected a study directory. See --help.")
    print(report.make_report(_WORKDIR.value, _OUT.value or None))
