"""The tail of a report: the original's numbers, deviations, runs, environment, commands."""

import shlex
from collections.abc import Iterator
from typing import Any

from qkjax.report import arms, drawing, original
from qkjax.report.blocks import (
    ABSENT,
    Block,
    Code,
    Notes,
    Section,
    Table,
    Text,
    counted,
    mean,
    number,
    without_empty,
)
from qkjax.report.material import Material
from qkjax.runs.results import PR, RunResult
from qkjax.verdicts.results import Study

CSV_COLUMNS = (
    "table: run (the numbers reported), evaluation (one probe of training), sweep, downstream, "
    "surgery, clause or verdict",
    "name: the arm, or the clause, hypothesis or attribution",
    "seed, step: of the run and its probe; empty where there is none",
    "metric: a name of docs/metrics.md; val/loss/first_half and second_half are halves of the "
    "validation split; params_sha256 names the parameters",
    "value: shortest decimal that reads back as the same number; empty where it was not finite",
)


def comparison(material: Material) -> Section:
    """The original's published numbers beside the study's, where the setting allows."""
    study = material.study
    blocks: list[Block] = [Text(_setting(material))]
    comparable = material.head_dim == original.HEAD_DIM
    by_steps = study.plan["recipe"] == "original"  # its rates and decays act by step
    names = list(original.PUBLISHED_PR[0])
    rows = []
    for tokens, published in original.PUBLISHED_PR.items():
        step = tokens // original.TOKENS_PER_STEP
        cells = [f"{step:,}" if by_steps else drawing.count(tokens)]
        for arm in names:
            runs = study.of_arm(arm) if comparable else []
            ours = _at_step(runs, step) if by_steps else _at_tokens(runs, tokens)
            cells += [number(published[arm], 1), number(ours, 1)]
        rows.append(tuple(cells))
    columns = (head for arm in names for head in (f"{arms.short(arm)}: original", "this study"))
    table = Table(
        f"Post-RoPE raw PR of keys by training {'steps' if by_steps else 'tokens'}: the original's "
        "pilot (one seed, read off its plot, ±0.3) and the mean over seeds of this study.",
        ("Steps" if by_steps else "Tokens", *columns),
        tuple(rows),
    )
    blocks += [without_empty(table), Notes(original.OTHER_RESULTS)]
    return Section("original", "Beside the original's numbers", tuple(blocks))


def _setting(material: Material) -> str:
    plan = material.study.plan
    run = next(iter(material.study.runs.values()), None)
    if material.head_dim != original.HEAD_DIM:
        return (
            f"Heads here have {material.head_dim} dimensions, the original's "
            f"{original.HEAD_DIM}: their Participation Ratios cannot be compared, so the table has "
            "no number of this study."
        )
    step = run.config.train.tokens_per_step if run else None
    own_rates = plan["scale"] == "pilot" and not plan.get("sweep")
    if plan["recipe"] == "original" and step == original.TOKENS_PER_STEP and own_rates:
        return (
            "This study runs the recipe of the original's pilot at its batch size (4,096 tokens a "
            "step: certain for its AdamW arms only): the same setting except for the deviations "
            "below. The original has one seed, so a difference says no more than that both were "
            "measured."
        )
    layers = counted(run.config.model.num_layers, "layer") if run else ""
    here = (
        f" Here a run has {layers} and "
        f"{run.config.train.tokens_per_step:,} tokens a step, the original's 22 and "
        f"{original.TOKENS_PER_STEP:,}. – stands where no evaluation is near."
        if run
        else ""
    )
    return (
        "Another recipe, batch size or learning rate than the original's pilot: set beside it for "
        f"orientation, not as a replication.{here}"
    )


def _at_tokens(runs: list[RunResult], tokens: int) -> float | None:
    values = [run.at_step(PR, tokens // run.config.train.tokens_per_step) for run in runs]
    return mean(values) if values else None


def _at_step(runs: list[RunResult], step: int) -> float | None:
    """At the evaluation nearest to the step, if that is within 1%: budgets are rounded."""
    if not runs:
        return None
    nearest = min((probe.step for probe in runs[0].probes), key=lambda found: abs(found - step))
    if abs(nearest - step) > 0.01 * step:
        return None
    return mean([run.at_step(PR, nearest) for run in runs])


def deviations(material: Material) -> Section:
    """Where the program departs from the original, and which recipe this study runs."""
    recipe = material.study.plan["recipe"]
    words = "ours" if recipe == "fixed" else "what the original's code does, where it is known"
    return Section(
        "deviations",
        "Deviations from the original",
        (
            Text(f"This study runs recipe {recipe}: {words}."),
            Table(
                "Every known difference; sizes are those of the 88M model.",
                ("", "Original", "Here"),
                original.DEVIATIONS,
                words=3,
            ),
        ),
    )


def record(material: Material) -> Section:
    """Runs, datasets, environment, commands: what it takes to do this again."""
    study = material.study
    return Section(
        "record",
        "Record",
        (
            Text(
                f"Plan: {study.plan.get('words') or study.plan['scale']}, fingerprint "
                f"`{study.plan.get('fingerprint', ABSENT)}`."
            ),
            *_left_out(study),
            *_runs(study),
            *_environment(study),
            *_commands(study),
            Text(
                "results.csv holds the numbers of runs, evaluations, sweep, scores and verdicts, "
                "one per row, sorted, without paths, times and rates; equal results give equal "
                "bytes. "
                "Its columns:"
            ),
            Notes(CSV_COLUMNS),
        ),
    )


def _left_out(study: Study) -> Iterator[Block]:
    twins = study.plan.get("left_out") or {}
    if twins:
        said = (
            f"{arms.label(arm)} (trains the same as {arms.label(twin)})"
            for arm, twin in twins.items()
        )
        yield Text(f"Left out of the plan: {', '.join(said)}.")


def _runs(study: Study) -> Iterator[Block]:
    rows = []
    for (arm, seed), run in study.runs.items():
        summary = run.summary
        status = f"diverged at step {summary['diverged_step']:,}" if run.diverged else "finished"
        rows.append(
            (
                arms.label(arm),
                str(seed),
                status,
                f"runs/{arm}/seed_{seed}",
                f"{summary['step']:,}",
                f"{summary['tokens']:,}",
                number(summary.get("epochs"), 2),
                number(summary.get("wall_seconds"), 0),
                f"`{str(summary['params_sha256'])[:16]}`",
            )
        )
    if rows:
        yield Table(
            "Runs.",
            (
                "Arm",
                "Seed",
                "Status",
                "Directory",
                "Steps",
                "Tokens",
                "Epochs",
                "Wall time (s)",
                "params_sha256",
            ),
            tuple(rows),
            words=4,
        )
        fingerprints = sorted({run.dataset_fingerprint for run in study.runs.values()})
        yield Text(f"Dataset fingerprint of every run: `{'`, `'.join(fingerprints)}`.")


def _environment(study: Study) -> Iterator[Block]:
    """What runs have in common, and which ones differ."""
    described: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for (arm, seed), run in study.runs.items():
        described.setdefault(_facts(run.environment), []).append(f"{arm} seed {seed}")
    for facts, names in described.items():
        if facts:
            where = "every run" if len(described) == 1 else ", ".join(names)
            yield Table(f"Environment of {where}.", ("", "Value"), facts, words=2)


def _facts(environment: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    devices = environment.get("devices") or {}
    git = environment.get("git") or {}
    dirty = " with changes" if git.get("dirty") else ""
    found = {
        "devices": f"{devices.get('count')} × {devices.get('kind')} ({devices.get('platform')})"
        if devices
        else "",
        "processes": str(devices.get("process_count", "")),
        "Python": str(environment.get("python", "")),
        **{str(name): str(v) for name, v in (environment.get("versions") or {}).items() if v},
        **{str(name): str(v) for name, v in (environment.get("variables") or {}).items()},
        "source": f"{git['sha']}{dirty}" if git.get("sha") else "",
    }
    return tuple((name, value) for name, value in found.items() if value)


def _commands(study: Study) -> Iterator[Block]:
    lines = []
    for run in study.runs.values():
        command = run.environment.get("command")
        if isinstance(command, list):
            lines.append(shlex.join(map(str, command)))
    if lines:
        yield Text("The command of every run's latest start (secrets masked):")
        yield Code("\n".join(lines))
