"""A reproduced study and the published one: qkjax reproduction --published=STUDY --workdir=STUDY

For every run that both have finished, says whether it is equal to the bit (P1), or as close as
another seed would be (P3); refuses runs on another corpus, of another config, and farther apart
than that. A published study is unpacked as the README beside its archives says.
"""

from absl import flags

from qkjax import errors
from qkjax.cli import command_line

FLAGS = flags.FlagValues()
_PUBLISHED = flags.DEFINE_string(
    "published", None, "Study directory of the published runs, unpacked.", flag_values=FLAGS
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Study directory made again.", flag_values=FLAGS)


def main() -> None:
    """Reads the command line and does the work; ends the process."""
    command_line.run(_compare, FLAGS, __doc__)


def _compare() -> None:
    from qkjax.verdicts import reproduction, results

    published = results.load_study(_need("published", _PUBLISHED.value))
    again = results.load_study(_need("workdir", _WORKDIR.value))
    found = reproduction.pairs(published, again)
    reproduction.check(found, str(again.workdir))
    print(reproduction.describe(found), flush=True)


def _need(name: str, value: str | None) -> str:
    if not value:
        raise errors.UsageError(f"--{name}: missing, expected a study directory. See --help.")
    return value
