"""What the small study found, arm against arm, and what became of its predictions.

`contrasts` and `predictions` give the Markdown that docs/write_generated.py writes into the pages
of docs/results. Intervals are those that decide in docs/statistics.md: 95%, the wider of the pooled
and the paired one. The predictions stand in docs/log.md with what would refute them:
P1 to P10 of recipe original on 2026-11-28, F1 to F8 of recipe fixed on 2026-11-29.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

from qkjax.config import gamma_exposure
from qkjax.runs.results import LOSS, PR, RunResult
from qkjax.study.questions import ARMS
from qkjax.verdicts import predictions as rules
from qkjax.verdicts.clauses import Panel, by_contrast
from qkjax.verdicts.judgement import LABELS, Clause
from qkjax.verdicts.predictions import Prediction, Quantity
from qkjax.verdicts.results import Study

BEFORE, CENTRED, QK = "pr/key/pre_rope/raw", "pr/key/pre_rope/centred", "pr/qk/pre_rope/raw"
ROLES = {  # the arms of an optimiser
    "none": "{}_noqk",
    "frozen": "{}_qk_frozen",
    "to_one": "{}_qk_to_one",
    "undecayed": "{}_qk_undecayed",
    "decayed": "{}_qk_decayed",
    "parent": "{}_qk",
}
PAIRS = (
    ("frozen", "none"),
    ("to_one", "none"),
    ("undecayed", "none"),
    ("decayed", "none"),
    ("parent", "none"),
    ("parent", "undecayed"),
    ("decayed", "parent"),
)
SEEDS = 3  # from these on a word is not "so far"
SMALLEST = 1.6  # PR: a smaller difference is none, in the predictions


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
    "q·k, raw": _of(QK),
    "directions used": rules.QUANTITIES["functional rank"],
    "loss, nat": rules.QUANTITIES["loss"],
}
QUANTITIES: dict[str, Quantity] = {
    **MEASURES,
    "post-norm": _of("pr/key/post_norm/raw"),
    "gamma's own": _of("gamma/key_pr"),
    "ln PR": rules.QUANTITIES["ln PR"],
    "centred - half of post-RoPE": _minus_half(CENTRED, PR),
    "q·k - half of keys": _minus_half(QK, BEFORE),
}


def contrasts(study: Study) -> str:
    """Arms minus arms of each optimiser, with intervals where there are two seeds."""
    heads = ["", "seeds", *MEASURES]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for optimizer, label in LABELS.items():
        arms = _arms(optimizer)
        for first, second in PAIRS:
            panel = _panel(study, optimizer, arms[first], arms[second])
            if not panel.seeds:
                continue
            weights = {arms[first]: 1.0, arms[second]: -1.0}
            cells = [_cell(_clause(panel, name, weights)) for name in MEASURES]
            seeds = ", ".join(map(str, panel.seeds))
            words = f"{label}: {_spelled(study, arms[first])} - {_spelled(study, arms[second])}"
            lines.append(f"| {words} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _arms(optimizer: str) -> dict[str, str]:
    return {role: name.format(optimizer) for role, name in ROLES.items()}


def _spelled(study: Study, arm: str) -> str:
    """What the runs of an arm do with gamma."""
    run = study.of_arm(arm)[0]
    if run.config.model.qk_norm == "none":
        return "no QK-Norm"
    found = gamma_exposure(run.config)
    if found is None:
        return "gamma stays 1"
    return f"gamma decays to {found.target:g}" if found.weight_decay else "gamma does not decay"


def _panel(study: Study, optimizer: str, *needed: str) -> Panel:
    """The seeds that have the arms needed; in its family are the optimiser's arms that have them.

    An optimiser without controls has two of the study's four arms; the family is then these four,
    as in H1 to H4.
    """
    seeds = [seed for seed in study.seeds if all((arm, seed) in study.runs for arm in needed)]
    made = {arm for arm in study.arms if all((arm, seed) in study.runs for seed in seeds)}
    family = [arm for arm in (*_arms(optimizer).values(), *needed) if seeds and arm in made]
    if set(family) < set(ARMS) and set(ARMS) <= made:
        family = list(ARMS)
    return dataclasses.replace(
        Panel.of(study, list(dict.fromkeys(family))), seeds=tuple(seeds), left_out=()
    )


def _clause(panel: Panel, quantity: str, weights: Mapping[str, float]) -> Clause:
    return by_contrast(panel, Prediction("", "", quantity, weights), QUANTITIES)


def _cell(clause: Clause) -> str:
    if clause.estimate is None:
        return clause.reason if "diverged" in clause.reason else "-"
    digits = 3 if clause.unit == "nat" else 1
    said = f"{clause.estimate:+.{digits}f}"
    if clause.deciding is None:
        return said
    low, high = clause.deciding
    return f"{said} ({low:+.{digits}f} to {high:+.{digits}f})"


class _Found(NamedTuple):
    """What became of one prediction."""

    said: str
    refuted: bool | None  # None: nothing can be said
    held: bool  # no value that would refute it is left in the interval
    seeds: int = 0


def predictions(study: Study) -> str:
    """Those of the study's recipe: what was found, and whether it refutes them."""
    letter, find, before = {
        "original": ("P", _of_original, _not_the_cause),
        "fixed": ("F", _of_fixed, lambda study: ""),
    }[study.plan["recipe"]]
    lines = ["| | prediction | seeds | found | |", "|---|---|---|---|---|"]
    for number, (words, each) in enumerate(find(study).items(), 1):
        so = "not refuted"
        if each.refuted is None:
            so = "needs two seeds"
        elif each.refuted or each.held:
            so = "refuted" if each.refuted else "held"
        if each.seeds < SEEDS and each.refuted is not None:
            so = f"so far {so}"
        lines.append(f"| {letter}{number} | {words} | {each.seeds} | {each.said} | {so} |")
    table = "\n".join(lines)
    return f"{before(study)}{table}"


def _not_the_cause(study: Study) -> str:
    """The sentence that was promised for the case that decay does not explain the fall."""
    clause = _gap_of_decay(study)
    if clause.deciding is None:
        return ""
    low, high = clause.deciding
    if high < 0 or (-SMALLEST < low and high < SMALLEST):
        return "**Decay of gamma is not the cause of the fall at this scale.**\n\n"
    return ""


def _gap_of_decay(study: Study) -> Clause:
    arm = _arms("adamw")
    needed = (arm["undecayed"], arm["parent"])
    panel = _panel(study, "adamw", *needed)
    return _clause(panel, "post-RoPE raw", {needed[0]: 1.0, needed[1]: -1.0})


def _of_original(study: Study) -> dict[str, _Found]:
    return {
        "step 0, every arm: post-RoPE raw 59 to 62, pre-RoPE centred 50 to 55": _at_the_start(
            study
        ),
        "undecayed and frozen within 3.2 of none": _both(
            _gap(study, "undecayed", "none", -3.2, 3.2), _gap(study, "frozen", "none", -3.2, 3.2)
        ),
        "the parent 3 to 17 below none": _gap(study, "none", "parent", 3, 17),
        "parent < undecayed": _within(_gap_of_decay(study), 0, math.inf),
        "to_one within 1.6 of frozen": _gap(study, "to_one", "frozen", -SMALLEST, SMALLEST),
        "post-norm of parent and undecayed within 3.2, gamma's own PR lower in the parent": _both(
            _gap(study, "undecayed", "parent", -3.2, 3.2, "post-norm"),
            _gap(study, "undecayed", "parent", 0, math.inf, "gamma's own"),
        ),
        "(!) none - parent in centred pre-RoPE less than half of it in post-RoPE raw": _gap(
            study, "none", "parent", -math.inf, 0, "centred - half of post-RoPE"
        ),
        "none - parent in q·k less than half of it in keys (pre-RoPE raw)": _gap(
            study, "none", "parent", -math.inf, 0, "q·k - half of keys"
        ),
        "(!) Muon without QK-Norm 1.1 to 1.8 times AdamW with it": _muon_over_adamw_qk(study),
        "rank correlation of PR and loss over the arms between -0.8 and 0.8": _correlation(study),
    }


def _of_fixed(study: Study) -> dict[str, _Found]:
    losses = _of_the_four(study, "loss, nat", {"adamw_noqk": 1.0, "muon_noqk": -1.0})
    return {
        "AdamW, with QK-Norm - without: -1.6 to 8": _gap(study, "parent", "none", -SMALLEST, 8),
        "Muon, with QK-Norm - without: within 3.2": _gap(
            study, "parent", "none", -3.2, 3.2, optimizer="muon"
        ),
        "Muon without QK-Norm 1.1 to 1.8 times AdamW with it": _muon_over_adamw_qk(study),
        "AdamW without QK-Norm above 35 at step 122": _above(study, PR, 122, 35),
        "AdamW without QK-Norm ends above 20 pre-RoPE centred": _above(study, CENTRED, None, 20),
        "AdamW, with QK-Norm - without, loss within 0.03 nat": _gap(
            study, "parent", "none", -0.03, 0.03, "loss, nat"
        ),
        "AdamW - Muon, both without QK-Norm, loss 0.03 to 0.5 nat": _within(losses, 0.03, 0.5),
        "the best rate with QK-Norm not below the one without": _rates(study),
    }


def _gap(
    study: Study,
    first: str,
    second: str,
    low: float,
    high: float,
    quantity: str = "post-RoPE raw",
    optimizer: str = "adamw",
) -> _Found:
    arm = _arms(optimizer)
    panel = _panel(study, optimizer, arm[first], arm[second])
    return _within(_clause(panel, quantity, {arm[first]: 1.0, arm[second]: -1.0}), low, high)


def _both(*found: _Found) -> _Found:
    known = [each.refuted for each in found]
    return _Found(
        "; ".join(each.said for each in found),
        None if None in known else any(known),
        all(each.held for each in found),
        min(each.seeds for each in found),
    )


def _of_the_four(study: Study, quantity: str, weights: Mapping[str, float]) -> Clause:
    """Over both optimisers, with the seeds that all four arms have."""
    panel = _panel(study, "adamw", *ARMS)
    family = ARMS if panel.seeds else ()
    return _clause(dataclasses.replace(panel, family=family), quantity, weights)


def _muon_over_adamw_qk(study: Study) -> _Found:
    ratio = _of_the_four(study, "ln PR", {"muon_noqk": 1.0, "adamw_qk": -1.0})
    return _within(ratio, math.log(1.1), math.log(1.8))


def _above(study: Study, metric: str, step: int | None, limit: float) -> _Found:
    """Whether the mean of adamw_noqk is above the limit, at a step or at the end."""
    runs = study.of_arm("adamw_noqk")
    if not runs:
        return _Found("-", None, False)
    values = [run.value(metric) if step is None else run.at_step(metric, step) for run in runs]
    if not np.isfinite(values).all():
        return _Found("diverged", None, False, len(runs))
    above = float(np.mean(values)) > limit
    words = f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
    return _Found(words, not above, above, len(runs))


def _rates(study: Study) -> _Found:
    """What the sweep, of one seed, chose with QK-Norm and without, by optimiser."""
    rates = study.learning_rates or {}
    chosen = {arm: rates.get(arm, {}).get("chosen") for arm in ARMS}
    if None in chosen.values():
        return _Found("-", None, False)
    pairs = [(chosen[f"{name}_qk"], chosen[f"{name}_noqk"]) for name in LABELS]
    lower = any(with_norm < without for with_norm, without in pairs)
    words = "; ".join(
        f"{LABELS[name]} {with_norm:g} and {without:g}"
        for name, (with_norm, without) in zip(LABELS, pairs, strict=True)
    )
    return _Found(words, lower, not lower, 1)


def _within(clause: Clause, low: float, high: float) -> _Found:
    """Refuted where the interval lies wholly outside; held where it lies wholly inside."""
    seeds = len(clause.seeds)
    if clause.deciding is None:
        return _Found(_cell(clause) if seeds else "-", None, False, seeds)
    first, last = clause.deciding
    said = clause.said if clause.unit == "ln PR" else _cell(clause)
    return _Found(said, last < low or first > high, low < first and last < high, seeds)


def _at_the_start(study: Study) -> _Found:
    inside, said = True, []
    for metric, low, high in ((PR, 59, 62), (CENTRED, 50, 55)):
        values = [run.at_step(metric, 0) for run in study.runs.values()]
        if not values:
            return _Found("-", None, False)
        inside = inside and low <= min(values) and max(values) <= high
        said.append(f"{min(values):.1f} to {max(values):.1f}")
    made = {arm for arm, _ in study.runs}
    words = f"{' and '.join(said)} in {len(made)} arms"
    return _Found(words, not inside, inside, _fewest(study))


def _correlation(study: Study) -> _Found:
    """Of the arms that have a run, over the seeds that all of them have."""
    made = {arm for arm, _ in study.runs}
    seeds = [seed for seed in study.seeds if all((arm, seed) in study.runs for arm in made)]
    means = np.array(
        [
            [np.mean([study.runs[arm, seed].value(metric) for seed in seeds] or [math.nan])]
            for metric in (PR, LOSS)
            for arm in sorted(made)
        ]
    ).reshape(2, -1)
    differ = np.ptp(means, axis=1).all() if means.size else False
    if means.shape[1] < 3 or not np.isfinite(means).all() or not differ:
        return _Found("-", None, False, len(seeds))
    found = float(stats.spearmanr(*means).statistic)
    words = f"{found:+.2f} over {len(made)} arms"
    return _Found(words, abs(found) > 0.8, abs(found) < 0.8, min(len(seeds), _fewest(study)))


def _fewest(study: Study) -> int:
    """The seeds of the arm that has fewest, of those that ran and of the four."""
    return min(len(study.of_arm(arm)) for arm in {*ARMS, *(arm for arm, _ in study.runs)})
