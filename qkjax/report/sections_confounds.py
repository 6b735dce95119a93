"""What the dimensions are for (rank surgery), and what else than the arm may move a PR."""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import stdev

from qkjax.report import arms, charts
from qkjax.report.blocks import (
    ABSENT,
    Block,
    Charts,
    Notes,
    Section,
    Table,
    Text,
    mean,
    number,
    short,
    without_empty,
)
from qkjax.report.material import SKIPPED, Material, chosen_rate
from qkjax.runs.results import LOSS, PR
from qkjax.trained import rank_curves
from qkjax.trained.rank_curves import TOLERANCE
from qkjax.verdicts import exposure, statistics

_FEWEST = 3  # seeds of an interval over ranks


def functional_rank(material: Material) -> Section:
    """Directions of the keys that the loss needs, by arm and seed."""
    title = "What the dimensions are for"
    if not material.surgery:
        return Section("rank", title, (Text(_no_surgery(material)),))
    tokens = sorted({row.tokens for rows in material.surgery.values() for row in rows})
    ranks = sorted({row.rank for rows in material.surgery.values() for row in rows})
    blocks: list[Block] = [
        Text(
            "Rank surgery keeps the strongest r directions of every head's keys, in all layers at "
            "once, around the mean key and before RoPE. The smallest number of directions that "
            "costs at most "
            f"{TOLERANCE:g} nat of validation loss is the number that the model uses. Measured on "
            f"{' or '.join(f'{n:,}' for n in tokens)} validation tokens, at the ranks "
            f"{', '.join(map(str, ranks))}: the true number may be smaller, down to the next "
            "smaller rank."
        ),
        _rank_table(material),
        *_rank_charts(material),
    ]
    return Section("rank", title, tuple(blocks))


def _no_surgery(material: Material) -> str:
    if not material.study.plan.get("surgery"):
        return "Not part of this study: its plan has no rank surgery."
    whys = {
        why
        for arm, seed in material.study.runs
        for status, why in [material.noted(f"surgery/{arm}/seed_{seed}")]
        if status == SKIPPED
    }
    because = f" Skipped: {'; '.join(sorted(whys))}." if whys else ""
    return f"No result yet: no run has been measured (surgery/<arm>/seed_<n>.csv).{because}"


def _rank_table(material: Material) -> Table:
    rows = []
    for arm in material.study.arms:
        found = {
            seed: rank_curves.dimensions_used(rows_)
            for (name, seed), rows_ in material.surgery.items()
            if name == arm
        }
        ranks = [float(rank) for rank in found.values() if rank is not None]
        whole = bool(ranks) and len(ranks) == len(found)
        several = len(ranks) >= _FEWEST and len(set(ranks)) > 1
        ends = _mean_interval(ranks) if whole and several else None
        by_seed = ", ".join(f"{seed}: {rank or 'more'}" for seed, rank in found.items())
        rows.append(
            (
                arms.label(arm),
                number(mean(ranks) if whole else None, 1),
                ABSENT if ends is None else f"{ends[0]:.1f} to {ends[1]:.1f}",
                by_seed or ABSENT,
            )
        )
    return Table(
        f"Directions within {TOLERANCE:g} nat, of {material.head_dim}: mean over seeds.",
        ("Arm", "Directions", "95% over seeds", "By seed"),
        tuple(rows),
        notes=(
            f"An interval needs {_FEWEST} seeds that do not all agree: the ranks are too few to "
            "show a smaller spread.",
        ),
    )


def _mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Two-sided 95% of the mean, t with n - 1 degrees of freedom."""
    error = stdev(values) / math.sqrt(len(values))
    half = statistics.quantile(len(values) - 1, statistics.LEVEL) * error
    return mean(values) - half, mean(values) + half


def _rank_charts(material: Material) -> Iterator[Block]:
    by_arm: dict[str, list[charts.RankCurve]] = {}
    for arm in material.study.arms:
        for (name, _), rows in material.surgery.items():
            top = [row for row in rows if row.kind == "top" and row.layer == rank_curves.ALL]
            if name == arm and top:
                pairs = tuple((row.rank, row.delta) for row in top)
                by_arm.setdefault(arm, []).append(pairs)
    shown = []
    for names, stem, words in material.groups(by_arm):
        curves = {arm: by_arm[arm] for arm in names}
        shown.append(
            charts.chart(
                f"rank_{stem}",
                f"Added loss against directions kept: {words}",
                f"Validation loss that keeping few directions costs; allowed {TOLERANCE:g} nat.",
                charts.added_loss(curves, TOLERANCE, material.head_dim, material.looks),
            )
        )
    if shown:
        yield Charts(
            "Added validation loss against the directions kept, mean over seeds. Below the dotted "
            f"line, at {TOLERANCE:g} nat, a model does not need the others.",
            tuple(shown),
        )


# --------------------------------------------------------------------------------------------
# Confounds.

_OF_SWEEP = (
    "Every arm runs at its own learning rate, and PR depends on the rate: an arm's PR is that of "
    "the arm at its rate. The figure and table of PR against the rate show how much.",
    "The rates were chosen by one tuning seed: the choice itself has the noise of a run. Rates "
    f"whose losses lie within {TOLERANCE:g} nat are flagged as a tie.",
)
_NAMED = (
    "Gammas move at the auxiliary rate in Muon arms and at the main rate in AdamW arms; the table "
    "gives rate and decay by arm.",
    "A PR is a mean over heads, then layers: two arms of equal mean may differ in every layer. The "
    "heat maps show the layers.",
)


def confounds(material: Material) -> Section:
    """Rates, gamma's exposure and loss: what moves with the arms beside what is asked."""
    if not material.study.runs:
        return Section("confounds", "What is confounded", (Text("No run has finished yet."),))
    blocks: list[Block] = [
        Notes((*_OF_SWEEP, *_NAMED) if material.study.plan.get("sweep") else _NAMED),
        *_exposure(material),
        *_over_rate(material),
        *_against_loss(material),
    ]
    return Section("confounds", "What is confounded", tuple(blocks))


def _exposure(material: Material) -> Iterator[Table]:
    """Gamma's own rate, tau, force of decay and logit cap, by arm."""
    rows = []
    for arm in material.study.arms:
        runs = material.study.of_arm(arm)
        if not runs or runs[0].config.model.qk_norm == "none":
            continue
        found = exposure.of_runs(runs)
        if found is None:
            rows.append((arms.label(arm), "frozen at 1", *[ABSENT] * 5))
            continue
        force, target = found.weight_decay, found.target
        # Decay towards 1 has another bound: gamma may reach 1 + 1/W.
        cap = found.largest_logit if force and target == 0 else None
        rows.append(
            (
                arms.label(arm),
                f"decayed to {target:g}" if force else "not decayed",
                f"{found.learning_rate:g}",
                short(force),
                short(found.tau),
                number(found.noise, 2),
                short(cap),
            )
        )
    if rows:
        yield without_empty(
            Table(
                "The gammas of QK-Norm: how fast they move and how strongly they are decayed.",
                (
                    "Arm",
                    "Gamma",
                    "Rate",
                    "Force W",
                    "tau",
                    "Noise √(rate / 2W)",
                    "Logit cap √head_dim / W²",
                ),
                tuple(rows),
                words=2,
                notes=(
                    "tau is the sum over steps of rate × W: decay to 0 alone multiplies gamma by "
                    "exp(-tau), and against Adam's normalised step |gamma| stays below 1/W, which "
                    f"caps the logits. Noise above {exposure.MOST_NOISE:g} dominates gamma, and "
                    "nothing is attributed then.",
                ),
            )
        )


def _over_rate(material: Material) -> Iterator[Block]:
    """PR of the sweep runs: what a rate alone does to it."""
    if not material.sweep_prs:
        return
    groups: dict[str, dict[str, list[charts.SweepPoint]]] = {}
    rows = []
    for arm, by_rate in material.sweep_prs.items():
        chosen = chosen_rate(material.study, arm)
        points = [charts.SweepPoint(rate, pr, rate == chosen) for rate, pr in by_rate.items()]
        groups.setdefault(arms.optimizer(arm), {})[arm] = points
        for point in points:
            mark = "chosen" if point.chosen else "diverged" if point.value is None else ABSENT
            rows.append((arms.label(arm), f"{point.rate:g}", number(point.value, 2), mark))
    scale = charts.Scale(
        f"PR of keys after RoPE\n(directions of {material.head_dim})",
        0.0,
        float(material.head_dim),
    )
    yield Charts(
        "PR against the learning rate: the runs of the sweep, shorter than those reported. The "
        "chosen rate is ringed.",
        tuple(
            charts.chart(
                f"pr_over_rate_{name}",
                f"PR against rate, {arms.family(name)}",
                "PR after RoPE of the sweep runs: "
                + "; ".join(map(_points, group, group.values())),
                charts.sweep(group, scale, material.looks),
            )
            for name, group in groups.items()
        ),
    )
    yield Table(
        "PR of every sweep run.",
        ("Arm", "Learning rate", f"PR after RoPE, of {material.head_dim}", ""),
        tuple(rows),
    )


def _points(arm: str, points: Sequence[charts.SweepPoint]) -> str:
    said = (f"{point.rate:g}: {number(point.value, 1)}" for point in points)
    return f"{arms.label(arm)} {', '.join(said)}"


def _against_loss(material: Material) -> Iterator[Charts]:
    points: Mapping[str, list[tuple[float, float]]] = {
        arm: [
            (run.value(PR), run.value(LOSS))
            for run in material.study.of_arm(arm)
            if not run.diverged
        ]
        for arm in material.study.arms
    }
    found = {arm: of_arm for arm, of_arm in points.items() if of_arm}
    if len(found) < 2:
        return
    yield Charts(
        "PR against validation loss at the end of training, one point per run. If a high PR were "
        "good by itself, points to the right would be lower.",
        (
            charts.chart(
                "pr_against_loss",
                "Loss against PR",
                "Validation loss against PR after RoPE of every run: "
                + "; ".join(
                    f"{arms.label(arm)} " + ", ".join(f"{pr:.1f}: {loss:.3f}" for pr, loss in pairs)
                    for arm, pairs in found.items()
                ),
                charts.scatter(
                    found,
                    f"PR of keys after RoPE (directions of {material.head_dim})",
                    "validation loss (nat per token)",
                    material.looks,
                ),
            ),
        ),
    )
