"""The verdicts of a study: H1 to H5 and the attribution to decay, with Holm's correction.

`judge` never fails on an unfinished study: what cannot be said is inconclusive, and says why.
"""

import dataclasses

from qkjax.study import hypotheses, statistics
from qkjax.study.clauses import Panel
from qkjax.study.judgement import (
    INCONCLUSIVE,
    SUPPORTED,
    Attribution,
    Clause,
    Judgement,
    Verdict,
)
from qkjax.study.results import Study

__all__ = ["ALPHA", "Attribution", "Clause", "Judgement", "Verdict", "judge"]

ALPHA = 0.025  # one-sided, over the family


def judge(study: Study) -> Judgement:
    """Every verdict of SCIENCE.md section 8 on a study, finished or not."""
    panel = Panel.of(study)
    family = [hypotheses.constraint_trap(panel)]
    rejected = statistics.holm({verdict.name: verdict.p for verdict in family}, ALPHA)
    family = [_corrected(verdict, rejected[verdict.name]) for verdict in family]
    return Judgement(tuple(family), (), (), panel.seeds)


def _corrected(verdict: Verdict, rejected: bool) -> Verdict:
    """A hypothesis is supported only where Holm's correction agrees; refuted needs none."""
    verdict = dataclasses.replace(verdict, holm_rejected=rejected)
    if verdict.status != SUPPORTED or rejected:
        return verdict
    return dataclasses.replace(
        verdict,
        status=INCONCLUSIVE,
        qualifier="",
        reason=f"supported by its intervals, but not after Holm's correction over H1-H4 "
        f"(p {verdict.p:.3g}): {verdict.reason}",
    )
