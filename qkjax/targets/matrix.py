"""The table of docs/targets.md: train steps of the presets on every target, compiled.

python -m qkjax.targets.matrix [TARGET|SCALE|ARM ...]: words choose rows, the others stay as they
are; without words all of them.
"""

import datetime
import importlib.metadata
import itertools
import sys
from collections.abc import Iterator

from qkjax import config as config_lib
from qkjax import errors, files
from qkjax.cli import command_line, places
from qkjax.targets import estimate, launch
from qkjax.targets import target as target_lib

TARGETS = ("h100:1", "h100:8", "h200:1", "a100:1", "v5e:2x4", "v6e:2x2")
SCALES = ("tiny", "small", "full", "1b5")  # pilot's programs are full's
ARMS = {"muon_qk": ("muon", "learned"), "adamw_qk": ("adamw", "learned")}
_NOT_HERE = "not compiled"  # such a row is printed, and takes no other's place
_MARKS = ("<!-- table -->", "<!-- end of table -->")
_HEAD = (
    "| scale | arm | target | GB a device | GB moved | GB between devices | ms, at least "
    "| tokens/s, at most | MFU | compiled |",
    "|---|---|---|---|---|---|---|---|---|---|",
)
_COMPILERS = {"gpu": "jax-cuda12-plugin", "tpu": "libtpu"}


def rows(words: list[str]) -> Iterator[str]:
    """A line of Markdown for every program; what a target refuses is a result.

    Args:
        words: names of TARGETS, SCALES, ARMS; of a kind without a word all are taken.
    Raises:
        UsageError: an unknown word.
    """
    known = (TARGETS, SCALES, tuple(ARMS))
    for word in words:
        if not any(word in names for names in known):
            raise errors.UsageError(
                f"{word}: no target, scale or arm of the table. Give some of "
                f"{', '.join(name for names in known for name in names)}."
            )
    targets, scales, arms = ([n for n in names if n in words] or names for names in known)
    for scale in scales:
        for arm in arms:
            for name in targets:
                made = ", ".join((str(datetime.date.today()), *_versions(name)))
                yield f"| {scale} | {arm} | {name} | {_result(scale, arm, name)} | {made} |"


def _result(scale: str, arm: str, name: str) -> str:
    config = config_lib.resolve(config_lib.base(*ARMS[arm], scale))
    aim = target_lib.parse(name)
    if launch.interpreter(aim.chip.platform) is None:
        return f"{_NOT_HERE}: {aim.extra} is not installed | | | | |"
    try:
        (train,) = launch.ask(config, aim, ("train",))
    except errors.OutOfMemoryError:
        return "refused: the memory does not hold a pass | | | | |"
    except errors.QkjaxError as error:
        said, _, _ = str(error).partition(". ")
        return f"refused: {said} | | | | |"
    found = estimate.of_step(config, aim, train)
    transferred = sum(c["bytes"] for c in train["collectives"].values())
    return (
        f"{train['device_bytes'] / 1e9:.2f} of {aim.chip.memory / 1e9:.0f} | "
        f"{train['bytes'] / 1e9:.1f} | {transferred / 1e9:.2f} | "
        f"{1e3 * found.seconds:.1f} | {found.tokens_per_second:,.0f} | {found.mfu:.0%}"
    )


def _write() -> None:
    root = places.checkout()
    if root is None:
        raise errors.UsageError("check_targets: no checkout here. Run it in the repository.")
    page = root / "docs" / "targets.md"
    for row in rows(sys.argv[1:]):
        print(row, flush=True)
        if _NOT_HERE not in row:
            files.replace(page, with_row(page.read_text(), row).encode())


def with_row(page: str, row: str) -> str:
    """The page with a row in its table, instead of an earlier one of the same program.

    Rows stand in the order of SCALES, ARMS and TARGETS; those of other programs stay.
    """
    before, _, rest = page.partition(_MARKS[0])
    table, _, after = rest.partition(_MARKS[1])
    found = {_program(line): line for line in table.splitlines() if _program(line)}
    found[_program(row)] = row
    order = list(itertools.product(SCALES, ARMS, TARGETS))
    lines = [*_HEAD, *(found[key] for key in order if key in found)]
    return "\n".join([before + _MARKS[0], *lines, _MARKS[1] + after])


def _program(line: str) -> tuple[str, ...]:
    """Scale, arm and target of a row; () of another line."""
    cells = tuple(cell.strip() for cell in line.split("|")[1:4])
    return cells if cells[:1] and cells[0] in SCALES else ()


def _versions(target: str) -> Iterator[str]:
    """jax and the compiler that a row is made with, where they are installed."""
    own = (places.PACKAGE.parent / ".venv-aot").glob("lib/python*/site-packages")
    path = [*map(str, own), *sys.path]
    for package in ("jax", _COMPILERS[target_lib.parse(target).chip.platform]):
        for found in itertools.islice(importlib.metadata.distributions(name=package, path=path), 1):
            yield f"{package} {found.version}"


if __name__ == "__main__":
    sys.exit(command_line.exit_code(_write))
