"""Checks a dataset: digests, records, token ids, and that no validation document is trained on.

qkjax check DIR               # or gs://BUCKET/FOLDER, s3://BUCKET/FOLDER
qkjax check --sources DIR     # also that its source files are unchanged
"""

from absl import flags

from qkjax.cli import command_line

FLAGS = flags.FlagValues()
_SOURCES = flags.DEFINE_bool(
    "sources",
    False,
    "Hash again the files from which the dataset was made.",
    flag_values=FLAGS,
)


def main() -> None:
    """Reads the command line and does the work; ends the process."""
    command_line.run(_check, FLAGS, __doc__, positionals=["DIR"], buckets=[""])


def _check(directory: str) -> None:
    from qkjax.data import check, mirror

    folder = mirror.local_directory("DIR", directory)
    print(check.summary(check.check(folder)))
    if _SOURCES.value:
        for line in check.check_sources(folder):
            print(f"  {line}")
        print("  sources: hashed again, unchanged since the dataset was made")
