"""A report as Markdown: the facts of the page as text and tables."""

import functools

from qkjax.report.blocks import (
    Block,
    Box,
    Charts,
    Code,
    Notes,
    Report,
    Table,
    Text,
    interval,
    p_value,
    short,
)
from qkjax.report.sections_verdicts import per_seed
from qkjax.verdicts.judgement import Clause


def markdown(report: Report) -> str:
    """The text; charts are links to figures/*.svg."""
    parts = [f"# {_escape(report.title)}", _escape(report.subtitle)]
    for section in report.sections:
        parts.append(f"## {_escape(section.title)}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _escape(text: str) -> str:
    """Names and values of runs are text: neither HTML nor Markdown of their own."""
    for character in ("&", "<", ">"):
        text = text.replace(character, {"&": "&amp;", "<": "&lt;", ">": "&gt;"}[character])
    for character in "\\*_[]|":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


@functools.singledispatch
def _block(block: Block) -> str:
    raise TypeError(f"no text of a {type(block).__name__}")


@_block.register
def _(block: Text) -> str:
    return _escape(block.text)


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
        link = f"[{_escape(chart.title)}](figures/{chart.name}.svg)"
        lines.append(f"- {link}: {_escape(chart.description)}")
    return "\n".join(lines)


@_block.register
def _(block: Table) -> str:
    rule = ["---" if i < block.words else "---:" for i in range(len(block.columns))]
    rows = [block.columns, *block.rows]
    lines = ["| " + " | ".join(map(_escape, row)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join(rule) + "|")
    return "\n\n".join([_escape(block.caption), "\n".join(lines), *map(_escape, block.notes)])


@_block.register
def _(block: Box) -> str:
    verdict = block.verdict
    facts = f"p {p_value(verdict.p)}, {verdict.correction}"
    tested = f" {facts}." if verdict.p is not None else ""
    head = [
        f"### {_escape(verdict.name)}. {_escape(verdict.title)}: {_escape(verdict.headline)}",
        _escape(verdict.question),
        _escape(f"{verdict.reason}.{tested}"),
        _block(_clauses("Clauses.", verdict.clauses)),
    ]
    if verdict.shown:
        head.append(_block(_clauses("Shown beside them, without deciding.", verdict.shown)))
    notes = [
        f"- {_escape(f'{clause.name}: {note}')}"
        for clause in (*verdict.clauses, *verdict.shown)
        for note in clause.notes
    ]
    return "\n\n".join([*head, *(["\n".join(notes)] if notes else [])])


def _clauses(caption: str, clauses: tuple[Clause, ...]) -> Table:
    return Table(
        caption,
        (
            "Clause",
            "Prediction",
            "Status",
            "Reason",
            "Estimate",
            "Unit",
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
                clause.word,
                clause.reason,
                short(clause.estimate, signed=True),
                clause.unit,
                interval(clause.deciding),
                interval(clause.pooled),
                interval(clause.paired),
                p_value(clause.p),
                short(clause.sesoi),
                per_seed(clause),
            )
            for clause in clauses
        ),
        words=4,
    )
