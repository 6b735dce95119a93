"""HellaSwag and LAMBADA of the final checkpoints, with errors and differences."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qkjax.report import arms
from qkjax.report.blocks import ABSENT, Block, Notes, Section, Table, Text, number, with_error
from qkjax.report.material import SKIPPED, Material
from qkjax.verdicts import items, statistics
from qkjax.verdicts.results import Study

_SCORES = (  # task, metric, heading, factor, digits
    ("hellaswag", "acc_norm", "HellaSwag acc_norm (%)", 100.0, 2),
    ("hellaswag", "acc", "HellaSwag acc (%)", 100.0, 2),
    ("lambada", "acc", "LAMBADA acc (%)", 100.0, 2),
    ("lambada", "perplexity", "LAMBADA perplexity", 1.0, 2),
)
_PAIR = (items.FIRST, items.SECOND)


def downstream(material: Material) -> Section:
    """Scores of the final checkpoints, with standard errors and differences."""
    study = material.study
    title = "Downstream scores"
    if not study.downstream:
        text = (
            "Not part of this study: no run is scored on HellaSwag or LAMBADA."
            if study.plan.get("downstream") == "none"
            else "No result yet: no run has been scored on HellaSwag or LAMBADA "
            "(downstream/<arm>/seed_<n>.json)."
        )
        return Section("downstream", title, (Text(text), *_skipped(material)))
    blocks: list[Block] = [
        *_skipped(material),
        Text(
            "Final checkpoints. Chance is 25% on HellaSwag and about 0% on LAMBADA. ± is one "
            "standard "
            "error over items; differences are between the two arms of one seed, item by item."
        ),
    ]
    for byte_exact in (False, True):
        if rows := _score_rows(study, byte_exact):
            blocks.append(
                Table(
                    "The items that are known to be the original's byte for byte."
                    if byte_exact
                    else "Scores of every run; a sample decides nothing.",
                    (
                        "Arm",
                        "Seed",
                        *(heading for _, _, heading, _, _ in _SCORES),
                        "Items",
                    ),
                    tuple(rows),
                    words=2,
                    strong=tuple(i for i, row in enumerate(rows) if row[0] == "Difference"),
                    notes=() if byte_exact else (_conditions(study),),
                )
            )
    return Section("downstream", title, tuple(blocks))


def _skipped(material: Material) -> Iterator[Notes]:
    """Runs that have no scores and will have none."""
    runs: dict[str, list[str]] = {}
    for arm, seed in material.study.runs:
        status, why = material.noted(f"downstream/{arm}/seed_{seed}")
        if status == SKIPPED and (arm, seed) not in material.study.downstream:
            runs.setdefault(why, []).append(f"{arms.label(arm)}, seed {seed}")
    if runs:
        every = len(material.study.runs)
        yield Notes(
            tuple(
                f"Skipped of {'every run' if len(names) == every else '; '.join(names)}: {why}."
                for why, names in runs.items()
            )
        )


def _score_rows(study: Study, byte_exact: bool) -> list[tuple[str, ...]]:
    rows = []
    for (arm, seed), found in study.downstream.items():
        tasks = found.get("tasks") or {}
        parts = {
            name: task.get("byte_exact") if byte_exact else task for name, task in tasks.items()
        }
        if not any(parts.values()):
            continue
        cells = []
        for task, metric, _, factor, digits in _SCORES:
            score = ((parts.get(task) or {}).get("metrics") or {}).get(metric)
            error = (
                None if score is None or score.get("stderr") is None else score["stderr"] * factor
            )
            cells.append(
                ABSENT if score is None else with_error(score["value"] * factor, error, digits)
            )
        counts = [f"{parts[name]['n']:,}" for name in ("hellaswag", "lambada") if parts.get(name)]
        sample = " (sample)" if items.is_sample(found) else ""
        rows.append((arms.label(arm) + sample, str(seed), *cells, " / ".join(counts)))
    return rows if byte_exact else rows + _differences(study)


def _differences(study: Study) -> list[tuple[str, ...]]:
    """Muon minus AdamW + QK-Norm within each seed that has both, from the items."""
    rows = []
    for seed in study.seeds:
        if any((arm, seed) not in study.downstream for arm in _PAIR):
            continue
        samples = [items.is_sample(study.downstream[arm, seed]) for arm in _PAIR]
        cells = [ABSENT] * len(_SCORES)
        if samples[0] == samples[1]:
            cells = [_item_difference(study, seed, task, metric) for task, metric, *_ in _SCORES]
        sample = " (sample)" if any(samples) else ""
        rows.append((f"Difference{sample}", str(seed), *cells, ABSENT))
    return rows


def _item_difference(study: Study, seed: int, task: str, metric: str) -> str:
    first, second = (
        {
            item["item_sha256"]: float(item[metric])
            for item in study.items.get((arm, seed), [])
            if item["task"] == task and metric in item
        }
        for arm in _PAIR
    )
    if first.keys() != second.keys() or len(first) < 2:
        return ABSENT
    names = sorted(first)
    ours, theirs = (np.array([100 * side[name] for name in names]) for side in (first, second))
    found = statistics.paired_sequences(ours, theirs)
    return f"{number(found.estimate, 2, signed=True)} ± {number(found.standard_error)}"


def _conditions(study: Study) -> str:
    tasks = [
        task for found in study.downstream.values() for task in (found.get("tasks") or {}).items()
    ]
    shots = sorted({f"{task['name']} {task['num_fewshot']}-shot" for _, task in tasks})
    truncated = sum(int(task.get("truncated") or 0) for _, task in tasks)
    backends = sorted({str(found.get("backend")) for found in study.downstream.values()})
    rules = sorted({_rule(found["bos"]) for found in study.downstream.values() if found.get("bos")})
    said = [
        ", ".join(shots),
        f"backend {' and '.join(backends)}",
        f"first token: {' and '.join(rules)}" if rules else "",
        f"prompts cut to the context: {truncated:,}",
    ]
    return "; ".join(filter(None, said)) + (
        f". Difference: {arms.label(_PAIR[0])} minus {arms.label(_PAIR[1])}, in points; that of "
        "log-perplexity is under H5."
    )


def _rule(bos: Mapping[str, Any]) -> str:
    """Whether prompts start with a token, and why."""
    return f"{bos['token']} ({bos['why']})" if bos["added"] else f"none added ({bos['why']})"
