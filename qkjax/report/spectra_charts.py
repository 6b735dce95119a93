"""Charts of a report from the spectra that runs saved: heat maps, singular values, gammas."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qkjax.report import arms, drawing
from qkjax.report.charts import SIZE, Curve, add_legend
from qkjax.report.quantities import Quantity
from qkjax.report.run_spectra import RunSpectra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
def spectra(ends: Mapping[str, Sequence[Arrays]], array: str, layer: int, low: float) -> "Figure":
    """Singular values over the largest at the end, mean over heads and seeds, one layer.

    Args:
        low: where the vertical axis begins.
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
        hue, line, _ = arms.look(arm)
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
    """Of every run the statistic [layers, head_dim] -> [layers] of gamma, mean over layers."""
    found = []
    for run in runs:
        evaluations = run.series(array)
        values = [float(statistic(e.arrays[array].astype(np.float64)).mean()) for e in evaluations]
        if evaluations:
            tokens = np.array([e.tokens for e in evaluations])
            found.append(Curve(tokens, np.array(values), False))
    return found
