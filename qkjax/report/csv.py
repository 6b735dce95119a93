"""results.csv: the numbers of a study, one per row; equal results give equal bytes.

No paths, times, rates or host names, so the file of a study that was killed and resumed equals that
of an uninterrupted one.
"""

import csv
import io
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from qkjax.report.material import Material
from qkjax.runs.results import PR
from qkjax.trained import rank_curves
from qkjax.verdicts.judgement import Clause
from qkjax.verdicts.results import Study

COLUMNS = ("table", "name", "seed", "step", "metric", "value")


class Row(NamedTuple):
    """One number."""

    table: str
    name: str
    seed: int | None
    step: int | None
    metric: str
    value: Any


def results_csv(material: Material) -> str:
    """The file's text."""
    study = material.study
    rows = [
        *_runs(study),
        *_sweep(material),
        *_downstream(study),
        *_surgery(material),
        *_verdicts(material),
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in sorted(rows, key=_order):
        writer.writerow((*row[:2], *map(_cell, row[2:])))
    return text.getvalue()


def _order(row: Row) -> tuple[Any, ...]:
    places = (-1 if number is None else number for number in (row.seed, row.step))
    return row.table, row.name, *places, row.metric


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(float(value)) if isinstance(value, float) else str(value)


def _runs(study: Study) -> Iterator[Row]:
    for (arm, seed), run in study.runs.items():
        for name in ("params_sha256", "step", "tokens", "epochs", "diverged", "diverged_step"):
            yield Row("run", arm, seed, None, name, run.summary.get(name))
        yield Row("run", arm, seed, None, "dataset_fingerprint", run.dataset_fingerprint)
        for metric in sorted({name for probe in run.probes for name in probe.metrics}):
            yield Row("run", arm, seed, None, metric, run.value(metric))
        if not run.diverged:
            for half, loss in zip(("first_half", "second_half"), run.half_losses(), strict=True):
                yield Row("run", arm, seed, None, f"val/loss/{half}", loss)
        for probe in run.probes:
            for metric, value in probe.metrics.items():
                yield Row("evaluation", arm, seed, probe.step, metric, value)


def _sweep(material: Material) -> Iterator[Row]:
    study = material.study
    seed = study.plan.get("tuning_seed")
    for arm, entry in (study.learning_rates or {}).items():
        for name in ("chosen", "edge", "extended", "sensitivity", "loss_at_init"):
            yield Row("sweep", arm, seed, None, name, entry.get(name))
        for run in entry["runs"]:
            at = f"lr_{run['learning_rate']:.6g}"
            for name in ("loss", "loss_whole", "diverged"):
                yield Row("sweep", arm, seed, None, f"{at}/{name}", run.get(name))
        for rate, value in material.sweep_prs.get(arm, {}).items():
            yield Row("sweep", arm, seed, None, f"lr_{rate:.6g}/{PR}", value)


def _surgery(material: Material) -> Iterator[Row]:
    for (arm, seed), rows in material.surgery.items():
        yield Row("surgery", arm, seed, None, "directions", rank_curves.dimensions_used(rows))
        for row in rows:
            name = f"{row.stage}/{row.centring}/{row.layer}/{row.kind}_{row.rank:03d}/delta"
            yield Row("surgery", arm, seed, None, name, row.delta)


def _downstream(study: Study) -> Iterator[Row]:
    for (arm, seed), found in study.downstream.items():
        yield Row("downstream", arm, seed, None, "sample", bool(found.get("sample")))
        for task, measured in (found.get("tasks") or {}).items():
            yield Row("downstream", arm, seed, None, f"{task}/num_fewshot", measured["num_fewshot"])
            parts = {"": measured, "/byte_exact": measured.get("byte_exact")}
            for suffix, part in parts.items():
                for metric, value in _scores(part):
                    yield Row("downstream", arm, seed, None, f"{task}{suffix}/{metric}", value)


def _scores(part: Mapping[str, Any] | None) -> Iterator[tuple[str, Any]]:
    if not part:
        return
    yield "n", part.get("n")
    for metric, score in (part.get("metrics") or {}).items():
        yield metric, score.get("value")
        yield f"{metric}_stderr", score.get("stderr")


def _verdicts(material: Material) -> Iterator[Row]:
    for verdict in material.judgement.verdicts:
        yield Row("verdict", verdict.name, None, None, "status", verdict.status)
        yield Row("verdict", verdict.name, None, None, "reason", verdict.reason)
        yield Row("verdict", verdict.name, None, None, "headline", verdict.headline)
        yield Row("verdict", verdict.name, None, None, "p", verdict.p)
        yield Row("verdict", verdict.name, None, None, "level", verdict.level)
        yield Row("verdict", verdict.name, None, None, "correction", verdict.correction)
        for clause in (*verdict.clauses, *verdict.shown):
            yield from _clause(clause)
    for found in material.judgement.attributions:
        name = f"attribution {found.optimizer}"
        yield Row("verdict", name, None, None, "status", found.status)
        yield Row("verdict", name, None, None, "reason", found.reason)
        yield Row("verdict", name, None, None, "share", found.share or None)
        for clause in (found.total, *found.parts, *found.beside, found.half):
            yield from _clause(clause)
    for clause in material.judgement.controls:
        yield from _clause(clause)


def _clause(clause: Clause) -> Iterator[Row]:
    values: dict[str, Any] = {
        "status": clause.status,
        "word": clause.word,
        "kind": clause.kind,
        "estimate": clause.estimate,
        "p": clause.p,
        "sesoi": clause.sesoi,
        "unit": clause.unit,
        "seeds_needed": clause.seeds_needed,
    }
    ends_of = {"deciding": clause.deciding, "pooled": clause.pooled, "paired": clause.paired}
    for name, ends in ends_of.items():
        low, high = ends or (None, None)
        values |= {f"{name}_low": low, f"{name}_high": high}
    for metric, value in values.items():
        yield Row("clause", clause.name, None, None, metric, value)
    for seed, value in clause.per_seed.items():
        yield Row("clause", clause.name, seed, None, "estimate", value)
