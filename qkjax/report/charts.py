"""Charts of a report that set arms side by side: over training, over rates, and their spectra.

A line is the mean over the seeds, the band their range, the thin lines the seeds themselves; a
run that diverged ends in a cross. Hue and line of an arm are the same everywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qkjax.report import arms, drawing
from qkjax.report.blocks import Chart
from qkjax.report.quantities import Quantity
from qkjax.report.run_spectra import RunSpectra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (4.0, 3.4)  # inches: a phone shows it at the size of its text
WIDE = (4.6, 2.9)  # two of them and a table fill a screen
BANDS = "Lines are means over seeds, bands their range, thin lines the seeds."


def chart(name: str, title: str, description: str, figure: "Figure") -> Chart:
    """A figure as the report keeps it."""
    return Chart(name, title, description, drawing.to_bytes(figure, "svg"))


class Curve(NamedTuple):
    """One metric of one run."""

    tokens: np.ndarray  # [evaluations] ascending
    values: np.ndarray  # [evaluations]
    diverged: bool


class Scale(NamedTuple):
    """The vertical axis, one for all charts of a quantity."""

    label: str  # with the unit
    low: float | None = None
    high: float | None = None
    logarithmic: bool = False
    reference: tuple[float, str] | None = None  # a level and what it is


Curves = Mapping[str, Sequence[Curve]]  # by arm, a curve for each seed
Looks = Mapping[str, arms.Look]  # by arm, of `arms.looks`


def common_scale(
    label: str, groups: Sequence[Curves], *, low: float | None = None, after: int = 0
) -> Scale:
    """A scale that holds every value of all groups, from `after` tokens on.

    Args:
        low: where it starts; None is just below the lowest value.
    """
    values = np.concatenate(
        [
            curve.values[curve.tokens >= after]
            for curves in groups
            for runs in curves.values()
            for curve in runs
        ]
        or [np.zeros(0)]
    )
    values = values[np.isfinite(values)]
    if not values.size:
        return Scale(label, low)
    margin = 0.05 * (float(values.max() - values.min()) or 1.0)
    start = float(values.min()) - margin if low is None else low
    return Scale(label, start, float(values.max()) + margin)


def around(label: str, groups: Sequence[Curves], level: float) -> Scale:
    """A scale as far above a level as below it that holds every value; the level is drawn."""
    found = common_scale(label, groups)
    reach = max((abs(end - level) for end in (found.low, found.high) if end is not None), default=0)
    reach = reach or 0.1
    return Scale(label, level - reach, level + reach, reference=(level, f"start: {level:g}"))


@drawing.styled
def over_tokens(
    curves: Curves,
    scale: Scale,
    looks: Looks,
    after: int = 0,
    size: tuple[float, float] = SIZE,
) -> "Figure":
    """One metric over training, every arm in one panel.

    Args:
        looks: of every arm of the plan.
        after: tokens from which on it is drawn, on a linear axis where that is above 0.
        size: width and height in inches.
    """
    figure = drawing.new_figure(*size)
    axes = _bare(figure)
    for arm, runs in curves.items():
        _draw_arm(axes, arm, runs, looks[arm], after)
    tokens = [int(token) for runs in curves.values() for curve in runs for token in curve.tokens]
    if after:
        axes.set_xlabel("training tokens")
        marks = [tick for tick in axes.get_xticks() if tick >= 0]
        axes.set_xticks(marks, [drawing.count(round(mark)) for mark in marks])
        reach = max(tokens, default=after + 1) - after
        axes.set_xlim(after - 0.03 * reach, after + 1.03 * reach)
    else:
        drawing.token_axis(axes, tokens)
    _set_scale(axes, scale)
    _legend(figure, axes)
    return figure


@drawing.styled
def by_stage(
    by_arm: Mapping[str, Sequence[Sequence[float]]],
    stages: Sequence[str],
    head_dim: int,
    looks: Looks,
) -> "Figure":
    """PR at each stage of a vector's way, a line per arm: mean over its runs, runs as thin lines.

    Args:
        by_arm: of every run the values by stage; NaN where the arm has no such stage.
    """
    figure = drawing.new_figure(*SIZE)
    axes = _bare(figure)
    places = np.arange(len(stages))
    for arm, runs in by_arm.items():
        hue, line, marker = looks[arm]
        for run in runs if len(runs) > 1 else ():
            axes.plot(places, run, color=hue, ls=line, lw=0.6, alpha=0.6)
        middle = drawing.nanmean(np.array(runs), axis=0)
        axes.plot(places, middle, color=hue, ls=line, marker=marker, lw=1.6, label=arms.short(arm))
    axes.set_xticks(places, [stage.replace(" ", "\n") for stage in stages])
    axes.set_xlim(-0.3, len(stages) - 0.7)
    axes.set_ylabel(f"PR (directions of {head_dim})")
    axes.set_ylim(0.0, head_dim)
    _legend(figure, axes)
    return figure


def _bare(figure: "Figure") -> "Axes":
    """One panel with a transparent ground: a page has its own paper."""
    figure.patch.set_visible(False)
    axes = figure.subplots()
    axes.patch.set_visible(False)
    return axes


def _draw_arm(axes: "Axes", arm: str, runs: Sequence[Curve], look: arms.Look, after: int) -> None:
    hue, line, marker = look
    name = arms.short(arm)
    if len(runs) == 1:
        name += " (n = 1)"
    shown = [
        Curve(run.tokens[run.tokens >= after], run.values[run.tokens >= after], run.diverged)
        for run in runs
    ]
    for run in shown if len(shown) > 1 else ():
        axes.plot(run.tokens, run.values, color=hue, ls=line, lw=0.6, alpha=0.6)
    for run in shown:
        if run.diverged and len(run.tokens):
            axes.plot(run.tokens[-1:], run.values[-1:], color=hue, marker="x", ms=9, mew=2)
    if any(run.diverged for run in runs):
        name += " (×: diverged)"
    tokens, values = _together(shown)
    if len(shown) > 1 and len(tokens):
        low, high = values.min(axis=0), values.max(axis=0)
        axes.fill_between(tokens, low, high, color=hue, alpha=0.18, lw=0)
    every = max(1, len(tokens) // 8)
    axes.plot(  # without a common evaluation no line, but a name
        tokens,
        values.mean(axis=0),
        color=hue,
        ls=line,
        marker=marker,
        lw=1.6,
        label=name,
        markevery=every,
    )


def _together(runs: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens at which every run was measured, and [runs, tokens] values there."""
    common = sorted(set.intersection(*(set(run.tokens.tolist()) for run in runs))) if runs else []
    rows = [[dict(zip(run.tokens, run.values, strict=True))[t] for t in common] for run in runs]
    return np.array(common), np.array(rows).reshape(len(runs), len(common))


def _set_scale(axes: "Axes", scale: Scale) -> None:
    axes.set_ylabel(scale.label)
    if scale.logarithmic:
        axes.set_yscale("log")
    axes.set_ylim(scale.low, scale.high)
    if scale.reference:
        level, words = scale.reference
        axes.axhline(level, color="#777777", lw=1.0, ls=(0, (2, 2)), label=words)


def _legend(figure: "Figure", axes: "Axes") -> None:
    if axes.get_legend_handles_labels()[0]:
        add_legend(figure)
    else:
        drawing.say_not_recorded(axes)


def add_legend(figure: "Figure") -> None:
    """Below the panel, in two columns."""
    figure.legend(
        loc="outside lower center", ncols=2, fontsize=8, handlelength=2.8, columnspacing=1.4
    )


# --------------------------------------------------------------------------------------------
# The sweep.


class SweepPoint(NamedTuple):
    """One short run."""

    rate: float
    value: float | None  # its loss or PR; None: it diverged
    chosen: bool


@drawing.styled
def sweep(by_arm: Mapping[str, Sequence[SweepPoint]], scale: Scale, looks: Looks) -> "Figure":
    """What short runs end at over the learning rate; the chosen one ringed, diverged on top."""
    figure = drawing.new_figure(*SIZE)
    axes = _bare(figure)
    _set_scale(axes, scale)
    rates = sorted({point.rate for points in by_arm.values() for point in points})
    diverged = False
    for arm, points in by_arm.items():
        hue, line, marker = looks[arm]
        sound = [(p.rate, p.value) for p in points if p.value is not None]
        if sound:
            x, y = zip(*sound, strict=True)
            axes.plot(x, y, color=hue, ls=line, marker=marker, lw=1.4, label=arms.short(arm))
        for point in points:
            if point.value is None:
                diverged = True
                axes.plot(
                    point.rate,
                    1.03,
                    color=hue,
                    marker="x",
                    ms=8,
                    mew=2,
                    transform=axes.get_xaxis_transform(),
                    ls="none",
                    clip_on=False,
                )
            elif point.chosen:
                axes.plot(
                    point.rate, point.value, color=hue, marker="o", ms=11, mfc="none", mew=1.6
                )
    axes.set_xscale("log", base=2)
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    cross = " (× on top: diverged)" if diverged else ""
    axes.set_xlabel(f"learning rate{cross}")
    _legend(figure, axes)
    return figure


# --------------------------------------------------------------------------------------------
# Rank surgery; loss against PR.

RankCurve = Sequence[tuple[int, float]]  # (directions kept, added loss)


@drawing.styled
def added_loss(
    by_arm: Mapping[str, Sequence[RankCurve]], most: float, head_dim: int, looks: Looks
) -> "Figure":
    """Added validation loss over the directions kept, mean over seeds, seeds as thin lines.

    Args:
        most: the added loss that is allowed, in nat.
    """
    figure = drawing.new_figure(*SIZE)
    axes = _bare(figure)
    ranks: set[int] = set()
    for arm, curves in by_arm.items():
        hue, line, marker = looks[arm]
        runs = [dict(curve) for curve in curves]
        for run in runs if len(runs) > 1 else ():
            axes.plot(list(run), list(run.values()), color=hue, ls=line, lw=0.6, alpha=0.6)
        common = sorted(set.intersection(*(set(run) for run in runs)))
        ranks |= set(common)
        means = [np.mean([run[rank] for run in runs]) for rank in common]
        axes.plot(common, means, color=hue, ls=line, marker=marker, lw=1.6, label=arms.short(arm))
    drawing.tolerance(axes, most)
    axes.set_xscale("log", base=2)
    marks = [rank for rank in sorted(ranks) if rank & (rank - 1) == 0 or rank == head_dim]
    axes.set_xticks(marks, [str(rank) for rank in marks])
    axes.minorticks_off()
    axes.set_xlabel(f"directions kept of {head_dim}")
    axes.set_ylabel("added validation loss\n(nat per token)")
    _legend(figure, axes)
    return figure


@drawing.styled
def scatter(
    points: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, looks: Looks
) -> "Figure":
    """A point a run."""
    figure = drawing.new_figure(*SIZE)
    axes = _bare(figure)
    for arm, pairs in points.items():
        hue, _, marker = looks[arm]
        x, y = zip(*pairs, strict=True)
        axes.plot(x, y, color=hue, marker=marker, ms=6, ls="none", label=arms.short(arm))
    axes.set(xlabel=x_label, ylabel=y_label)
    _legend(figure, axes)
    return figure


# --------------------------------------------------------------------------------------------
# The spectra that runs saved: heat maps, singular values, gammas.

Arrays = Mapping[str, np.ndarray]
_COLUMNS = 2  # of heat maps in a chart


@drawing.styled
def heat_maps(ends: Mapping[str, Sequence[Arrays]], shown: Quantity, head_dim: int) -> "Figure":
    """Layer x head of every arm at the end, mean over its seeds, all on one scale.

    Args:
        ends: by arm, for each seed the arrays of the last evaluation.
    """
    maps = {}
    for arm, runs in ends.items():
        found = [values for arrays in runs if (values := shown.values(dict(arrays))) is not None]
        if found:
            maps[arm] = np.mean(found, axis=0)
    rows = -(-max(len(maps), 1) // _COLUMNS)
    num_layers = max((len(values) for values in maps.values()), default=1)
    height = 0.75 + max(1.1, 0.1 * num_layers)
    figure = drawing.new_figure(SIZE[0], rows * height + 0.7)
    figure.patch.set_visible(False)
    panels = figure.subplots(rows, _COLUMNS, squeeze=False)
    mesh = None
    for axes in panels.flat[len(maps) :]:
        axes.set_axis_off()
    if not maps:
        drawing.say_not_recorded(panels[0, 0])
    for axes, (arm, values) in zip(panels.flat, maps.items(), strict=False):
        mesh = drawing.heat_map(axes, values, drawing.VALUE_COLOURS, 1.0, float(head_dim))
        axes.set_title(arms.short(arm), fontsize=8.5)
    if mesh is not None:
        figure.colorbar(
            mesh,
            ax=panels,
            label=f"{shown.title} ({shown.unit(head_dim)})",
            location="bottom",
            aspect=40,
            pad=0.02,
        )
    return figure


@drawing.styled
def spectra(
    ends: Mapping[str, Sequence[Arrays]], array: str, layer: int, low: float, looks: Looks
) -> "Figure":
    """Singular values over the largest at the end, mean over heads and seeds, one layer.

    Args:
        low: where the vertical axis starts.
    """
    figure = drawing.new_figure(*SIZE)
    figure.patch.set_visible(False)
    axes = figure.subplots()
    axes.patch.set_visible(False)
    axes.set_yscale("log")
    count = 0
    for arm, runs in ends.items():
        curves = [_normalised(arrays[array][layer]) for arrays in runs if array in arrays]
        if not curves:
            continue
        hue, line, _ = looks[arm]
        curve = drawing.nanmean(np.array(curves), axis=0)
        count = len(curve)
        axes.plot(np.arange(1, count + 1), curve, color=hue, ls=line, label=arms.short(arm))
    axes.set(ylabel="singular value / largest\n(dimensionless)", xlabel=f"index (of {count})")
    axes.set_ylim(0.7 * low, 1.4)
    if axes.lines:
        add_legend(figure)
    else:
        drawing.say_not_recorded(axes)
    return figure


def _normalised(sigma_HK: np.ndarray) -> np.ndarray:
    """[K] mean over heads of the values over the largest; NaN, which no axis shows, for zeros."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = drawing.nanmean(sigma_HK.astype(np.float64) / sigma_HK[:, :1], axis=0)
        return np.where(mean > 0, mean, np.nan)


def lowest_ratio(ends: Mapping[str, Sequence[Arrays]], array: str) -> float:
    """Smallest singular value over its largest among all layers: the end of a common axis."""
    curves = [
        _normalised(sigma)
        for runs in ends.values()
        for arrays in runs
        for sigma in arrays.get(array, ())
    ]
    found = np.concatenate([np.ones(1), *curves])
    return float(found[np.isfinite(found)].min())


def gamma_curves(
    runs: Sequence[RunSpectra], array: str, statistic: Callable[[np.ndarray], np.ndarray]
) -> list[Curve]:
    """The statistic [layers, head_dim] -> [layers] of gamma for every run, mean over layers."""
    found = []
    for run in runs:
        evaluations = run.series(array)
        values = [float(statistic(e.arrays[array].astype(np.float64)).mean()) for e in evaluations]
        if evaluations:
            tokens = np.array([e.tokens for e in evaluations])
            found.append(Curve(tokens, np.array(values), False))
    return found
