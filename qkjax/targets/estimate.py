"""What a run takes on a target, from its compiled programs: numbers, and text for people."""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from qkjax import flops
from qkjax.config import Config
from qkjax.targets import launch, roofline
from qkjax.targets.target import Target

PROGRAMS = ("train", "evaluate", "decompose")


@dataclasses.dataclass(frozen=True)
class Step:
    """The estimate of a train step on a target."""

    seconds: float
    tokens_per_second: float
    mfu: float  # PaLM convention
    model_flop: float  # on all devices, attention over the full square
    causal_flop: float  # likewise, half of the square
    compiled_flop: float  # what its program computes, on all devices


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The estimate of a run on a target."""

    target: Target
    config: Config  # as the target computes it
    programs: tuple[dict[str, Any], ...]  # of `programs.describe`
    step: Step
    hours: float  # with evaluations; without start, compilation, checkpoints


def of_step(config: Config, target: Target, train: dict[str, Any]) -> Step:
    """The estimate of the train step that `programs.describe` describes."""
    seconds = train["seconds"]["total"]
    tokens = config.train.tokens_per_step
    parameters = flops.num_parameters(config.model)
    square = tokens * flops.training_flops_per_token(config.model, parameters)
    compiled = sum(train["product_flop"].values()) + train["attention_flop"]
    return Step(
        seconds,
        tokens / seconds,
        square / seconds / (target.num_devices * target.chip.bfloat16),
        square,
        tokens * flops.training_flops_per_token(config.model, parameters, causal=True),
        compiled * target.num_devices,
    )


def make(config: Config, target: Target) -> Estimate:
    """Compiles a run's programs for the target, in another process.

    Raises:
        UsageError: no compiler here, or the target's devices do not fit the config.
        OutOfMemoryError: the target's devices do not hold a program.
    """
    # A minute or two of one core, in a process that says nothing.
    what = f"{config.arm}, scale {config.scale}"
    print(f"compiling {what}, for {target}", file=sys.stderr, flush=True)
    answers = launch.ask(config, target, PROGRAMS)
    most = max(answer["device_bytes"] for answer in answers) / 1e9
    memory = f"{most:.2f} of {target.chip.memory / 1e9:.0f} GB a device"
    print(f"compiled {what}: {memory}", file=sys.stderr, flush=True)
    train, evaluate, decompose = answers
    step = of_step(config, target, train)
    rows = config.eval.batch_sequences * target.num_devices * config.model.sequence_length
    passes = [config.eval.tokens] * len(config.eval.steps)
    if config.eval.final_tokens >= 0:
        passes.append(config.eval.final_tokens)
    # Of a pass over the whole split only the dataset knows the size: a batch stands for it.
    batches = sum(max(1, -(-size // rows)) for size in passes)
    evaluations = (
        batches * evaluate["seconds"]["total"] + len(passes) * decompose["seconds"]["total"]
    )
    return Estimate(
        target,
        config.for_platform(target.chip.platform),
        tuple(answers),
        step,
        (config.train.num_steps * step.seconds + evaluations) / 3600,
    )


def describe(estimate: Estimate, price: float | None) -> str:
    """For people.

    Args:
        price: of one device for an hour, in any currency; None: no cost is named.
    """
    return "\n".join(_lines(estimate, price))


def _lines(e: Estimate, price: float | None) -> Iterator[str]:
    chip, n = e.target.chip, e.target.num_devices
    model = e.config.model.on(chip.platform)
    yield (
        f"target          {e.target}: {n} x {chip.kinds[0]}, each {chip.memory / 1e9:.0f} GB, "
        f"{chip.bfloat16 / 1e12:,.0f} TFLOP/s, {chip.bandwidth / 1e12:.2f} TB/s; compiled, not run"
    )
    yield (
        f"program         attention {model.attention}, {model.dtype}, {model.unroll} of "
        f"{model.num_layers} layers per iteration of the loop"
    )
    yield (
        f"{'a device':<15} {'memory':>10} {'kernels':>9} {'moved':>11} {'FLOP':>14} "
        f"{'transfers':>11} {'at least':>12}"
    )
    for p in e.programs:
        flop = sum(p["product_flop"].values()) + p["attention_flop"]
        transferred = sum(c["bytes"] for c in p["collectives"].values())
        yield (
            f"{p['name']:<15} {p['device_bytes'] / 1e9:>7.2f} GB {p['kernels']:>9,} "
            f"{p['bytes'] / 1e9:>8.2f} GB {flop / 1e12:>8.3f} TFLOP "
            f"{transferred / 1e9:>8.3f} GB {1e3 * p['seconds']['total']:>9.2f} ms"
        )
    most = max(p["device_bytes"] for p in e.programs)
    yield (
        f"memory          {most / 1e9:.2f} of {chip.memory / 1e9:.0f} GB a device"
        + ("" if most < chip.memory else ": IT DOES NOT FIT. Lower train.microbatch_sequences")
    )
    for p in e.programs:
        for name, c in sorted(p["collectives"].items()):
            yield f"transfer        {p['name']}: {c['times']} {name}, {c['bytes'] / 1e6:,.2f} MB"
        if p["decompositions"]:
            yield (
                f"solvers         {p['name']}: {p['decompositions']:,} calls of linear algebra, "
                "one after another; their time is not counted"
            )
    train, step = e.programs[0]["seconds"], e.step
    yield (
        f"model FLOP      {step.model_flop / 1e12:,.3f} TFLOP a step (PaLM convention), "
        f"{step.causal_flop / 1e12:,.3f} causal; compiled {step.compiled_flop / 1e12:,.3f}"
    )
    yield (
        f"roofline        step {1e3 * step.seconds:.1f} ms: memory-bound kernels "
        f"{1e3 * train['memory_bound']:.1f}, transfers {1e3 * train['transfers']:.1f}"
    )
    yield f"tokens/s        {step.tokens_per_second:,.0f}, MFU {step.mfu:.1%}"
    yield f"hours           {e.hours:.2f} with evaluations, at least"
    if price is not None:
        cost = e.hours * n * price
        yield f"cost            {cost:,.2f} at {price:g} an hour and device, at least"
    yield f"assumptions     {roofline.ASSUMPTIONS}"
