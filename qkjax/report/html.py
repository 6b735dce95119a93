"""A report as one page that needs nothing else: no scripts, no fonts, no network.

Built as a tree of elements, so what a run's name or config holds comes out as text.
"""

import functools
import importlib.resources
import re
import xml.etree.ElementTree as ET

from qkjax.report import arms
from qkjax.report.blocks import (
    Block,
    Box,
    Chart,
    Charts,
    Code,
    Folded,
    Lead,
    Notes,
    Report,
    Section,
    Table,
    Text,
    amount,
    interval,
    p_value,
    short,
)
from qkjax.report.sections_verdicts import has_data, per_seed, without_data
from qkjax.verdicts.judgement import (
    INCONCLUSIVE,
    NON_INFERIORITY,
    REFUTED,
    RULE,
    SUPPORTED,
    WORDS,
    Clause,
)

_STATUSES = (SUPPORTED, REFUTED, INCONCLUSIVE)
_SIGNS = {SUPPORTED: "✓", REFUTED: "✗", INCONCLUSIVE: "?"}
_CODE = re.compile(r"`([^`]*)`")
_MINUS = re.compile(r"(?<![\w.)-])-(?=\d)")
Child = ET.Element | str | None


def page(report: Report) -> bytes:
    """The page, UTF-8."""
    links = (_element("a", section.title, href=f"#{section.anchor}") for section in report.sections)
    root = _element(
        "html",
        _element(
            "head",
            _element("meta", charset="utf-8"),
            _element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            _element("title", report.title),
            _element("style", _style()),
        ),
        _element(
            "body",
            _element(
                "header",
                _element("h1", report.title),
                _element("p", report.subtitle, cls="subtitle"),
                _element("nav", *links, aria_label="Contents"),
            ),
            _element("main", *map(_section, report.sections)),
            _element("footer", f"Written by `{report.made_by}`, only from files."),
        ),
        lang="en",
    )
    text = ET.tostring(root, encoding="unicode", method="html")
    return f"<!DOCTYPE html>\n{text}\n".encode()


def _style() -> str:
    """The style sheet that lies beside this file."""
    return importlib.resources.files("qkjax.report").joinpath("style.css").read_text("utf-8")


def _element(tag: str, *children: Child, cls: str = "", **attributes: str) -> ET.Element:
    """An element; `cls` is its class, underscores of names become hyphens."""
    names = {name.replace("_", "-"): value for name, value in attributes.items()}
    element = ET.Element(tag, {**({"class": cls} if cls else {}), **names})
    for child in children:
        if isinstance(child, ET.Element):
            element.append(child)
        elif child and len(element):
            element[-1].tail = (element[-1].tail or "") + child
        elif child:
            element.text = (element.text or "") + child
    return element


def _words(text: str) -> list[Child]:
    """Text in which `this` is code, and a minus is as long as a plus."""
    parts = _CODE.split(_MINUS.sub("−", text))
    return [_element("code", part) if i % 2 else part for i, part in enumerate(parts)]


def _section(section: Section) -> ET.Element:
    blocks = [element for block in section.blocks for element in _blocks(block)]
    return _element("section", _element("h2", section.title), *blocks, id=section.anchor)


# --------------------------------------------------------------------------------------------
# One function for each kind of block.


@functools.singledispatch
def _blocks(block: Block) -> list[ET.Element]:
    raise TypeError(f"no page of a {type(block).__name__}")


@_blocks.register
def _(block: Text) -> list[ET.Element]:
    return [_element("p", *_words(block.text))]


@_blocks.register
def _(block: Lead) -> list[ET.Element]:
    return [_element("p", *_words(block.text), cls="lead")]


@_blocks.register
def _(block: Folded) -> list[ET.Element]:
    inner = [element for each in block.blocks for element in _blocks(each)]
    return [_folded(block.summary, *inner)]


def _folded(summary: str, *inner: Child) -> ET.Element:
    return _element("details", _element("summary", *_words(summary)), *inner)


@_blocks.register
def _(block: Notes) -> list[ET.Element]:
    items = (_element("li", *_words(item)) for item in block.items)
    return [_element("ul", *items, cls=f"notes {block.tone}".strip())]


@_blocks.register
def _(block: Code) -> list[ET.Element]:
    return [_element("pre", block.text, tabindex="0")]


@_blocks.register
def _(block: Charts) -> list[ET.Element]:
    charts = (
        _element("div", _element("h3", chart.title), inline(chart), cls="chart")
        for chart in block.charts
    )
    caption = _element("figcaption", *_words(block.caption))
    return [_element("figure", caption, _element("div", *charts, cls=f"charts of-{block.columns}"))]


@_blocks.register
def _(block: Table) -> list[ET.Element]:
    kinds = ["left" if i < block.words else "" for i in range(len(block.columns))]
    head = (
        _element("th", *_words(name), cls=kind, scope="col")
        for name, kind in zip(block.columns, kinds, strict=True)
    )
    rows = []
    for i, row in enumerate(block.rows):
        cells = [
            _element("th", *_cell(text), cls=_kind(kind, text), scope="row")
            if column == 0
            else _element("td", *_cell(text), cls=_kind(kind, text))
            for column, (text, kind) in enumerate(zip(row, kinds, strict=True))
        ]
        rows.append(_element("tr", *cells, cls="strong" if i in block.strong else ""))
    caption = _element("p", *_words(block.caption), cls="caption")
    table = _element(
        "table",
        _element("thead", _element("tr", *head)),
        _element("tbody", *rows),
        aria_label=block.caption,
    )
    # The box scrolls where the table is wider than a phone; the keyboard has to reach it.
    box = _element("div", table, cls="table" if block.notes else "table space", tabindex="0")
    notes = [_element("p", *_words(note), cls="table-notes") for note in block.notes]
    return [caption, box, *notes]


def _kind(kind: str, text: str) -> str:
    """What is short does not wrap."""
    return f"{kind} tight".strip() if len(text) <= 24 else kind


def _cell(text: str) -> list[Child]:
    is_status = text in WORDS
    return [_status(text)] if is_status else _words(text)


def _status(words: str) -> ET.Element:
    """A word, or a headline that holds several: the sign and colour of the first status in it."""
    places = {words.find(status): status for status in _STATUSES if status in words}
    status = places[min(places)] if places else INCONCLUSIVE
    return _element("span", f"{_SIGNS[status]} {words}", cls=f"status {status}")


@_blocks.register
def _(block: Box) -> list[ET.Element]:
    verdict = block.verdict
    title = f"{verdict.name} · {verdict.title}"
    if verdict.left_out:
        words = _element("strong", title), f": not part of this study, {verdict.left_out}."
        return [_element("p", *words, cls="left-out", id=verdict.name.lower())]
    facts = [_sentence(verdict.reason)]
    if verdict.p is not None:
        tested = f"p (largest of its clauses): {p_value(verdict.p)}, {verdict.correction}"
        facts.append(_sentence(tested))
    beside = [
        _clause(clause, verdict.word_of(clause)) for clause in verdict.shown if has_data(clause)
    ]
    return [
        _element(
            "article",
            _element("header", _element("h3", title), _status(verdict.headline)),
            _element("p", verdict.question, cls="question"),
            *(
                _clause(clause, verdict.word_of(clause))
                for clause in verdict.clauses
                if has_data(clause)
            ),
            _element("p", *_words(without_data((*verdict.clauses, *verdict.shown))), cls="facts"),
            _folded(f"Shown beside it, deciding nothing ({len(beside)})", *beside)
            if beside
            else None,
            _folded("Why this verdict", *(_element("p", *_words(each)) for each in facts)),
            cls=f"verdict {verdict.status}",
            id=verdict.name.lower(),
        )
    ]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _clause(clause: Clause, word: str) -> ET.Element:
    """What is predicted, the estimate with its interval, why; the other numbers on demand."""
    reason = clause.reason.removeprefix(f"{clause.said}: ")
    notes = [_element("ul", *(_element("li", *_words(n)) for n in clause.notes))] * bool(
        clause.notes
    )
    facts = [
        part
        for name, value in clause_facts(clause)
        for part in (_element("dt", name), _element("dd", *_words(value)))
    ]
    words = _element(
        "div",
        _element("p", _element("strong", *_words(_sentence(clause.text)))),
        _element(
            "p",
            _status(word),
            " ",
            _element("span", *_words(clause.said), cls="said") if clause.said else None,
        ),
        _element("p", *_words(_sentence(reason)), cls="because") if reason else None,
        _folded(f"{clause.name}: numbers", _element("dl", *facts), *notes),
    )
    return _element("div", words, interval_figure(clause), cls=f"clause {clause.status}")


def clause_facts(clause: Clause) -> list[tuple[str, str]]:
    """The numbers of a clause that there are."""
    names = {RULE: "limit", NON_INFERIORITY: "margin"}
    limit = names.get(clause.kind, "SESOI")
    estimate = short(clause.estimate, signed=clause.kind != RULE)
    found = (
        ("estimate", clause.estimate, amount(estimate, clause.unit)),
        ("deciding 95%", clause.deciding, interval(clause.deciding)),
        ("pooled 95%", clause.pooled, interval(clause.pooled)),
        ("paired 95%", clause.paired, interval(clause.paired)),
        ("p, one-sided", None if clause.kind == RULE else clause.p, p_value(clause.p)),
        (limit, clause.sesoi or None, amount(f"{clause.sesoi or 0:.3g}", clause.unit)),
        ("seeds needed", clause.seeds_needed, str(clause.seeds_needed)),
        ("by seed", clause.per_seed or None, per_seed(clause)),
    )
    return [(name, text) for name, value, text in found if value is not None]


# --------------------------------------------------------------------------------------------
# SVG inside a page: matplotlib's charts made to fit it.

_XLINK = "{http://www.w3.org/1999/xlink}href"
# Colours that a page may set for its theme; everything else in a chart keeps its own.
_THEMED = {
    "#000000": "currentColor",
    "#dddddd": "var(--grid)",
    **{hue.lower(): f"var(--{name})" for name, hue in arms.HUES.items()},
}
_FONT = re.compile(r"font: (?:[a-z]+ )?([\d.]+)px [^;]*")


def inline(chart: Chart) -> ET.Element:
    """The chart as an element of a page: themed, with a name and a description.

    Every id gets the chart's name in front, so that charts of one page do not share any.
    """
    root = ET.fromstring(chart.svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name, value in list(element.attrib.items()):
            if name == _XLINK:
                del element.attrib[name]
                local = value.startswith("#")  # else an image that lies in the file
                element.set("href", f"#{chart.name}-{value[1:]}" if local else value)
            elif name == "id":
                element.set("id", f"{chart.name}-{value}")
            else:
                element.set(name, _themed(value, chart.name))
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    for index, (tag, text) in enumerate((("title", chart.title), ("desc", chart.description))):
        described = ET.Element(tag, {"id": f"{chart.name}-{tag}"})
        described.text = text
        root.insert(index, described)
    root.set("role", "img")
    root.set("aria-labelledby", f"{chart.name}-title {chart.name}-desc")
    return root


def _themed(value: str, name: str) -> str:
    value = value.replace("url(#", f"url(#{name}-")
    value = _FONT.sub(r"font-size: \1px", value)
    for colour, themed in _THEMED.items():
        value = re.sub(colour, themed, value, flags=re.IGNORECASE)
    return value


# --------------------------------------------------------------------------------------------
# The interval of a clause.

_WIDTH, _HEIGHT, _EDGE = 280.0, 46.0, 12.0
_FARTHEST = 3.0  # pooled intervals; a longer paired one is cut, with an arrow


def interval_figure(clause: Clause) -> ET.Element | None:
    """0, the smallest effect of interest, both intervals, and the seeds, on the clause's scale.

    None where the clause has neither an estimate nor a seed.
    """
    seeds = [value for value in clause.per_seed.values() if value is not None]
    if clause.estimate is None and not seeds:
        return None
    marks = [0.0, *seeds, *filter(None, (clause.estimate, clause.sesoi)), *(clause.pooled or ())]
    low, high = min(marks), max(marks)
    if clause.paired:
        reach = _FARTHEST * (high - low)
        low, high = max(clause.paired[0], low - reach), min(clause.paired[1], high + reach)
        low, high = min(low, *marks), max(high, *marks)
    span = (high - low) or 1.0

    def x(value: float) -> str:
        share = (min(max(value, low), high) - low) / span
        return f"{_EDGE + share * (_WIDTH - 2 * _EDGE):.1f}"

    root = ET.Element(
        "svg",
        {
            "viewBox": f"0 0 {_WIDTH:g} {_HEIGHT:g}",
            "class": "interval",
            "role": "img",
            "aria-label": f"estimate {short(clause.estimate, signed=True)} {clause.unit}, "
            f"pooled {interval(clause.pooled)}, paired {interval(clause.paired)}",
        },
    )

    def line(kind: str, start: str, end: str, top: float, bottom: float) -> None:
        ET.SubElement(
            root,
            "line",
            {
                "class": kind,
                "x1": start,
                "x2": end,
                "y1": f"{top:g}",
                "y2": f"{bottom:g}",
            },
        )

    line("zero", x(0.0), x(0.0), 3, 31)
    if clause.sesoi:
        line("sesoi", x(clause.sesoi), x(clause.sesoi), 3, 31)
    if clause.paired:
        line("paired", x(clause.paired[0]), x(clause.paired[1]), 17, 17)
        for end, turn in ((clause.paired[0], 1), (clause.paired[1], -1)):
            if end < low or end > high:
                tip = float(x(end))
                points = f"{tip:g},17 {tip + 6 * turn:g},13.5 {tip + 6 * turn:g},20.5"
                ET.SubElement(root, "polygon", {"class": "arrow", "points": points})
    if clause.pooled:
        line("pooled", x(clause.pooled[0]), x(clause.pooled[1]), 17, 17)
    for value in seeds:
        ET.SubElement(root, "circle", {"class": "seed", "cx": x(value), "cy": "17", "r": "3.2"})
    if clause.estimate is not None and clause.kind != RULE:
        line("estimate", x(clause.estimate), x(clause.estimate), 9, 25)
    _label(root, x(0.0), "0")
    if clause.sesoi and abs(float(x(clause.sesoi)) - float(x(0.0))) > 34:
        words = {NON_INFERIORITY: "margin", RULE: "limit"}.get(clause.kind, "")
        _label(root, x(clause.sesoi), f"{words} {clause.sesoi:.3g}".strip())
    return root


def _label(root: ET.Element, x: str, text: str) -> None:
    place = float(x)
    anchor = "start" if place < 40 else "end" if place > _WIDTH - 40 else "middle"
    label = ET.SubElement(root, "text", {"x": x, "y": "43", "text-anchor": anchor})
    label.text = text
