"""How arms are named and drawn: hue = optimiser, line = normalisation and its controls."""

from typing import NamedTuple

_OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
_CONTROLS = {
    "frozen": "γ frozen",
    "decayed": "γ decayed",
    "undecayed": "γ undecayed",
    "merged": "QKVO merged",
}
# Okabe & Ito (2008); the first two are the study's optimisers.
HUES = {"adamw": "#0072B2", "muon": "#D55E00"}
_MORE_HUES = ("#009E73", "#CC79A7", "#E69F00")
_LINES = {
    "qk": ("-", "o"),
    "noqk": ("--", "s"),
    "frozen": (":", "^"),
    "decayed": ("-.", "v"),
    "undecayed": ((0, (5, 1, 1, 1, 1, 1)), "D"),
    "merged": ((0, (8, 3)), "P"),
}


class Look(NamedTuple):
    """Of one arm, the same in every chart."""

    hue: str
    line: object  # a line style of matplotlib
    marker: str


def optimizer(arm: str) -> str:
    """ "muon" of "muon_qk_frozen"."""
    return arm.split("_")[0]


def family(name: str) -> str:
    """An optimiser in words."""
    return _OPTIMIZERS.get(name, name)


def label(arm: str) -> str:
    """The arm in words, such as "Muon + QK-Norm, γ frozen"; its own name where it has none."""
    name, _, rest = arm.partition("_")
    qk, *controls = rest.split("_")
    if name not in _OPTIMIZERS or qk not in ("qk", "noqk"):
        return arm
    words = f"{_OPTIMIZERS[name]} + QK-Norm" if qk == "qk" else f"{_OPTIMIZERS[name]}, no QK-Norm"
    if not set(controls) <= _CONTROLS.keys():  # somebody's own arm
        return ", ".join([words, " ".join(controls)])
    return ", ".join([words, *(_CONTROLS[word] for word in controls)])


def short(arm: str) -> str:
    """The label as a legend has it: "Muon + QK, γ frozen"."""
    return label(arm).replace("QK-Norm", "QK")


def look(arm: str) -> Look:
    """Hue by the optimiser, line and marker by normalisation or, of a control, by its last word."""
    name, last = optimizer(arm), arm.split("_")[-1]
    hue = HUES.get(name) or _MORE_HUES[sum(name.encode()) % len(_MORE_HUES)]
    return Look(hue, *_LINES.get(last, ("-", "X")))
