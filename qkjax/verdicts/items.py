"""H5: whether the arm of higher rank answers more items right; the trained model is the unit.

Each seed trains one model of either arm, and both answer the same items. The clause is decided by
the paired interval over seeds of the accuracy differences, and the items have to agree: McNemar's
exact test of each seed. What the items say of two given models is shown beside it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qkjax.runs.results import PR
from qkjax.verdicts import statistics
from qkjax.verdicts.clauses import LEVEL, ONE_SEED, decided, listed, spoken
from qkjax.verdicts.judgement import INCONCLUSIVE, LABELS, OPPOSITE, SUPERIORITY, SUPPORTED, Clause
from qkjax.verdicts.results import Study

FIRST, SECOND = "muon_noqk", "adamw_qk"
SESOI_POINTS, SESOI_NAT = 1.0, 0.01
ALPHA = 0.025  # one-sided, of McNemar's test of one seed
Score = Callable[[Mapping[str, Any]], float]


class _Question(NamedTuple):
    """One comparison of the two arms over the items of a task."""

    name: str
    task: str
    score: Score
    factor: float  # from the mean of scores to `unit`
    sesoi: float
    unit: str
    text: str


ACCURACIES = (
    _Question(
        "H5 HellaSwag acc_norm",
        "hellaswag",
        lambda item: float(item["acc_norm"]),
        100.0,
        SESOI_POINTS,
        "points",
        "Muon answers more HellaSwag items correctly than AdamW+QK.",
    ),
    _Question(
        "H5 LAMBADA acc",
        "lambada",
        lambda item: float(item["acc"]),
        100.0,
        SESOI_POINTS,
        "points",
        "Muon predicts more last words of LAMBADA than AdamW+QK.",
    ),
)
LIKELIHOODS = (
    _Question(
        "H5 LAMBADA log-perplexity",
        "lambada",
        lambda item: float(item["log_likelihood"]),
        1.0,
        SESOI_NAT,
        "nat",
        "Muon gives the last words of LAMBADA a lower log-perplexity.",
    ),
    _Question(
        "H5 HellaSwag gold endings",
        "hellaswag",
        lambda item: float(item["log_likelihoods"][int(item["gold"])]),
        1.0,
        SESOI_NAT,
        "nat",
        "Muon gives the right endings of HellaSwag a higher likelihood.",
    ),
)


def is_sample(downstream: Mapping[str, Any] | None) -> bool:
    """Whether a downstream result is of the first items only (--limit): it decides nothing."""
    return bool(downstream and downstream.get("sample"))


def clauses(study: Study) -> tuple[list[Clause], list[Clause]]:
    """(the two accuracies, which decide; likelihoods and correlations, which are shown)."""
    deciding = [_compare(study, question) for question in ACCURACIES]
    shown = [_compare(study, question) for question in LIKELIHOODS]
    for optimizer, label in LABELS.items():
        shown += [_correlate(study, question, optimizer, label) for question in ACCURACIES]
    return deciding, shown


def _compare(study: Study, question: _Question) -> Clause:
    clause = Clause(
        name=question.name,
        text=question.text,
        kind=SUPERIORITY,
        unit=question.unit,
        sesoi=question.sesoi,
        level=LEVEL,
    )
    pairs, why = _paired_scores(study, question)
    if not pairs:
        return dataclasses.replace(clause, reason=why)
    first, second = (np.array([pair[side] for pair in pairs.values()]) for side in (0, 1))
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return dataclasses.replace(clause, reason="a score is not finite")
    per_seed = question.factor * (first - second).mean(axis=1)
    estimate = float(per_seed.mean())
    clause = dataclasses.replace(
        clause,
        estimate=estimate,
        said=spoken(estimate, None, question.unit),
        per_seed={seed: float(value) for seed, value in zip(pairs, per_seed, strict=True)},
        seeds=tuple(pairs),
        family=(SECOND, FIRST),
        notes=_notes(question, first, second, list(pairs)) + ((why,) if why else ()),
    )
    if len(pairs) == 1:
        return dataclasses.replace(clause, reason=f"{clause.said}; {ONE_SEED}")
    means = question.factor * np.stack([second.mean(axis=1), first.mean(axis=1)], axis=1)
    found = statistics.contrast(means, (-1.0, 1.0))  # of two arms pooled and paired are one
    if found.mse == 0:
        return dataclasses.replace(clause, reason="the seeds do not differ (MSE = 0)")
    clause = decided(clause, found, question.sesoi)
    return _agreed(clause, first, second) if question.unit == "points" else clause


def _agreed(clause: Clause, first_SN: np.ndarray, second_SN: np.ndarray) -> Clause:
    """The clause where its items agree in sign with its word; else inconclusive.

    Supported and the opposite ask every seed's items to lie on their side. A word of a small
    effect asks that McNemar's test of no seed finds the first arm better.
    """
    tests = [statistics.mcnemar(*pair) for pair in zip(first_SN, second_SN, strict=True)]
    if clause.word == SUPPORTED:
        agree = all(test.first_only > test.second_only for test in tests)
    elif clause.word == OPPOSITE:
        agree = all(test.first_only < test.second_only for test in tests)
    else:
        agree = not any(test.p_first_better <= ALPHA for test in tests)
    if agree or clause.word == INCONCLUSIVE:
        return clause
    reason = f"{clause.said}: {clause.word} over seeds, but the items of a seed disagree"
    return dataclasses.replace(clause, word=INCONCLUSIVE, word_at_975=INCONCLUSIVE, reason=reason)


def _paired_scores(
    study: Study, question: _Question
) -> tuple[dict[int, tuple[np.ndarray, np.ndarray]], str]:
    """The scores of both arms over the same items, by seed; what is missing, for people."""
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    lacking, reference = [], None
    for seed in study.seeds_of_all((FIRST, SECOND)):
        items = {}
        for arm in (FIRST, SECOND):
            chosen = [i for i in study.items.get((arm, seed), []) if i["task"] == question.task]
            if is_sample(study.downstream.get((arm, seed))):
                lacking.append(f"{arm} seed {seed} has only a sample")
            elif not chosen:
                lacking.append(f"{arm} seed {seed} has no result")
            else:
                items[arm] = sorted(chosen, key=lambda item: item["index"])
        if len(items) < 2:
            continue
        names = {arm: [item["item_sha256"] for item in of_arm] for arm, of_arm in items.items()}
        reference = names[FIRST] if reference is None else reference
        for arm in (FIRST, SECOND):
            if names[arm] != reference:
                return {}, (
                    f"{arm} seed {seed} answered other items ({len(names[arm]):,}) than the first "
                    f"run compared ({len(reference):,})"
                )
        if len(reference) < 2:
            return {}, "fewer than two items"
        first, second = (
            np.array([question.score(item) for item in items[arm]]) for arm in (FIRST, SECOND)
        )
        found[seed] = first, second
    why = f"{question.task}: {listed(lacking)}" if lacking else ""
    return found, why


def _notes(
    question: _Question, first: np.ndarray, second: np.ndarray, seeds: Sequence[int]
) -> tuple[str, ...]:
    """What the items say of the two models of every seed, and what they could have found."""
    notes, shares = [], []
    for seed, ours, theirs in zip(seeds, first, second, strict=True):
        by_item = statistics.paired_bootstrap(ours, theirs)
        low, high = (question.factor * end for end in by_item.interval)
        said = f"seed {seed}: over {len(ours):,} items, in {question.unit}, "
        said += f"95% {low:+.3g} to {high:+.3g}"
        if question.unit == "points":
            test = statistics.mcnemar(ours, theirs)
            shares.append(test.discordant / len(ours))
            said += (
                f", {test.first_only:,} right with Muon alone, {test.second_only:,} with AdamW+QK "
                f"alone, McNemar p {test.p_two_sided:.3g}"
            )
        notes.append(said)
    if shares:
        share = float(np.mean(shares))
        power = 100 * statistics.detectable_difference(first.shape[1], share)
        notes.append(
            f"power: at {share:.0%} discordant items a difference of {power:.2f} points is found "
            f"in one seed with probability 0.8; {question.sesoi:g} is of interest"
        )
    return tuple(notes)


def _correlate(study: Study, question: _Question, optimizer: str, label: str) -> Clause:
    """PR against the score over the arms of one optimiser, each the mean of its seeds.

    The sample size is the number of arms: their seeds are no independent draws of a rank.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for (arm, seed), run in study.runs.items():
        chosen = [i for i in study.items.get((arm, seed), []) if i["task"] == question.task]
        sample = is_sample(study.downstream.get((arm, seed)))
        if arm.startswith(optimizer) and chosen and not sample and not run.diverged:
            score = float(np.mean([question.score(item) for item in chosen]))
            points.setdefault(arm, []).append((run.value(PR), question.factor * score))
    means = [np.mean(of_arm, axis=0) for of_arm in points.values()]
    found = statistics.correlation([x for x, _ in means], [y for _, y in means])
    number = f"n = {len(points)} {'arm' if len(points) == 1 else 'arms'}"
    clause = Clause(
        name=f"{question.name} with PR, {label}",
        text=f"Among arms of {label}, those of higher PR score higher.",
        kind=SUPERIORITY,
        unit="correlation",
        sesoi=0.0,
        level="decides nothing",
        notes=(number,),
    )
    if not math.isfinite(found.pearson):
        words = "no result" if not points else "too few arms, or none that differ"
        return dataclasses.replace(clause, reason=f"{words} ({number})")
    said = spoken(found.pearson, found.interval, "")
    return dataclasses.replace(
        clause,
        estimate=found.pearson,
        deciding=found.interval,
        said=said,
        reason=f"{said}, {number}: drawn, decides nothing",
        notes=(number, f"Spearman {found.spearman:+.3f}"),
    )
