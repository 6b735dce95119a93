"""Losses in a report: the sweep that chose the rates, and validation loss over training."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qkjax.report import arms, charts, drawing
from qkjax.report.blocks import (
    ABSENT,
    Block,
    Chart,
    Charts,
    Notes,
    Section,
    Table,
    Text,
    mean,
    number,
    without_empty,
)
from qkjax.report.material import Material, chosen_rate
from qkjax.runs.results import LOSS, RunResult
from qkjax.verdicts import statistics
from qkjax.verdicts.results import Study

BASELINE = "adamw_qk"
TIE = 0.01  # nat: closer than this, one tuning seed does not tell two rates apart
_DIVERGED = "A diverged run has no loss at its end. "
_CHOSEN = "The learning rate was chosen on the first half of the validation sequences. "


def losses(material: Material) -> Section:
    """Validation loss against tokens, with the differences to the baseline."""
    study = material.study
    curves = material.curves(LOSS)
    if not curves:
        return Section("loss", "Validation loss", (Text("No run has finished yet."),))
    return Section(
        "loss",
        "Validation loss",
        (
            Text(
                "Validation tokens and their order are the same at every evaluation and for every "
                f"run. {charts.BANDS} Differences are taken within a seed, whose runs share their "
                "data order and the initial values of common parameters. "
                f"{material.passes}".rstrip()
            ),
            Charts(
                "Validation loss against training tokens: whole, from a quarter of the tokens on, "
                "and as differences. Each column has one scale.",
                tuple(_charts(material, curves)),
                columns=3,
            ),
            _loss_table(study),
        ),
    )


def _charts(material: Material, curves: charts.Curves) -> Iterator[Chart]:
    groups, looks = list(material.groups(curves)), material.looks
    late = max(int(curve.tokens[-1]) for runs in curves.values() for curve in runs) // 4
    lower = {
        stem: {arm: _minus(material, arm) for arm in names if _reference(material, arm)}
        for names, stem, _ in groups
    }
    label = "validation loss\n(nat per token)"
    whole = charts.common_scale(label, [curves])
    end = charts.common_scale(label, [curves], after=late)
    less = charts.common_scale(
        "difference in validation loss\n(nat per token)", list(lower.values()), after=late
    )._replace(reference=(0.0, "no difference"))
    for names, stem, title in groups:
        chosen = {arm: curves[arm] for arm in names}
        yield charts.chart(
            f"loss_{stem}",
            f"Validation loss: {title}",
            f"Validation loss over training; at the end: {material.said(LOSS, names, 3)}.",
            charts.over_tokens(chosen, whole, looks),
        )
        yield charts.chart(
            f"loss_{stem}_late",
            "From a quarter of the tokens on",
            "The same from a quarter of the tokens on, on a linear axis.",
            charts.over_tokens(chosen, end, looks, late),
        )
        against = arms.label(BASELINE) if stem == "arms" else "the arm that it changes"
        shown = {arm: runs for arm, runs in lower[stem].items() if runs}
        yield charts.chart(
            f"loss_{stem}_difference",
            f"Minus {against}, same seed",
            f"Difference in validation loss to {against} within each seed.",
            charts.over_tokens(shown, less, looks, late),
        )


def _reference(material: Material, arm: str) -> str:
    """What an arm's loss is compared with: of a control its parent, else the baseline."""
    parents = material.study.plan.get("parents") or {}
    return "" if arm == BASELINE else parents.get(arm, BASELINE)


def _minus(material: Material, arm: str) -> list[charts.Curve]:
    """The arm's loss less that of its reference, for every seed that has both."""
    found = []
    for run in material.study.of_arm(arm):
        other = material.study.runs.get((_reference(material, arm), run.seed))
        if other is None:
            continue
        ours, theirs = dict(run.series(LOSS)), dict(other.series(LOSS))
        tokens = [token for token in ours if token in theirs]
        values = [ours[token] - theirs[token] for token in tokens]
        found.append(charts.Curve(np.array(tokens), np.array(values), run.diverged))
    return found


def _loss_table(study: Study) -> Table:
    rows, strong = [], []
    for arm in study.arms:
        runs = study.of_arm(arm)
        for run in runs:
            halves = (float("nan"),) * 2 if run.diverged else run.half_losses()
            against = study.runs.get((BASELINE, run.seed))
            rows.append(
                (
                    arms.label(arm),
                    str(run.seed),
                    number(run.value(LOSS), 4),
                    *(number(half, 4) for half in halves),
                    _difference(run, against),
                    "diverged" if run.diverged else ABSENT,
                )
            )
        if len(runs) > 1:
            values = [run.value(LOSS) for run in runs]
            sound = [run.half_losses() for run in runs if not run.diverged]
            means = [mean([pair[i] for pair in sound]) for i in (0, 1)]
            strong.append(len(rows))
            fewer = f" (halves: of {len(sound)})" if 0 < len(sound) < len(runs) else ""
            rows.append(
                (
                    arms.label(arm),
                    f"mean of {len(runs)}{fewer}",
                    number(mean(values), 4),
                    *(number(value, 4) for value in means),
                    ABSENT,
                    ABSENT,
                )
            )
    return without_empty(
        Table(
            "Validation loss at the end (nat per token).",
            (
                "Arm",
                "Seed",
                "Val loss",
                "first half",
                "second half",
                f"minus {arms.label(BASELINE)}, same seed",
                "Remark",
            ),
            tuple(rows),
            words=2,
            strong=tuple(strong),
            notes=(
                (_CHOSEN if study.learning_rates else "")
                + (_DIVERGED if any(run.diverged for run in study.runs.values()) else "")
                + "± is the standard error over validation sequences, in pairs: it is valid for "
                "these trained models and does not contain the spread between seeds.",
            ),
        )
    )


def _difference(run: RunResult, against: RunResult | None) -> str:
    if against is None or run.arm == BASELINE or run.diverged or against.diverged:
        return ABSENT
    if len(run.sequence_losses) < 2:
        return number(run.value(LOSS) - against.value(LOSS), 4, signed=True)
    found = statistics.paired_sequences(run.sequence_losses, against.sequence_losses)
    return f"{number(found.estimate, 4, signed=True)} ± {number(found.standard_error, 4)}"


# --------------------------------------------------------------------------------------------
# The learning-rate sweep that chose the rates.


def sweep(material: Material) -> Section:
    """The best learning rate of every arm, its loss, and how much it matters."""
    study = material.study
    rates = study.learning_rates
    plan = study.plan.get("sweep")
    blocks: list[Block] = []
    if not rates:
        blocks.append(
            Text(
                "Not available yet: no arm has a chosen learning rate (sweep/learning_rates.json)."
                if plan
                else "This study has no sweep: every arm runs at the rate of its recipe, given "
                "below."
            )
        )
    else:
        missing = [arms.label(arm) for arm in study.plan["arms"] if arm not in rates]
        seed = study.plan.get("tuning_seed")
        tokens = f"{drawing.count(plan['tokens'])} tokens" if plan else "equal budgets"
        blocks.append(
            Text(
                f"Short runs of {tokens} each, seed {seed}, which no reported run has: the choice "
                "has the noise of one run. The rate of the "
                "lowest final validation loss on the first half of the validation sequences is "
                "taken; "
                "results are also reported on the second half, which was not used for the choice."
            )
        )
        if missing:
            blocks.append(Notes((f"Not finished: {', '.join(missing)}.",)))
        blocks += [
            _best(study, rates),
            *_sweep_charts(rates, material.looks),
            _every_run(study, rates),
        ]
    blocks += _used_rates(study)
    return Section("sweep", "Learning-rate sweep", tuple(blocks))


def _best(study: Study, rates: Mapping[str, Any]) -> Table:
    rows = []
    for arm in study.plan["arms"]:
        if arm not in rates:
            rows.append((arms.label(arm), *[ABSENT] * 5, "not finished"))
            continue
        entry = rates[arm]
        best: dict[str, Any] = next(
            (r for r in entry["runs"] if r["learning_rate"] == entry["chosen"]), {}
        )
        diverged = [f"{r['learning_rate']:g}" for r in entry["runs"] if r["diverged"]]
        remarks = [
            f"EDGE ({entry['edge']})" if entry.get("edge") else "",
            _tie(entry),
            "grid extended" if entry.get("extended") else "",
            f"diverged at {', '.join(diverged)}" if diverged else "",
        ]
        rows.append(
            (
                arms.label(arm),
                ABSENT if entry["chosen"] is None else f"{entry['chosen']:g}",
                number(best.get("loss"), 4),
                number(best.get("loss_whole"), 4),
                number(entry.get("sensitivity"), 4),
                str(len(entry["runs"])),
                "; ".join(filter(None, remarks)) or ABSENT,
            )
        )
    return Table(
        "Best learning rate of every arm.",
        (
            "Arm",
            "Best LR",
            "Sweep val loss, first half (nat)",
            "whole split (nat)",
            "LR sensitivity (nat)",
            "Runs",
            "Remarks",
        ),
        tuple(rows),
        notes=(
            "LR sensitivity (after Wortsman et al. 2023): mean over the original grid of "
            "min(loss, loss at initialisation) - best loss; a diverged run counts as the loss at "
            "initialisation, which is that of an ordinary evaluation (of fewer tokens where runs "
            "end with a longer pass). Their grid spans a factor of 1,000, ours one of 16 or less: "
            "not comparable with their figures.",
        ),
    )


def _tie(entry: Mapping[str, Any]) -> str:
    """The two best rates where their losses are too close to choose by one run; else ""."""
    sound = [run for run in entry["runs"] if run["loss"] is not None]
    best = sorted(sound, key=lambda run: run["loss"])[:2]
    if len(best) < 2 or best[1]["loss"] - best[0]["loss"] >= TIE:
        return ""
    rates = " and ".join(f"{run['learning_rate']:g}" for run in best)
    return f"TIE: {rates} are within {TIE:g} nat"


def _sweep_charts(rates: Mapping[str, Any], looks: charts.Looks) -> Iterator[Charts]:
    groups: dict[str, dict[str, list[charts.SweepPoint]]] = {}
    for arm, entry in rates.items():
        points = [
            charts.SweepPoint(r["learning_rate"], r["loss"], r["learning_rate"] == entry["chosen"])
            for r in entry["runs"]
        ]
        groups.setdefault(arms.optimizer(arm), {})[arm] = points
    losses = [p.value for group in groups.values() for points in group.values() for p in points]
    found = [loss for loss in losses if loss is not None]
    if not found:
        return
    margin = 0.06 * ((max(found) - min(found)) or 1.0)
    scale = charts.Scale(
        "validation loss, first half\n(nat per token)", min(found) - margin, max(found) + margin
    )
    yield Charts(
        "Final validation loss of the sweep runs. The chosen rate is ringed. One vertical scale.",
        tuple(
            charts.chart(
                f"sweep_{name}",
                f"Sweep, {arms.family(name)}",
                "Validation loss against learning rate: "
                + "; ".join(
                    f"{arms.label(arm)} "
                    + ", ".join(
                        f"{p.rate:g}: {'diverged' if p.value is None else f'{p.value:.3f}'}"
                        for p in points
                    )
                    for arm, points in group.items()
                ),
                charts.sweep(group, scale, looks),
            )
            for name, group in groups.items()
        ),
    )


def _every_run(study: Study, rates: Mapping[str, Any]) -> Table:
    rows = [
        (
            arms.label(arm),
            f"{run['learning_rate']:g}",
            number(run["loss"], 4),
            number(run["loss_whole"], 4),
            "diverged"
            if run["diverged"]
            else "chosen"
            if run["learning_rate"] == rates[arm]["chosen"]
            else ABSENT,
        )
        for arm in study.plan["arms"]
        if arm in rates
        for run in rates[arm]["runs"]
    ]
    return Table(
        "Every run of the sweep.",
        ("Arm", "Learning rate", "Val loss, first half (nat)", "whole split (nat)", ""),
        tuple(rows),
    )


def _used_rates(study: Study) -> Iterator[Table]:
    rows = []
    for arm in study.arms:
        if not (runs := study.of_arm(arm)):
            continue
        optimizer = runs[0].config.optimizer
        auxiliary = optimizer.adam_learning_rate  # of every optimiser but AdamW
        parent = (study.plan.get("parents") or {}).get(arm)
        chosen = chosen_rate(study, arm)
        origin = "recipe" if chosen is None else "sweep of its parent" if parent else "sweep"
        rows.append(
            (
                arms.label(arm),
                f"{optimizer.learning_rate:g}",
                ABSENT if auxiliary is None else f"{auxiliary:g}",
                f"{runs[0].config.train.num_steps:,}",
                f"{runs[0].config.train.tokens_per_step:,}",
                origin,
            )
        )
    if rows:
        yield Table(
            "Rates and budgets of the reported runs.",
            (
                "Arm",
                "Learning rate",
                "Auxiliary AdamW",
                "Steps",
                "Tokens a step",
                "Rate from",
            ),
            tuple(rows),
        )
