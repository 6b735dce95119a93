"""H1 to H4 and the attribution to decay: which contrasts they are made of.

SCIENCE.md section 8, clause by clause.
"""

import dataclasses
from collections.abc import Sequence

from qkjax.study.clauses import Measure, Panel, by_contrast
from qkjax.study.judgement import (
    INCONCLUSIVE,
    REFUTED,
    SHOWN,
    SUPPORTED,
    Clause,
    Verdict,
)
from qkjax.study.results import PR, RunResult

PR_BEFORE = "pr/key/pre_rope/centred"
SESOI_PR_SHARE = 0.05  # of head_dim


def _value(metric: str) -> Measure:
    def measure(run: RunResult) -> float:
        return run.value(metric)

    return measure


def combine(
    name: str,
    title: str,
    question: str,
    clauses: Sequence[Clause],
    shown: Sequence[Clause] = (),
    qualifier: str = "",
) -> Verdict:
    """All clauses supported: supported; any refuted: refuted, naming it; else inconclusive."""
    refuted = [clause for clause in clauses if clause.status == REFUTED]
    undecided = [clause for clause in clauses if clause.status != SUPPORTED]
    deciding = refuted or undecided or clauses
    status = REFUTED if refuted else INCONCLUSIVE if undecided else SUPPORTED
    p_values = [clause.p for clause in clauses]
    return Verdict(
        name=name,
        title=title,
        question=question,
        status=status,
        reason="; ".join(f"{clause.name}: {clause.reason}" for clause in deciding),
        p=None if None in p_values else max(p for p in p_values if p is not None),
        holm_rejected=None,
        clauses=tuple(clauses),
        shown=tuple(dataclasses.replace(clause, kind=SHOWN) for clause in shown),
        qualifier=qualifier,
    )


def constraint_trap(panel: Panel) -> Verdict:
    """H1: QK-Norm lowers the participation ratio of keys."""
    weights = {"adamw_noqk": 0.5, "adamw_qk": -0.5, "muon_noqk": 0.5, "muon_qk": -0.5}
    sesoi = SESOI_PR_SHARE * panel.head_dim
    after, before = (
        by_contrast(
            panel, name,
            f"Without QK-Norm the {what} PR of keys ends higher, on average over the optimisers.",
            _value(metric), weights, sesoi=sesoi, unit="PR",
        )
        for name, what, metric in (
            ("H1 post-RoPE", "post-RoPE raw", PR),
            ("H1 pre-RoPE", "pre-RoPE centred", PR_BEFORE),
        )
    )  # fmt: skip
    only = after.status == SUPPORTED and before.status != SUPPORTED
    return combine(
        "H1",
        "The constraint trap",
        "Does QK-Norm lower the dimensionality of attention keys?",
        [after],
        shown=[before],
        qualifier="supported for post-RoPE PR only" if only else "",
    )
