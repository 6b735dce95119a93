"""4A of a report: the learning-rate sweep."""

from collections.abc import Iterator, Mapping
from typing import Any

from qkjax.report import arms, charts, drawing
from qkjax.report.blocks import ABSENT, Block, Charts, Notes, Section, Table, Text, number
from qkjax.report.material import Material, chosen_rate
from qkjax.verdicts.results import Study


def sweep(material: Material) -> Section:
    """4A: the best learning rate of every arm, its loss, and how much it matters."""
    study = material.study
    rates = study.learning_rates
    plan = study.plan.get("sweep")
    blocks: list[Block] = []
    if not rates:
        blocks.append(
            Text(
                "Not there yet: no arm has a chosen learning rate (sweep/learning_rates.json)."
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
                f"Short runs of {tokens} each, seed {seed}, which no reported run has. The rate "
                "of the "
                "lowest final validation loss on the first half of the validation sequences is "
                "taken; "
                "results are also reported on the second half, which chose nothing."
            )
        )
        if missing:
            blocks.append(Notes((f"Not finished: {', '.join(missing)}.",)))
        blocks += [_best(study, rates), *_charts(rates), _every_run(study, rates)]
    blocks += _used_rates(study)
    return Section("sweep", "4A. Learning-rate sweep", tuple(blocks))


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
        "Best learning rate of every configuration.",
        (
            "Configuration",
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


def _charts(rates: Mapping[str, Any]) -> Iterator[Charts]:
    groups: dict[str, dict[str, list[charts.SweepPoint]]] = {}
    for arm, entry in rates.items():
        points = [
            charts.SweepPoint(r["learning_rate"], r["loss"], r["learning_rate"] == entry["chosen"])
            for r in entry["runs"]
        ]
        groups.setdefault(arms.optimizer(arm), {})[arm] = points
    losses = [p.loss for group in groups.values() for points in group.values() for p in points]
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
                        f"{p.rate:g}: {'diverged' if p.loss is None else f'{p.loss:.3f}'}"
                        for p in points
                    )
                    for arm, points in group.items()
                ),
                charts.sweep(group, scale),
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
        ("Configuration", "Learning rate", "Val loss, first half (nat)", "whole split (nat)", ""),
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
                "Configuration",
                "Learning rate",
                "Auxiliary AdamW",
                "Steps",
                "Tokens a step",
                "Rate from",
            ),
            tuple(rows),
        )
