"""What a study costs before it runs, and what its recipe changes: the text of --dry_run."""

import collections
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from qkjax import chips, flops, presets
from qkjax import config as config_lib
from qkjax.runs.directory import RunDirectory
from qkjax.study import plan_arms
from qkjax.study.plan import EXPORT, EXTENSION, SURGERY, TRAINING, Plan, Step
from qkjax.study.plan_config import StudyConfig
from qkjax.targets import estimate, roofline
from qkjax.targets import target as target_lib

# What a config derives from tokens, tokens_per_step and the fractions of the schedule.
_DERIVED = (
    "schedule.",
    "train.num_steps",
    "train.sequences_per_step",
    "eval.steps",
    "checkpoint.steps",
)
# Model FLOP a second of one CPU core: whole runs of small with their evaluations, docs/results.
_CORE_FLOP_PER_SECOND = 65e9
_CORES = (1, 2, 8)
_CHECKPOINTS = 4  # most that a run has at one time: step 0, two kept, one being written


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one training step of the plan."""

    tokens: int  # trained on
    evaluated: int  # by its evaluations, but for those of the whole split
    whole_passes: int  # evaluations of the whole validation split
    flop: float  # training, PaLM convention
    disk: int  # bytes of checkpoints at their most


def cost(plan: Plan, step: Step) -> Cost:
    """Tokens, arithmetic and disk of a training step."""
    run = plan.run_config(step, step.learning_rate)
    tokens = run.train.num_steps * run.train.tokens_per_step
    parameters = flops.num_parameters(run.model)
    passes = {run.eval.tokens: len(run.eval.steps)}  # tokens, 0 = all, and how often
    if run.eval.final_tokens >= 0:
        passes[run.eval.final_tokens] = passes.get(run.eval.final_tokens, 0) + 1
    # Muon has one moment of every block matrix, AdamW two; 12 bytes a parameter is the upper bound.
    state = 12 * parameters
    return Cost(
        tokens=tokens,
        evaluated=sum(size * times for size, times in passes.items()),
        whole_passes=passes.get(0, 0),
        flop=tokens * flops.training_flops_per_token(run.model, parameters),
        disk=min(len(run.checkpoint.steps), _CHECKPOINTS) * state,
    )


def measured_rates(workdir: pathlib.Path) -> dict[str, float]:
    """Tokens per second by arm: of the finished runs below a study directory, all in all.

    Their evaluations, start and compilation are in it, as wall_seconds of summary.json has them.
    """
    tokens: collections.Counter[str] = collections.Counter()
    seconds: collections.Counter[str] = collections.Counter()
    for path in sorted(workdir.glob("*/*/*/summary.json")):
        directory = RunDirectory(path.parent)
        summary = directory.read_summary()
        directory.check_files()
        if summary is not None and not summary["diverged"] and "wall_seconds" in summary:
            tokens[summary["arm"]] += summary["tokens"]
            seconds[summary["arm"]] += summary["wall_seconds"]
    return {arm: tokens[arm] / seconds[arm] for arm in tokens if seconds[arm] > 0}


def rates_on(plan: Plan, target: target_lib.Target) -> dict[str, float]:
    """Tokens per second by arm on a target, with evaluations, of compiled programs: at most.

    Arms that compute the same share a compilation.

    Raises:
        UsageError: no compiler here, or the target's devices do not fit a config.
        OutOfMemoryError: the target's devices do not hold a program.
    """
    found: dict[Any, float] = {}
    rates = {}
    for name, arm in plan.arms.items():
        run = arm.config
        norm = "none" if run.model.qk_norm == "none" else "learned"
        shape = dataclasses.replace(run.model, qk_norm=norm)
        key = (shape, run.optimizer.name, bool(run.optimizer.qk_clip), run.muon.granularity)
        if key not in found:
            made = estimate.make(run, target)
            tokens = run.train.num_steps * run.train.tokens_per_step
            found[key] = tokens / (3600 * made.hours)
        rates[name] = found[key]
    return rates


def describe(
    plan: Plan,
    rates: Mapping[str, float],
    target: target_lib.Target | None = None,
    price: float | None = None,
) -> str:
    """The plan, its costs and what the other recipe would change, for people.

    Args:
        rates: tokens per second by arm; the slowest of them serves for other arms.
        target: what `rates` were estimated for; None: they were measured.
        price: of a device of the target for an hour.
    """
    costs = _costs(plan, rates, target, price)
    return "\n".join([*_steps(plan), "", *costs, "", *_recipes(plan.study)])


def _steps(plan: Plan) -> Iterator[str]:
    study = plan.study
    yield f"scale {study.scale}, recipe {study.recipe}{', quick' if study.quick else ''}"
    yield f"{len(plan.steps)} {'step' if len(plan.steps) == 1 else 'steps'}:"
    for step in plan.steps:
        rate = "" if step.learning_rate is None else f"learning rate {step.learning_rate:g}"
        yield f"  {step.kind:<10}  {step.name:<44}  {step.fingerprint[:12]}  {rate}".rstrip()
    for control, arm in plan.left_out.items():
        yield f"left out: {control}, because {arm} trains the same"


def _costs(
    plan: Plan,
    rates: Mapping[str, float],
    target: target_lib.Target | None,
    price: float | None,
) -> Iterator[str]:
    yield f"{'kind':<10} {'runs':>5} {'tokens':>15} {'PFLOP':>12} {'checkpoints':>12} {'time':>9}"
    totals: list[tuple[int, float, int, float | None]] = []
    for kind in TRAINING:
        steps = [step for step in plan.steps if step.kind == kind]
        if not steps:
            continue
        costs = [(step, cost(plan, step)) for step in steps]
        total = (
            sum(c.tokens for _, c in costs),
            sum(c.flop for _, c in costs),
            sum(c.disk for _, c in costs),
            sum(c.tokens / _rate(rates, step.arm) for step, c in costs) if rates else None,
        )
        totals.append(total)
        at_most = "<=" if kind == EXTENSION else ""
        yield _row(kind, f"{at_most}{len(steps)}", total)
    time = None
    if totals:
        tokens, flop, disk, seconds = zip(*totals, strict=True)
        time = sum(s for s in seconds if s is not None) if rates else None
        yield _row("all", "", (sum(tokens), sum(flop), sum(disk), time))
    parameters = [flops.num_parameters(arm.config.model) for arm in plan.arms.values()]
    exports = sum(step.kind == EXPORT for step in plan.steps)
    if exports:
        yield f"exports: {exports}, about {4 * max(parameters) / 1e9:.2f} GB each"
    surgery = [step for step in plan.steps if step.kind == SURGERY]
    if surgery:
        passes = sum(1 + len(plan.surgery_ranks(step.arm)) for step in surgery)
        yield (
            f"rank surgery: {len(surgery)} {'run' if len(surgery) == 1 else 'runs'}, forward "
            f"passes only, at most {passes * plan.study.surgery.tokens:,} tokens"
        )
    training = [cost(plan, step) for step in plan.steps if step.kind in TRAINING]
    whole = sum(c.whole_passes for c in training)
    yield (
        f"arms: {len(plan.arms)}, parameters {min(parameters):,} to {max(parameters):,}; tokens of "
        "training alone; on top, forward alone, come evaluations of "
        f"{sum(c.evaluated for c in training):,} tokens"
        + (f" and {whole} passes over the whole validation split" if whole else "")
    )
    if rates:
        shown = ", ".join(f"{arm or 'all arms'} {rate:,.0f}" for arm, rate in rates.items())
        yield f"time: one run after the other, at tokens/s: {shown}"
        if target is not None:
            yield f"time on {target}, compiled, not run, at least: {roofline.ASSUMPTIONS}"
            if price is not None and time is not None:
                money = time / 3600 * target.num_devices * price
                yield f"cost: {money:,.2f} at {price:g} an hour and device, at least"
    else:
        yield (
            "time: no rate is known yet. Give --tokens_per_second=N, a --workdir where a "
            "run of this study is finished, or --aot=h100:8. Training alone takes:"
        )
        yield from chips.hours_table(sum(c.flop for c in training))
        yield (
            f"CPU cores, a run on each (--jobs), at {_CORE_FLOP_PER_SECOND / 1e9:.0f} GFLOP/s as "
            "runs of small were measured, in h:mm:ss: "
            + ", ".join(f"{n} {_core_time(training, n)}" for n in _CORES)
        )


def _core_time(costs: list[Cost], cores: int) -> str:
    return duration(_longest([c.flop for c in costs], cores) / _CORE_FLOP_PER_SECOND)


def _longest(work: list[float], workers: int) -> float:
    """What the busiest of the workers does, where each takes the next piece as it is free."""
    busy = [0.0] * workers
    for piece in work:
        busy[busy.index(min(busy))] += piece
    return max(busy)


def _rate(rates: Mapping[str, float], arm: str) -> float:
    return rates.get(arm, min(rates.values()))


def _row(kind: str, runs: str, total: tuple[int, float, int, float | None]) -> str:
    tokens, flop, disk, seconds = total
    time = "-" if seconds is None else duration(seconds)
    gigabytes = f"{disk / 1e9:,.2f} GB"
    return f"{kind:<10} {runs:>5} {tokens:>15,} {flop / 1e15:>12,.4g} {gigabytes:>12} {time:>9}"


def duration(seconds: float) -> str:
    """As hours:minutes:seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _recipes(study: StudyConfig) -> Iterator[str]:
    yield f"recipes at scale {study.scale} differ in (every other setting is the same in both):"
    table = [("setting", *presets.RECIPES, "arms")]
    table += [(field, str(a), str(b), arms) for field, a, b, arms in recipe_differences(study)]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    for field, fixed, original, arms in table:
        yield f"  {field:<{widths[0]}}  {fixed:<{widths[1]}}  {original:<{widths[2]}}  {arms}"


def recipe_differences(study: StudyConfig) -> list[tuple[str, Any, Any, str]]:
    """(setting, its value in recipe fixed, in recipe original, the arms that this is true of).

    Of the arms, not of the controls: some of their words exist in one recipe only. Without what
    follows from other settings (numbers of steps), and without Muon's settings in AdamW arms.
    """
    bare = dataclasses.replace(study, controls=(), optional_controls=())
    sides = [
        plan_arms.make_arms(dataclasses.replace(bare, recipe=recipe))[0]
        for recipe in presets.RECIPES
    ]
    found: dict[str, tuple[str, Any, Any, list[str]]] = {}
    for name in study.arms:
        fixed, original = (_settings(side[name].config) for side in sides)
        for field in dict.fromkeys((*fixed, *original)):
            pair = fixed.get(field), original.get(field)
            if pair[0] != pair[1]:
                found.setdefault(f"{field} {pair}", (field, *pair, []))[3].append(name)
    return [
        (field, a, b, "all" if names == list(study.arms) else ", ".join(names))
        for field, a, b, names in found.values()
    ]


def _settings(run: config_lib.Config) -> dict[str, Any]:
    unused = ("muon.",) if run.optimizer.name != "muon" else ()
    left_out = ("arm", "recipe", *_DERIVED, *unused)
    return {
        field: value
        for field, value in plan_arms.identity(run).items()
        if not field.startswith(left_out)
    }
