"""Charts of a report: what they draw is what was measured, on scales that do not lie."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from qkjax.report import arms, charts, drawing, html
from qkjax.report.blocks import Chart
from qkjax.report.charts import Curve, Scale, SweepPoint
from qkjax.report.quantities import quantity
from qkjax.verdicts.judgement import SUPERIORITY, Clause

pytest.importorskip("matplotlib", reason="matplotlib is absent: pip install -e '.[report]'")
TOKENS = np.array([0, 1_000, 10_000, 40_000])
SCALE = Scale("loss (nat)", 0.0, 12.0)
NAMES = ("adamw_qk", "adamw_noqk", "muon_qk", "muon_noqk", "adamw_qk_frozen", "muon_noqk_merged")
LOOKS = arms.looks(NAMES)


def curve(*values: float, tokens: np.ndarray = TOKENS, diverged: bool = False) -> Curve:
    return Curve(tokens[: len(values)], np.array(values), diverged)


def lines_of(figure, arm: str) -> list:
    """The lines under an arm's name in the legend; what is behind its first blank stays."""
    name, _, more = arm.partition(" ")
    wanted = " ".join(filter(None, (arms.short(name), more)))
    return [line for line in figure.axes[0].lines if line.get_label() == wanted]


# --------------------------------------------------------------------------------------------
# Over tokens.


def test_a_line_is_the_mean_of_the_seeds_and_the_band_their_range():
    runs = [curve(10, 8, 6, 4), curve(10, 9, 8, 7)]
    figure = charts.over_tokens({"muon_qk": runs}, SCALE, LOOKS)
    axes = figure.axes[0]
    (mean,) = lines_of(figure, "muon_qk")
    assert list(mean.get_xdata()) == TOKENS.tolist()
    assert list(mean.get_ydata()) == [10, 8.5, 7, 5.5]
    (band,) = axes.collections
    edges = {tuple(vertex) for vertex in band.get_paths()[0].vertices}
    assert {(40_000.0, 4.0), (40_000.0, 7.0), (1_000.0, 8.0), (1_000.0, 9.0)} <= edges
    seeds = [list(line.get_ydata()) for line in axes.lines if line is not mean]
    assert [10, 8, 6, 4] in seeds and [10, 9, 8, 7] in seeds
    assert axes.get_ylim() == (0.0, 12.0) and axes.get_ylabel() == "loss (nat)"
    assert axes.get_xlabel().startswith("training tokens")


def test_one_seed_has_no_band_and_says_so():
    figure = charts.over_tokens({"muon_qk": [curve(10, 8, 6, 4)]}, SCALE, LOOKS)
    assert not figure.axes[0].collections
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["Muon + QK (n = 1)"]


def test_a_run_that_diverged_ends_in_a_cross_and_the_mean_with_it():
    runs = [curve(10, 8, 6, 4), curve(10, 9, diverged=True)]
    figure = charts.over_tokens({"muon_qk": runs}, SCALE, LOOKS)
    (mean,) = lines_of(figure, "muon_qk (×: diverged)")
    assert list(mean.get_ydata()) == [10, 8.5]
    late = charts.over_tokens({"muon_qk": runs}, SCALE, LOOKS, after=10_000)
    (mean,) = lines_of(late, "muon_qk (×: diverged)")  # of no common evaluation, but named
    assert not len(mean.get_xdata())
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x"]
    assert [(c.get_xdata()[0], c.get_ydata()[0]) for c in crosses] == [(1_000, 9)]


def test_from_some_tokens_on_nothing_before_is_drawn():
    figure = charts.over_tokens({"muon_qk": [curve(10, 8, 6, 4)]}, SCALE, LOOKS, after=10_000)
    (line,) = figure.axes[0].lines
    assert list(line.get_xdata()) == [10_000, 40_000]
    assert figure.axes[0].get_xscale() == "linear"
    assert figure.axes[0].get_xlim()[1] > 40_000


def test_a_scale_holds_every_group():
    groups = [{"muon_qk": [curve(10, 8, 6, 4)]}, {"adamw_qk": [curve(11, 9, math.nan, 2)]}]
    scale = charts.common_scale("nat", groups)
    assert scale.low < 2 and scale.high > 11
    late = charts.common_scale("nat", groups, after=10_000)
    assert late.low < 2 and 6 < late.high < 8
    assert charts.common_scale("nat", groups, low=0.0).low == 0.0
    assert charts.common_scale("nat", []) == Scale("nat")


def test_hue_is_the_optimiser_and_line_the_normalisation():
    looks = LOOKS
    assert {looks[a].hue for a in looks if a.startswith("adamw")} == {arms.HUES["adamw"]}
    assert {looks[a].hue for a in looks if a.startswith("muon")} == {arms.HUES["muon"]}
    assert looks["adamw_qk"].line == looks["muon_qk"].line != looks["muon_noqk"].line
    assert len(set(looks.values())) == len(looks)
    figure = charts.over_tokens({arm: [curve(3, 2)] for arm in looks}, SCALE, LOOKS)
    assert {line.get_color() for line in figure.axes[0].lines} == set(arms.HUES.values())


def test_names_of_arms():
    assert arms.label("muon_noqk") == "Muon, no QK-Norm"
    assert arms.label("adamw_qk_frozen") == "AdamW + QK-Norm, γ frozen"
    assert arms.label("muon_qk_frozen_merged") == "Muon + QK-Norm, γ frozen, QKVO merged"
    assert arms.label("muon_noqk_per_head") == "Muon, no QK-Norm, per head"
    assert arms.label("lion_qk") == "lion_qk" and arms.label("mine") == "mine"
    assert arms.label("muon_qk_to_one") == "Muon + QK-Norm, γ pulled to 1"


def test_arms_of_ones_own_are_told_apart_by_their_order_in_the_plan():
    names = ("muon_qk", "lion_noqk", "sophia_noqk", "lion_qk", "muon_qk_merged", "muon_noqk_merged")
    looks = arms.looks(names)
    assert len(set(looks.values())) == len(names)
    hues = [looks[name].hue for name in names]
    assert hues[0] == hues[4] == hues[5] == arms.HUES["muon"]
    assert hues[1] == hues[3] != hues[2] and not {hues[1], hues[2]} & set(arms.HUES.values())
    many = [f"o{number}_qk" for number in range(20)]  # more of them than hues
    assert len(set(arms.looks(many).values())) == 20


# --------------------------------------------------------------------------------------------
# The sweep, heat maps, spectra.


def test_sweep_rings_the_chosen_rate_and_puts_diverged_ones_on_top():
    points = [
        SweepPoint(1e-3, 4.0, False),
        SweepPoint(2e-3, 3.5, True),
        SweepPoint(4e-3, None, False),
    ]
    figure = charts.sweep({"adamw_qk": points}, SCALE, LOOKS)
    axes = figure.axes[0]
    (line,) = lines_of(figure, "adamw_qk")
    assert list(zip(*line.get_data(), strict=True)) == [(1e-3, 4.0), (2e-3, 3.5)]
    (ring,) = (line for line in axes.lines if line.get_markerfacecolor() == "none")
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (2e-3, 3.5)
    (cross,) = (line for line in axes.lines if line.get_marker() == "x")
    assert cross.get_xdata()[0] == 4e-3
    assert cross.get_transform() == axes.get_xaxis_transform()  # no loss, so no place on the axis
    assert "diverged" in axes.get_xlabel() and axes.get_xscale() == "log"


def test_heat_maps_are_the_mean_over_seeds_on_one_scale():
    def arrays(share: float) -> dict[str, np.ndarray]:
        sigma = np.ones((3, 2, 8), np.float32)
        sigma[1, 0, 4:] = share  # layer 1, head 0 uses fewer directions
        return {"key_post_rope_raw": sigma}

    ends = {"muon_qk": [arrays(0.0), arrays(1.0)], "adamw_qk": [arrays(1.0)]}
    shown = quantity("pr", "key", "post_rope", "raw")
    figure = charts.heat_maps(ends, shown, 8)
    meshes = {axes.get_title(): axes.collections[0] for axes in figure.axes if axes.get_title()}
    values = meshes["Muon + QK"].get_array()
    assert values.shape == (3, 2) and values[1, 0] == pytest.approx(6.0)
    assert values[0, 0] == pytest.approx(8.0)
    assert {mesh.get_clim() for mesh in meshes.values()} == {(1.0, 8.0)}


def test_spectra_are_of_the_layer_and_over_the_largest():
    sigma = np.tile(np.array([4.0, 2.0, 1.0], np.float32), (2, 2, 1))
    sigma[1, :, 1:] = 1.0
    ends = {"muon_qk": [{"key": sigma}], "adamw_qk": [{"other": sigma}]}
    assert charts.lowest_ratio(ends, "key") == 0.25
    figure = charts.spectra(ends, "key", 0, 0.01, LOOKS)
    (line,) = figure.axes[0].lines
    assert list(line.get_xdata()) == [1, 2, 3]
    assert line.get_ydata() == pytest.approx([1.0, 0.5, 0.25])
    last = charts.spectra(ends, "key", 1, 0.01, LOOKS).axes[0]
    assert last.lines[0].get_ydata() == pytest.approx([1.0, 0.25, 0.25])
    assert last.get_ylim() == figure.axes[0].get_ylim() and last.get_ylim()[0] < 0.01


# --------------------------------------------------------------------------------------------
# SVG in a page.


def test_charts_of_one_page_share_no_id_and_follow_its_theme():
    figure = charts.over_tokens({"muon_qk": [curve(3, 2), curve(3, 1)]}, SCALE, LOOKS)
    svg = drawing.to_bytes(figure, "svg")
    assert svg == drawing.to_bytes(figure, "svg")
    first, second = (html.inline(Chart(n, "Loss", "falls", svg)) for n in ("one", "two"))
    ids = [[e.get("id") for e in root.iter() if e.get("id")] for root in (first, second)]
    assert len(set(ids[0])) == len(ids[0]) and not set(ids[0]) & set(ids[1])
    text = ET.tostring(first, encoding="unicode")
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', text)
    assert used and set(used) <= set(ids[0])
    assert "var(--muon)" in text and arms.HUES["muon"].lower() not in text.lower()
    assert "currentColor" in text and "var(--grid)" in text
    assert first.get("role") == "img" and first.get("aria-labelledby") == "one-title one-desc"
    assert (first[0].tag, first[0].text, first[1].text) == ("title", "Loss", "falls")
    assert first.get("width") is None and first.get("viewBox")


def make_clause(**changed) -> Clause:
    fields = {
        "name": "H",
        "text": "",
        "kind": SUPERIORITY,
        "word": "supported",
        "estimate": 4.0,
        "pooled": (3.0, 5.0),
        "paired": (-90.0, 98.0),
        "p": 0.01,
        "sesoi": 3.2,
        "unit": "PR",
        "seeds_needed": None,
        "per_seed": {42: 3.5, 43: 4.5, 44: None},
    }
    return Clause(**{**fields, **changed})


def test_interval_figure_is_to_scale_and_cuts_a_long_interval_with_arrows():
    root = html.interval_figure(make_clause())
    kinds = {line.get("class"): line for line in root.iter("line")}
    x = {kind: (float(line.get("x1")), float(line.get("x2"))) for kind, line in kinds.items()}
    per_unit = (x["pooled"][1] - x["pooled"][0]) / 2
    assert x["estimate"][0] - x["zero"][0] == pytest.approx(4 * per_unit, abs=0.2)
    assert x["sesoi"][0] - x["zero"][0] == pytest.approx(3.2 * per_unit, abs=0.2)
    dots = [float(dot.get("cx")) for dot in root.iter("circle")]
    assert [d - x["zero"][0] for d in dots] == pytest.approx(
        [3.5 * per_unit, 4.5 * per_unit], abs=0.2
    )
    assert x["paired"] == (12.0, 268.0) and len(list(root.iter("polygon"))) == 2
    short = html.interval_figure(make_clause(paired=(2.0, 6.0)))
    assert not list(short.iter("polygon"))
    assert "paired [+2, +6]" in short.get("aria-label")


def test_interval_figure_of_too_little():
    assert html.interval_figure(make_clause(estimate=None, per_seed={42: None})) is None
    lone = make_clause(pooled=None, paired=None, per_seed={42: 4.0})
    assert [line.get("class") for line in html.interval_figure(lone).iter("line")] == [
        "zero",
        "sesoi",
        "estimate",
    ]


# --------------------------------------------------------------------------------------------
# Gamma, rank surgery, loss against PR.


def test_a_scale_around_a_level_reaches_as_far_above_as_below():
    groups = [{"muon_qk": [curve(1.0, 0.9, 0.4, 0.6)]}, {"adamw_qk": [curve(1.0, 1.1)]}]
    scale = charts.around("gamma", groups, 1.0)
    assert scale.low < 0.4 and scale.high > 1.1
    assert scale.high - 1.0 == pytest.approx(1.0 - scale.low)
    assert scale.reference == (1.0, "start: 1")
    alike = charts.around("gamma", [{"muon_qk": [curve(1.0, 1.0)]}], 1.0)
    assert alike.low < 1.0 < alike.high


def test_added_loss_is_the_mean_of_the_seeds_at_the_ranks_of_all():
    runs = [[(1, 0.5), (4, 0.02), (8, 0.0)], [(1, 0.7), (8, 0.002)]]
    figure = charts.added_loss({"muon_qk": runs}, 0.01, 8, LOOKS)
    (line,) = lines_of(figure, "muon_qk")
    assert list(line.get_xdata()) == [1, 8]
    assert line.get_ydata() == pytest.approx([0.6, 0.001])
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "symlog")
    assert "0.01 nat" in [text.get_text() for text in axes.texts]


def test_loss_against_pr_has_a_point_a_run():
    points = {"muon_qk": [(20.0, 3.5), (21.0, 3.4)], "muon_noqk": [(30.0, 3.6)]}
    figure = charts.scatter(points, "PR", "loss", LOOKS)
    drawn = {line.get_label(): line for line in figure.axes[0].lines}
    assert drawn["Muon + QK"].get_xdata() == pytest.approx([20.0, 21.0])
    assert drawn["Muon + QK"].get_ydata() == pytest.approx([3.5, 3.4])
    assert drawn["Muon + QK"].get_linestyle() == "None"
    assert drawn["Muon, no QK"].get_marker() == LOOKS["muon_noqk"].marker
