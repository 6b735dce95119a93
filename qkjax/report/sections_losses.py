"""4B of a report: validation loss over training, and its differences within seeds."""

from collections.abc import Iterator

import numpy as np

from qkjax.report import arms, charts
from qkjax.report.blocks import (
    ABSENT,
    Chart,
    Charts,
    Section,
    Table,
    Text,
    mean,
    number,
    without_empty,
)
from qkjax.report.material import Material
from qkjax.runs.results import LOSS, RunResult
from qkjax.verdicts import statistics
from qkjax.verdicts.results import Study

BASELINE = "adamw_qk"
_DIVERGED = "The loss of a diverged run counts as that of its start. "
_CHOSEN = "The learning rate was chosen on the first half of the validation sequences. "


def losses(material: Material) -> Section:
    """4B: validation loss against tokens, with the differences to the baseline."""
    study = material.study
    curves = material.curves(LOSS)
    if not curves:
        return Section("loss", "4B. Validation loss", (Text("No run has finished yet."),))
    return Section(
        "loss",
        "4B. Validation loss",
        (
            Text(
                "Validation tokens and their order are the same at every evaluation and for every "
                f"run. {charts.BANDS} Differences are taken within a seed, whose runs share "
                "their data order and the start of what they have in common. "
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
    groups = list(material.groups(curves))
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
            charts.over_tokens(chosen, whole),
        )
        yield charts.chart(
            f"loss_{stem}_late",
            "From a quarter of the tokens on",
            "The same from a quarter of the tokens on, on a linear axis.",
            charts.over_tokens(chosen, end, late),
        )
        against = arms.label(BASELINE) if stem == "arms" else "the arm that it changes"
        shown = {arm: runs for arm, runs in lower[stem].items() if runs}
        yield charts.chart(
            f"loss_{stem}_difference",
            f"Minus {against}, same seed",
            f"Difference in validation loss to {against} within each seed.",
            charts.over_tokens(shown, less, late),
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
                "Configuration",
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
                + "± is the standard error over validation sequences, in pairs: it holds for these "
                "trained models, and leaves the spread between seeds out.",
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
