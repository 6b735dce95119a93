"""Keys in a report: how many dimensions they use, how they lie, what attention does with them."""

from collections.abc import Callable, Iterator

import numpy as np

from qkjax.report import arms, charts, sections_measures
from qkjax.report.blocks import Block, Charts, Section, Table, Text, mean, number
from qkjax.report.material import Material
from qkjax.report.quantities import quantity
from qkjax.runs.results import PR
from qkjax.verdicts.hypotheses import LOGIT_SEQUENCES, MAX_LOGIT
from qkjax.verdicts.predictions import AXES, PR_BEFORE
from qkjax.verdicts.stability import MAX_LOGIT as LOGIT

_VIEWS = (  # metric, stem, title; the published number first
    (PR, "pr_post_rope_raw", "post-RoPE, raw (the published number)"),
    (PR_BEFORE, "pr_pre_rope_centred", "pre-RoPE, centred"),
)
_LAST = "Of a run that diverged: its last evaluation."
_COLUMNS = (  # metric, heading, digits
    (PR, "PR post-RoPE raw", 2),
    ("pr/key/post_rope/centred", "post-RoPE centred", 2),
    ("pr/key/pre_rope/raw", "pre-RoPE raw", 2),
    (PR_BEFORE, "pre-RoPE centred", 2),
    (AXES, "Axis alignment", 3),
    ("overlap/key", "Overlap of heads", 3),
    ("wqk/pr", "PR of W_q^T W_k", 2),
    (LOGIT, "Max logit", 1),
)
_ARRAYS = (("key_post_rope_raw", "post-RoPE, raw"), ("key_pre_rope_centred", "pre-RoPE, centred"))


def keys(material: Material) -> Section:
    """Trajectories, heat maps, spectra, gammas and logits."""
    title = "Dimensions of keys"
    if not material.study.runs:
        return Section("keys", title, (Text("No run has finished yet."),))
    blocks: list[Block] = [
        Text(
            "The Participation Ratio (PR) of a head's keys is (Σσ)² / Σσ² of their singular "
            f"values: {material.head_dim} at most, 1 at collapse; mean over heads, then layers. "
            "The original published it after RoPE, of raw keys. RoPE rotates keys by their "
            "position and so hides a generic collapse, but not one along the axes; therefore the "
            "report also shows the PR before RoPE with the mean key removed, and the "
            "axis-alignment index: 0 for a random orientation, 1 where the axes are the "
            f"directions in use. {material.passes}".rstrip()
        ),
        _key_table(material),
        *_trajectories(material),
        *_heat_maps(material),
        *_spectra(material),
        *_attention(material),
        *sections_measures.measures(material),
    ]
    return Section("keys", title, tuple(blocks))


def _key_table(material: Material) -> Table:
    study = material.study
    rows, strong = [], []
    for arm in study.arms:
        runs = study.of_arm(arm)
        for run in runs:
            cells = (number(run.value(metric), digits) for metric, _, digits in _COLUMNS)
            diverged = " (diverged)" if run.diverged else ""
            rows.append((arms.label(arm) + diverged, str(run.seed), *cells))
        if len(runs) > 1:
            strong.append(len(rows))
            cells = (
                number(mean([run.value(metric) for run in runs]), digits)
                for metric, _, digits in _COLUMNS
            )
            rows.append((arms.label(arm), f"mean of {len(runs)}", *cells))
    return Table(
        f"Keys at the end; PR of {material.head_dim}.",
        ("Arm", "Seed", *(heading for _, heading, _ in _COLUMNS)),
        tuple(rows),
        words=2,
        strong=tuple(strong),
    )


def _trajectories(material: Material) -> Iterator[Block]:
    by_metric = {metric: material.curves(metric) for metric, *_ in (*_VIEWS, (AXES,))}
    shown = []
    scale = charts.Scale(
        f"participation ratio of keys\n(directions of {material.head_dim})",
        0.0,
        float(material.head_dim),
    )
    axes_scale = charts.common_scale(
        "axis alignment of keys\n(0 random, 1 axes)", [by_metric[AXES]]
    )
    for names, stem, words in material.groups(by_metric[PR]):
        for metric, name, title in _VIEWS:
            shown.append(
                _over_tokens(
                    material, metric, names, f"{name}_{stem}", f"PR {title}: {words}", scale
                )
            )
        shown.append(
            _over_tokens(
                material, AXES, names, f"axes_{stem}", f"Axis alignment: {words}", axes_scale
            )
        )
    if shown:
        yield Charts(
            "Participation ratio of keys over training, on one scale, and their alignment with "
            f"the axes. {charts.BANDS}",
            tuple(shown),
            columns=3,
        )


def _over_tokens(
    material: Material,
    metric: str,
    names: list[str],
    stem: str,
    title: str,
    scale: charts.Scale,
) -> charts.Chart:
    return charts.chart(
        stem,
        title,
        f"{metric} over training tokens; at the end: {material.said(metric, names)}.",
        charts.over_tokens(material.curves(metric, names), scale, material.looks),
    )


def _heat_maps(material: Material) -> Iterator[Block]:
    if not material.ends:
        yield Text("No run has saved spectra: no heat maps and no singular values.")
        return
    shown = []
    for names, stem, words in material.groups(material.ends):
        ends = {arm: material.ends[arm] for arm in names}
        for array, title in _ARRAYS:
            measured = quantity("pr", "key", *array.removeprefix("key_").rsplit("_", 1))
            shown.append(
                charts.chart(
                    f"heat_maps_{array}_{stem}",
                    f"PR {title}, by layer and head: {words}",
                    f"Participation ratio of every layer and kv head at the end, {title}.",
                    charts.heat_maps(ends, measured, material.head_dim),
                )
            )
    yield Charts(
        f"Layer by head at the end, mean over seeds; every map runs from 1 to {material.head_dim}. "
        f"{_LAST}",
        tuple(shown),
    )


def _spectra(material: Material) -> Iterator[Block]:
    if not material.ends:
        return
    first = next(iter(material.ends.values()))[0]
    shown = []
    main = {arm: runs for arm, runs in material.ends.items() if arm in material.study.plan["arms"]}
    ends = main or material.ends
    lows = [charts.lowest_ratio(ends, array) for array, _ in _ARRAYS]
    for array, title in _ARRAYS:
        if array not in first:
            continue
        count = len(first[array])
        for layer in sorted({0, count // 2, count - 1}):
            shown.append(
                charts.chart(
                    f"spectra_{array}_layer_{layer}",
                    f"Spectrum of layer {layer}, {title}",
                    f"Singular values of keys over the largest, layer {layer} of {count}, {title}.",
                    charts.spectra(ends, array, layer, min(lows), material.looks),
                )
            )
    yield Charts(
        "Singular values of the keys of the first, middle and last layer at the end, divided by "
        f"the largest; mean over heads and seeds. One scale. {_LAST}",
        tuple(shown),
        columns=3,
    )


def _attention(material: Material) -> Iterator[Block]:
    shown = []
    logits = material.curves(LOGIT)
    for names, stem, words in material.groups(logits):
        scale = charts.common_scale("largest attention logit\n(dimensionless)", [logits], low=0.0)
        if (scale.high or 0.0) > MAX_LOGIT / 2:  # near the limit of H4: then it is in the picture
            scale = scale._replace(
                high=max(scale.high or 0.0, 1.05 * MAX_LOGIT),
                reference=(MAX_LOGIT, f"limit of H4: {MAX_LOGIT:g}"),
            )
        shown.append(
            _over_tokens(
                material,
                LOGIT,
                names,
                f"max_logit_{stem}",
                f"Largest attention logit: {words}",
                scale,
            )
        )
    if shown:
        yield Charts(
            "Largest attention logit of all heads and layers, after 1/√head_dim, causal pairs "
            f"only, of the first {LOGIT_SEQUENCES} validation sequences: larger ones exist.",
            tuple(shown),
            columns=3,
        )
    if gammas := tuple(_gammas(material)):
        yield Charts(
            "The gammas of QK-Norm: their mean over head_dim and layers, and their spread (the "
            "standard deviation over head_dim, mean over layers). Frozen gammas stay at 1.",
            gammas,
        )


_STATISTICS: tuple[tuple[str, str, Callable[[np.ndarray], np.ndarray]], ...] = (
    ("mean", "mean", lambda gamma: gamma.mean(axis=-1)),
    ("spread", "spread over head_dim", lambda gamma: gamma.std(axis=-1)),
)


def _gammas(material: Material) -> Iterator[charts.Chart]:
    for name, words, statistic in _STATISTICS:
        by_array: dict[str, dict[str, list[charts.Curve]]] = {}
        for array in ("gamma_k", "gamma_q"):
            for arm in material.study.arms:
                runs = [run for (name_, _), run in material.spectra.items() if name_ == arm]
                if curves := charts.gamma_curves(runs, array, statistic):
                    by_array.setdefault(array, {})[arm] = curves
        for array, curves_ in by_array.items():
            label = f"{array}, {words}\n(dimensionless)"
            groups = list(by_array.values())
            scale = (
                charts.around(label, groups, 1.0)
                if name == "mean"
                else (charts.common_scale(label, groups, low=0.0))
            )
            yield charts.chart(
                f"{array}_{name}",
                f"{array}: {words}",
                f"{array} of the arms with QK-Norm over training, {words}.",
                charts.over_tokens(curves_, scale, material.looks),
            )
