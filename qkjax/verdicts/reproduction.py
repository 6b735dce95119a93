"""A study made again beside the published one: equal to the bit, or as near as seeds are.

Levels of docs/reliability.md: P1, the same machine and software give the same bits; P3, another
machine or version gives a run that differs as another seed would. Reads files alone.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from qkjax import errors
from qkjax.runs.results import RunResult
from qkjax.verdicts import power
from qkjax.verdicts.results import Study

# What is compared, and the deviation of `power.ASSUMED` that it is compared with.
METRICS = {
    "val/loss": "loss",
    "pr/key/post_rope/raw": "PR",
    "pr/key/pre_rope/centred": "PR",
}
# Standard deviations of a difference between two runs. Of 60 differences one is beyond it by chance
# in 260 studies.
LIMIT = 4.0


class Pair(NamedTuple):
    """A run that both studies have finished."""

    name: str  # arm/seed_n
    equal: bool  # the sha256 of its last parameters
    apart: dict[str, float]  # metric -> deviations between the two; infinite where one has diverged
    versions: tuple[str, ...]  # that differ: "jax 0.10.2 -> 0.11.0"


def pairs(published: Study, again: Study) -> list[Pair]:
    """The runs that both have, in the order of the published plan.

    Raises:
        UsageError: no run in common, or a run on another corpus.
    """
    found = []
    spread: dict[str, float] = {}
    for place, run in published.runs.items():
        other = again.runs.get(place)
        if other is None:
            continue
        name = f"{run.arm}/seed_{run.seed}"
        if run.dataset_fingerprint != other.dataset_fingerprint:
            raise errors.UsageError(
                f"{again.workdir}: other corpus: not comparable. {name} is trained on dataset "
                f"{other.dataset_fingerprint[:12]}, the published one on "
                f"{run.dataset_fingerprint[:12]}; the embedded corpus is made of the installed "
                "packages. Install the versions of the commit's constraints.txt."
            )
        if run.config.fingerprinted() != other.config.fingerprinted():
            ours, theirs = (r.config.optimizer.learning_rate for r in (other, run))
            if ours != theirs and published.learning_rates:
                raise errors.UsageError(
                    f"{again.workdir}: the sweep chose the rate {ours:g} for {run.arm}, the "
                    f"published one {theirs:g}, so that {name} is another run. Copy the published "
                    "sweep/learning_rates.json to another --workdir and train there."
                )
            raise errors.UsageError(
                f"{again.workdir}: {name} has another config than the published run. Train it at "
                "the published commit, with the published study's command."
            )
        if not spread:
            size = run.config.model.head_dim
            spread = power.assumed(size) | power.measured(published, size)
        apart = {
            metric: _distance(run, other, metric, spread[quantity])
            for metric, quantity in METRICS.items()
        }
        equal = run.summary["params_sha256"] == other.summary["params_sha256"]
        found.append(Pair(name, equal, apart, tuple(_changed_versions(run, other))))
    if not found:
        raise errors.UsageError(
            f"{again.workdir}: no run in common with {published.workdir}, expected one of "
            f"{', '.join(f'{arm}/seed_{seed}' for arm, seed in published.runs)}. Let it finish one."
        )
    return found


def describe(found: list[Pair]) -> str:
    """One line per run, and a summary, for people."""
    lines = []
    for pair in found:
        if pair.equal:
            lines.append(f"{pair.name:<32} equal to the bit")
            continue
        shown = ", ".join(f"{metric} {far:.1f}" for metric, far in pair.apart.items())
        lines.append(f"{pair.name:<32} apart, in deviations between two seeds: {shown}")
    equal = sum(pair.equal for pair in found)
    if equal == len(found):
        lines.append(f"P1: all {equal} runs are equal to the bit")
    else:
        why = sorted({change for pair in found for change in pair.versions})
        lines.append(
            f"P3: {equal} of {len(found)} runs are equal to the bit, the others within {LIMIT:g} "
            f"deviations; {', '.join(why) or 'versions are the same, so the machine is another'}"
        )
    return "\n".join(lines)


def check(found: list[Pair], where: str) -> None:
    """Refuses runs that differ by more than seeds do.

    Raises:
        UsageError: names the farthest.
    """
    for pair in found:
        metric, farthest = max(pair.apart.items(), key=lambda item: item[1])
        if not pair.equal and farthest > LIMIT:
            raise errors.UsageError(
                f"{where}: {pair.name} is {farthest:.1f} deviations from the published run in "
                f"{metric}, expected at most {LIMIT:g}. Compare the two environment.json."
            )


def _distance(run: RunResult, other: RunResult, metric: str, deviation: float) -> float:
    """Between two runs, in deviations of a difference; infinite where one has diverged."""
    if run.diverged or other.diverged:
        return 0.0 if run.diverged == other.diverged else math.inf
    return abs(run.value(metric) - other.value(metric)) / (math.sqrt(2) * deviation)


def _changed_versions(run: RunResult, other: RunResult) -> Iterator[str]:
    versions, others = (r.environment.get("versions", {}) for r in (run, other))
    for package, version in versions.items():
        if others.get(package) != version:
            yield f"{package} {version} -> {others.get(package)}"
