"""Models and runs side by side on one page, with a CSV of every number; from files alone."""

import csv
import io
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qkjax import files, flops
from qkjax.report import charts, drawing, html
from qkjax.report.blocks import (
    ABSENT,
    Charts,
    Lead,
    Notes,
    Report,
    Section,
    Table,
    number,
    without_empty,
)
from qkjax.report.quantities import Quantity, quantity
from qkjax.report.run_spectra import RunSpectra, load_runs
from qkjax.runs.directory import RunDirectory
from qkjax.trained import rank_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, CSV = "index.html", "gallery.csv"
STAGES = ("pre_norm", "post_norm", "pre_rope", "post_rope")
_WORDS = {
    "pre_norm": "before the norm",
    "post_norm": "normalised",
    "pre_rope": "pre-RoPE",
    "post_rope": "post-RoPE",
}
# What is drawn against depth, and along revisions.
_VIEWS = (("pre_rope", "centred"), ("post_rope", "raw"), ("pre_rope", "raw"))
_CAVEATS = (
    "PR is (sum s)^2 / sum s^2 of the singular values of a head's keys, here as a share of "
    "head_dim: 1 means that all directions are used equally. It is not how many directions the "
    "model needs; that is "
    "what the loss with projected keys says (`directions`, where it was measured).",
    "Raw PR before RoPE falls with a large mean key, which does not change the attention: apart "
    "from RoPE, it adds the same value to all logits of a query. Centred PR leaves it out. `mean` "
    "is its share of the "
    "energy.",
    "Raw PR after RoPE is what the original study published. RoPE spreads a constant key over 20 "
    "to 34 of 64 directions, so it hardly sees a collapse that is not along the axes.",
    "Gamma scales directions after the norm: its PR is that of |gamma|, divided by its length. A "
    "model "
    "can scale a query's direction up and the key's down while every logit stays equal, so the PR "
    "of `q.k` (the product) is shown beside it.",
    "The largest logit is that of the first sequences alone, after the model's own scaling and "
    "softcap. The sink is the probability on position 0; uniform attention gives the number in "
    "the CSV. In layers with a window it counts only queries whose window contains position 0.",
    "Numbers of different texts and tokenizers differ by some percent, of different lengths of "
    "sequences by more: compare rows of one text and one T. Heads of different sizes are not "
    "comparable: 0.5 of 64 is "
    "not 0.5 of 256. A quantised model has the keys of its quantised weights. One model is one "
    "training run: no error bar is possible.",
)


class Row(NamedTuple):
    """One evaluation of one model or run."""

    name: str
    facts: dict[str, Any]  # of the columns that are words or counts
    values: dict[str, float]  # by column; NaN where the model does not have it


def make_gallery(
    workdirs: Sequence[str | pathlib.Path],
    out: str | pathlib.Path,
    report: Callable[[str], None] = print,
) -> None:
    """Writes index.html, gallery.csv and figures/*.svg.

    Args:
        workdirs: directories of `qkjax measure`, and runs.
        report: gets the path of every file.
    Raises:
        UsageError: not such a directory, one given twice, damaged files, no matplotlib.
        StorageError: the disk failed.
    """
    runs = load_runs(workdirs)
    rows = [_rows(run) for run in runs]
    target = pathlib.Path(out)
    made = _report(runs, rows)
    written = {CSV: _csv(rows).encode(), PAGE: html.page(made)}
    written |= {f"figures/{chart.name}.svg": chart.svg for chart in made.charts}
    for name, content in written.items():
        files.replace(target / name, content)
        report(str(target / name))


# --------------------------------------------------------------------------------------------
# Numbers.


def _rows(run: RunSpectra) -> list[Row]:
    """A row for every evaluation, in ascending steps."""
    directory = RunDirectory(run.workdir)
    model = directory.read_model()
    metrics = {row["step"]: row for row in directory.read_metrics()}
    rows = []
    for evaluation in run.evaluations:
        seen = evaluation.arrays.get("num_tokens")  # older runs lack it
        facts: dict[str, Any] = {
            "step": evaluation.step,
            "tokens": evaluation.tokens if run.ages_known else None,
            "qk_norm": run.qk_norm,
            "head_dim": run.head_dim,
            "text": run.dataset_fingerprint[:12],
            "sequence_length": run.sequence_length,
            "positions": None if seen is None else int(seen),
        }
        if model is None:
            config = directory.need_config()
            facts |= {
                "kind": "run",
                "class": config.arm,
                "parameters": flops.num_parameters(config.model),
                "kv_heads": config.model.num_kv_heads,
                "layers": config.model.num_layers,
                "quantised": None,
                "text_source": config.data.dir,
            }
        else:
            facts |= {
                "kind": "model",
                "class": model["class"],
                "parameters": model["parameters"],
                "kv_heads": model["num_kv_heads"],
                "layers": model["num_layers"],
                "quantised": model.get("quantised"),
                "text_source": model["text"].get("source"),
            }
        values = _values(metrics[evaluation.step], evaluation.arrays, run.head_dim)
        curve = directory.path / "rank_surgery" / f"step_{evaluation.step:08d}.csv"
        found = rank_curves.dimensions_used(rank_curves.read_csv(curve))
        values["directions"] = math.nan if found is None else found / run.head_dim
        rows.append(Row(run.label, facts, values))
    return rows


def _values(
    metrics: dict[str, Any], arrays: dict[str, np.ndarray], head_dim: int
) -> dict[str, float]:
    """The numbers of one evaluation; counts of directions as a share of head_dim."""

    def of(name: str, over: float = 1.0) -> float:
        value = metrics.get(name)
        return math.nan if value is None else float(value) / over

    values = {}
    for measure in ("pr", "erank"):
        for stage in STAGES:
            for centring in ("raw", "centred"):
                name = f"{measure}/key/{stage}/{centring}"
                values[f"{measure}_{stage}_{centring}"] = of(name, head_dim)
    gamma = arrays.get("gamma_k")
    values |= {
        "pr_value_centred": of("pr/value/centred", head_dim),
        "pr_qk_centred": of("pr/qk/pre_rope/centred", head_dim),
        "mean_share_pre_rope": of("mean_share/key/pre_rope"),
        "mean_share_post_rope": of("mean_share/key/post_rope"),
        "gamma_key_pr": of("gamma/key_pr", 1 if gamma is None else gamma.shape[-1]),
        "gamma_key_spread": of("gamma/key_spread"),
        "sink_mass": of("sink/mass"),
        "sink_uniform": of("sink/uniform"),
        "max_logit": of("attention/max_logit"),
        "axis_alignment": of("aa/key"),
        "loss": of("val/loss"),
    }
    return values


def _csv(rows: Sequence[Sequence[Row]]) -> str:
    """One line per model and evaluation; an empty cell is what a model does not have."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    first = rows[0][0]
    writer.writerow(("name", *first.facts, *first.values))
    for row in (row for of_one in rows for row in of_one):
        cells = (f"{v:.6g}" if math.isfinite(v) else "" for v in row.values.values())
        writer.writerow((row.name, *row.facts.values(), *cells))
    return text.getvalue()


# --------------------------------------------------------------------------------------------
# The page.


def _report(runs: Sequence[RunSpectra], rows: Sequence[Sequence[Row]]) -> Report:
    last = [of_one[-1] for of_one in rows]
    texts = {row.facts["text"] for row in last}
    lead = "All rows are of one text."
    if len(texts) > 1:
        lead = (
            f"The rows are of {len(texts)} texts, named under What was measured; another text "
            "moves every number."
        )
    sections = [
        Section("numbers", "The numbers", (Lead(lead), _keys(last), _others(last))),
        Section("depth", "Over depth", (_over_depth(runs),)),
    ]
    if any(len(of_one) > 1 and run.ages_known for run, of_one in zip(runs, rows, strict=True)):
        sections.append(Section("training", "Over training", (_over_training(runs),)))
    sections += [
        Section("meaning", "What each number can and cannot say", (Notes(_CAVEATS),)),
        Section("record", "What was measured", (_record(last),)),
    ]
    return Report(
        "Keys of models and runs",
        f"{len(runs)} side by side, PR as a share of head_dim",
        tuple(sections),
        made_by="qkjax gallery",
    )


def _count(value: int | None) -> str:
    return ABSENT if value is None else drawing.count(value)


def _keys(last: Sequence[Row]) -> Table:
    views = [
        (f"pr_{stage}_{centring}", f"{_WORDS[stage]}, {centring}")
        for stage in ("pre_norm", "pre_rope", "post_rope")
        for centring in ("raw", "centred")
    ]
    cells = [
        (
            row.name,
            row.facts["qk_norm"],
            _count(row.facts["parameters"]),
            _count(row.facts["tokens"]),
            str(row.facts["head_dim"]),
            *(number(row.values[name], 3) for name, _ in views),
        )
        for row in last
    ]
    columns = ("Model", "QK-Norm", "Parameters", "Tokens", "head_dim", *(w for _, w in views))
    caption = "PR of keys, as a share of head_dim: mean over kv heads, then layers."
    return without_empty(Table(caption, columns, tuple(cells), words=2))


def _others(last: Sequence[Row]) -> Table:
    views = {
        "erank_pre_rope_centred": "erank pre-RoPE, centred",
        "mean_share_pre_rope": "mean pre-RoPE",
        "pr_qk_centred": "q.k centred",
        "pr_value_centred": "values centred",
        "gamma_key_pr": "gamma PR",
        "gamma_key_spread": "gamma spread",
        "axis_alignment": "axis alignment",
        "sink_mass": "sink",
        "max_logit": "largest logit",
        "directions": "directions",
        "loss": "loss",
    }
    cells = [(row.name, *(number(row.values[name], 3) for name in views)) for row in last]
    caption = (
        "Beside them: shares of head_dim, of energy and of attention; gamma's 90% over 10% "
        "quantile; nats per token."
    )
    return without_empty(Table(caption, ("Model", *views.values()), tuple(cells)))


def _record(last: Sequence[Row]) -> Table:
    cells = []
    for row in last:
        facts = row.facts
        words = (facts["class"], facts["quantised"] or "no", str(facts["text_source"]))
        counts = (facts["positions"], facts["sequence_length"], facts["layers"], facts["kv_heads"])
        shown = (ABSENT if count is None else f"{count:,}" for count in counts)
        cells.append((row.name, *words, facts["text"], *shown))
    columns = (
        "Model",
        "Class or arm",
        "Quantised",
        "Text",
        "Fingerprint",
        "Keys of each head",
        "T",
    )
    caption = "T is the length of a sequence; the fingerprint is that of the token ids."
    return Table(caption, (*columns, "Layers", "kv heads"), tuple(cells), words=5)


def _over_depth(runs: Sequence[RunSpectra]) -> Charts:
    made = []
    for stage, centring in _VIEWS:
        shown = quantity("pr", "key", stage, centring)
        if any(run.series(shown.array) for run in runs):
            title = f"PR of keys, {_WORDS[stage]}, {centring}"
            what = "Mean over kv heads of every layer, against depth, a line for each model."
            figure = _depth_figure(runs, shown)
            made.append(charts.chart(f"depth_{shown.name}", title, what, figure))
    return Charts("From the first layer (0) to the last (1), as published.", tuple(made))


@drawing.styled
def _depth_figure(runs: Sequence[RunSpectra], shown: Quantity) -> "Figure":
    figure, axes = _panel()
    for i, run in enumerate(runs):
        values = shown.values(run.evaluations[-1].arrays)
        if values is None:
            continue
        mean = drawing.nanmean(values) / run.head_dim
        hue, marker = drawing.hue_and_marker(i)
        depth = np.arange(len(mean)) / max(len(mean) - 1, 1)
        axes.plot(depth, mean, color=hue, marker=marker, ms=3, label=run.label)
    axes.set(xlabel="depth (layer / last layer)", ylabel="PR (share of head_dim)", ylim=(0, 1))
    charts.add_legend(figure)
    return figure


def _over_training(runs: Sequence[RunSpectra]) -> Charts:
    made = []
    for stage, centring in _VIEWS:
        shown = quantity("pr", "key", stage, centring)
        some = [run for run in runs if run.ages_known and len(run.series(shown.array)) > 1]
        if some:
            title = f"PR of keys, {_WORDS[stage]}, {centring}"
            what = "Mean over kv heads and layers of every revision or evaluation, over tokens."
            figure = _training_figure(runs, some, shown)
            made.append(charts.chart(f"training_{shown.name}", title, what, figure))
    return Charts("Revisions of models and evaluations of runs.", tuple(made))


@drawing.styled
def _training_figure(
    runs: Sequence[RunSpectra], some: Sequence[RunSpectra], shown: Quantity
) -> "Figure":
    figure, axes = _panel()
    drawing.token_axis(axes, [e.tokens for run in some for e in run.evaluations])
    for run in some:
        hue, marker = drawing.hue_and_marker(runs.index(run))
        recorded = run.series(shown.array)
        values = [shown.values(evaluation.arrays) for evaluation in recorded]
        mean = [drawing.nanmean(drawing.nanmean(v)) / run.head_dim for v in values if v is not None]
        tokens = [evaluation.tokens for evaluation in recorded]
        axes.plot(tokens, mean, color=hue, marker=marker, ms=3, label=run.label)
    axes.set(ylabel="PR (share of head_dim)", ylim=(0, 1))
    charts.add_legend(figure)
    return figure


def _panel() -> Any:
    """A figure with a transparent ground, and its panel: a page has its own paper."""
    figure = drawing.new_figure(*charts.SIZE)
    figure.patch.set_visible(False)
    axes = figure.subplots()
    axes.patch.set_visible(False)
    return figure, axes
