"""4A and 4B of a report: the learning-rate sweep, and validation loss over training."""

from collections.abc import Iterator, Mapping
from typing import Any

from qkjax.study import arms, drawing, report_charts, statistics
from qkjax.study.report_blocks import (
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
from qkjax.study.report_data import Material, chosen_rate
from qkjax.study.results import LOSS, RunResult, Study

BASELINE = "adamw_qk"


# --------------------------------------------------------------------------------------------
# 4A: learning rates.


def sweep(material: Material) -> Section:
    """4A: the best learning rate of every arm, its loss, and how much it matters."""
    study = material.study
    rates = study.learning_rates
    plan = study.plan.get("sweep")
    blocks: list[Block] = []
    if not rates:
        blocks.append(Text(
            "Not there yet: no arm has a chosen learning rate (sweep/learning_rates.json)."
            if plan else
            "This study has no sweep: every arm runs at the rate of its recipe, given below."
        ))  # fmt: skip
    else:
        missing = [arms.label(arm) for arm in study.plan["arms"] if arm not in rates]
        seed = study.plan.get("tuning_seed")
        tokens = f"{drawing.count(plan['tokens'])} tokens" if plan else "equal budgets"
        blocks.append(Text(
            f"Short runs of {tokens} each, seed {seed}, which no reported run has. The rate of the "
            "lowest final validation loss on the first half of the validation sequences is taken; "
            "results are also reported on the second half, which chose nothing."
        ))  # fmt: skip
        if missing:
            blocks.append(Notes((f"Not finished: {', '.join(missing)}.",)))
        blocks += [_sweep_table(study, rates), *_sweep_charts(study, rates)]
    blocks += _used_rates(study)
    return Section("sweep", "4A. Learning-rate sweep", tuple(blocks))


def _sweep_table(study: Study, rates: Mapping[str, Any]) -> Table:
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
            "grid extended" if entry.get("extended") else "",
            f"diverged at {', '.join(diverged)}" if diverged else "",
        ]
        rows.append((
            arms.label(arm), ABSENT if entry["chosen"] is None else f"{entry['chosen']:g}",
            number(best.get("loss"), 4), number(best.get("loss_whole"), 4),
            number(entry.get("sensitivity"), 4), str(len(entry["runs"])),
            "; ".join(filter(None, remarks)) or ABSENT,
        ))  # fmt: skip
    return Table(
        "Best learning rate of every configuration.",
        ("Configuration", "Best LR", "Sweep val loss, first half (nat)",
         "whole split (nat)", "LR sensitivity (nat)", "Runs", "Remarks"),
        tuple(rows),
        notes=(
            "LR sensitivity (after Wortsman et al. 2023): mean over the original grid of "
            "min(loss, loss at initialisation) - best loss; a diverged run counts as the loss at "
            "initialisation. Their grid spans a factor of 1,000, ours one of 16 or less: not "
            "comparable with their figures.",
        ),
    )  # fmt: skip


def _sweep_charts(study: Study, rates: Mapping[str, Any]) -> Iterator[Charts]:
    groups: dict[str, dict[str, list[report_charts.SweepPoint]]] = {}
    for arm, entry in rates.items():
        points = [
            report_charts.SweepPoint(
                r["learning_rate"], r["loss"], r["learning_rate"] == entry["chosen"]
            )
            for r in entry["runs"]
        ]
        groups.setdefault(arms.optimizer(arm), {})[arm] = points
    losses = [p.loss for group in groups.values() for points in group.values() for p in points]
    found = [loss for loss in losses if loss is not None]
    if not found:
        return
    margin = 0.06 * ((max(found) - min(found)) or 1.0)
    scale = report_charts.Scale(
        "validation loss, first half\n(nat per token)", min(found) - margin, max(found) + margin
    )
    yield Charts(
        "Final validation loss of the sweep runs. The chosen rate is ringed. One vertical scale.",
        tuple(
            report_charts.chart(
                f"sweep_{name}", f"Sweep, {arms.family(name)}",
                "Validation loss against learning rate: " + "; ".join(
                    f"{arms.label(arm)} " + ", ".join(
                        f"{p.rate:g}: {'diverged' if p.loss is None else f'{p.loss:.3f}'}"
                        for p in points
                    ) for arm, points in group.items()
                ),
                report_charts.sweep(group, scale),
            )
            for name, group in groups.items()
        ),
    )  # fmt: skip


def _used_rates(study: Study) -> Iterator[Table]:
    rows = []
    for arm in study.arms:
        if not (runs := study.of_arm(arm)):
            continue
        optimizer = runs[0].config.optimizer
        auxiliary = optimizer.adam_learning_rate if optimizer.name == "muon" else None
        parent = (study.plan.get("parents") or {}).get(arm)
        chosen = chosen_rate(study, arm)
        origin = "recipe" if chosen is None else "sweep of its parent" if parent else "sweep"
        rows.append((
            arms.label(arm), f"{optimizer.learning_rate:g}",
            ABSENT if auxiliary is None else f"{auxiliary:g}",
            f"{runs[0].config.train.num_steps:,}",
            f"{runs[0].config.train.tokens_per_step:,}", origin,
        ))  # fmt: skip
    if rows:
        yield Table(
            "Rates and budgets of the reported runs.",
            ("Configuration", "Learning rate", "Auxiliary AdamW", "Steps", "Tokens a step",
             "Rate from"),
            tuple(rows),
        )  # fmt: skip


# --------------------------------------------------------------------------------------------
# 4B: validation loss.


def losses(material: Material) -> Section:
    """4B: validation loss against tokens, with the differences to the baseline."""
    study = material.study
    curves = material.curves(LOSS)
    if not curves:
        return Section("loss", "4B. Validation loss", (Text("No run has finished yet."),))
    label = "validation loss\n(nat per token)"
    charts: list[Chart] = []
    last = max(int(curve.tokens[-1]) for runs in curves.values() for curve in runs)
    for names, stem, title in material.groups(curves):
        chosen = {arm: curves[arm] for arm in names}
        charts.append(report_charts.chart(
            f"loss_{stem}", f"Validation loss, {title}",
            f"Validation loss over training; at the end: {material.said(LOSS, names, 3)}.",
            report_charts.over_tokens(
                chosen, report_charts.common_scale(label, [curves])
            ),
        ))  # fmt: skip
        late = last // 4
        charts.append(report_charts.chart(
            f"loss_{stem}_late", f"Validation loss, {title}: the last three quarters",
            "The same from a quarter of the tokens on, on a linear axis.",
            report_charts.over_tokens(
                chosen, report_charts.common_scale(label, [curves], after=late), after=late
            ),
        ))  # fmt: skip
    return Section(
        "loss",
        "4B. Validation loss",
        (
            Text(
                "Validation tokens and their order are the same at every evaluation and for every "
                f"run. {report_charts.BANDS}"
            ),
            Charts("Validation loss against training tokens; rows share their scale.",
                   tuple(charts)),
            _loss_table(study),
        ),
    )  # fmt: skip


def _loss_table(study: Study) -> Table:
    rows, strong = [], []
    for arm in study.arms:
        runs = study.of_arm(arm)
        for run in runs:
            halves = (float("nan"),) * 2 if run.diverged else run.half_losses()
            against = study.runs.get((BASELINE, run.seed))
            rows.append((
                arms.label(arm), str(run.seed), number(run.value(LOSS), 4),
                *(number(half, 4) for half in halves), _difference(run, against),
                "diverged" if run.diverged else ABSENT,
            ))  # fmt: skip
        if len(runs) > 1:
            values = [run.value(LOSS) for run in runs]
            sound = [run.half_losses() for run in runs if not run.diverged]
            means = [mean([pair[i] for pair in sound]) for i in (0, 1)]
            strong.append(len(rows))
            rows.append((
                arms.label(arm), f"mean of {len(runs)}", number(mean(values), 4),
                *(number(value, 4) for value in means), ABSENT, ABSENT,
            ))  # fmt: skip
    return without_empty(Table(
        "Validation loss at the end (nat per token).",
        ("Configuration", "Seed", "Val loss", "first half", "second half",
         f"minus {arms.label(BASELINE)}, same seed", "Remark"),
        tuple(rows), words=2, strong=tuple(strong),
        notes=("The learning rate was chosen on the first half of the validation sequences. "
               "± is the standard error over validation sequences, in pairs: it holds for these "
               "trained models, and leaves the spread between seeds out.",),
    ))  # fmt: skip


def _difference(run: RunResult, against: RunResult | None) -> str:
    if against is None or run.arm == BASELINE or run.diverged or against.diverged:
        return ABSENT
    if len(run.sequence_losses) < 2:
        return number(run.value(LOSS) - against.value(LOSS), 4, signed=True)
    found = statistics.paired_sequences(run.sequence_losses, against.sequence_losses)
    return f"{number(found.estimate, 4, signed=True)} ± {number(found.standard_error, 4)}"
