"""The verdicts of a study: H1 to H5 and the attribution to decay, with Holm's correction.

`judge` never fails on an unfinished study: what cannot be said is inconclusive, and says why.
"""

import dataclasses
from collections.abc import Iterable

from qkjax import presets
from qkjax.verdicts import hypotheses, items, statistics
from qkjax.verdicts.clauses import Panel
from qkjax.verdicts.judgement import (
    INCONCLUSIVE,
    SUPPORTED,
    Attribution,
    Clause,
    Judgement,
    Verdict,
)
from qkjax.verdicts.results import Study

__all__ = ["ALPHA", "Attribution", "Clause", "Judgement", "Verdict", "judge", "scope"]

ALPHA = 0.025  # one-sided, over the family H1 to H4
STUDY_TOKENS = 300_000_000  # a run of the study's question


def judge(study: Study) -> Judgement:
    """Every verdict of SCIENCE.md section 8 on a study, finished or not.

    Returns:
        H1 to H5, what the PR that QK-Norm costs under each optimiser is made of, and what a
        reader has to know first.
    """
    panel = Panel.of(study)
    family = [
        hypotheses.constraint_trap(panel),
        hypotheses.optimizer_behaviour(panel),
        hypotheses.reversal(panel),
        hypotheses.muon_alternative(panel),
    ]
    rejected = statistics.holm({verdict.name: verdict.p for verdict in family}, ALPHA)
    deciding, shown = items.clauses(panel)
    last = hypotheses.combine(
        "H5",
        "Rank predicts reasoning",
        "Does the arm of higher rank answer more questions right?",
        deciding,
        shown=shown,
    )
    verdicts = (*(_corrected(verdict, rejected[verdict.name]) for verdict in family), last)
    attributions = tuple(hypotheses.attribute(panel, name) for name in hypotheses.LABELS)
    noted = [(c.name, c.notes) for v in verdicts for c in (*v.clauses, *v.shown)]
    noted += [
        (f"attribution, {c.name}", c.notes) for a in attributions for c in (a.total, *a.parts)
    ]
    return Judgement(
        verdicts=verdicts,
        attributions=attributions,
        warnings=tuple(_warnings(panel, noted)),
        seeds_used=panel.seeds,
    )


def _corrected(verdict: Verdict, rejected: bool) -> Verdict:
    """A hypothesis is supported only where Holm's correction agrees; refuted needs none."""
    verdict = dataclasses.replace(verdict, holm_rejected=rejected)
    if verdict.status != SUPPORTED or rejected:
        return verdict
    return dataclasses.replace(
        verdict,
        status=INCONCLUSIVE,
        qualifier="",
        reason="supported by its intervals, but not after Holm's correction over H1-H4 "
        f"(p {verdict.p:.3g}): {verdict.reason}",
    )


def scope(study: Study) -> str:
    """What the verdicts are about, in one sentence; a small study does not answer a large one."""
    plan = study.plan
    scale, tokens = plan["scale"], plan.get("tokens") or 0
    reshaped = [
        text
        for text in plan.get("overrides") or ()
        if text.partition("=")[0].removeprefix("model.") in (*presets.SHAPES["full"], "mlp", "d_ff")
    ]
    if scale == "full" and tokens >= STUDY_TOKENS and not reshaped:
        return "The verdicts are about the study's own scale: 88M parameters, 300M tokens a run."
    budget = f" at {tokens:,} tokens a run" if tokens else ""
    shape = f" with {', '.join(reshaped)}" if reshaped else ""
    return (
        f"The verdicts are about scale {scale}{budget}{shape} alone: they do not answer the "
        "study's question, which is about 88M parameters and 300M tokens a run."
    )


def _warnings(panel: Panel, noted: Iterable[tuple[str, Iterable[str]]]) -> Iterable[str]:
    study = panel.study
    if len(panel.seeds) == 1:
        yield f"one seed ({panel.seeds[0]}): no replication, so no contrast is decided"
    for seed in panel.left_out:
        lacking = [f"{run.arm} ({run.why})" for run in study.missing if run.seed == seed]
        yield f"seed {seed} is left out of every contrast, it lacks {', '.join(lacking)}"
    for run in study.runs.values():
        if run.diverged:
            yield (
                f"{run.arm} seed {run.seed} diverged at step {run.summary['diverged_step']:,}: "
                "its loss counts as the initial one, its other numbers as the last finite ones"
            )
    for (arm, seed), found in study.downstream.items():
        if items.is_sample(found):
            yield f"{arm} seed {seed}: measured on a sample of the items, which decides nothing"
    if study.plan.get("quick"):
        yield "a quick study: its budgets are too small for its question"
    for name, notes in noted:
        for note in notes:
            if "would say" in note or "disagree" in note:
                yield f"{name}: {note}"
    yield from study.notes
