"""plot_spectra and compare_spectra: a real run, older runs, broken ones; without importing jax."""

import csv
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable

import jax
import numpy as np
import pytest
import small_run

from qkjax import errors, train
from qkjax.measures import ranks
from qkjax.report import drawing, figures, quantities, run_spectra
from qkjax.trained import rank_curves

pytest.importorskip("matplotlib", reason="matplotlib is absent: pip install -e '.[report]'")
ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = (0, 5, 9, 20)
HEAD_DIM = 16
Call = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run of the arm adamw_qk: two layers, two query and two kv heads of 16."""
    folder = tmp_path_factory.mktemp("figures")
    dataset = small_run.make_dataset(folder / "dataset")
    config = small_run.make_config(dataset, "adamw", "learned", model__num_kv_heads=2)
    train.train_and_evaluate(config, folder / "run")
    return folder / "run"


@pytest.fixture
def copy(run: pathlib.Path, tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
    """Copies the run, its arrays changed by a function and its config by dotted fields."""

    def make(name: str, change: Callable[[dict], dict] = dict, **fields: object) -> pathlib.Path:
        to = tmp_path / name
        (to / "spectra").mkdir(parents=True)
        for file in ("config.json", "environment.json", "metrics.jsonl"):
            shutil.copy(run / file, to / file)
        for step in STEPS:
            np.savez(to / "spectra" / file_name(step), **change(arrays(run, step)))
        config = json.loads((to / "config.json").read_text())
        for field, value in fields.items():
            section, _, inner = field.rpartition("__")
            (config[section] if section else config)[inner] = value
        (to / "config.json").write_text(json.dumps(config))
        return to

    return make


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Call:
    """Runs a tool where importing jax raises, as `without` does too, and with odd settings."""
    home = tmp_path_factory.mktemp("home")
    poison = tmp_path_factory.mktemp("poison")
    for name in ("jax", "flax", "optax", "orbax", "grain", "clu"):
        (poison / f"{name}.py").write_text(f"raise AssertionError('{name} was imported')\n")

    def run_tool(tool: str, *arguments: object, without: str = "", settings: str = ""):
        paths = [poison]
        if without:
            paths.append(tmp_path_factory.mktemp("without"))
            (paths[-1] / f"{without}.py").write_text("raise ImportError('planted')\n")
        if settings:
            (home / "matplotlibrc").write_text(settings)
        environment = {
            "PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT])),
            "PATH": "",
            "HOME": str(home),
            "MPLCONFIGDIR": str(home),
            "MATPLOTLIBRC": str(home),
        }
        try:
            return subprocess.run(
                [sys.executable, f"tools/{tool}.py", *map(str, arguments)],
                capture_output=True,
                text=True,
                cwd=ROOT,
                env=environment,
            )
        finally:
            (home / "matplotlibrc").unlink(missing_ok=True)

    return run_tool


def file_name(step: int) -> str:
    return f"step_{step:08d}.npz"


def arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    with np.load(workdir / "spectra" / file_name(step)) as file:
        return dict(file)


def ratio(sigma: np.ndarray) -> np.ndarray:
    sigma = sigma.astype(np.float64)
    return sigma.sum(-1) ** 2 / (sigma**2).sum(-1)


def texts(svg: pathlib.Path) -> list[str]:
    """Every text of a figure; where it is drawn as paths, none."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text())


# --------------------------------------------------------------------------------------------
# The measures.


def test_measures_are_those_of_the_evaluation():
    random = np.random.default_rng(0).uniform(0, 1, (5, 64))
    steep = np.exp(-np.arange(64) / 2.0) * 1e4
    tie = np.where(np.arange(64) < 10, 1.0, 0.0)  # nine of the ten hold 90%, exactly
    zeros, rank_one = np.zeros(64), np.eye(1, 64)[0] * 1e-20
    not_finite = [np.append(random[0, 1:], bad) for bad in (np.nan, np.inf)]
    sigma = np.stack([*random, steep, tie, zeros, rank_one, *not_finite]).astype(np.float32)
    assert quantities.TITLES.keys() == ranks.MEASURES.keys()
    for measure, formula in ranks.MEASURES.items():
        # Sums of 64 terms of one sign in float32, twice: under 2 * 64 * 6e-8.
        expected = np.asarray(jax.jit(formula)(sigma))
        found = quantities.quantity(measure).values({"key_post_rope_raw": sigma})
        np.testing.assert_allclose(found, expected, rtol=8e-6, err_msg=measure)
        undefined = [False] * 7 + [True, False, True, True]
        assert np.isnan(found).tolist() == undefined


# --------------------------------------------------------------------------------------------
# plot_spectra.


@pytest.fixture(scope="module")
def plotted(run: pathlib.Path, call: Call) -> tuple[pathlib.Path, str]:
    done = call("plot_spectra", f"--workdir={run}")
    assert done.returncode == 0, done.stderr
    return run / "figures", done.stdout


NAMES = {
    "attention",
    "gamma",
    *(f"pr_{v}_{kind}" for v in ("key", "query", "value") for kind in ("trajectory", "heat_maps")),
    *(f"{v}_singular_values" for v in ("key", "query", "value")),
    *(f"pr_{v}_stages" for v in ("key", "query")),
    *(f"mean_share_{v}_trajectory" for v in ("key", "query")),
    "pr_qk_trajectory",
    "pr_weights_trajectory",
}


@pytest.mark.process
def test_every_figure_is_there_in_both_formats(plotted):
    folder, output = plotted
    expected = {f"{name}.{ending}" for name in NAMES for ending in ("svg", "png")}
    assert {path.name for path in folder.iterdir()} == expected
    assert {pathlib.Path(line).name for line in output.splitlines()} == expected  # and no note
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


LABELS = {
    "pr_key_trajectory": (
        "participation ratio",
        "(directions of 16)",
        "key, post-RoPE, raw",
        "key, pre-RoPE, centred",
        "training tokens (linear to 640, then log)",
        "lowest to highest layer",
        "middle half of the layers",
        "mean over heads, then layers",
        "participation ratio over training: run (adamw_qk, seed 42)",
    ),
    "pr_value_heat_maps": (
        "value, raw: 0 tokens",
        "value, centred: 2.56k tokens",
        "layer",
        "head",
        "participation ratio",
        "(directions of 16)",
    ),
    "query_singular_values": (
        "layer 0: query, post-RoPE, raw",
        "layer 1: query, pre-RoPE, centred",
        "singular value",
        "/ largest (dimensionless)",
        "index (of 16)",
        "640 tokens",
        "trained on",
    ),
    "gamma": (
        "gamma_q",
        "gamma_k",
        "mean over head_dim",
        "standard deviation over",
        "PR of |gamma|",
        "quantile of |gamma|",
        "share below 0",
        "layer",
    ),
    "pr_key_stages": (
        "key, before QK-Norm, centred",
        "key, normalised, before gamma, centred",
        "key, pre-RoPE, centred",
        "key, post-RoPE, centred",
    ),
    "pr_qk_trajectory": ("q.k, pre-RoPE, raw", "q.k, pre-RoPE, centred", "(directions of 16)"),
    "pr_weights_trajectory": ("W_q", "W_k", "W_v", "W_o"),
    "mean_share_key_trajectory": ("energy of the mean vector", "(share of all energy)"),
    "attention": (
        "maximum attention logit",
        "(dimensionless, after 1/sqrt(head_dim))",
        "attention entropy",
        "(nats)",
        "max over layers",
        "mean over layers",
        "layer",
        f"uniform attention: {np.log(np.arange(1, 33)).mean():.2f}",
        f"uniform attention: {np.mean(1 / np.arange(2, 33)):.4f}",
        "attention on the first position",
    ),
}


@pytest.mark.process
@pytest.mark.parametrize("name", LABELS)
def test_axes_are_labelled_with_units(name, plotted):
    found = texts(plotted[0] / f"{name}.svg")
    assert set(LABELS[name]) <= set(found)
    assert "not recorded" not in found


@pytest.mark.process
def test_heat_maps_show_the_first_and_last_evaluation(run, plotted):
    found = texts(plotted[0] / "pr_key_heat_maps.svg")
    for step in (0, 20):
        for array in ("key_post_rope_raw", "key_pre_rope_centred"):
            for value in ratio(arrays(run, step)[array]).flat:
                assert f"{value:.3g}" in found


def keys_only(all_arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Half of the figures need half of the time."""
    return {n: a for n, a in all_arrays.items() if not n.startswith(("query", "value"))}


KEY_NAMES = {name for name in NAMES if "query" not in name and "value_" not in name}


@pytest.mark.process
def test_equal_data_give_equal_bytes(copy, plotted, call):
    """In another directory and process, under other settings of the user's."""
    settings = "svg.fonttype: path\nfont.size: 20\naxes.facecolor: red\nlines.linewidth: 9\n"
    again = copy("run", keys_only)
    done = call("plot_spectra", f"--workdir={again}", "--format=svg", settings=settings)
    assert done.returncode == 0, done.stderr
    files = sorted((again / "figures").iterdir())
    assert {path.stem for path in files} == KEY_NAMES
    for path in files:
        assert path.read_bytes() == (plotted[0] / path.name).read_bytes(), path.name
    # The second format of a figure does not depend on its having been saved in the first.
    alone = figures.gamma_curves(run_spectra.load_run(again))
    assert drawing.to_bytes(alone, "png") == (plotted[0] / "gamma.png").read_bytes()


def test_trajectory_is_what_the_run_measured(run):
    """The lines are the metrics that the training run wrote, by way of jax."""
    loaded = run_spectra.load_run(run)
    rows = [row for row in small_run.rows(run) if row["step"] in STEPS]
    for measure in ranks.MEASURES:
        views = (("post_rope", "raw"), ("pre_rope", "centred"))
        shown = [quantities.quantity(measure, "key", *view) for view in views]
        drawn = figures.trajectories([loaded], shown)
        for axes, (stage, centring) in zip(drawn.axes, views, strict=True):
            (line,) = axes.lines
            assert list(line.get_xdata()) == [row["tokens"] for row in rows]
            logged = [row[f"{measure}/key/{stage}/{centring}"] for row in rows]
            np.testing.assert_allclose(line.get_ydata(), logged, rtol=1e-5)
    layers = np.array([ratio(arrays(run, step)["key_post_rope_raw"]).mean(-1) for step in STEPS])
    pale = figures.trajectories([loaded], [quantities.quantity("pr")]).axes[0].collections[0]
    at_steps = pale.get_paths()[0].vertices[1 : 1 + len(STEPS), 1]
    np.testing.assert_allclose(at_steps, layers.min(-1))


def test_curves_of_singular_values_are_over_the_largest(run):
    shown = [quantities.quantity("pr", "query", "pre_rope", "centred")]
    drawn = figures.singular_value_curves(run_spectra.load_run(run), shown)
    for layer, axes in enumerate(drawn.axes):
        assert axes.get_yscale() == "log"
        for step, line in zip(STEPS, axes.lines, strict=True):
            sigma = arrays(run, step)["query_pre_rope_centred"][layer].astype(np.float64)
            np.testing.assert_allclose(line.get_ydata(), (sigma.T / sigma[:, 0]).mean(-1))


def test_gamma_and_attention_curves(run):
    loaded = run_spectra.load_run(run)
    gamma = np.stack([arrays(run, step)["gamma_k"] for step in STEPS]).astype(np.float64)
    panels = figures.gamma_curves(loaded).axes
    low, high = np.quantile(np.abs(gamma), (0.1, 0.9), axis=-1)
    for axes, values in (
        (panels[1], gamma.mean(-1)),
        (panels[3], gamma.std(-1)),
        (panels[5], ratio(np.abs(gamma))),
        (panels[7], high / low),
        (panels[9], (gamma < 0).mean(-1)),
    ):
        np.testing.assert_allclose([line.get_ydata() for line in axes.lines], values.T, atol=1e-12)
    logits = np.stack([arrays(run, step)["max_logit"] for step in STEPS])
    *by_layer, overall = figures.attention_curves(loaded).axes[0].lines
    np.testing.assert_allclose([line.get_ydata() for line in by_layer], logits.max(-1).T)
    np.testing.assert_allclose(overall.get_ydata(), logits.max((-1, -2)))
    entropy = np.stack([arrays(run, step)["entropy"] for step in STEPS]).astype(np.float64)
    drawn = figures.attention_curves(loaded).axes
    np.testing.assert_allclose(drawn[1].lines[2].get_ydata(), entropy.mean((-1, -2)))
    sinks = np.stack([arrays(run, step)["sink_mass"] for step in STEPS]).astype(np.float64)
    np.testing.assert_allclose(drawn[2].lines[2].get_ydata(), sinks.mean((-1, -2)))


def test_what_a_clip_did_is_drawn_from_the_rows_of_its_steps(run, copy):
    clipped = copy("clipped", keys_only)
    lines = [json.loads(line) for line in (clipped / "metrics.jsonl").read_text().splitlines()]
    for step, row in enumerate(lines[1:], start=1):
        row |= {"train/max_logit": 10.0 + step, "train/clipped_heads": step % 3}
    lines[4]["train/max_logit"] = None  # not finite
    (clipped / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in lines))
    loaded = run_spectra.load_run(clipped)
    drawn, _ = figures.figures_of_run(loaded, "pr")
    logits, heads = (axes.lines[0].get_ydata() for axes in drawn["clip"].axes)
    assert list(heads) == [step % 3 for step in range(1, len(lines))]
    assert np.isnan(logits[3]) and logits[0] == 11.0
    assert len(run_spectra.load_run(run).clips) == 0


@pytest.mark.process
def test_an_older_run_is_drawn_as_far_as_it_goes(copy, call):
    kept = ("key_post_rope_raw", "num_tokens")
    older = copy("older", lambda a: {name: a[name] for name in kept}, model__qk_norm="none")
    (older / "spectra" / file_name(21)).write_bytes(
        (older / "spectra" / file_name(20)).read_bytes()
    )
    done = call("plot_spectra", f"--workdir={older}", "--format=svg", "--measure=srank", "--step=9")
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stdout.splitlines() if line.startswith("note: ")]
    assert [note.partition(str(older))[2] for note in notes] == [
        f"/spectra/{file_name(21)}: left out, metrics.jsonl has no row of step 21",
        ": key_pre_rope_centred not recorded",
        ": query_post_rope_raw, query_pre_rope_centred not recorded",
        ": value_raw, value_centred not recorded",
        *(
            f": {v}_pre_norm_centred, {v}_post_norm_centred not recorded (it has no QK-Norm); "
            f"no figure srank_{v}_stages"
            for v in ("key", "query")
        ),
        ": qk_pre_rope_raw, qk_pre_rope_centred not recorded; no figure srank_qk_trajectory",
        ": weight_query, weight_key, weight_value, weight_output not recorded; no figure "
        "srank_weights_trajectory",
        *(
            f": {v}_pre_rope_raw, {v}_post_rope_raw not recorded; no figure "
            f"mean_share_{v}_trajectory"
            for v in ("key", "query")
        ),
        ": gamma_q, gamma_k not recorded (it has no QK-Norm); no figure gamma",
        ": max_logit, entropy, sink_mass not recorded; no figure attention",
    ]
    drawn = ("srank_key_trajectory", "srank_key_heat_maps", "key_singular_values")
    assert {path.name for path in (older / "figures").iterdir()} == {f"{n}.svg" for n in drawn}
    for name in drawn:
        assert "not recorded" in texts(older / "figures" / f"{name}.svg")
    found = texts(older / "figures" / "srank_key_heat_maps.svg")
    assert "key, post-RoPE, raw: 1.15k tokens" in found  # the chosen step, and no other
    assert not any("2.56k" in text or ": 0 tokens" in text for text in found)
    sigma = arrays(older, 9)["key_post_rope_raw"].astype(np.float64)
    for value in ((sigma**2).sum(-1) / sigma[..., 0] ** 2).flat:
        assert f"{value:.3g}" in found


@pytest.mark.process
def test_a_diverged_run_is_drawn(copy, call):
    """NaN everywhere: panels stay empty or grey, nothing fails or warns."""

    def poison(all_arrays):
        kept = keys_only(all_arrays)
        return {name: np.full_like(array, np.nan) for name, array in kept.items()}

    diverged = copy("diverged", poison)
    done = call("plot_spectra", f"--workdir={diverged}", "--format=svg")
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.stem for path in (diverged / "figures").iterdir()} == KEY_NAMES
    assert "undefined" in texts(diverged / "figures" / "pr_key_heat_maps.svg")


# --------------------------------------------------------------------------------------------
# compare_spectra.


def halved(all_arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weaker half of all directions is gone; every logit is larger by 1."""
    changed = dict(all_arrays)
    for name, array in all_arrays.items():
        if array.shape[-1:] == (HEAD_DIM,) and re.search("raw|centred|singular", name):
            changed[name] = np.where(np.arange(HEAD_DIM) < HEAD_DIM // 2, array, 0)
    changed["max_logit"] = all_arrays["max_logit"] + 1
    return changed


def comparison(folder: pathlib.Path, name: str) -> list[dict[str, str]]:
    with open(folder / f"compare_{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.process
def test_comparison_holds_values_and_differences(run, copy, call, tmp_path):
    other = copy("other/run", halved, seed=7, arm="muon_qk")
    third = copy("third/run", optimizer__beta2=0.5, data__dir="elsewhere")
    done = call("compare_spectra", run, other, third, f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    rows = comparison(tmp_path, "pr_key_post_rope_raw")
    assert list(rows[0]) == [
        "run",
        "arm",
        "seed",
        "step",
        "tokens",
        "layer",
        "head",
        "value",
        "difference",
    ]
    assert len(rows) == 3 * 2 * 2
    first = ratio(arrays(run, 20)["key_post_rope_raw"])
    label = f"{run.parent.name}/run"
    for i, (workdir, name, arm, seed) in enumerate(
        (
            (run, label, "adamw_qk", "42"),
            (other, "other/run", "muon_qk", "7"),
            (third, "third/run", "adamw_qk", "42"),
        )
    ):
        mine = rows[4 * i : 4 * i + 4]
        values = ratio(arrays(workdir, 20)["key_post_rope_raw"])
        assert [(r["run"], r["arm"], r["seed"], r["step"], r["tokens"]) for r in mine] == (
            [(name, arm, seed, "20", "2560")] * 4
        )
        assert [(r["layer"], r["head"]) for r in mine] == [
            ("0", "0"),
            ("0", "1"),
            ("1", "0"),
            ("1", "1"),
        ]
        found = [float(r["value"]) for r in mine]
        np.testing.assert_allclose(found, values.ravel(), rtol=1e-8)
        found = [float(r["difference"]) for r in mine]
        np.testing.assert_allclose(found, (values - first).ravel(), rtol=1e-8, atol=1e-12)
    _, *lines = done.stdout.splitlines()
    measured = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    loss = next(row["val/loss"] for row in measured if row["step"] == 20)
    for line, name, of in zip(lines, (label, "other/run", "third/run"), (0, 4, 8), strict=False):
        mean = np.mean([float(r["value"]) for r in rows[of : of + 4]])
        assert line.split() == [
            *(name, rows[of]["arm"], rows[of]["seed"], "20", "2,560"),
            *(f"{loss:.4f}", f"{mean:.4g}"),
        ]
    assert lines[3] == f"third/run has optimizer.beta2 0.5, in {label} 0.95"
    assert lines[4] == str(tmp_path / "compare_pr_key_post_rope_raw.csv")
    found = texts(tmp_path / "compare_pr_key_post_rope_raw.svg")
    assert {
        "other/run (muon_qk, seed 7)",
        "other/run",
        f"minus {label}",
        "difference",
        "(directions of 16)",
        "mean over heads",
        "layer",
        "head",
        "participation ratio: key, post-RoPE, raw: after 2.56k tokens",
    } <= set(found)
    assert {f"{float(r['difference']):.3g}" for r in rows[4:]} <= set(found)
    found = texts(tmp_path / "compare_pr_key_post_rope_raw_trajectory.svg")
    legend = "line: mean over heads, then layers; band: lowest to highest layer"
    assert {legend, label, "other/run", "third/run"} <= set(found)


def effective_rank(sigma: np.ndarray) -> np.ndarray:
    p = sigma / sigma.sum(-1, keepdims=True)
    return np.exp(-np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0).sum(-1))


QUANTITIES = {
    "erank_value_centred": (("erank", "value", None, "centred"), "value_centred", effective_rank),
    "pr_cov_wqk_singular_values": (
        ("pr_cov", "wqk"),
        "wqk_singular_values",
        lambda sigma: ratio(sigma**2),
    ),
    "pr_key_pre_rope_raw": (("pr", None, "pre_rope"), "key_pre_rope_raw", ratio),
    "max_logit": (("max_logit",), "max_logit", lambda logits: logits),
}


@pytest.mark.parametrize("name", QUANTITIES)
def test_any_quantity_can_be_compared(name, run, copy):
    asked, array, formula = QUANTITIES[name]
    shown = quantities.quantity(*asked)
    assert shown.name == name
    runs = run_spectra.load_runs([run, copy("other", halved)])
    base, other = run_spectra.compare(runs, shown, 5)
    expected = [formula(arrays(r.workdir, 5)[array].astype(np.float64)) for r in runs]
    np.testing.assert_allclose(other.values, expected[1], rtol=1e-12)
    np.testing.assert_allclose(other.difference, expected[1] - expected[0], atol=1e-12)
    assert np.abs(other.difference).min() > 0.5 and not base.difference.any()


def test_quantities_of_newer_evaluations_are_absent_in_older_ones():
    rng = np.random.default_rng(1)
    stages = ("key_pre_norm", "query_post_norm", "key_pre_rope", "qk_pre_rope")
    names = [f"{stage}_{centring}" for stage in stages for centring in ("raw", "centred")]
    names += ["value_raw", "value_centred", "weight_key", "weight_output"]
    saved = {name: rng.uniform(1, 2, (2, 3, 8)) for name in names}
    saved |= {name: rng.uniform(0, 1, (2, 3)) for name in ("sink_mass", "query_norm_mean")}

    def share(name):
        raw, centred = saved[f"{name}_raw"], saved[f"{name}_centred"]
        return 1 - (centred**2).sum(-1) / (raw**2).sum(-1)

    expected = {
        ("pr", "key", "pre_norm"): ("before QK-Norm, raw", ratio(saved["key_pre_norm_raw"])),
        ("pr", "query", "post_norm", "centred"): (
            "query, normalised, before gamma, centred",
            ratio(saved["query_post_norm_centred"]),
        ),
        ("pr", "qk"): ("q.k, pre-RoPE, raw", ratio(saved["qk_pre_rope_raw"])),
        ("pr", "weight_key"): ("W_k", ratio(saved["weight_key"])),
        ("erank", "weight_output"): ("W_o", effective_rank(saved["weight_output"])),
        ("mean_share", None, "pre_rope"): ("key, pre-RoPE, raw", share("key_pre_rope")),
        ("mean_share", "value"): ("value, raw", share("value")),
        ("sink_mass",): ("", saved["sink_mass"]),
        ("query_norm_mean",): ("", saved["query_norm_mean"]),
    }
    for asked, (words, values) in expected.items():
        shown = quantities.quantity(*asked)
        np.testing.assert_allclose(shown.values(saved), values, rtol=1e-12, err_msg=str(asked))
        assert shown.source.endswith(words) and shown.title and shown.unit(8), asked
        assert shown.values({}) is None
    assert quantities.quantity("mean_share").name == "mean_share_key_post_rope_raw"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("pr", "qk", "post_rope"), "--stage: qk is measured at pre_rope alone"),
        (("pr", "weight_key", None, "raw"), "--centring: weight_key has no centring"),
        (("mean_share", "wqk"), "--vectors: mean_share has no vectors"),
        (("mean_share", None, None, "raw"), "--centring: mean_share has no centring"),
    ],
)
def test_choices_that_a_newer_quantity_does_not_have_are_refused(asked, message):
    with pytest.raises(errors.UsageError, match=message):
        quantities.quantity(*asked)


@pytest.mark.process
def test_flags_choose_what_is_compared(run, call, tmp_path):
    done = call(
        "compare_spectra",
        run,
        "--measure=r90",
        "--vectors=query",
        "--stage=pre_rope",
        "--centring=centred",
        "--step=5",
        "--format=svg",
        f"--out={tmp_path}",
    )
    assert done.returncode == 0, done.stderr
    stem = "compare_r90_query_pre_rope_centred"
    names = {stem + rest for rest in (".csv", ".svg", "_trajectory.svg")}
    assert {path.name for path in tmp_path.iterdir()} == names
    energy = np.cumsum(arrays(run, 5)["query_pre_rope_centred"].astype(np.float64) ** 2, -1)
    expected = 1 + (energy < 0.9 * energy[..., -1:]).sum(-1)
    rows = comparison(tmp_path, "r90_query_pre_rope_centred")
    assert [int(row["value"]) for row in rows] == expected.ravel().tolist()
    assert {row["step"] for row in rows} == {"5"}


def test_runs_are_matched_by_tokens(run, copy):
    """Another batch size reaches the same tokens at another step."""
    slower = copy("slower")
    rows = [json.loads(line) for line in (slower / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({**row, "step": 2 * row["step"]}) + "\n" for row in rows)
    (slower / "metrics.jsonl").write_text(text)
    for step in reversed(STEPS[1:]):
        os.replace(slower / "spectra" / file_name(step), slower / "spectra" / file_name(2 * step))
    runs = run_spectra.load_runs([run, slower])
    shown = quantities.quantity("pr")
    for asked, (first, second) in {None: (20, 40), 5: (5, 10)}.items():
        found = run_spectra.compare(runs, shown, asked)
        assert [each.evaluation.step for each in found] == [first, second]
        assert not found[1].difference.any()
    (slower / "spectra" / file_name(40)).unlink()  # then the last that both have
    found = run_spectra.compare(run_spectra.load_runs([run, slower]), shown)
    assert [each.evaluation.step for each in found] == [9, 18]


@pytest.mark.process
def test_undefined_values_are_empty_cells(run, copy, call):
    def undefined(all_arrays):
        return {**all_arrays, "aa": np.array([[np.nan, 0.25], [0.5, 0.75]])}

    workdir = copy("undefined", undefined)
    done = call("compare_spectra", workdir, "--measure=aa", "--format=svg")
    assert (done.returncode, done.stderr) == (0, "")
    rows = comparison(workdir / "figures", "aa")
    assert [row["value"] for row in rows] == ["", "0.25", "0.5", "0.75"]
    assert [row["difference"] for row in rows] == ["", "0", "0", "0"]
    assert "head (grey: undefined)" in texts(workdir / "figures" / "compare_aa.svg")


# --------------------------------------------------------------------------------------------
# Mistakes.


@pytest.mark.process
def test_without_matplotlib(run, call, tmp_path):
    """The message says how to get it; the CSV needs none."""
    for tool, arguments in (("plot_spectra", (f"--workdir={run}",)), ("compare_spectra", (run,))):
        done = call(tool, *arguments, f"--out={tmp_path}", without="matplotlib")
        assert done.returncode == 2
        assert done.stderr == (
            "ERROR: matplotlib: cannot be imported (planted), figures need it. "
            "Run pip install -e '.[report]'.\n"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["compare_pr_key_post_rope_raw.csv"]
    assert len(comparison(tmp_path, "pr_key_post_rope_raw")) == 4


def wider(all_arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**all_arrays, "key_post_rope_raw": np.ones((2, 1, HEAD_DIM), np.float32)}


def longer(all_arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**all_arrays, "num_tokens": np.float32(96)}


@pytest.fixture
def broken(run: pathlib.Path, copy: Callable[..., pathlib.Path], tmp_path: pathlib.Path) -> dict:
    """Directories that cannot be drawn or compared, by name."""
    empty, foreign, damaged, nameless = map(copy, ("empty", "foreign", "damaged", "nameless"))
    shutil.rmtree(empty / "spectra")
    (foreign / "environment.json").write_text('{"dataset_fingerprint": "another"}')
    (damaged / "spectra" / file_name(5)).write_bytes(b"PK\x03\x04 cut")
    (nameless / "environment.json").write_text("{}")
    short = copy("short")
    (short / "spectra" / file_name(5)).unlink()
    fingerprint = json.loads((run / "environment.json").read_text())["dataset_fingerprint"]
    return {
        "run": run,
        "tmp": tmp_path,
        "fingerprint": fingerprint,
        "empty": empty,
        "foreign": foreign,
        "damaged": damaged,
        "nameless": nameless,
        "short": short,
        "wider": copy("wider", wider),
        "longer": copy("longer", longer),
    }


MISTAKES = {
    "plot_spectra": (
        ((), "--workdir: missing, expected a run directory"),
        (("--workdir={tmp}/none",), "{tmp}/none: neither a run nor a measured model, expected a"),
        (("--workdir={empty}",), "{empty}/spectra: no evaluation in it, expected step_*.npz"),
        (("--workdir={damaged}",), "{damaged}/spectra/step_00000005.npz: damaged ("),
        (("--workdir={nameless}",), "{nameless}/environment.json: names no dataset_fingerprint"),
        (
            ("--workdir={run}", "--step=6"),
            "--step: 6 was not evaluated in {run}. Choose one of 0, 5, 9, 20.",
        ),
        (("--workdir={run}", "--measure=rank"), "flag --measure=rank: "),
        (
            ("--workdir={run}", "--format=svg,gif"),
            "--format: 'gif' is unknown. Known: svg, png.",
        ),
        (
            ("{run}",),
            "{run}: an unexpected argument, which nothing reads. Did you mean --workdir={run}?",
        ),
    ),
    "compare_spectra": (
        ((), "RUN...: missing, expected RUN... on the command line. See --help."),
        (("{run}", "{run}/../run"), "{run}/../run: given twice."),
        (
            ("{run}", "{foreign}"),
            "{foreign}: dataset another, but {run} has {fingerprint}. Compare runs on one dataset",
        ),
        (
            ("{run}", "{longer}"),
            "{longer}: measured on 96 validation tokens, but {run} on 224. Compare runs with one",
        ),
        (
            ("{run}", "{wider}"),
            "{wider}: key_post_rope_raw has shape (2, 1, 16), but (2, 2, 16) in {run}. Compare",
        ),
        (
            ("{run}", "{short}", "--step=5"),
            "{short}: no evaluation after 640 tokens, which {run} has. It has 0, 1152, 2560.",
        ),
        (
            ("{run}", "--vectors=value", "--stage=pre_rope"),
            "--stage: value has no stage, expected none, found pre_rope. Leave --stage out.",
        ),
        (
            ("{run}", "--measure=entropy", "--vectors=key"),
            "--vectors: entropy has no vectors, expected none, found key. Leave --vectors out.",
        ),
    ),
}


@pytest.mark.process
@pytest.mark.parametrize("tool", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(tool, broken, call):
    for arguments, expected in MISTAKES[tool]:
        done = call(tool, *(argument.format(**broken) for argument in arguments))
        assert done.returncode == 2, (arguments, done.stderr)
        assert done.stderr.startswith("ERROR: " + expected.format(**broken)), done.stderr
        assert done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.mark.process
def test_an_unrecorded_quantity_cannot_be_compared(run, copy, call):
    older = copy("older", lambda a: {name: a[name] for name in ("key_post_rope_raw", "num_tokens")})
    done = call("compare_spectra", run, older, "--measure=overlap")
    assert done.returncode == 2
    assert done.stderr == (
        f"ERROR: {older}: step 20 has not recorded overlap. "
        "Recorded: key_post_rope_raw, num_tokens.\n"
    )


@pytest.mark.process
def test_a_full_disk_is_exit_code_4(run, call, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = call("compare_spectra", run, f"--out={tmp_path / 'file'}")
    assert done.returncode == 4
    assert done.stderr.startswith(f"ERROR: {tmp_path}/file/compare_pr_key_post_rope_raw.csv: ")


def test_formats_are_written_once():
    assert drawing.check_formats(["png", "svg", "png"]) == ("png", "svg")


# --------------------------------------------------------------------------------------------
# rank_surgery.


def rank_rows(layers: Iterable[str]) -> list[rank_curves.Row]:
    return [
        rank_curves.Row(
            layer, "pre_rope", "raw", kind, rank, None, 100, "d" * 64, 3.0, 1 / rank - 0.1
        )
        for layer in layers
        for kind in rank_curves.KINDS
        for rank in (1, 8, 16)
    ]


def test_rank_curves_name_their_axes_and_are_the_same_every_time():
    rows = rank_rows(("all", *map(str, range(9))))
    drawn = [figures.rank_curves(rows, 16, "A title") for _ in range(2)]
    images = [drawing.to_bytes(figure, "svg") for figure in drawn]
    assert images[0] == images[1]
    for text in (
        "A title",
        "all layers together",
        "one layer at a time, random directions",
        "directions kept of each head's 16 (log2)",
        "added validation loss (nat per token; linear below 0.01)",
        "0.01 nat",
        "layer",
    ):
        assert f">{text}<" in images[0].decode(), text
    (line,) = (line for line in drawn[0].axes[0].lines if line.get_label() == "top directions")
    assert list(line.get_xdata()) == [1, 8, 16] and line.get_ydata()[0] == 0.9


@pytest.mark.parametrize("layers", [("all",), ("0", "1"), ("all", "0", "1")])
def test_the_title_of_rank_curves_is_whole(layers: tuple[str, ...]):
    title = (
        "Keys projected pre-RoPE: muon_qk_undecayed_merged, step 195, 65,536 validation tokens, "
        "val/loss 5.1234"
    )
    figure = figures.rank_curves(rank_rows(layers), 16, title)
    box = figure.texts[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
    assert figure.texts[0].get_text().replace("\n", " ") == title
