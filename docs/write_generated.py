"""Draws the README's figure and writes the parts of pages that come from data.

    python docs/write_generated.py

reads docs/results/small_original/runs/ARM_seed_N.tar.gz (`tools/airgapped/pack_results.py` made
them), writes docs/figures/results.svg, and replaces the text between the two marks in README.md:
the answer so far (also that of small_fixed), figure, table and verdicts. In every folder of
docs/results it writes the report of the study as it stands there (report.md, results.csv, figures/)
and the tables of its page. The table of docs/deviations.md comes from the configs. Run it again
when archives or configs change. Equal archives give equal bytes. Needs matplotlib.
"""

import pathlib
import re
import shutil
import sys
import tarfile
import tempfile
import textwrap
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import contrasts  # noqa: E402
import numpy as np  # noqa: E402

from qkjax.report import arms as arms_lib  # noqa: E402
from qkjax.report import drawing, report  # noqa: E402
from qkjax.report.blocks import number  # noqa: E402
from qkjax.study import plan_config, plan_cost  # noqa: E402
from qkjax.verdicts import judge, results  # noqa: E402
from qkjax.verdicts.judgement import LABELS  # noqa: E402

RESULTS = ROOT / "docs" / "results"
FIGURE = ROOT / "docs" / "figures" / "results.svg"
README = ROOT / "README.md"
DEVIATIONS = ROOT / "docs" / "deviations.md"
MARK = "<!-- {}: written by docs/write_generated.py -->"
END = "<!-- end of {} -->"

ARMS = ("adamw_qk", "adamw_noqk", "muon_qk", "muon_noqk")
# Under recipe original the gammas of an arm decay; its control `undecayed` has no decay.
DRAWN = (
    "adamw_qk",
    "adamw_qk_undecayed",
    "adamw_qk_frozen",
    "adamw_noqk",
    "muon_qk",
    "muon_qk_undecayed",
    "muon_noqk",
)
LOSS = "val/loss"
MEASURES = {  # metric -> title of its panel and column of the table
    "pr/key/pre_rope/centred": "before RoPE, centred",
    "pr/key/post_rope/raw": "after RoPE, raw",
}
HEAD_DIM = 64
SEEDS = 3  # the number that the study needs of every arm
WORDS = {  # by recipe and optimiser, what the arms that the first screen names do
    "original": {
        "AdamW": {
            "adamw_qk": "with QK-Norm whose gammas decay as in the original",
            "adamw_qk_undecayed": "with gammas that do not decay",
            "adamw_qk_frozen": "with gammas that stay 1",
            "adamw_noqk": "without QK-Norm",
        },
        "Muon": {
            "muon_qk": "with QK-Norm whose gammas decay",
            "muon_qk_undecayed": "with gammas that do not decay",
            "muon_qk_frozen": "with gammas that stay 1",
            "muon_noqk": "without QK-Norm",
        },
    },
    "fixed": {
        "AdamW": {"adamw_qk": "with QK-Norm", "adamw_noqk": "without"},
        "Muon": {"muon_qk": "with QK-Norm", "muon_noqk": "without"},
    },
}
HOW = {  # by recipe, what its runs are
    "original": "The model has 4 layers (scale `small`, recipe `original`), and a run trains on",
    "fixed": "That is recipe `fixed`, with warm-up and a sweep; a run trains on",
}
ALT = "Participation Ratio of the keys over training, before and after RoPE, by arm"
# The dark variant, for readers whose system is dark: paper, ink, grid, hues of Okabe & Ito.
DARK = {
    "#ffffff": "#0d1117",
    "#000000": "#e6edf3",
    "#dddddd": "#30363d",
    "#0072b2": "#56b4e9",
    "#d55e00": "#ff9d57",
}


class Run(NamedTuple):
    """One finished run of the archives."""

    arm: str
    seed: int
    commit: str
    tokens: np.ndarray  # [evaluations]
    values: dict[str, np.ndarray]  # by metric, [evaluations]


def published() -> dict[str, results.Study]:
    """The small study by recipe, as far as docs/results has it."""
    folders = {recipe: RESULTS / f"small_{recipe}" for recipe in WORDS}
    return {recipe: load(folder) for recipe, folder in folders.items() if folder.exists()}


def read_all(study: results.Study) -> dict[str, list[Run]]:
    """By arm, the runs of a study by seed."""
    found: dict[str, list[Run]] = {}
    for (arm, seed), run in study.runs.items():
        values = {
            name: np.array([probe.metrics[name] for probe in run.probes], float)
            for name in (LOSS, *MEASURES)
        }
        tokens = np.array([probe.tokens for probe in run.probes])
        commit = run.environment["git"]["sha"][:7]
        found.setdefault(arm, []).append(Run(arm, seed, commit, tokens, values))
    return {arm: sorted(runs, key=lambda run: run.seed) for arm, runs in sorted(found.items())}


def first_screen(by_recipe: dict[str, results.Study]) -> str:
    """The text between the marks of the README."""
    runs = {recipe: read_all(study) for recipe, study in by_recipe.items()}
    return block(runs["original"], runs.get("fixed"), verdicts(by_recipe))


def table(runs: dict[str, list[Run]]) -> str:
    """The four arms as a table: mean over seeds, in brackets the range where there are several."""
    columns = " | ".join(f"PR {title}" for title in MEASURES.values())
    lines = [
        f"| arm | seeds | validation loss, nat | {columns} | commit |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        of_arm = runs.get(arm, [])
        seeds = ", ".join(str(run.seed) for run in of_arm)
        cells = [_cell([run.values[LOSS][-1] for run in of_arm], 3)]
        cells += [_cell([run.values[name][-1] for run in of_arm], 1) for name in MEASURES]
        commits = ", ".join(sorted({run.commit for run in of_arm}))
        row = (arms_lib.label(arm), seeds or "not run yet", *cells, commits or "-")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def answer(runs: dict[str, list[Run]], recipe: str) -> str:
    """What the finished runs say so far, in two sentences with their scope."""
    by_optimizer = WORDS[recipe]
    metric = "pr/key/post_rope/raw"
    said = []
    for optimizer, words in by_optimizer.items():
        ends = [
            f"{_cell([run.values[metric][-1] for run in runs[arm]], 1)} {how}"
            for arm, how in words.items()
            if arm in runs
        ]
        if ends:
            said.append(f"{optimizer}'s keys end at {', '.join(ends)}")
    missing = [arms_lib.label(arm) for arm in ARMS if arm not in runs]
    named = {arm for words in by_optimizer.values() for arm in words} | set(ARMS)
    fewest = min(len(of_arm) for arm, of_arm in runs.items() if arm in named)
    tokens = drawing.count(max(int(run.tokens[-1]) for of in runs.values() for run in of))
    if missing or fewest < SEEDS:
        scope = f"{fewest} seed{'s' * (fewest > 1)} of {SEEDS}, so nothing is decided"
    else:
        scope = f"{fewest} seeds"
    gaps = f"; not run yet: {' and '.join(missing)}" if missing else ""
    start = f"**So far** (PR after RoPE, out of {HEAD_DIM}): "
    if recipe == "fixed":
        start = "**With learning rates tuned and no decay of gamma**: "
    return f"{start}{'; '.join(said)}. {HOW[recipe]} {tokens} tokens of docstrings; {scope}{gaps}."


def verdicts(by_recipe: dict[str, results.Study]) -> str:
    """Every question with its verdict, by the rules of docs/statistics.md, for each recipe."""
    judged = {recipe: judge.judge(study) for recipe, study in by_recipe.items()}
    rows = {
        f"{verdict.name}: {verdict.question}": [
            each.verdict(verdict.name).headline for each in judged.values()
        ]
        for verdict in next(iter(judged.values())).verdicts
        if not verdict.left_out
    }
    for optimizer, label in LABELS.items():
        shares = [
            next(a.share for a in each.attributions if a.optimizer == optimizer) or "not asked"
            for each in judged.values()
        ]
        if set(shares) != {"not asked"}:
            rows[f"What of the PR that QK-Norm costs {label} is the decay of gamma?"] = shares
    head = ["verdict", *(f"recipe `{recipe}`" for recipe in judged)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {question} | {' | '.join(words)} |" for question, words in rows.items()]
    return "\n".join(lines)


def block(
    runs: dict[str, list[Run]], fixed: dict[str, list[Run]] | None = None, judged: str = ""
) -> str:
    """The answer, the verdicts, and the figure and table of recipe original."""
    said = [answer(runs, "original"), *([answer(fixed, "fixed")] if fixed else [])]
    rules = (
        "Verdicts follow [rules that were fixed before the data](docs/statistics.md) and are about "
        "this scale alone. "
    )
    note = (
        "Figure and table are of recipe `original`, in which the gammas of QK-Norm decay: means "
        "over the seeds, at the last step in the table, with their range in brackets. The figure "
        "also shows controls without that decay."
    )
    parts = [textwrap.fill(words, 112) for words in said]
    parts += [judged] if judged else []
    parts += [f"![{ALT}](docs/figures/{FIGURE.name})", table(runs)]
    parts += [textwrap.fill(rules + note if judged else note, 112)]
    return "\n\n".join(parts)


def _cell(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


@drawing.styled
def figure(runs: dict[str, list[Run]]) -> Any:
    """PR of the keys over training, before and after RoPE: means, and one thin line per seed."""
    drawn = {arm: runs[arm] for arm in DRAWN if arm in runs}
    looks = arms_lib.looks(DRAWN)
    panels_figure = drawing.new_figure(7.4, 3.5)
    panels = panels_figure.subplots(1, 2, sharey=True)
    for axes, (metric, title) in zip(panels, MEASURES.items(), strict=True):
        axes.patch.set_visible(False)
        for arm, of_arm in drawn.items():
            hue, line, marker = looks[arm]
            for run in of_arm if len(of_arm) > 1 else ():
                axes.plot(run.tokens, run.values[metric], color=hue, ls=line, lw=0.6, alpha=0.6)
            count = len(of_arm)
            axes.plot(
                of_arm[0].tokens,
                np.mean([run.values[metric] for run in of_arm], axis=0),
                color=hue,
                ls=line,
                marker=marker,
                lw=1.6,
                label=f"{arms_lib.short(arm)} ({count} seed{'s' * (count > 1)})",
            )
        drawing.token_axis(axes, sorted({int(t) for of in drawn.values() for t in of[0].tokens}))
        axes.set_title(title)
        axes.set_ylim(0, HEAD_DIM)
    panels[0].set_ylabel(f"PR of keys (directions of {HEAD_DIM})")
    panels_figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        fontsize=8,
        handlelength=3.2,
    )
    return panels_figure


def svg(runs: dict[str, list[Run]]) -> str:
    """The figure with a second set of colours for readers whose system is dark."""
    drawn = drawing.to_bytes(figure(runs), "svg").decode()
    rules = [
        f'[style*="{kind}: {light}"] {{ {kind}: {dark} !important }}'
        for light, dark in DARK.items()
        for kind in ("fill", "stroke")
    ]
    rules.append(f"text {{ fill: {DARK['#000000']} }}")
    style = "\n   ".join(rules)
    themed = (
        f"<style>\n  @media (prefers-color-scheme: dark) {{\n   {style}\n  }}\n </style>\n <defs>"
    )
    return re.sub(r"<defs>", lambda _: themed, drawn, count=1)


def studies() -> list[pathlib.Path]:
    """The folders of docs/results, one a study."""
    return sorted(path.parent for path in RESULTS.glob("*/study.json"))


def unpack(folder: pathlib.Path, workdir: pathlib.Path) -> None:
    """Makes a study directory, without checkpoints, of a folder of docs/results."""
    for name in ("study.json", "dataset.json"):
        shutil.copy(folder / name, workdir / name)
    if (folder / "surgery").exists():
        shutil.copytree(folder / "surgery", workdir / "surgery")
    if (folder / "sweep").exists():
        (workdir / "sweep").mkdir()
        shutil.copy(folder / "sweep" / "learning_rates.json", workdir / "sweep")
        _extract(folder / "sweep" / "runs.tar.gz", workdir / "sweep")
    for archive in sorted((folder / "runs").glob("*.tar.gz")):
        arm = archive.name.partition("_seed_")[0]
        _extract(archive, workdir / "runs" / arm)


def _extract(archive: pathlib.Path, into: pathlib.Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 on
        tar.extractall(into)


def write_report(folder: pathlib.Path, out: pathlib.Path) -> None:
    """report.md, results.csv and figures/ of a folder of docs/results, as its archives stand."""
    with tempfile.TemporaryDirectory() as workdir:
        unpack(folder, pathlib.Path(workdir))
        page = report.make_report(workdir, out)
    page.unlink()  # report.md and the figures say the same, and can be read where they lie


def load(folder: pathlib.Path) -> results.Study:
    """The numbers of a folder of docs/results; files of its runs are not kept."""
    with tempfile.TemporaryDirectory() as workdir:
        unpack(folder, pathlib.Path(workdir))
        return results.load_study(workdir)


def with_tables(page: str, folder: pathlib.Path) -> str:
    """The page of a study with its tables: runs, contrasts, and what became of predictions."""
    study = load(folder)
    page = with_block(page, "runs", run_table(study))
    page = with_block(page, "contrasts", contrasts.contrasts(study))
    if MARK.format("predictions") in page:
        page = with_block(page, "predictions", contrasts.predictions(study))
    return page


def run_table(study: results.Study) -> str:
    """The runs of a study at their last step."""
    columns = {
        LOSS: ("validation loss, nat", 3),
        "pr/key/pre_norm/raw": ("pre_norm raw", 1),
        "pr/key/post_norm/raw": ("post_norm raw", 1),
        "pr/key/pre_rope/raw": ("pre_rope raw", 1),
        "pr/key/pre_rope/centred": ("pre_rope centred", 1),
        "pr/key/post_rope/raw": ("post_rope raw", 1),
        "gamma/key_pr": ("gamma's own PR", 1),
    }
    heads = " | ".join(title for title, _ in columns.values())
    lines = [
        f"| arm | seed | {heads} | starts | params_sha256 |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for (arm, seed), run in study.runs.items():
        cells = [number(run.value(name), digits) for name, (_, digits) in columns.items()]
        starts = len(run.environment["starts"])
        digest = run.summary["params_sha256"][:12]
        lines.append(f"| {arm} | {seed} | {' | '.join(cells)} | {starts} | {digest} |")
    return "\n".join(lines)


def recipes() -> str:
    """The settings in which the recipes differ at full scale, as the plan of a study has them."""
    from configs import study

    found = plan_cost.recipe_differences(plan_config.resolve(study.get_config("full")))
    lines = ["| setting | fixed | original | arms |", "|---|---|---|---|"]
    lines += [f"| `{field}` | {ours} | {theirs} | {arms} |" for field, ours, theirs, arms in found]
    return "\n".join(lines)


def with_block(page: str, name: str, written: str) -> str:
    """The page with a block between its two marks."""
    start, end = MARK.format(name), END.format(name)
    before, _, rest = page.partition(start)
    _, _, after = rest.partition(end)
    assert after, f"the marks {start} and {end} are not there"
    return f"{before}{start}\n{written}\n{end}{after}"


def main() -> None:
    by_recipe = published()
    runs = read_all(by_recipe["original"])
    FIGURE.write_text(svg(runs))
    README.write_text(with_block(README.read_text(), "results", first_screen(by_recipe)))
    for folder in studies():
        write_report(folder, folder)
        page = folder / "README.md"
        page.write_text(with_tables(page.read_text(), folder))
    DEVIATIONS.write_text(with_block(DEVIATIONS.read_text(), "recipes", "\n" + recipes() + "\n"))
    print(table(runs))


if __name__ == "__main__":
    main()
