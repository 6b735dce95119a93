"""How every figure looks and is written: style, scales, axes, heat maps, bytes.

The same data give the same bytes: fonts, sizes and ids are fixed, and no date is written. Text
stays text in SVG. Hues are those of Okabe & Ito (2008), which colour-blind readers tell apart;
layers and tokens run through viridis and values through cividis, from dark to light.
"""

import contextlib
import functools
import io
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from qkjax import errors, files
from qkjax.report.run_spectra import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("svg", "png")
HUES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*"
VALUE_COLOURS, DIFFERENCE_COLOURS = "cividis", "PuOr"
_STYLE: dict[str, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.titlesize": 11,
    "font.size": 9,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.markersize": 4,
    "savefig.dpi": 150,
    "svg.fonttype": "none",
    "svg.hashsalt": "qkjax",
}
_ANNOTATED_LAYERS = 8  # heat maps of more layers do not show their numbers

P = ParamSpec("P")


# --------------------------------------------------------------------------------------------
# Figures as such.


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise errors.UsageError(
            f"matplotlib: cannot be imported ({error}), figures need it. "
            "Run pip install -e '.[report]'."
        ) from error
    return matplotlib


def check_available() -> None:
    """Checks, before any work is done, that figures can be drawn.

    Raises:
        UsageError: matplotlib cannot be imported.
    """
    _matplotlib()


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """This file's settings, which override every matplotlibrc."""
    matplotlib = _matplotlib()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def styled(draw: Callable[P, "Figure"]) -> Callable[P, "Figure"]:
    """The function, run under this file's settings; the layout of its figure is then fixed.

    Laid out at each save, a second format would come out a little different from the first.
    """

    @functools.wraps(draw)
    def under_style(*args: P.args, **kwargs: P.kwargs) -> "Figure":
        with _style():
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            return figure

    return under_style


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))  # not pyplot's: no window system, no global state


def to_bytes(figure: "Figure", file_format: str) -> bytes:
    """The figure as a file of one of FORMATS; equal figures give equal bytes."""
    metadata = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}[file_format]
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format=file_format, metadata=metadata)
    return buffer.getvalue()


def check_formats(formats: Sequence[str]) -> tuple[str, ...]:
    """The formats of a flag, each once.

    Raises:
        UsageError: there is none, or an unknown one.
    """
    for file_format in formats or [""]:
        if file_format not in FORMATS:
            raise errors.UsageError(
                f"--format: {file_format!r} is unknown. Known: {', '.join(FORMATS)}."
            )
    return tuple(dict.fromkeys(formats))


def save(figure: "Figure", stem: pathlib.Path, formats: Sequence[str]) -> list[pathlib.Path]:
    """Writes stem.svg, stem.png, ...; returns their paths.

    Raises:
        StorageError: the disk is full or fails.
    """
    paths = [stem.with_name(f"{stem.name}.{file_format}") for file_format in formats]
    for path, file_format in zip(paths, formats, strict=True):
        files.replace(path, to_bytes(figure, file_format))
    return paths


# --------------------------------------------------------------------------------------------
# Axes.


def count(number: int) -> str:
    """A number of tokens, short: 0, 980, 20k, 1.5M, 0.3B, 11T."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def token_axis(axes: "Axes", tokens: Iterable[int]) -> None:
    """Tokens, logarithmic from the first evaluation after the start on, so that 0 has a place."""
    axes.set_xlabel("training tokens")
    positive = sorted(number for number in tokens if number > 0)
    if not positive:
        return
    first, last = positive[0], positive[-1]
    steps = (1, 2, 5) if last < 50 * first else (1,)
    marks = sorted(step * 10**power for power in range(16) for step in steps)
    marks = [0, *(mark for mark in marks if first <= mark <= last)]
    if last > 1.5 * marks[-1]:
        near = len(marks) > 2 and last < 2 * marks[-1]  # their labels would touch
        marks = [*(marks[:-1] if near else marks), last]
    axes.set_xscale("symlog", linthresh=first, linscale=0.5)
    axes.set_xticks(marks, [count(mark) for mark in marks])
    axes.minorticks_off()
    axes.set_xlim(-0.06 * first, last * 1.1)
    if last > first:
        axes.set_xlabel(f"training tokens (linear to {count(first)}, then log)")


def layer_curves(axes: "Axes", evaluations: Sequence[Evaluation], values_EN: np.ndarray) -> None:
    """One curve per layer [evaluations, layers] over tokens; `layer_bar` is their legend."""
    tokens = [e.tokens for e in evaluations]
    token_axis(axes, tokens)
    for values, colour in zip(values_EN.T, colours(values_EN.shape[1]), strict=True):
        axes.plot(tokens, values, color=colour, lw=1.2)


def layer_bar(figure: "Figure", panels: np.ndarray, num_layers: int) -> None:
    """The colours of `layer_curves`, one step per layer."""
    matplotlib = _matplotlib()
    listed = matplotlib.colors.ListedColormap(colours(num_layers))
    norm = matplotlib.colors.BoundaryNorm(np.arange(num_layers + 1) - 0.5, num_layers)
    shades = matplotlib.cm.ScalarMappable(norm, listed)
    bar = figure.colorbar(shades, ax=panels, label="layer", ticks=layer_ticks(num_layers))
    bar.ax.minorticks_off()


def layer_ticks(num_layers: int) -> list[int]:
    """Layers that an axis names."""
    return list(range(0, num_layers, 1 if num_layers <= 12 else 3))


def hue_and_marker(i: int) -> tuple[str, str]:
    """The hue and marker of the i-th run of a figure."""
    return HUES[i % len(HUES)], _MARKERS[i % len(_MARKERS)]


def colours(number: int) -> list[Any]:
    """`number` colours in order; the palest yellow, unreadable on white, is left out."""
    return list(_matplotlib().colormaps["viridis"](np.linspace(0, 0.92, number)))


def tolerance(axes: "Axes", most: float) -> None:
    """A vertical axis of added loss in nat: linear to the most that is allowed, then log."""
    axes.set_yscale("symlog", linthresh=most)
    axes.axhline(most, color="#777777", lw=0.8, ls=":")
    axes.annotate(
        f"{most} nat",
        (0.01, most),
        xycoords=("axes fraction", "data"),
        xytext=(0, -2),
        textcoords="offset points",
        va="top",
        color="#777777",
    )


def say_not_recorded(axes: "Axes") -> None:
    """An empty panel says why it is empty."""
    axes.grid(False)
    axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center")


def heat_map(axes: "Axes", values: np.ndarray, colour_map: str, low: float, high: float) -> Any:
    """Draws [layers, heads], layer 0 on top, grey where undefined; the result is for a colorbar."""
    num_layers, num_heads = values.shape
    shown = np.ma.array(values, mask=~np.isfinite(values))
    mesh = axes.pcolormesh(
        shown, cmap=colour_map, vmin=low, vmax=high, edgecolors="face", linewidth=0.2
    )
    axes.set_facecolor("#bbbbbb")
    axes.grid(False)
    axes.invert_yaxis()
    undefined = " (grey: undefined)" if shown.mask.any() else ""
    axes.set(xlabel=f"head{undefined}", ylabel="layer")
    axes.set_xticks(np.arange(num_heads) + 0.5, [str(head) for head in range(num_heads)])
    rows = layer_ticks(num_layers)
    axes.set_yticks([row + 0.5 for row in rows], [str(row) for row in rows])
    if num_layers <= _ANNOTATED_LAYERS:
        for layer, head in np.ndindex(values.shape):
            value = values[layer, head]
            text = f"{value:.3g}" if np.isfinite(value) else "undefined"
            red, green, blue, _ = mesh.cmap(mesh.norm(value))
            dark = np.isfinite(value) and 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            ink = "#ffffff" if dark else "#111111"  # both themes of a page have these cells
            axes.text(head + 0.5, layer + 0.5, text, color=ink, ha="center", va="center")
    return mesh


def map_height(num_layers: int) -> float:
    """Inches of a row of heat maps."""
    return 1.0 + max(1.5, 0.16 * num_layers)


# --------------------------------------------------------------------------------------------
# Statistics that leave out what is undefined (NaN).


def nanmean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean over what is finite; NaN where nothing is."""
    return _quiet(np.nanmean, values, axis=axis)


def nanmax(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Maximum over what is finite; NaN where nothing is."""
    return _quiet(np.nanmax, values, axis=axis)


def largest(values: np.ndarray) -> float:
    """Largest absolute value of what is finite; 0 where nothing is."""
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def nanquantiles(values: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """[shares, ...] quantiles over the last axis; NaN where nothing is finite."""
    return _quiet(np.nanquantile, values, shares, axis=-1)


def _quiet(statistic: Callable[..., Any], *args: Any, axis: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # "all-NaN slice": NaN is the answer
        return statistic(*args, axis=axis)
