"""What the small study found, arm against arm, and what became of its predictions.

`contrasts` and `predictions` give the Markdown that docs/write_generated.py writes into the pages
of docs/results. Intervals are those that decide in docs/statistics.md: 95%, the wider of the pooled
and the paired one. The predictions stand in docs/log.md, 2026-11-28, with what would refute them.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

from qkjax.report.blocks import short
from qkjax.runs.results import LOSS, PR, RunResult
from qkjax.verdicts import predictions as rules
from qkjax.verdicts.clauses import Panel, by_contrast
from qkjax.verdicts.judgement import LABELS, Clause
from qkjax.verdicts.predictions import Prediction, Quantity
from qkjax.verdicts.results import Study

BEFORE, CENTRED, QK = "pr/key/pre_rope/raw", "pr/key/pre_rope/centred", "pr/qk/pre_rope/raw"
ROLES = {  # of an arm beside the parent, which decays gamma: what it is called
    "none": "{}_noqk",
    "frozen": "{}_qk_frozen",
    "to_one": "{}_qk_to_one",
    "undecayed": "{}_qk_undecayed",
    "parent": "{}_qk",
}
PAIRS = (
    ("frozen", "none", "QK-Norm, gamma stays 1"),
    ("to_one", "none", "QK-Norm, gamma decays to 1"),
    ("undecayed", "none", "QK-Norm, gamma does not decay"),
    ("parent", "none", "QK-Norm, gamma decays to 0"),
    ("parent", "undecayed", "the decay of gamma alone"),
)


def _of(metric: str) -> Quantity:
    return dataclasses.replace(rules.QUANTITIES["PR"], measure=lambda run: run.value(metric))


def _minus_half(first: str, second: str) -> Quantity:
    def measure(run: RunResult) -> float:
        return run.value(first) - run.value(second) / 2

    return dataclasses.replace(rules.QUANTITIES["PR"], measure=measure)


def _projection(run: RunResult) -> float:
    """Of what the key projection gives; without QK-Norm that is what RoPE takes."""
    return run.value(BEFORE if run.config.model.qk_norm == "none" else "pr/key/pre_norm/raw")


MEASURES: dict[str, Quantity] = {  # the columns of the table
    "projection, raw": dataclasses.replace(rules.QUANTITIES["PR"], measure=_projection),
    "pre-RoPE raw": _of(BEFORE),
    "pre-RoPE centred": _of(CENTRED),
    "post-RoPE raw": _of(PR),
    "queries with keys": _of(QK),
    "directions used": rules.QUANTITIES["functional rank"],
    "loss, nat": rules.QUANTITIES["loss"],
}
QUANTITIES: dict[str, Quantity] = {
    **MEASURES,
    "post-norm": _of("pr/key/post_norm/raw"),
    "ln PR": rules.QUANTITIES["ln PR"],
    "centred - half of post-RoPE": _minus_half(CENTRED, PR),
    "queries with keys - half of keys": _minus_half(QK, BEFORE),
}


def contrasts(study: Study) -> str:
    """A table for each optimiser: arms minus arms, with intervals where there are two seeds."""
    tables = []
    for optimizer, label in LABELS.items():
        panel, arms = _panel(study, optimizer)
        if not (panel.family and panel.seeds):
            continue
        seeds = f"seed{'s' * (len(panel.seeds) > 1)} {', '.join(map(str, panel.seeds))}"
        lines = [
            f"| {label}, {seeds} | {' | '.join(MEASURES)} |",
            "|---" * (len(MEASURES) + 1) + "|",
        ]
        for first, second, words in PAIRS:
            weights = {arms[first]: 1.0, arms[second]: -1.0}
            if set(weights) <= set(panel.family):
                cells = [_cell(_clause(panel, name, weights)) for name in MEASURES]
                lines.append(f"| {first} - {second} ({words}) | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _panel(study: Study, optimizer: str) -> tuple[Panel, dict[str, str]]:
    """Of the arms that have runs: a family is what was run."""
    arms = {role: name.format(optimizer) for role, name in ROLES.items()}
    made = {arm for arm, _ in study.runs}
    return Panel.of(study, [arm for arm in arms.values() if arm in made]), arms


def _clause(panel: Panel, quantity: str, weights: Mapping[str, float]) -> Clause:
    return by_contrast(panel, Prediction("", "", quantity, weights), QUANTITIES)


def _cell(clause: Clause) -> str:
    if clause.estimate is None:
        return "-"
    digits = 3 if clause.unit == "nat" else 1
    said = f"{clause.estimate:+.{digits}f}"
    if clause.deciding is None:
        return said
    low, high = clause.deciding
    return f"{said} ({low:+.{digits}f} to {high:+.{digits}f})"


class _Found(NamedTuple):
    """What became of one prediction."""

    said: str
    refuted: bool
    held: bool  # wholly: no value that would refute it is left in the interval


def predictions(study: Study) -> str:
    """P1 to P10: what was found, and whether it refutes them."""
    lines = ["| nr | prediction | found | so |", "|---|---|---|---|"]
    for number, (words, found) in enumerate(_predictions(study).items(), 1):
        so = "needs two seeds of every arm"
        if found is not None:
            so = "refuted" if found.refuted else "held" if found.held else "not refuted"
        lines.append(f"| P{number} | {words} | {found.said if found else '-'} | {so} |")
    return "\n".join(lines)


def _predictions(study: Study) -> dict[str, _Found | None]:
    adamw, arm = _panel(study, "adamw")
    four = Panel.of(study)

    def gap(
        first: str, second: str, low: float, high: float, quantity: str = "post-RoPE raw"
    ) -> _Found | None:
        clause = _clause(adamw, quantity, {arm[first]: 1.0, arm[second]: -1.0})
        return _within(clause, low, high)

    def both(*found: _Found | None) -> _Found | None:
        known = [each for each in found if each is not None]
        if len(known) < len(found):
            return None
        return _Found(
            "; ".join(each.said for each in known),
            any(each.refuted for each in known),
            all(each.held for each in known),
        )

    ratio = _clause(four, "ln PR", {"muon_noqk": 1.0, "adamw_qk": -1.0})
    return {
        "step 0, every arm: post-RoPE raw 59 to 62, pre-RoPE centred 50 to 55": _at_the_start(
            study
        ),
        "undecayed and frozen within 3.2 of none": both(
            gap("undecayed", "none", -3.2, 3.2), gap("frozen", "none", -3.2, 3.2)
        ),
        "the parent 3 to 17 below none": gap("none", "parent", 3, 17),
        "parent < undecayed": gap("undecayed", "parent", 0, math.inf),
        "to_one within 1.6 of frozen": gap("to_one", "frozen", -1.6, 1.6),
        "post-norm of parent and undecayed within 3.2, gamma's own PR lower in the parent": both(
            gap("undecayed", "parent", -3.2, 3.2, "post-norm"), _gammas(study, arm)
        ),
        "none - parent in centred pre-RoPE less than half of it in post-RoPE raw": gap(
            "none", "parent", -math.inf, 0, "centred - half of post-RoPE"
        ),
        "none - parent in queries with keys less than half of it in keys (pre-RoPE raw)": gap(
            "none", "parent", -math.inf, 0, "queries with keys - half of keys"
        ),
        "Muon without QK-Norm 1.1 to 1.8 times AdamW with it": _within(
            ratio, math.log(1.1), math.log(1.8)
        ),
        "rank correlation of PR and loss over the arms between -0.8 and 0.8": _correlation(study),
    }


def _within(clause: Clause, low: float, high: float) -> _Found | None:
    """Refuted where the interval lies wholly outside; held where it lies wholly inside."""
    if clause.deciding is None:
        return None
    first, last = clause.deciding
    said = clause.said if clause.unit == "ln PR" else _cell(clause)
    return _Found(said, last < low or first > high, low < first and last < high)


def _at_the_start(study: Study) -> _Found | None:
    inside, said = True, []
    for metric, low, high in ((PR, 59, 62), (CENTRED, 50, 55)):
        values = [run.at_step(metric, 0) for run in study.runs.values()]
        if not values:
            return None
        inside = inside and low <= min(values) and max(values) <= high
        said.append(f"{min(values):.1f} to {max(values):.1f}")
    return _Found(" and ".join(said), not inside, inside)


def _gammas(study: Study, arm: Mapping[str, str]) -> _Found | None:
    means = []
    for role in ("parent", "undecayed"):
        values = [run.value("gamma/key_pr") for run in study.of_arm(arm[role])]
        if not values:
            return None
        means.append(float(np.mean(values)))
    said = f"gamma's own PR {means[0]:.1f} and {means[1]:.1f}"
    return _Found(said, means[0] >= means[1], means[0] < means[1])


def _correlation(study: Study) -> _Found | None:
    made = {arm for arm, _ in study.runs}
    means = np.array(
        [
            [np.mean([run.value(metric) for run in study.of_arm(arm)]) for metric in (PR, LOSS)]
            for arm in sorted(made)
        ]
    )
    if len(means) < 3:
        return None
    found = float(stats.spearmanr(*means.T).statistic)
    said = f"{short(found, signed=True)} over {len(means)} arms"
    return _Found(said, abs(found) > 0.8, abs(found) < 0.8)
