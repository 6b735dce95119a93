"""What runs measure beside the PR of keys: stages of QK-Norm, q.k, sinks, weights, gammas, clips.

Runs from before a measure have none of it: its column, chart or table is then not there.
"""

import math
from collections.abc import Iterator, Sequence

from qkjax.report import arms, charts
from qkjax.report.blocks import (
    ABSENT,
    Block,
    Chart,
    Charts,
    Folded,
    Table,
    mean,
    number,
    without_empty,
)
from qkjax.report.material import Material
from qkjax.verdicts.hypotheses import LOGIT_SEQUENCES

STAGES = {  # of vectors on their way through QK-Norm and RoPE, as a table and an axis name them
    "pre_norm": "before QK-Norm",
    "post_norm": "normalised",
    "pre_rope": "with γ",
    "post_rope": "after RoPE",
}
_VECTORS = {"key": "Keys", "query": "Queries"}
_CENTRINGS = ("raw", "centred")
CLIP_LOGIT, CLIPPED = "train/max_logit", "train/clipped_heads"

# metric, heading, digits, factor
_COLUMNS = (
    ("pr/qk/pre_rope/raw", "PR of q·k, raw", 1, 1),
    ("pr/qk/pre_rope/centred", "centred", 1, 1),
    ("mean_share/key/pre_rope", "Mean key (%)", 1, 100),
    ("mean_share/query/pre_rope", "Mean query (%)", 1, 100),
    ("sink/mass", "Sink (%)", 2, 100),
    ("weight/pr/query", "PR of W_q", 1, 1),
    ("weight/pr/key", "W_k", 1, 1),
    ("weight/pr/value", "W_v", 1, 1),
    ("weight/pr/output", "W_o", 1, 1),
)
_GAMMAS = tuple(
    (f"gamma/{vectors}_{what}", f"{gamma} {heading}", digits, factor)
    for vectors, gamma in (("key", "γ_k"), ("query", "γ_q"))
    for what, heading, digits, factor in (
        ("pr", "PR", 1, 1),
        ("spread", "90% / 10%", 2, 1),
        ("negative", "below 0 (%)", 1, 100),
    )
)


def measures(material: Material) -> Iterator[Block]:
    """Every part of which some run has measured anything."""
    yield from _stages(material)
    yield from _beside(material)
    yield from _gammas(material)
    yield from _clips(material)


def _mean(material: Material, metric: str, arm: str) -> float:
    """Over the arm's runs that measured it and did not diverge; NaN without any.

    Of a ratio of quantiles, which has no end where a gamma comes near 0, the geometric mean.
    """
    values = [run.value(metric) for run in material.study.of_arm(arm)]
    known = [value for value in values if math.isfinite(value)]
    if metric.endswith("_spread") and known:
        return math.exp(mean([math.log(value) for value in known]))
    return mean(known)


def _rows(material: Material, columns: Sequence[tuple[str, str, int, int]]) -> list[list[str]]:
    """A row for each arm that has any of the columns, means over seeds."""
    rows = []
    for arm in material.study.arms:
        cells = [
            number(factor * _mean(material, metric, arm), digits)
            for metric, _, digits, factor in columns
        ]
        if any(cell != ABSENT for cell in cells):
            rows.append([arms.label(arm), *cells])
    return rows


def _table(
    material: Material,
    caption: str,
    columns: Sequence[tuple[str, str, int, int]],
    *notes: str,
) -> Iterator[Table]:
    if rows := _rows(material, columns):
        headings = ("Arm", *(heading for _, heading, *_ in columns))
        yield without_empty(Table(caption, headings, tuple(map(tuple, rows)), notes=notes))


# --------------------------------------------------------------------------------------------
# Stages.


def _name(vectors: str, stage: str, centring: str) -> str:
    return f"pr/{vectors}/{stage}/{centring}"


def _stages(material: Material) -> Iterator[Block]:
    """Where the PR of keys and queries falls: in them, in the norm, by gamma, or by RoPE."""
    normalised = [
        arm
        for arm in material.study.arms
        if math.isfinite(_mean(material, _name("key", "post_norm", "centred"), arm))
    ]
    if not normalised:
        return
    rows = []
    for arm in material.study.arms:
        for vectors, words in _VECTORS.items():
            cells = [
                " / ".join(
                    number(_mean(material, _name(vectors, stage, centring), arm), 1)
                    for centring in _CENTRINGS
                )
                for stage in STAGES
            ]
            unmeasured = f"{ABSENT} / {ABSENT}"
            cells = [ABSENT if cell == unmeasured else cell for cell in cells]
            if any(cell != ABSENT for cell in cells):
                rows.append((arms.label(arm), words.lower(), *cells))
    yield Charts(
        f"Where PR falls on the way through QK-Norm, of {material.head_dim} directions at the end: "
        "before QK-Norm, normalised, multiplied by γ, rotated by RoPE. Keys without QK-Norm have "
        "the last two. Lines are means over seeds, thin lines the seeds.",
        tuple(_stage_charts(material, "key")),
    )
    yield Table(
        f"PR by stage at the end, raw / centred; of {material.head_dim}, mean over seeds.",
        ("Arm", "Vectors", *(words[0].upper() + words[1:] for words in STAGES.values())),
        tuple(rows),
        words=2,
        notes=(
            "The step from before QK-Norm to normalised shows the effect of the normalisation, the "
            "next step that of γ: only unequal γ change a PR.",
        ),
    )
    yield Folded("The same of queries, as charts", (_queries(material),))


def _queries(material: Material) -> Charts:
    return Charts("PR of queries by stage.", tuple(_stage_charts(material, "query")))


def _stage_charts(material: Material, vectors: str) -> Iterator[Chart]:
    values = {
        centring: {
            arm: runs
            for arm in material.study.arms
            if (runs := _by_stage(material, arm, vectors, centring))
        }
        for centring in _CENTRINGS
    }
    for names, stem, words in material.groups(values["centred"]):
        for centring in _CENTRINGS:
            shown = {arm: values[centring][arm] for arm in names if arm in values[centring]}
            said = "; ".join(
                f"{arms.label(arm)} {_said(material, arm, vectors, centring)}" for arm in shown
            )
            yield charts.chart(
                f"stages_{vectors}_{centring}_{stem}",
                f"{_VECTORS[vectors]} by stage, {centring}: {words}",
                f"Participation ratio of {_VECTORS[vectors].lower()} by stage, {centring}: {said}.",
                charts.by_stage(shown, tuple(STAGES.values()), material.head_dim, material.looks),
            )


def _by_stage(material: Material, arm: str, vectors: str, centring: str) -> list[list[float]]:
    """The values of all stages, for every run that measured any; NaN where it has none."""
    found = [
        [run.value(_name(vectors, stage, centring)) for stage in STAGES]
        for run in material.study.of_arm(arm)
    ]
    return [values for values in found if any(map(math.isfinite, values))]


def _said(material: Material, arm: str, vectors: str, centring: str) -> str:
    means = [_mean(material, _name(vectors, stage, centring), arm) for stage in STAGES]
    return " → ".join(number(value, 1) for value in means if math.isfinite(value))


# --------------------------------------------------------------------------------------------
# Over training: q.k, the mean key, sinks, weights, gammas.


def _beside(material: Material) -> Iterator[Block]:
    """What no exchange of scale between gammas can change, and what else may explain a low PR."""
    directions = charts.Scale(f"PR (directions of {material.head_dim})", 0.0, material.head_dim)
    uniform = next(
        (
            value
            for run in material.study.runs.values()
            if math.isfinite(value := run.value("sink/uniform"))
        ),
        math.nan,
    )
    shown = []
    for metric, stem, title, scale in (
        ("pr/qk/pre_rope/centred", "pr_qk", "PR of q·k, centred", directions),
        (
            "mean_share/key/pre_rope",
            "mean_share_key",
            "Share of the mean key, pre-RoPE",
            charts.Scale("share of all energy", 0.0, 1.0),
        ),
        ("sink/mass", "sink_mass", "Attention on position 0", None),
        ("weight/pr/key", "weight_pr_key", "PR of W_k", directions),
        ("weight/pr/query", "weight_pr_query", "PR of W_q", directions),
    ):
        curves = material.curves(metric, list(material.study.plan["arms"]))
        if not curves:
            continue
        if scale is None:
            scale = charts.common_scale("share of attention", [curves], low=0.0)
            if math.isfinite(uniform):
                top = max(scale.high or 0.0, 1.2 * uniform)
                scale = scale._replace(high=top, reference=(uniform, f"even: {uniform:.2g}"))
        shown.append(
            charts.chart(
                stem,
                title,
                f"{title} over training; at the end: {material.said(metric, curves, 3)}.",
                charts.over_tokens(curves, scale, material.looks),
            )
        )
    if shown:
        yield Charts(
            "Shown beside the PR of keys: the PR of all products q·k before RoPE, which no "
            "exchange of scale between γ_q and γ_k changes; the energy of the mean key; attention "
            "on the first position; the kernels' own PR, by head, without γ. The arms alone; the "
            f"table has every arm. {charts.BANDS}",
            tuple(shown),
            columns=3,
        )
    even = f" Uniform attention would give {100 * uniform:.2f}%." if math.isfinite(uniform) else ""
    yield from _table(
        material,
        f"Beside the PR of keys, at the end; PR of {material.head_dim}, mean over seeds.",
        _COLUMNS,
        "Mean key and mean query: the share of the energy before RoPE that is their mean vector. "
        f"Sink: attention on position 0 of the first {LOGIT_SEQUENCES} validation sequences.{even}",
    )


def _gammas(material: Material) -> Iterator[Block]:
    shown = []
    for what, title, label in (
        ("pr", "PR of |γ|", f"PR (directions of {material.head_dim})"),
        ("spread", "90% over 10% quantile of |γ|", "ratio (dimensionless)"),
    ):
        by_vectors = {v: material.curves(f"gamma/{v}_{what}") for v in _VECTORS}
        scale = charts.Scale(label, 0.0, float(material.head_dim))
        if what == "spread":
            scale = charts.common_scale(label, list(by_vectors.values()), low=1.0)
        for vectors, curves in by_vectors.items():
            gamma = {"key": "γ_k", "query": "γ_q"}[vectors]
            named = title.replace("γ", gamma)
            if curves:
                shown.append(
                    charts.chart(
                        f"gamma_{vectors}_{what}",
                        named,
                        f"{named} over training; at the end: "
                        f"{material.said(f'gamma/{vectors}_{what}', curves)}.",
                        charts.over_tokens(curves, scale, material.looks),
                    )
                )
    if shown:
        yield Charts(
            "How uniform the gammas are: equal gammas have a PR equal to the number of directions, "
            "and a ratio of 1. Quantiles are the median over layers.",
            tuple(shown),
        )
    yield from _table(material, "The gammas of QK-Norm at the end, mean over seeds.", _GAMMAS)


# --------------------------------------------------------------------------------------------
# QK-Clip.


def _clips(material: Material) -> Iterator[Block]:
    """What the clip measured and did, for the arms that have one."""
    logits, clipped = (material.training(metric) for metric in (CLIP_LOGIT, CLIPPED))
    if not logits:
        return
    shown = []
    for curves, stem, title, label in (
        (logits, "clip_logits", "Largest logit of a training batch", "largest attention logit"),
        (clipped, "clip_heads", "Heads clipped in a step", "heads"),
    ):
        scale = charts.common_scale(label, [curves], low=0.0)
        shown.append(
            charts.chart(
                stem,
                title,
                f"{title} over training.",
                charts.over_tokens(curves, scale, material.looks),
            )
        )
    yield Charts(
        "QK-Clip: the largest logit of the sequences that it measures, before the update, and how "
        "many heads it clipped; each point is the maximum over a range of steps.",
        tuple(shown),
    )
    rows = []
    for arm in logits:
        runs = material.study.of_arm(arm)
        heads = {run.config.model.num_layers * run.config.model.num_heads for run in runs}
        tops, acted = [], []
        for run in runs:
            tops += [row[CLIP_LOGIT] for row in run.rows if row.get(CLIP_LOGIT) is not None]
            acted += [row[CLIPPED] for row in run.rows if row.get(CLIPPED) is not None]
        rows.append(
            (
                arms.label(arm),
                " / ".join(f"{run.config.optimizer.qk_clip:g}" for run in runs[:1]),
                number(max(tops, default=math.nan), 1),
                number(100 * mean([float(count > 0) for count in acted]), 1),
                number(mean(acted), 2),
                " / ".join(map(str, sorted(heads))),
            )
        )
    yield Table(
        "QK-Clip over all steps and seeds.",
        (
            "Arm",
            "Limit",
            "Largest logit",
            "Steps that clipped (%)",
            "Heads a step",
            "of",
        ),
        tuple(rows),
    )
