"""Checks a dataset: digests, records, token ids, and that nothing held out is trained on.

python tools/check_data.py DIR
python tools/check_data.py --sources DIR     # also that its text is still what it was read from
"""

from absl import flags

from qkjax.cli import command_line

_SOURCES = flags.DEFINE_bool(
    "sources", False, "Hash the files again that the dataset was made from."
)


def main(directory: str) -> None:
    from qkjax.data import check

    print(check.summary(check.check(directory)))
    if _SOURCES.value:
        for line in check.check_sources(directory):
            print(f"  {line}")
        print("  sources: read again, as they were when the dataset was made")


if __name__ == "__main__":
    command_line.run(main, positionals=["DIR"])
