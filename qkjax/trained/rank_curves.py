"""What rank surgery found: rows of loss against rank, their CSV, figure and one answer.

Reads and writes files alone, without jax: the report uses it too.
"""

import csv
import io
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from qkjax import errors, files

KINDS = ("top", "random")
ALL = "all"  # every layer's keys are projected, instead of one layer's
TOLERANCE = 0.01  # nats of validation loss
_COLOURS = {"top": "#0072B2", "random": "#D55E00"}  # told apart by every kind of colour vision
_MARKERS = {"top": "o-", "random": "s--"}
_MOST_IN_A_LEGEND = 6  # layers; more of them get a colour bar


class Row(NamedTuple):
    """The validation loss with one projection."""

    layer: str  # "all", or the index of the one layer whose keys are projected
    stage: str
    kind: str  # "top" or "random"
    rank: int
    seed: int | None  # of random directions
    val_loss: float  # nats per predicted token
    delta: float  # val_loss minus that of the model as it is


def dimensions_used(rows: Sequence[Row]) -> int | None:
    """The smallest rank measured whose top directions, in all layers, lose at most 0.01 nat.

    Returns:
        None where no rank does, or the layers were not measured together.
    """
    return min((row.rank for row in _used(rows) if row.delta <= TOLERANCE), default=None)


def answer(rows: Sequence[Row], head_dim: int) -> str:
    """`dimensions_used` as a sentence, with the next smaller rank measured and what it loses."""
    used = sorted(_used(rows), key=lambda row: row.rank)
    if not used:
        return "dimensions used: unknown, the layers were not projected together (--layers=all)"
    rank = dimensions_used(rows)
    if rank is None:
        most = used[-1]
        return (
            f"dimensions used: more than {most.rank} of {head_dim} "
            f"(rank {most.rank} loses {most.delta:.4f} nat, allowed is {TOLERANCE})"
        )
    text = f"dimensions used, to within {TOLERANCE} nat: {rank} of {head_dim}"
    fewer = [row for row in used if row.rank < rank]
    if fewer:
        return f"{text} (rank {fewer[-1].rank} loses {fewer[-1].delta:.4f} nat)"
    return text if rank == 1 else f"{text}, or fewer (no smaller rank was measured)"


def _used(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.layer == ALL and row.kind == "top"]


def to_csv(rows: Sequence[Row]) -> bytes:
    """The rows as a CSV file with a header; numbers keep their float32 digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row._fields)
    for row in rows:
        writer.writerow([*row[:-2], f"{row.val_loss:.9g}", f"{row.delta:.6g}"])
    return text.getvalue().encode()


def write_figure(rows: Sequence[Row], head_dim: int, title: str, csv_path: pathlib.Path) -> None:
    """Draws the loss against the rank, beside the CSV file: .svg and .png.

    One panel for all layers together and one for each kind of directions in one layer at a time,
    as far as they were measured.

    Raises:
        UsageError: matplotlib is not installed.
        StorageError: the disk failed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise errors.UsageError(
            f"{csv_path.with_suffix('.svg')}: not drawn, matplotlib is not installed ({error}); "
            f"{csv_path.name} is complete. Install it with: pip install -e '.[report]'"
        ) from error
    together = [row for row in rows if row.layer == ALL]
    alone = [row for row in rows if row.layer != ALL]
    panels: list[tuple[str, list[Row]]] = [("all layers together", together)] if together else []
    for kind in KINDS if alone else ():
        of_kind = [row for row in alone if row.kind == kind]
        panels.append((f"one layer at a time, {kind} directions", of_kind))
    with matplotlib.rc_context({"svg.hashsalt": "qkjax", "font.size": 9}):  # equal bytes each time
        figure = Figure(figsize=(4.6 * len(panels) + 0.4, 4.2), layout="constrained")
        figure.suptitle(title)
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        last = max((int(row.layer) for row in alone), default=0)
        for axis, (name, shown) in zip(axes, panels, strict=True):
            _draw_panel(axis, shown, last)
            axis.set_title(name)
            axis.set_xlabel(f"directions kept of each head's {head_dim} (log2)")
        if last >= _MOST_IN_A_LEGEND:
            ticks = range(0, last + 1, 1 + last // 8)
            figure.colorbar(_layer_colours(last), ax=axes[-1], label="layer", ticks=ticks)
        axes[0].set_ylabel(f"added validation loss (nat per token; linear below {TOLERANCE})")
        for suffix, metadata in ((".svg", {"Date": None}), (".png", {})):
            image = io.BytesIO()
            figure.savefig(image, format=suffix[1:], dpi=150, metadata=metadata)
            files.replace(csv_path.with_suffix(suffix), image.getvalue())


def _draw_panel(axis: Any, rows: Sequence[Row], last_layer: int) -> None:
    """One line for each kind of directions, or for each layer."""
    of_layer = _layer_colours(last_layer)
    for layer, kind in dict.fromkeys((row.layer, row.kind) for row in rows):
        line = [row for row in rows if (row.layer, row.kind) == (layer, kind)]
        together = layer == ALL
        axis.plot(
            [row.rank for row in line],
            [row.delta for row in line],
            _MARKERS[kind],
            color=_COLOURS[kind] if together else of_layer.to_rgba(int(layer)),
            label=f"{kind} directions" if together else f"layer {layer}",
            markersize=4,
        )
    axis.axhline(TOLERANCE, color="0.4", linewidth=0.8, linestyle=":")
    axis.annotate(
        f"{TOLERANCE} nat",
        (0.01, TOLERANCE),
        xycoords=("axes fraction", "data"),
        xytext=(0, -2),
        textcoords="offset points",
        va="top",
        color="0.4",
    )
    ranks = sorted({row.rank for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ranks, [str(rank) for rank in ranks])
    axis.set_yscale("symlog", linthresh=TOLERANCE)  # linear within the tolerance, log beyond
    axis.grid(color="0.9", linewidth=0.6)
    if rows[0].layer == ALL or last_layer < _MOST_IN_A_LEGEND:
        axis.legend(frameon=False)


def _layer_colours(last_layer: int) -> Any:
    """Layer -> colour: viridis, equally light for every kind of colour vision; no pale yellow."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    colours = matplotlib.colormaps["viridis"](
        [0.9 * layer / max(last_layer, 1) for layer in range(last_layer + 1)]
    )
    bounds = [layer - 0.5 for layer in range(last_layer + 2)]
    return ScalarMappable(BoundaryNorm(bounds, last_layer + 1), ListedColormap(colours))
