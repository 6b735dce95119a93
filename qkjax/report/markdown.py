"""A report as Markdown: the facts of the page as text and tables."""

import functools
import re

from qkjax.report.blocks import (
    Block,
    Box,
    Charts,
    Code,
    Folded,
    Lead,
    Notes,
    Report,
    Table,
    Text,
    interval,
    p_value,
    short,
)
from qkjax.report.sections_verdicts import has_data, per_seed, without_data
from qkjax.verdicts.judgement import Clause, Verdict

_CODE = re.compile(r"(?<!`)`([^`<>&]+)`(?!`)")  # anything else between backticks is text
# What would mean something: an underscore within a word does not, nor a bracket without a link.
_MARKS = re.compile(r"[\\*`]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])")


def markdown(report: Report) -> str:
    """The text; charts are links to figures/*.svg."""
    parts = [f"# {_escape(report.title)}", _escape(report.subtitle)]
    for section in report.sections:
        parts.append(f"## {_escape(section.title)}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _escape(text: str) -> str:
    """Names and values of runs are text: neither HTML nor Markdown of their own."""
    parts = _CODE.split(" ".join(text.split()))
    return "".join(f"`{part}`" if i % 2 else _escape_words(part) for i, part in enumerate(parts))


def _cell(text: str) -> str:
    """The text of a table's cell, which a bar would end, also inside code."""
    return _escape(text).replace("|", "\\|")


def _escape_words(text: str) -> str:
    for character in ("&", "<", ">"):
        text = text.replace(character, {"&": "&amp;", "<": "&lt;", ">": "&gt;"}[character])
    return _MARKS.sub(r"\\\g<0>", text)


@functools.singledispatch
def _block(block: Block) -> str:
    raise TypeError(f"no text of a {type(block).__name__}")


@_block.register
def _(block: Text) -> str:
    return _escape(block.text)


@_block.register
def _(block: Lead) -> str:
    return f"**{_escape(block.text)}**"


@_block.register
def _(block: Folded) -> str:
    return "\n\n".join([f"**{_escape(block.summary)}**", *map(_block, block.blocks)])


@_block.register
def _(block: Notes) -> str:
    return "\n".join(f"- {_escape(item)}" for item in block.items)


@_block.register
def _(block: Code) -> str:
    return "\n".join(f"    {line}" for line in block.text.splitlines())


@_block.register
def _(block: Charts) -> str:
    lines = [_escape(block.caption), ""]
    for chart in block.charts:
        title = re.sub(r"(?<!\\)[\[\]]", r"\\\g<0>", _escape(chart.title))
        link = f"[{title}](figures/{chart.name}.svg)"
        lines.append(f"- {link}: {_escape(chart.description)}")
    return "\n".join(lines)


@_block.register
def _(block: Table) -> str:
    rule = ["---" if i < block.words else "---:" for i in range(len(block.columns))]
    rows = [block.columns, *block.rows]
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join(rule) + "|")
    return "\n\n".join([_escape(block.caption), "\n".join(lines), *map(_escape, block.notes)])


@_block.register
def _(block: Box) -> str:
    verdict = block.verdict
    if verdict.left_out:
        words = f"{verdict.name}. {verdict.title}: not part of this study, {verdict.left_out}."
        return _escape(words)
    facts = f"p {p_value(verdict.p)}, {verdict.correction}"
    tested = f" {facts}." if verdict.p is not None else ""
    clauses = (*verdict.clauses, *verdict.shown)
    head = [
        f"### {_escape(verdict.name)}. {_escape(verdict.title)}: {_escape(verdict.headline)}",
        _escape(verdict.question),
        _escape(f"{verdict.reason}.{tested}"),
        _block(_clauses("Clauses.", verdict, verdict.clauses))
        if any(map(has_data, verdict.clauses))
        else "",
        _escape(without_data([c for c in clauses if c.name not in verdict.reason])),
    ]
    if any(map(has_data, verdict.shown)):
        head.append(
            _block(_clauses("Shown beside them; they decide nothing.", verdict, verdict.shown))
        )
    notes = [
        f"- {_escape(f'{clause.name}: {note}')}"
        for clause in (*verdict.clauses, *verdict.shown)
        for note in clause.notes
    ]
    return "\n\n".join([*filter(None, head), *(["\n".join(notes)] if notes else [])])


def _clauses(caption: str, verdict: Verdict, clauses: tuple[Clause, ...]) -> Table:
    return Table(
        caption,
        (
            "Clause",
            "Prediction",
            "Status",
            "Reason",
            "Estimate with 95% interval",
            "Deciding 95%",
            "Pooled 95%",
            "Paired 95%",
            "p",
            "SESOI, margin or limit",
            "Per seed",
        ),
        tuple(
            (
                clause.name,
                clause.text,
                verdict.word_of(clause),
                clause.reason,
                clause.said or short(clause.estimate, signed=True),
                interval(clause.deciding),
                interval(clause.pooled),
                interval(clause.paired),
                p_value(clause.p),
                short(clause.sesoi),
                per_seed(clause),
            )
            for clause in clauses
            if has_data(clause)
        ),
        words=5,
    )
