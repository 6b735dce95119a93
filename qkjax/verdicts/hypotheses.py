"""H1 to H5: which clauses they are made of, and what they say before and after correction."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from qkjax.study import questions
from qkjax.verdicts import items, rules, stability, statistics
from qkjax.verdicts.clauses import ONE_SEED, Panel, by_contrast, by_rule
from qkjax.verdicts.judgement import (
    INCONCLUSIVE,
    REFUTED,
    REHEARSAL,
    RULE,
    SUPPORTED,
    WORDS,
    Clause,
    Verdict,
)
from qkjax.verdicts.predictions import DECIDING, FUNCTIONAL, SHOWN, deciding
from qkjax.verdicts.results import Study

MAX_LOGIT, MAX_RISE, MAX_SPIKE = 100.0, 10.0, 0.5  # conventions, and said so on the page
LOGIT_SEQUENCES = 4  # probes.ATTENTION_SEQUENCES
FAMILY = tuple(DECIDING)  # H1 to H4: corrected for one another
_OUTSIDE = "outside the corrected family: two-sided 95%, refuted at 97.5%"
_TITLES = {
    "H1": ("The constraint trap", "Does QK-Norm lower the dimensionality of attention keys?"),
    "H2": (
        "Optimiser behaviour",
        "Does AdamW collapse keys under QK-Norm, along the axes, where Muon does not?",
    ),
    "H3": ("The reversal", "Is QK-Norm better at first, and do its keys collapse in the long run?"),
    "H4": (
        "The Muon alternative",
        "Is Muon without QK-Norm stable, of full dimensionality, and as good?",
    ),
    "H5": (
        "Rank predicts reasoning",
        "Does the arm of higher rank answer more questions correctly?",
    ),
}


def make(panel: Panel) -> list[Verdict]:
    """H1 to H5 of a study, each from its own clauses alone; `corrected` does the rest."""
    left_out, seeds = left_out_of(panel.study), len(panel.seeds)
    has_surgery = any(run.functional_rank is not None for run in panel.study.runs.values())
    verdicts = []
    for name in FAMILY:
        predicted = deciding(name, panel.study.plan["scale"] == "pilot")
        clauses = [by_contrast(panel, prediction) for prediction in predicted]
        if name == "H4":
            clauses = [*_rules(panel.study), *(_with_sequences(panel, c) for c in clauses)]
        beside = (*SHOWN[name], *(FUNCTIONAL.get(name, ()) if has_surgery else ()))
        shown = [by_contrast(panel, prediction) for prediction in beside]
        verdicts.append(combine(name, clauses, shown, left_out.get(name, ""), seeds))
    answers, beside_them = items.clauses(panel.study)
    verdicts.append(combine("H5", answers, beside_them, left_out.get("H5", ""), seeds))
    return verdicts


def left_out_of(study: Study) -> dict[str, str]:
    """The hypotheses that the plan cannot answer, and why.

    As study.json has them; of a study planned before it did, from its runs.
    """
    if "unanswerable" in study.plan:
        planned = dict(study.plan["unanswerable"])
        if study.downstream:  # scores may be asked for later, and H5 is outside the family
            planned.pop("H5", None)
        return planned
    configs = [run.config for run in study.runs.values()]
    if not configs:
        return {}
    scores = bool(study.downstream) or study.plan.get("downstream", "none") != "none"
    return questions.unanswerable(study.arms, configs[0], scores)


def combine(
    name: str,
    clauses: Sequence[Clause],
    shown: Sequence[Clause],
    left_out: str,
    seeds: int,
) -> Verdict:
    """All clauses supported: supported; a clause refuted at 97.5%: refuted; else inconclusive.

    With one seed that has every arm nothing is decided, a broken rule included; nor with none,
    where there are rules: H5 needs only its own two arms.
    """
    codes, strict = (
        np.array([rules.CODES[word] for word in words])
        for words in zip(*((c.word, c.word_at_975) for c in clauses), strict=True)
    )
    word = WORDS[int(rules.judge_hypothesis(codes, strict))]
    if seeds == 1 or (not seeds and any(clause.kind == RULE for clause in clauses)):
        word = INCONCLUSIVE
    p_values = [clause.p for clause in clauses if clause.kind != RULE]
    known = [p for p in p_values if p is not None]
    title, question = _TITLES[name]
    return Verdict(
        name=name,
        title=title,
        question=question,
        word=word,
        headline="",
        reason=ONE_SEED if seeds == 1 else _reason(word, clauses),
        p=max(known) if known and len(known) == len(p_values) else None,
        level=None,
        correction=_OUTSIDE,
        clauses=tuple(clauses),
        shown=tuple(shown),
        left_out=left_out,
    )


def _reason(word: str, clauses: Sequence[Clause]) -> str:
    """The clauses that made the word, each with its own reason."""
    if word == SUPPORTED:
        return _said(clauses)
    if word != INCONCLUSIVE:
        return _said([c for c in clauses if c.word_at_975.startswith(REFUTED)])
    alone = [clause for clause in clauses if clause.status == REFUTED and clause.kind != RULE]
    undecided = [clause for clause in clauses if clause.word == INCONCLUSIVE]
    parts = [f"{c.name} refuted alone, at 95% but not at 97.5% ({c.reason})" for c in alone]
    return "; ".join([*parts, *([_said(undecided)] if undecided else [])])


def _said(clauses: Sequence[Clause]) -> str:
    """Every reason once, after the clauses that have it."""
    names: dict[str, list[str]] = {}
    for clause in clauses:
        names.setdefault(clause.reason, []).append(clause.name)
    return "; ".join(f"{', '.join(dict.fromkeys(of))}: {why}" for why, of in names.items())


# --------------------------------------------------------------------------------------------
# Correction.


def corrected(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """H1 at .0125, H2 to H4 by Holm at .0125; a side that is wholly supported helps the other."""
    members = [v for v in verdicts if v.name in FAMILY and not v.left_out]
    first, others = ([v for v in members if (v.name == "H1") == is_first] for is_first in (1, 0))
    sides = [
        (
            np.array([1.0 if v.p is None else v.p for v in side]),
            np.array([v.word == SUPPORTED for v in side], bool),
        )
        for side in (first, others)
    ]
    found = statistics.correct(*sides[0], *sides[1])
    tested = {}
    for side, result in zip((first, others), found, strict=True):
        for place, verdict in enumerate(side):
            rejected, level = bool(result.rejected[place]), float(result.level[place])
            whole = float(result.level.min() * len(side))  # Holm's first step is at whole / m
            tested[verdict.name] = _after(verdict, rejected, level, whole, side, len(members))
    return [_left_out(tested.get(verdict.name, verdict)) for verdict in verdicts]


def _after(
    verdict: Verdict, rejected: bool, level: float, whole: float, side: list[Verdict], size: int
) -> Verdict:
    passed = ", passed on by the other side" if whole > 1.5 * statistics.ALPHA else ""
    if verdict.name == "H1":
        how = f"tested at one-sided {level:.4g}{passed}"
    else:
        names = ", ".join(v.name for v in side)
        how = f"tested at one-sided {level:.3g}, by Holm over {names} at {whole:.4g}{passed}"
    verdict = dataclasses.replace(verdict, level=level, correction=how)
    if verdict.word != SUPPORTED or rejected:
        return verdict
    return dataclasses.replace(
        verdict,
        word=INCONCLUSIVE,
        reason=f"supported alone, not after correction for {size} (p {verdict.p:.3g} against "
        f"{level:.3g}): {verdict.reason}",
    )


def _left_out(verdict: Verdict) -> Verdict:
    if not verdict.left_out:
        return verdict
    what = "left out of the family" if verdict.name in FAMILY else "not part of this study"
    return dataclasses.replace(verdict, correction=f"{what}: {verdict.left_out}")


def with_headline(verdict: Verdict, rehearsal: bool) -> Verdict:
    """What a first screen says of it: the word; of H1 the words of both measures."""
    words = verdict.word
    if verdict.reason.startswith("supported alone"):
        words += f" ({verdict.reason.partition(' (')[0]})"
    if verdict.name == "H1":
        after, before = (word.removeprefix("refuted: ") for word in (words, verdict.shown[0].word))
        words = f"post-RoPE raw: {after}; pre-RoPE centred: {before}"
    return dataclasses.replace(verdict, headline=f"{REHEARSAL}{words}" if rehearsal else words)


# --------------------------------------------------------------------------------------------
# H4 by rule.


def _rules(study: Study) -> Iterator[Clause]:
    muon = "muon_noqk"
    finishes = by_rule(
        study,
        muon,
        "H4 finishes",
        "Every run of Muon without QK-Norm finishes.",
        stability.divergences,
        limit=1.0,
        unit="",
    )
    reason = "every run finished" if finishes.word == SUPPORTED else finishes.reason
    yield dataclasses.replace(finishes, reason=reason, sesoi=None)  # a limit would say nothing
    yield by_rule(
        study,
        muon,
        "H4 spikes",
        f"After 2% of training no loss is {MAX_SPIKE} nat above the median of the 100 steps "
        "before.",
        stability.highest_spike,
        limit=MAX_SPIKE,
        unit="nat",
        reaches=True,
        too_short="budget too short: no step after 2% of training",
    )
    yield by_rule(
        study,
        muon,
        "H4 logits",
        f"No attention logit of the {LOGIT_SEQUENCES} sequences that every evaluation measures "
        f"reaches {MAX_LOGIT:g}.",
        stability.highest_logit,
        limit=MAX_LOGIT,
        unit="",
        too_short="no evaluation measured attention/max_logit",
    )
    yield by_rule(
        study,
        muon,
        "H4 rise",
        f"The largest logit of these sequences rises by less than {MAX_RISE:g} over the last half.",
        stability.logit_rise,
        limit=MAX_RISE,
        unit="",
        too_short="budget too short: fewer than two evaluations in the last half",
    )


_LOSSES = {p.name: p for p in DECIDING["H4"] if p.quantity == "loss"}


def _with_sequences(panel: Panel, clause: Clause) -> Clause:
    """A loss clause with the error of sampling the validation text, of each seed."""
    if clause.name not in _LOSSES:
        return clause
    notes = []
    arms = tuple(_LOSSES[clause.name].weights)
    for seed in panel.study.seeds:
        pair = [panel.study.runs.get((arm, seed)) for arm in arms]
        sound = [run for run in pair if run is not None and not run.diverged]
        if len(sound) < 2 or len(sound[0].sequence_losses) < 2:
            continue
        found = statistics.paired_sequences(*(run.sequence_losses for run in sound))
        notes.append(
            f"seed {seed}: {found.estimate:+.4f} nat, standard error {found.standard_error:.4f} "
            f"over {found.num_pairs:,} validation sequences"
        )
    return dataclasses.replace(clause, notes=(*clause.notes, *notes))
