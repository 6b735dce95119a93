"""H5: whether the arm of higher rank answers more items right, item by item.

Two arms of one seed answer the same items, so scores are compared in pairs. The interval over
items takes the trained models as given; the one over seeds stands beside it. An accuracy is better
only where the interval and McNemar's exact test both say so.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from qkjax.runs.results import PR
from qkjax.verdicts import statistics
from qkjax.verdicts.clauses import Panel, decide, figures, listed
from qkjax.verdicts.judgement import INCONCLUSIVE, SUPERIORITY, SUPPORTED, Clause
from qkjax.verdicts.results import Study

FIRST, SECOND = "muon_noqk", "adamw_qk"
SESOI_POINTS, SESOI_NAT = 1.0, 0.01
ALPHA = 0.025  # one-sided, of McNemar's test
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
        "Muon answers more HellaSwag items right than AdamW+QK.",
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


def clauses(panel: Panel) -> tuple[list[Clause], list[Clause]]:
    """(the two accuracies, which decide; likelihoods and correlations, which are shown)."""
    deciding = [_compare(panel.study, question) for question in ACCURACIES]
    shown = [_compare(panel.study, question) for question in LIKELIHOODS]
    for optimizer, label in (("adamw", "AdamW"), ("muon", "Muon")):
        shown += [_correlate(panel, question, optimizer, label) for question in ACCURACIES]
    return deciding, shown


def _compare(study: Study, question: _Question) -> Clause:
    clause = Clause(
        question.name,
        question.text,
        INCONCLUSIVE,
        "",
        None,
        None,
        None,
        None,
        question.sesoi,
        question.unit,
        None,
        per_seed={},
    )
    pairs, why = _paired_scores(study, question)
    if not pairs:
        return dataclasses.replace(clause, reason=why)
    first, second = (np.array([pair[side] for pair in pairs.values()]) for side in (0, 1))
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return dataclasses.replace(clause, reason="a score is not finite")
    by_item = statistics.paired_bootstrap(first.mean(axis=0), second.mean(axis=0))
    per_seed = question.factor * (first - second).mean(axis=1)
    estimate = question.factor * by_item.estimate
    over_items = (question.factor * by_item.interval[0], question.factor * by_item.interval[1])
    # Over several seeds the sign test of each item's sum: items are independent, its seeds are not.
    test = statistics.mcnemar(first.sum(axis=0), second.sum(axis=0))
    binary = question.unit == "points"
    clause = dataclasses.replace(
        clause,
        estimate=estimate,
        pooled=over_items,
        p=test.p_first_better if binary else None,
        per_seed={seed: float(value) for seed, value in zip(pairs, per_seed, strict=True)},
        notes=_notes(question, first, second, list(pairs)) + ((why,) if why else ()),
    )
    said = figures(estimate, over_items, question.unit)
    if len(pairs) == 1:
        return dataclasses.replace(clause, reason=f"no replication: {said} over items, one seed")
    status, words = found = decide(estimate, over_items, question.sesoi, SUPERIORITY)
    if binary and status == SUPPORTED and test.p_first_better > ALPHA:
        status = INCONCLUSIVE
        words = f"above 0, but McNemar's test does not agree (p {test.p_first_better:.3g})"
    over_seeds = _over_seeds(per_seed)
    notes = clause.notes
    other = decide(estimate, over_seeds, question.sesoi, SUPERIORITY)
    if other != found:
        notes += (
            f"over seeds, [{over_seeds[0]:+.4g}, {over_seeds[1]:+.4g}], it would say {other[0]} "
            f"({other[1]})",
        )
    return dataclasses.replace(
        clause,
        status=status,
        paired=over_seeds,
        reason=f"{words}: {said} over items",
        notes=notes,
    )


def _over_seeds(per_seed: np.ndarray) -> tuple[float, float]:
    found = statistics.paired_sequences(per_seed, np.zeros_like(per_seed))
    return found.interval


def _paired_scores(
    study: Study, question: _Question
) -> tuple[dict[int, tuple[np.ndarray, np.ndarray]], str]:
    """By seed the scores of both arms over the same items; what is missing, for people."""
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    lacking, reference = [], None
    for seed in study.seeds:
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
    """McNemar's table of every seed, and what the items could have found."""
    if question.unit != "points":
        return ()
    notes, shares = [], []
    for seed, ours, theirs in zip(seeds, first, second, strict=True):
        test = statistics.mcnemar(ours, theirs)
        shares.append(test.discordant / len(ours))
        notes.append(
            f"seed {seed}: of {len(ours):,} items {test.first_only:,} right with Muon alone, "
            f"{test.second_only:,} with AdamW+QK alone, McNemar p {test.p_two_sided:.3g}"
        )
    share = float(np.mean(shares))
    power = 100 * statistics.detectable_difference(first.shape[1], share)
    notes.append(
        f"power: at {share:.0%} discordant items a difference of {power:.2f} points is found in "
        f"one seed with probability 0.8; {question.sesoi:g} is of interest"
    )
    return tuple(notes)


def _correlate(panel: Panel, question: _Question, optimizer: str, label: str) -> Clause:
    """PR against the score over all runs of one optimiser; the arms and seeds are the spread."""
    study, points = panel.study, []
    for (arm, seed), run in study.runs.items():
        chosen = [i for i in study.items.get((arm, seed), []) if i["task"] == question.task]
        if (
            arm.startswith(optimizer)
            and chosen
            and not is_sample(study.downstream.get((arm, seed)))
        ):
            score = float(np.mean([question.score(item) for item in chosen]))
            points.append((run.value(PR), question.factor * score))
    found = statistics.correlation([x for x, _ in points], [y for _, y in points])
    clause = Clause(
        f"{question.name} with PR, {label}",
        f"Among runs of {label}, those of higher PR score higher.",
        INCONCLUSIVE,
        "",
        None,
        None,
        None,
        None,
        0.0,
        "correlation",
        None,
        per_seed={},
        notes=(f"n = {found.num_runs} runs",),
    )
    if found.interval is None or not math.isfinite(found.pearson):
        words = "no result" if not points else "too few runs, or none that differ"
        return dataclasses.replace(clause, reason=f"{words} (n = {found.num_runs})")
    status, words = decide(found.pearson, found.interval, 0.0, SUPERIORITY)
    return dataclasses.replace(
        clause,
        status=status,
        reason=f"{words}: {figures(found.pearson, found.interval, '')}, n = {found.num_runs}",
        estimate=found.pearson,
        pooled=found.interval,
        notes=(f"n = {found.num_runs} runs", f"Spearman {found.spearman:+.3f}"),
    )
