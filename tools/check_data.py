"""Checks a dataset: digests, records, token ids, and that nothing held out is trained on.

python tools/check_data.py DIR
"""

from qkjax.cli import command_line


def main(directory: str) -> None:
    from qkjax.data import check

    print(check.summary(check.check(directory)))


if __name__ == "__main__":
    command_line.run(main, positionals=["DIR"])
