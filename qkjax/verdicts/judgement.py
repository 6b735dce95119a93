"""What a study says, as data: clauses, verdicts, attributions.

`qkjax.verdicts.judge.judge` makes it, the report shows it. Nothing here computes.
"""

import dataclasses
from typing import Any

from qkjax import files

SUPPORTED, REFUTED, INCONCLUSIVE = "supported", "refuted", "inconclusive"
# How a clause is decided: its interval against 0 and SESOI, against a margin, or by a rule on
# every run; a clause of kind "shown" decides nothing.
SUPERIORITY, NON_INFERIORITY, RULE, SHOWN = "superiority", "non-inferiority", "rule", "shown"

Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Clause:
    """One prediction and what the study says about it; positive = as predicted."""

    name: str  # "H3(a)", "H4 spikes", "H1 pre-RoPE"
    text: str  # one sentence: what is predicted
    status: str  # "supported" | "refuted" | "inconclusive"
    reason: str  # one line, for people
    estimate: float | None
    pooled: Interval | None  # 95%; of H5: over items
    paired: Interval | None  # 95%, S - 1 degrees of freedom; of H5: over seeds
    p: float | None  # one-sided, against 0 (non-inferiority: the margin); by rule 0 or 1
    sesoi: float | None  # smallest effect of interest; non-inferiority: the margin; rule: the limit
    unit: str
    seeds_needed: int | None  # of an inconclusive clause
    per_seed: dict[int, float | None]  # the same contrast within each seed
    notes: tuple[str, ...] = ()
    kind: str = SUPERIORITY


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One hypothesis of SCIENCE.md section 8."""

    name: str  # "H1" ... "H5"
    title: str
    question: str
    status: str
    reason: str
    p: float | None  # the largest of its clauses; None where one of them has none
    holm_rejected: bool | None  # over H1-H4 at 0.025; None for H5
    clauses: tuple[Clause, ...]  # these decide
    shown: tuple[Clause, ...] = ()  # beside them, without deciding
    qualifier: str = ""  # such as "supported for post-RoPE PR only"


@dataclasses.dataclass(frozen=True)
class Attribution:
    """What the PR that QK-Norm costs under one optimiser is made of."""

    optimizer: str  # "adamw" | "muon"
    status: str  # of the total: only a supported one is attributed
    reason: str
    total: Clause  # A = none - decayed
    parts: tuple[Clause, ...]  # normalisation, learned gamma, decay: they add up to A
    explained_by_decay: bool | None  # decay >= A / 2; None where A is not supported
    roles: dict[str, str]  # "none", "frozen", "undecayed", "decayed": the arm that serves as it


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Everything that a study says."""

    verdicts: tuple[Verdict, ...]  # H1 to H5
    attributions: tuple[Attribution, ...]  # adamw, muon
    warnings: tuple[str, ...]  # what a reader has to know first
    seeds_used: tuple[int, ...]  # seeds that have every arm of the plan

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers, strings and None, as JSON has them."""
        return files.plain(dataclasses.asdict(self))

    def verdict(self, name: str) -> Verdict:
        """By its name, "H1" to "H5"."""
        return {verdict.name: verdict for verdict in self.verdicts}[name]
