"""The first screen of a report: what the study found, in a sentence, a table and two pictures."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qkjax.report import arms, charts
from qkjax.report.blocks import (
    ABSENT,
    Block,
    Charts,
    Lead,
    Section,
    Table,
    counted,
    number,
    without_empty,
)
from qkjax.report.material import Material
from qkjax.runs.results import LOSS, PR, RunResult
from qkjax.verdicts.judgement import LABELS
from qkjax.verdicts.predictions import PR_BEFORE

_COLUMNS = ((PR, "PR after RoPE", 1), (PR_BEFORE, "PR before RoPE", 1), (LOSS, "Val loss (nat)", 3))


def result(material: Material) -> Section:
    """The plain result, the numbers by arm, PR and loss over training."""
    blocks: list[Block] = [Lead(_sentence(material)), _table(material), *_curves(material)]
    return Section("result", "Result", tuple(blocks))


def _sentence(material: Material) -> str:
    """ "One seed: nothing is decided. So far: ..."."""
    said = [_prs(material), _best_loss(material), _diverged(material)]
    found = "; ".join(filter(None, said))
    decided = not material.judgement.rehearsal and not material.study.missing
    opening = "Measured" if decided and len(material.judgement.seeds_used) > 1 else "So far"
    return f"{material.judgement.headline} " + (
        f"{opening}: {found}." if found else "So far: no run has finished."
    )


def _prs(material: Material) -> str:
    """PR with and without QK-Norm, under each optimiser that has both."""
    parts = []
    for optimizer, name in LABELS.items():
        values = [material.end(PR, f"{optimizer}_{end}") for end in ("qk", "noqk")]
        if all(map(math.isfinite, values)):
            parts.append(f"{values[0]:.1f} under {name} (without: {values[1]:.1f})")
    if not parts:
        return ""
    return f"keys with QK-Norm use {' and '.join(parts)} of {material.head_dim} directions (PR)"


def _best_loss(material: Material) -> str:
    """The arm that is lowest in the mean and in every seed, if there is one."""
    losses = {
        arm: mean
        for arm in material.study.plan["arms"]
        if math.isfinite(mean := _mean([run.value(LOSS) for run in _sound(material, arm)]))
    }
    if len(losses) < 2:
        return ""
    best = min(losses, key=losses.__getitem__)
    runs = material.study.runs
    for seed in material.study.seeds:
        in_seed = {arm: runs[arm, seed].value(LOSS) for arm in losses if (arm, seed) in runs}
        if best in in_seed and min(in_seed.values()) < in_seed[best]:
            return "no arm has the lowest validation loss in every seed"
    return f"the lowest validation loss, {losses[best]:.3f} nat, is that of {arms.label(best)}"


def _diverged(material: Material) -> str:
    """ "AdamW, no QK-Norm: 2 of 3 runs diverged"."""
    parts = []
    for arm in material.study.arms:
        runs = material.study.of_arm(arm)
        if count := sum(run.diverged for run in runs):
            parts.append(f"{arms.label(arm)}: {count} of {counted(len(runs), 'run')} diverged")
    return "; ".join(parts)


def _sound(material: Material, arm: str) -> list[RunResult]:
    return [run for run in material.study.of_arm(arm) if not run.diverged]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _table(material: Material) -> Table:
    rows = []
    for arm in material.study.arms:
        runs = _sound(material, arm)
        cells = [
            _spread([run.value(metric) for run in runs], digits) for metric, _, digits in _COLUMNS
        ]
        rows.append((_name(material, arm), *cells, _spread(_hellaswag(material, arm), 1)))
    several = len(material.study.seeds) > 1
    return without_empty(
        Table(
            f"At the end of training; PR of {material.head_dim} directions"
            + (", mean ± standard deviation over seeds." if several else "."),
            ("Arm", *(heading for _, heading, _ in _COLUMNS), "HellaSwag (%)"),
            tuple(rows),
            notes=(material.passes,) if material.passes else (),
        )
    )


def _name(material: Material, arm: str) -> str:
    """The arm, and what of it is not whole."""
    runs, planned = material.study.of_arm(arm), len(material.study.seeds_of(arm))
    diverged = sum(run.diverged for run in runs)
    remarks = [
        f"{diverged} of {len(runs)} diverged" if diverged else "",
        f"{len(runs)} of {planned} seeds" if len(runs) < planned else "",
    ]
    said = ", ".join(filter(None, remarks))
    return f"{arms.label(arm)} ({said})" if said else arms.label(arm)


def _spread(values: Sequence[float], digits: int) -> str:
    """ "25.3 ± 0.2", which may wrap before the sign alone; of one seed no spread."""
    if not values or not all(map(math.isfinite, values)):
        return ABSENT
    spread = f" ±\u00a0{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return number(_mean(values), digits) + spread


def _hellaswag(material: Material, arm: str) -> list[float]:
    """acc_norm of the arm's scored runs, in percent."""
    found = []
    for (name, _), scored in material.study.downstream.items():
        task: Mapping[str, Any] = (scored.get("tasks") or {}).get("hellaswag") or {}
        score = (task.get("metrics") or {}).get("acc_norm")
        if name == arm and score is not None:
            found.append(100 * score["value"])
    return found


def _curves(material: Material) -> Iterator[Block]:
    """PR and loss of the four arms side by side; of a study without them, of all."""
    plan = material.study.plan
    shown = []
    for metric, stem, title in (
        (PR, "result_pr", f"PR of keys after RoPE, of {material.head_dim}"),
        (LOSS, "result_loss", "Validation loss"),
    ):
        curves = material.curves(metric, list(plan["arms"]) or None)
        if not curves:
            continue
        scale = (
            charts.Scale(f"PR (directions of {material.head_dim})", 0.0, float(material.head_dim))
            if metric == PR
            else charts.common_scale("nat per token", [curves])
        )
        shown.append(
            charts.chart(
                stem,
                title,
                f"{title} over training; at the end: "
                f"{material.said(metric, curves, 2 if metric == PR else 3)}.",
                charts.over_tokens(curves, scale, material.looks, size=charts.WIDE),
            )
        )
    if shown:
        yield Charts(charts.BANDS, tuple(shown))
