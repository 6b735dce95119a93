"""How arms are named and drawn: hue = optimiser, line = normalisation and its controls."""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from qkjax.report import drawing
from qkjax.verdicts.judgement import LABELS

_CONTROLS = {
    "frozen": "γ frozen",
    "decayed": "γ decayed",
    "undecayed": "γ undecayed",
    "to_one": "γ pulled to 1",
    "clip": "QK-Clip",
    "merged": "QKVO merged",
    "separate": "Q, K, V, O apart",
    "per_head": "per head",
    "groups_of": "heads in groups of",
    "mup": "scale mup",
}
# The study's optimisers have the first two hues; others take the next ones as they come.
HUES = dict(zip(LABELS, drawing.HUES, strict=False))
_MORE_HUES = drawing.HUES[len(LABELS) : -1]  # black is the ink
_LINES: dict[str, tuple[object, str]] = {  # by the last word of an arm's name
    "qk": ("-", "o"),
    "noqk": ("--", "s"),
    "frozen": (":", "^"),
    "decayed": ("-.", "v"),
    "undecayed": ((0, (5, 1, 1, 1, 1, 1)), "D"),
    "to_one": ((0, (3, 1, 1, 1)), "<"),
    "clip": ((0, (1, 1)), ">"),
    "merged": ((0, (8, 3)), "P"),
}
_SPARE_LINES = tuple(itertools.product(("-", "--", ":", "-."), "X*hdp8"))


class Look(NamedTuple):
    """The look of one arm, the same in every chart."""

    hue: str
    line: object  # a line style of matplotlib
    marker: str


def optimizer(arm: str) -> str:
    """ "muon" of "muon_qk_frozen"."""
    return arm.split("_")[0]


def family(name: str) -> str:
    """An optimiser in words."""
    return LABELS.get(name, name)


def label(arm: str) -> str:
    """The arm in words, such as "Muon + QK-Norm, γ frozen"; its own name where it has none."""
    name, qk, *controls = _words(arm)
    if name not in LABELS or qk not in ("qk", "noqk"):
        return arm
    words = f"{LABELS[name]} + QK-Norm" if qk == "qk" else f"{LABELS[name]}, no QK-Norm"
    for word in controls:
        words += f" {word}" if word.isdigit() else f", {_CONTROLS.get(word, word)}"
    return words


def short(arm: str) -> str:
    """The label as a legend has it: "Muon + QK, γ frozen"."""
    return label(arm).replace("QK-Norm", "QK")


def _words(arm: str) -> tuple[str, ...]:
    """Optimiser, normalisation ("" where there is none) and controls of an arm's name."""
    name, _, rest = arm.partition("_")
    qk, _, rest = rest.partition("_")
    found = []
    while rest:
        known = (word for word in _CONTROLS if f"{rest}_".startswith(f"{word}_"))
        word = next(known, rest.partition("_")[0])
        found.append(word)
        rest = rest[len(word) + 1 :]
    return name, qk, *found


def looks(names: Iterable[str]) -> dict[str, Look]:
    """How each arm of a plan is drawn; no two alike.

    Args:
        names: every arm of the plan, in its order: arms of your own are told apart by it.
    """
    names = tuple(names)
    hues = dict(HUES)
    own = itertools.cycle(_MORE_HUES)
    for name in map(optimizer, names):
        if name not in hues:
            hues[name] = next(own)
    found: dict[str, Look] = {}
    for arm in names:
        candidates = _lines(arm)
        hue = hues[optimizer(arm)]
        taken = set(found.values())
        free = (Look(hue, *each) for each in candidates if Look(hue, *each) not in taken)
        found[arm] = next(free, Look(hue, "-", "X"))
    return found


def _lines(arm: str) -> Iterator[tuple[object, str]]:
    """Line and marker by the last word of the arm's name, then those that no word has."""
    last = _words(arm)[-1]
    if last in _LINES:
        yield _LINES[last]
    yield from _SPARE_LINES
