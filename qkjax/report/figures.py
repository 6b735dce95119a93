"""Figures of runs: data in, matplotlib Figure out; `figures_of_run` draws a run's spectra."""

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qkjax.measures import ranks
from qkjax.report import drawing
from qkjax.report.quantities import CENTRINGS, MEAN_SHARE, STAGES, Quantity, quantity
from qkjax.report.run_spectra import Compared, Evaluation, RunSpectra
from qkjax.trained.rank_curves import ALL, KINDS, TOLERANCE, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_CURVES = 8  # of singular values in one panel
_MEAN, _RANGE = "mean over heads, then layers", "lowest to highest layer"
# What the original study published, beside what sees a generic collapse; values are not rotated.
_VIEWS = {
    "key": (("post_rope", "raw"), ("pre_rope", "centred")),
    "query": (("post_rope", "raw"), ("pre_rope", "centred")),
    "value": ((None, "raw"), (None, "centred")),
}
_WEIGHTS = ("weight_query", "weight_key", "weight_value", "weight_output")


def _more(measure: str) -> dict[str, list[Quantity]]:
    """Trajectories alone, by the name of their figure; a panel for each quantity."""
    stages = {
        f"{measure}_{vectors}_stages": [
            quantity(measure, vectors, stage, "centred") for stage in STAGES
        ]
        for vectors in ("key", "query")
    }
    shares = {
        f"{MEAN_SHARE}_{vectors}_trajectory": [
            quantity(MEAN_SHARE, vectors, stage) for stage in ("pre_rope", "post_rope")
        ]
        for vectors in ("key", "query")
    }
    return stages | {
        f"{measure}_qk_trajectory": [quantity(measure, "qk", centring=c) for c in CENTRINGS],
        f"{measure}_weights_trajectory": [quantity(measure, kernel) for kernel in _WEIGHTS],
        **shares,
    }


def figures_of_run(
    run: RunSpectra, measure: str, step: int | None = None
) -> tuple[dict[str, "Figure"], list[str]]:
    """Every figure of one run by the stem of its file name, and a note on each left out.

    Args:
        measure: of `quantities.MEASURES`, of the trajectories and heat maps.
        step: evaluation of the heat maps; None is the first and the last.
    Raises:
        UsageError: the step was not evaluated, or matplotlib is absent.
    """
    figures: dict[str, Figure] = {}
    notes = list(run.notes)
    steps = sorted({run.steps[0], run.steps[-1]}) if step is None else [run.at(step).step]
    for vectors, views in _VIEWS.items():
        quantities = [quantity(measure, vectors, stage, centring) for stage, centring in views]
        recorded = {q.array for q in quantities if run.series(q.array)}
        absent = [q.array for q in quantities if q.array not in recorded]
        if absent:
            notes.append(f"{run.workdir}: {', '.join(absent)} not recorded")
        if recorded:
            if run.ages_known:
                figures[f"{measure}_{vectors}_trajectory"] = trajectories([run], quantities)
            figures[f"{measure}_{vectors}_heat_maps"] = heat_maps(run, quantities, steps)
            figures[f"{vectors}_singular_values"] = singular_value_curves(run, quantities)
    for name, quantities in _more(measure).items():
        normed = name.endswith("_stages")
        if not any(_series(run, q)[0] for q in (quantities[:1] if normed else quantities)):
            why = " (it has no QK-Norm)" if normed and run.qk_norm == "none" else ""
            listed = ", ".join(q.array for q in quantities[: 2 if normed else None])
            notes.append(f"{run.workdir}: {listed} not recorded{why}; no figure {name}")
            continue
        if run.ages_known:
            figures[name] = trajectories([run], quantities)
    if len(run.clips):
        figures["clip"] = clip_curves(run)
    for name, draw, arrays in (
        ("gamma", gamma_curves, ("gamma_q", "gamma_k")),
        ("attention", attention_curves, ("max_logit", "entropy", "sink_mass")),
    ):
        if any(run.series(array) for array in arrays):
            if run.ages_known:
                figures[name] = draw(run)
            continue
        why = " (it has no QK-Norm)" if name == "gamma" and run.qk_norm == "none" else ""
        notes.append(f"{run.workdir}: {', '.join(arrays)} not recorded{why}; no figure {name}")
    return figures, notes


# --------------------------------------------------------------------------------------------
# Over training.


@drawing.styled
def trajectories(runs: Sequence[RunSpectra], quantities: Sequence[Quantity]) -> "Figure":
    """One measure over training, a panel for each quantity, on one scale.

    Of one run: mean over heads, then layers; the middle half and the range of the layers as
    bands. Of several runs: a hue for each, and the range.
    """
    figure = drawing.new_figure(4.2 * len(quantities) + 0.4, 3.8)
    panels = figure.subplots(1, len(quantities), sharey=True, squeeze=False)[0]
    tokens = [evaluation.tokens for run in runs for evaluation in run.evaluations]
    for axes, shown in zip(panels, quantities, strict=True):
        drawing.token_axis(axes, tokens)
        axes.set_title(shown.source or shown.title)
        drawn = [_trajectory(axes, i, run, shown, len(runs) == 1) for i, run in enumerate(runs)]
        if not any(drawn):
            drawing.say_not_recorded(axes)
    head_dim = max(run.head_dim for run in runs)
    panels[0].set_ylabel(f"{quantities[0].title}\n({quantities[0].unit(head_dim)})")
    if quantities[0].counts_directions:
        panels[0].set_ylim(0, head_dim)
    legend = {h.get_label(): h for axes in panels for h in axes.get_legend_handles_labels()[0]}
    figure.legend(
        handles=list(legend.values()),
        loc="outside lower center",
        ncols=3 if len(runs) == 1 else max(2, 2 * len(quantities)),
        title=None if len(runs) == 1 else f"line: {_MEAN}; band: {_RANGE}",
    )
    about = f"{quantities[0].title} over training"
    figure.suptitle(f"{about}: {_who(runs[0])}" if len(runs) == 1 else about)
    return figure


def _trajectory(axes: "Axes", i: int, run: RunSpectra, shown: Quantity, alone: bool) -> bool:
    """Draws one run, the i-th; False where it has not recorded the quantity."""
    tokens, values = _series(run, shown)
    if not tokens:
        return False
    by_layer = drawing.nanmean(values)
    low, first_quarter, last_quarter, high = drawing.nanquantiles(by_layer, [0, 0.25, 0.75, 1])
    hue, marker = drawing.hue_and_marker(i)
    bands = [(low, high, 0.15, "")]
    if alone:  # side by side, not on top of each other: each has the shade of its legend
        bands = [
            (low, first_quarter, 0.15, _RANGE),
            (last_quarter, high, 0.15, ""),
            (first_quarter, last_quarter, 0.4, "middle half of the layers"),
        ]
    for below, above, alpha, label in bands:
        axes.fill_between(tokens, below, above, color=hue, alpha=alpha, lw=0, label=label or None)
    name = _MEAN if alone else run.label
    axes.plot(tokens, drawing.nanmean(by_layer), color=hue, marker=marker, label=name)
    return True


def _series(run: RunSpectra, shown: Quantity) -> tuple[list[int], np.ndarray]:
    """Tokens and values [evaluations, layers, heads] where recorded."""
    found = [(e.tokens, shown.values(e.arrays)) for e in run.evaluations]
    recorded = [(tokens, values) for tokens, values in found if values is not None]
    return [tokens for tokens, _ in recorded], np.array([values for _, values in recorded])


@drawing.styled
def singular_value_curves(run: RunSpectra, quantities: Sequence[Quantity]) -> "Figure":
    """Singular values over the largest, mean over heads, of the first, middle and last layer.

    A row for each quantity (its measure plays no part), a curve for each evaluation.
    """
    evaluations = _spread(run.series(*(q.array for q in quantities if run.series(q.array))))
    array = next(q.array for q in quantities if run.series(q.array))
    num_layers = len(evaluations[0].arrays[array])
    layers = sorted({0, num_layers // 2, num_layers - 1})
    figure = drawing.new_figure(2.7 * len(layers) + 1.8, 2.4 * len(quantities) + 0.8)
    panels = figure.subplots(len(quantities), len(layers), sharex=True, sharey=True, squeeze=False)
    lines = {}
    for row, shown in zip(panels, quantities, strict=True):
        for axes, layer in zip(row, layers, strict=True):
            axes.set_title(f"layer {layer}: {shown.source}")
            axes.set_yscale("log")
            if not run.series(shown.array):
                drawing.say_not_recorded(axes)
                continue
            hues = drawing.colours(len(evaluations))
            for evaluation, hue in zip(evaluations, hues, strict=True):
                curve = _normalised(evaluation.arrays[shown.array][layer])
                label = _age(run, evaluation)
                (lines[label],) = axes.plot(
                    np.arange(1, len(curve) + 1), curve, color=hue, lw=1.2, label=label
                )
        row[0].set_ylabel("singular value\n/ largest (dimensionless)")
    for axes in panels[-1]:
        axes.set_xlabel(f"index (of {run.head_dim})")
    figure.legend(handles=list(lines.values()), loc="outside right center", title="trained on")
    figure.suptitle(f"singular values, mean over heads: {_who(run)}")
    return figure


def _normalised(sigma_HK: np.ndarray) -> np.ndarray:
    """[K] mean over heads of the values over the largest; NaN, which no axis shows, for zeros."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = drawing.nanmean(sigma_HK.astype(np.float64) / sigma_HK[:, :1], axis=0)
        return np.where(mean > 0, mean, np.nan)


def _spread(evaluations: list[Evaluation]) -> list[Evaluation]:
    """All of them or, the first and the last included, as many as a panel can show."""
    if len(evaluations) <= _MAX_CURVES:
        return evaluations
    return [evaluations[i] for i in np.linspace(0, len(evaluations) - 1, _MAX_CURVES).astype(int)]


def _quantile_ratio(gammas: np.ndarray) -> np.ndarray:
    low, high = np.quantile(np.abs(gammas), (0.1, 0.9), axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(low > 0, high / low, np.nan)


# Of gammas [..., head_dim], by the label of their panels' axis.
_GAMMA_ROWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean over head_dim\n(dimensionless factor)": lambda gammas: gammas.mean(axis=-1),
    "standard deviation over\nhead_dim (dimensionless)": lambda gammas: gammas.std(axis=-1),
    "PR of |gamma|\n(directions)": lambda gammas: ranks.participation_ratio(np.abs(gammas)),
    "90% over 10%\nquantile of |gamma|": _quantile_ratio,
    "share below 0": lambda gammas: (gammas < 0).mean(axis=-1),
}


@drawing.styled
def gamma_curves(run: RunSpectra) -> "Figure":
    """gamma_q and gamma_k over training, per layer: size, spread, evenness, sign over head_dim."""
    figure = drawing.new_figure(8.8, 1.0 + 2.0 * len(_GAMMA_ROWS))
    panels = figure.subplots(len(_GAMMA_ROWS), 2, sharex=True, sharey="row")
    num_layers = 1
    for column, name in zip(panels.T, ("gamma_q", "gamma_k"), strict=True):
        column[0].set_title(name)
        evaluations = run.series(name)
        if not evaluations:
            for axes in column:
                drawing.say_not_recorded(axes)
            continue
        gammas = np.stack([e.arrays[name].astype(np.float64) for e in evaluations])
        num_layers = gammas.shape[1]
        for axes, statistic in zip(column, _GAMMA_ROWS.values(), strict=True):
            drawing.layer_curves(axes, evaluations, statistic(gammas))
            axes.set_xlabel("" if axes is not column[-1] else axes.get_xlabel())
    for axes, label in zip(panels[:, 0], _GAMMA_ROWS, strict=True):
        axes.set_ylabel(label)
    panels[1, 0].set_ylim(bottom=0)
    drawing.layer_bar(figure, panels, num_layers)
    figure.suptitle(f"gamma of QK-Norm: {_who(run)}")
    return figure


@drawing.styled
def attention_curves(run: RunSpectra) -> "Figure":
    """Largest logit, entropy and sink of the attention over training, per layer and overall.

    A panel for each that the run has recorded, the first two at any rate.
    """
    names = ["max_logit", "entropy", *(["sink_mass"] if run.series("sink_mass") else [])]
    figure = drawing.new_figure(4.4 * len(names), 3.8)
    panels = figure.subplots(1, len(names))
    num_layers = 1
    for axes, name in zip(panels, names, strict=True):
        statistic = "max" if name == "max_logit" else "mean"
        shown = quantity(name)
        axes.set_title(f"{shown.title}: {statistic} over heads")
        axes.set_ylabel(f"{shown.title}\n({shown.unit(run.head_dim)})")
        drawing.token_axis(axes, [e.tokens for e in run.evaluations])
        tokens, values = _series(run, shown)
        if not tokens:
            drawing.say_not_recorded(axes)
            continue
        over = drawing.nanmax if statistic == "max" else drawing.nanmean
        by_layer = over(values)
        num_layers = by_layer.shape[1]
        drawing.layer_curves(axes, run.series(name), by_layer)
        axes.plot(tokens, over(by_layer), "k--", marker="o", label=f"{statistic} over layers")
        if name != "max_logit":
            places = np.arange(1, run.sequence_length + 1)
            uniform = np.log(places).mean() if name == "entropy" else (1 / places[1:]).mean()
            label = f"uniform attention: {uniform:.{2 if name == 'entropy' else 4}f}"
            axes.axhline(uniform, color="#666666", lw=1.5, ls=":", label=label)
            axes.set_ylim(0, 1.05 * max(uniform, drawing.largest(values)))
        axes.legend(loc="best")
    drawing.layer_bar(figure, panels, num_layers)
    figure.suptitle(f"attention: {_who(run)}")
    return figure


@drawing.styled
def clip_curves(run: RunSpectra) -> "Figure":
    """What QK-Clip measured and did: the largest logit and the heads clipped, of every step."""
    figure = drawing.new_figure(8.8, 3.4)
    tokens, *columns = run.clips.T
    labels = ("largest logit of the batch\n(dimensionless)", "heads clipped in a step")
    for axes, values, label in zip(figure.subplots(1, 2), columns, labels, strict=True):
        axes.plot(tokens, values, color=drawing.HUES[0], lw=0.9)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        drawing.token_axis(axes, [int(number) for number in tokens])
    figure.suptitle(f"QK-Clip: {_who(run)}")
    return figure


# --------------------------------------------------------------------------------------------
# Layers and heads.


@drawing.styled
def heat_maps(run: RunSpectra, quantities: Sequence[Quantity], steps: Sequence[int]) -> "Figure":
    """Layer x head after some steps (rows), of some quantities of one measure (columns)."""
    evaluations = [run.at(step) for step in steps]
    values = [[shown.values(e.arrays) for shown in quantities] for e in evaluations]
    recorded = [value for row in values for value in row if value is not None]
    height = drawing.map_height(max(map(len, recorded), default=1))
    figure = drawing.new_figure(3.4 * len(quantities) + 1.4, height * len(steps) + 0.5)
    panels = figure.subplots(len(steps), len(quantities), squeeze=False)
    low, high = _scale(quantities[0], run.head_dim, recorded)
    mesh = None
    for row, evaluation, cells in zip(panels, evaluations, values, strict=True):
        for axes, shown, value in zip(row, quantities, cells, strict=True):
            axes.set_title(f"{shown.source}: {_age(run, evaluation)}")
            if value is None:
                drawing.say_not_recorded(axes)
            else:
                mesh = drawing.heat_map(axes, value, drawing.VALUE_COLOURS, low, high)
    if mesh is not None:
        label = f"{quantities[0].title}\n({quantities[0].unit(run.head_dim)})"
        figure.colorbar(mesh, ax=panels, label=label)
    figure.suptitle(f"{quantities[0].title}: {_who(run)}")
    return figure


@drawing.styled
def comparison(compared: Sequence[Compared], shown: Quantity) -> "Figure":
    """Runs side by side: layer x head of each; below it the difference to the first run.

    Below the first run stand the means over heads of all runs, layer by layer.
    """
    first, others = compared[0], compared[1:]
    num_layers = len(first.values)
    figure = drawing.new_figure(
        2.7 * max(len(compared), 2) + 1.4, 2 * drawing.map_height(num_layers) + 1.0
    )
    panels = figure.subplots(2, len(compared), squeeze=False)
    unit = shown.unit(first.run.head_dim)
    low, high = _scale(shown, first.run.head_dim, [each.values for each in compared])
    for axes, each in zip(panels[0], compared, strict=True):
        mesh = drawing.heat_map(axes, each.values, drawing.VALUE_COLOURS, low, high)
        axes.set_title(_who(each.run))
    figure.colorbar(mesh, ax=panels[0], label=f"{shown.title}\n({unit})")
    reach = max((drawing.largest(each.difference) for each in others), default=0.0) or 1.0
    for axes, each in zip(panels[1, 1:], others, strict=True):
        mesh = drawing.heat_map(axes, each.difference, drawing.DIFFERENCE_COLOURS, -reach, reach)
        axes.set_title(f"{each.run.label}\nminus {first.run.label}")
    if others:
        figure.colorbar(mesh, ax=panels[1], label=f"difference\n({unit})")
    for i, each in enumerate(compared):
        hue, marker = drawing.hue_and_marker(i)
        mean = drawing.nanmean(each.values)
        panels[1, 0].plot(mean, range(num_layers), color=hue, marker=marker, label=each.run.label)
    panels[1, 0].set(title="mean over heads", xlabel=f"{shown.title}\n({unit})", ylabel="layer")
    panels[1, 0].set_ylim(num_layers - 0.5, -0.5)
    panels[1, 0].set_yticks(drawing.layer_ticks(num_layers))
    figure.legend(loc="outside lower center", ncols=4)
    tokens = f"after {drawing.count(first.evaluation.tokens)} tokens"
    figure.suptitle(": ".join(filter(None, (shown.title, shown.source, tokens))))
    return figure


@drawing.styled
def beside(compared: Sequence[Compared], shown: Quantity) -> "Figure":
    """Runs and public models in one panel: mean over heads against depth, 0 first and 1 last layer.

    Counts of directions are drawn as a share of each one's head_dim: 64 directions of 256 are not
    64 of 64.
    """
    figure = drawing.new_figure(5.6, 4.2)
    axes = figure.subplots()
    for i, each in enumerate(compared):
        hue, marker = drawing.hue_and_marker(i)
        mean = drawing.nanmean(each.values)
        if shown.counts_directions:
            mean = mean / each.run.head_dim
        depth = np.arange(len(mean)) / max(len(mean) - 1, 1)
        label = f"{_who(each.run)}, {_age(each.run, each.evaluation)}"
        axes.plot(depth, mean, color=hue, marker=marker, label=label)
    unit = shown.unit(compared[0].run.head_dim)
    words = "share of head_dim" if shown.counts_directions else unit
    axes.set(xlabel="depth (layer / last layer)", ylabel=f"{shown.title}\n({words})")
    if shown.counts_directions:
        axes.set_ylim(0, 1)
    figure.legend(loc="outside lower center", ncols=1)
    figure.suptitle(": ".join(filter(None, (shown.title, shown.source))))
    return figure


def _scale(shown: Quantity, head_dim: int, values: Sequence[np.ndarray]) -> tuple[float, float]:
    """One scale for all panels; counts of directions have the same one in every figure."""
    if shown.counts_directions:
        return 1.0, float(head_dim)
    finite = np.concatenate([value[np.isfinite(value)] for value in values])
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    return float(low), float(high) if high > low else float(low) + 1.0


def _age(run: RunSpectra, evaluation: Evaluation) -> str:
    """How long a run was trained before an evaluation."""
    return f"{drawing.count(evaluation.tokens)} tokens" if run.ages_known else "as published"


def _who(run: RunSpectra) -> str:
    if run.is_model:
        return f"{run.label} ({run.arm})"
    named = run.arm in run.label.split("/")
    return f"{run.label}, seed {run.seed}" if named else f"{run.label} ({run.arm}, seed {run.seed})"


# --------------------------------------------------------------------------------------------
# Rank surgery.

_KIND_LINES = {"top": "-", "random": "--"}
_MOST_IN_A_LEGEND = 6  # layers; more of them get a colour bar
_PANEL = 4.6  # inches
_LETTERS = 56  # of a title, as wide as one panel


@drawing.styled
def rank_curves(rows: Sequence[Row], head_dim: int, title: str) -> "Figure":
    """Added validation loss against the directions kept.

    One panel for all layers together and one for each kind of directions in one layer at a time,
    as far as they were measured.
    """
    together = [row for row in rows if row.layer == ALL]
    alone = [row for row in rows if row.layer != ALL]
    parts: list[tuple[str, list[Row]]] = [("all layers together", together)] if together else []
    for kind in KINDS if alone else ():
        of_kind = [row for row in alone if row.kind == kind]
        parts.append((f"one layer at a time, {kind} directions", of_kind))
    figure = drawing.new_figure(_PANEL * len(parts) + 0.4, 4.4)
    figure.suptitle(textwrap.fill(title, _LETTERS * len(parts)))
    panels = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    last = max((int(row.layer) for row in alone), default=0)
    for axes, (name, shown) in zip(panels, parts, strict=True):
        _rank_panel(axes, shown, last)
        axes.set_title(name)
        axes.set_xlabel(f"directions kept of each head's {head_dim} (log2)")
    if last >= _MOST_IN_A_LEGEND:
        drawing.layer_bar(figure, panels[-1:], last + 1)
    panels[0].set_ylabel(f"added validation loss (nat per token; linear below {TOLERANCE})")
    return figure


def _rank_panel(axes: "Axes", rows: Sequence[Row], last_layer: int) -> None:
    """One line for each kind of directions, or for each layer."""
    of_layer = drawing.colours(last_layer + 1)
    for layer, kind in dict.fromkeys((row.layer, row.kind) for row in rows):
        line = [row for row in rows if (row.layer, row.kind) == (layer, kind)]
        hue, marker = drawing.hue_and_marker(KINDS.index(kind))
        together = layer == ALL
        axes.plot(
            [row.rank for row in line],
            [row.delta for row in line],
            ls=_KIND_LINES[kind],
            marker=marker,
            color=hue if together else of_layer[int(layer)],
            label=f"{kind} directions" if together else f"layer {layer}",
        )
    drawing.tolerance(axes, TOLERANCE)
    ranks = sorted({row.rank for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    if rows[0].layer == ALL or last_layer < _MOST_IN_A_LEGEND:
        axes.legend()
