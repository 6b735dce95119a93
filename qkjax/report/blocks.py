"""What a report is made of: sections of paragraphs, tables, charts and verdicts, as data.

`html` and `markdown` show the same blocks, so the page and the text cannot differ.
Nothing here computes but the form of a number.
"""

import dataclasses
import math
from collections.abc import Sequence

from qkjax.verdicts.judgement import Verdict

ABSENT = "–"  # a number that nobody measured


@dataclasses.dataclass(frozen=True)
class Text:
    """One paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Lead:
    """The one sentence that a reader takes away."""

    text: str


@dataclasses.dataclass(frozen=True)
class Notes:
    """A list of short remarks; `tone` "warning" for what a reader has to know first."""

    items: tuple[str, ...]
    tone: str = ""


@dataclasses.dataclass(frozen=True)
class Code:
    """Lines to copy, as they are."""

    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under named columns; columns of `words` are set left, all others are numbers."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1  # columns from the left that hold words
    strong: tuple[int, ...] = ()  # rows that sum up others
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Chart:
    """A figure as SVG, with what it says in words for those who do not see it."""

    name: str  # stem of its file
    title: str
    description: str
    svg: bytes


@dataclasses.dataclass(frozen=True)
class Charts:
    """Charts side by side, on one scale where they show one quantity."""

    caption: str
    charts: tuple[Chart, ...]
    columns: int = 2  # where there is room


@dataclasses.dataclass(frozen=True)
class Box:
    """One hypothesis with its clauses."""

    verdict: Verdict


@dataclasses.dataclass(frozen=True)
class Folded:
    """Blocks that a page shows when asked for, under one line."""

    summary: str
    blocks: tuple["Block", ...]


Block = Text | Lead | Notes | Code | Table | Charts | Box | Folded


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the report under a heading."""

    anchor: str
    title: str
    blocks: tuple[Block, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """The whole of it."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]
    made_by: str = "qkjax report"

    @property
    def charts(self) -> list[Chart]:
        """All of them, in order."""
        found: list[Chart] = []
        waiting = [block for section in self.sections for block in section.blocks]
        while waiting:
            block = waiting.pop(0)
            if isinstance(block, Charts):
                found += block.charts
            elif isinstance(block, Folded):
                waiting = [*block.blocks, *waiting]
        return found


# --------------------------------------------------------------------------------------------
# Numbers as text.


def number(value: float | None, digits: int = 2, *, signed: bool = False) -> str:
    """`digits` digits after the point, of a million and more two; ABSENT where not measured."""
    if value is None or not math.isfinite(value):
        return ABSENT
    form = ".1e" if abs(value) >= 1e6 else f",.{digits}f"
    return f"{value:{'+' if signed else ''}{form}}"


def short(value: float | None, *, signed: bool = False) -> str:
    """Four significant digits; ABSENT where it was not measured."""
    if value is None or not math.isfinite(value):
        return ABSENT
    return f"{value:{'+' if signed else ''}.4g}"


def interval(ends: tuple[float, float] | None) -> str:
    """ "[+1.02, +5.40]"."""
    return f"[{short(ends[0], signed=True)}, {short(ends[1], signed=True)}]" if ends else ABSENT


def amount(value: str, unit: str) -> str:
    """ "3.2 PR", "1 point"."""
    return f"{value} {unit.removesuffix('s') if value.lstrip('+-') == '1' else unit}".rstrip()


def counted(count: int, what: str) -> str:
    """ "8 runs", "1 run"."""
    return f"{count:,} {what if count == 1 else f'{what}s'}"


def seeds_named(seeds: Sequence[int]) -> str:
    """ "seed 42", "seeds 42, 137 and 256"."""
    *some, last = map(str, seeds)
    return f"seeds {', '.join(some)} and {last}" if some else f"seed {last}"


def p_value(p: float | None) -> str:
    """Three digits, and no zero where there is none."""
    if p is None:
        return ABSENT
    return "< 0.001" if 0 < p < 0.001 else f"{p:.3f}"


def with_error(value: float, error: float | None, digits: int = 2) -> str:
    """ "28.41 ± 0.44"."""
    return number(value, digits) + ("" if error is None else f" ± {number(error, digits)}")


def without_empty(table: Table) -> Table:
    """The table without the columns in which nobody has anything."""
    kept = [
        i
        for i in range(len(table.columns))
        if i < table.words or any(row[i] != ABSENT for row in table.rows)
    ]
    return dataclasses.replace(
        table,
        columns=tuple(table.columns[i] for i in kept),
        rows=tuple(tuple(row[i] for i in kept) for row in table.rows),
    )


def mean(values: Sequence[float]) -> float:
    """NaN where one of them is, or there is none."""
    return math.fsum(values) / len(values) if values else math.nan
