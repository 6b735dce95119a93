"""SVG inside a page: matplotlib's charts made to fit it, and the small figure of a clause."""

import re
import xml.etree.ElementTree as ET

from qkjax.report import arms
from qkjax.report.blocks import Chart, interval, short
from qkjax.verdicts.judgement import NON_INFERIORITY, RULE, Clause

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
_FARTHEST = 3.0  # a paired interval longer than so many pooled ones is cut, with an arrow


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

    def line(kind: str, begin: str, end: str, top: float, bottom: float) -> None:
        ET.SubElement(
            root,
            "line",
            {
                "class": kind,
                "x1": begin,
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
