"""What a study compares: the fields of configs/study.py, with their types and their checks.

A separate module: configs/study.py imports it, and plan_arms.py loads the files of configs/.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from qkjax import errors, presets

SCALES = ("tiny", "small", "pilot", "full")
# Two seeds rehearse; three decide what --dry_run prints. The original's design is two.
SEEDS = {
    "tiny": (42, 137),
    "small": (42, 137, 256),
    "pilot": (42, 137, 256),
    "full": (42, 137, 256),
}
EARLIER_SEEDS = (42, 137)  # at every scale, of studies recorded before 2026-11-28
_NAMES = ("arms", "controls", "optional_controls")  # on the command line separated by commas
# What the plan itself sets in every run: an override would make the plan untrue.
_OWN_FIELDS = (
    "seed",
    "data.dir",
    "train.tokens",
    "optimizer.learning_rate",
    "optimizer.adam_learning_rate",
)


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """The learning-rate sweep of every arm."""

    tokens: int  # of each short run; 0 = no sweep, every arm runs at its recipe's own rate
    seed: int  # of all sweep runs; never a seed of the study
    factors: tuple[float, ...]  # grid = factors x the arm's base rate, ascending
    extend: bool  # one more rate where the best one is at an edge of the grid


@dataclasses.dataclass(frozen=True)
class SurgeryConfig:
    """Rank surgery of every final run: how many directions of its keys the loss needs."""

    tokens: int  # of the validation split, for each rank; 0 = no surgery
    ranks: tuple[int, ...]  # directions kept; () = 1, 2, 4 and every eighth of head_dim


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """What a study compares (configs/study.py)."""

    scale: str
    recipe: str
    quick: bool  # a smoke test: too small for its question
    arms: tuple[str, ...]  # files of configs/
    controls: tuple[str, ...]  # an arm's name and its control words: "muon_qk_frozen"
    optional_controls: tuple[str, ...]  # left out where an arm of the plan trains the same already
    seeds: tuple[int, ...]  # of every arm
    extra_seeds: dict[str, tuple[int, ...]]  # by arm or control, beside `seeds`
    tokens: int  # of every run
    sweep: SweepConfig
    surgery: SurgeryConfig
    data_dir: str  # dataset of every run; "" = the embedded corpus (tiny)
    overrides: tuple[str, ...]  # "FIELD=VALUE": given to every run, sweep included
    export: bool  # also as Hugging Face directories
    downstream: str  # HellaSwag and LAMBADA from the "hub" or a folder of files; "" = none

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """The seeds of an arm or control, with its extra seeds last."""
        return (*self.seeds, *self.extra_seeds.get(arm, ()))


def parse_words(words: str) -> tuple[str, str, bool]:
    """(scale, recipe, quick) of the words after the colon of configs/study.py.

    Raises:
        UsageError: an unknown word, or two that exclude each other.
    """
    known = (*SCALES, *presets.RECIPES, "quick")
    given = presets.split_words(words, known, ", ".join(known))
    scales, recipes = (
        [word for word in dict.fromkeys(given) if word in group]
        for group in (SCALES, presets.RECIPES)
    )
    for found in (scales, recipes):
        if len(found) > 1:
            raise errors.UsageError(
                f"--config: {' and '.join(found)} exclude each other. Keep one of them."
            )
    return (scales or ["full"])[0], (recipes or ["fixed"])[0], "quick" in given


def resolve(values: ml_collections.ConfigDict) -> StudyConfig:
    """The checked config of a study.

    Raises:
        UsageError: it is not the config of a study, or lists every field that is wrong.
    """
    plain = values.to_dict()
    fields = {field.name for field in dataclasses.fields(StudyConfig)}
    if set(plain) != fields:
        raise errors.UsageError(
            f"--config: not the config of a study, it has the fields {', '.join(sorted(plain))}. "
            "Pass --config=configs/study.py:tiny, or a copy of that file."
        )
    for name in _NAMES:
        plain[name] = tuple(item for text in plain[name] for item in text.split(","))
    plain["extra_seeds"] = _extra_seeds(plain["extra_seeds"])
    sections = {
        "sweep": SweepConfig(**plain["sweep"]),
        "surgery": SurgeryConfig(**plain["surgery"]),
    }
    study = StudyConfig(**{**plain, **sections})
    found = list(_mistakes(study))
    if found:
        raise errors.UsageError("config of the study: " + "; ".join(found))
    return study


def _extra_seeds(given: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Extra seeds by arm; a single seed may be given without a tuple."""
    seeds = {arm: tuple(v) if isinstance(v, tuple | list) else (v,) for arm, v in given.items()}
    return {arm: found for arm, found in seeds.items() if found}


def _are_seeds(seeds: tuple[Any, ...]) -> bool:
    return all(isinstance(seed, int) and seed >= 0 for seed in seeds)


def _mistakes(study: StudyConfig) -> Iterator[str]:
    if not study.arms:
        yield "arms is empty, it must name files of configs/"
    names = (*study.arms, *study.controls)
    for field, items in (
        ("arms and controls", names),
        ("seeds", study.seeds),
        ("sweep.factors", study.sweep.factors),
    ):
        if len(set(items)) < len(items):
            yield f"{field} has an entry twice: {', '.join(map(str, items))}"
    if not study.seeds or not _are_seeds(study.seeds):
        yield f"seeds is {study.seeds}, it must be one or more integers from 0"
    for arm, extra in study.extra_seeds.items():
        if arm not in (*names, *study.optional_controls):
            yield f"extra_seeds names {arm}, which is not among arms and controls"
        if not _are_seeds(extra):
            yield f"extra_seeds of {arm} is {extra}, it must be integers from 0"
        if len({*study.seeds, *extra}) < len(study.seeds) + len(extra):
            yield f"extra_seeds of {arm} has a seed twice, or one of seeds: {extra}"
    if study.tokens < 1:
        yield f"tokens is {study.tokens}, it must be above 0"
    yield from _mistakes_of_sweep(study)
    if study.surgery.tokens < 0:
        yield f"surgery.tokens is {study.surgery.tokens}, it must be 0 (no surgery) or more"
    if any(not isinstance(rank, int) or rank < 1 for rank in study.surgery.ranks):
        yield f"surgery.ranks is {study.surgery.ranks}, it must be integers from 1"
    for text in study.overrides:
        field, equals, _ = str(text).partition("=")
        if not equals:
            yield f"overrides: {text!r} must be FIELD=VALUE"
        elif field in (*_OWN_FIELDS, *presets.WORD_FIELDS):
            yield f"overrides: {field} is set by the plan itself; use the study's own fields"


def _mistakes_of_sweep(study: StudyConfig) -> Iterator[str]:
    if study.sweep.tokens < 0:
        yield f"sweep.tokens is {study.sweep.tokens}, it must be 0 (no sweep) or more"
    if study.sweep.tokens < 1:
        return
    factors = study.sweep.factors
    if not factors or list(factors) != sorted(factors) or min(factors) <= 0:
        yield f"sweep.factors is {factors}, it must be ascending numbers above 0"
    if study.sweep.extend and len(factors) < 2:
        yield "sweep.extend needs two or more sweep.factors, whose ratio it continues"
    if study.sweep.seed in {*study.seeds, *itertools.chain(*study.extra_seeds.values())}:
        yield (
            f"sweep.seed {study.sweep.seed} is also one of seeds or extra_seeds, it must be "
            "another: rates tuned on a reported seed would flatter it"
        )
