"""What a study says, as data. `qkjax.verdicts.judge.judge` makes it, the report shows it.

    judgement = judge.judge(results.load_study("studies/small"))
    judgement.headline        # one sentence for the first screen
    h1 = judgement.verdict("H1")
    h1.headline               # "post-RoPE raw: supported; pre-RoPE centred: the opposite"
    h1.clauses[0].said        # "+19 PR, 95% +17.2 to +20.8"

A `Clause` is one prediction. Its deciding interval D is the wider of `pooled` (block ANOVA over
`family`) and `paired` (the seeds' own contrasts); `word` follows from D alone. A `Verdict` is a
hypothesis of several clauses, corrected for the number of hypotheses. Words are exact strings:

    supported
    refuted: the opposite                        D lies below -SESOI
    refuted: negligible                          D lies within (-SESOI, SESOI)
    refuted: no effect as large as claimed       D lies below SESOI
    refuted: not twice                           a ratio clause: D lies below twice
    refuted: worse by more than the margin       a non-inferiority clause
    refuted: by rule                             a rule is broken, or a side diverged
    inconclusive

`status` is the word up to its colon. Nothing here computes.
"""

import dataclasses

SUPPORTED, REFUTED, INCONCLUSIVE = "supported", "refuted", "inconclusive"
OPPOSITE = "refuted: the opposite"
NEGLIGIBLE = "refuted: negligible"
TOO_SMALL = "refuted: no effect as large as claimed"
NOT_TWICE = "refuted: not twice"
WORSE = "refuted: worse by more than the margin"
BY_RULE = "refuted: by rule"
WORDS = (SUPPORTED, OPPOSITE, NEGLIGIBLE, TOO_SMALL, NOT_TWICE, WORSE, BY_RULE, INCONCLUSIVE)

# How a clause is decided: D against 0 and the SESOI, D against twice, D against a margin, or by a
# rule that every run of an arm keeps or breaks.
SUPERIORITY, RATIO, NON_INFERIORITY, RULE = "superiority", "ratio", "non-inferiority", "rule"

LABELS = {"adamw": "AdamW", "muon": "Muon"}  # the optimisers that verdicts are of, in words
REHEARSAL = "rehearsal: "  # before every word of a study that decides nothing
Interval = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Clause:
    """One prediction and what the study says about it; positive = as predicted.

    Of a ratio (unit "ln PR") estimate and intervals are natural logarithms; `said` is in ratios.
    """

    name: str  # "H3(a)", "H4 spikes", "H1 pre-RoPE"
    text: str  # one sentence: what is predicted
    kind: str  # SUPERIORITY, RATIO, NON_INFERIORITY or RULE
    unit: str  # "PR", "ln PR", "nat", "aa", "points"
    sesoi: float | None  # smallest effect of interest; the limit of a ratio or rule; the margin
    word: str = INCONCLUSIVE  # one of WORDS
    reason: str = ""  # a few words: why this word
    said: str = ""  # the estimate with D: "+3.2 PR, 95% +1.0 to +5.4"; "1.95 times, 95% ..."
    estimate: float | None = None
    deciding: Interval | None = None  # D, two-sided 95%: the wider of the two below
    pooled: Interval | None = None  # 95%, t with (S-1)(F-1) degrees of freedom
    paired: Interval | None = None  # 95%, t with S-1
    p: float | None = None  # one-sided, the larger of both; none by rule
    level: str = ""  # what the word is compared with: "D at 95%, one-sided .025"
    word_at_975: str = INCONCLUSIVE  # the same with D at 97.5%: what a hypothesis is refuted by
    seeds_needed: int | None = None  # for 80% power, of an inconclusive clause; None: not known
    per_seed: dict[int, float | None] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = ()  # those that the intervals use
    family: tuple[str, ...] = ()  # the arms of the pooled error
    notes: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """SUPPORTED, REFUTED or INCONCLUSIVE."""
        return self.word.partition(":")[0]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One hypothesis."""

    name: str  # "H1" ... "H5"
    title: str
    question: str  # what it asks, in words
    word: str  # of WORDS, after correction
    headline: str  # what a first screen shows; of a rehearsal "rehearsal: WORD"
    reason: str  # one line: which clauses made it so
    p: float | None  # the largest of its contrast clauses; None where one of them has none
    level: float | None  # one-sided: what p was held against; None outside the corrected family
    correction: str  # the level in words, or why there is none
    clauses: tuple[Clause, ...]  # these decide
    shown: tuple[Clause, ...] = ()  # beside them, without deciding; at 95%, uncorrected
    left_out: str = ""  # why the plan cannot answer it and the family goes without it

    @property
    def status(self) -> str:
        """SUPPORTED, REFUTED or INCONCLUSIVE."""
        return self.word.partition(":")[0]

    def word_of(self, clause: Clause) -> str:
        """A clause's word as it is shown: of a rehearsal, which decides nothing, it says so."""
        is_rehearsal = self.headline.startswith(REHEARSAL)
        return f"{REHEARSAL}{clause.word}" if is_rehearsal else clause.word


@dataclasses.dataclass(frozen=True)
class Attribution:
    """What the PR that QK-Norm costs under one optimiser is made of; outside the correction."""

    optimizer: str  # "adamw" | "muon"
    status: str  # of the total: only a supported one is attributed
    reason: str  # one line, with the words of `share`
    total: Clause  # A = none - decayed
    parts: tuple[Clause, ...]  # normalisation, learned gamma, decay: they add up to A
    beside: tuple[Clause, ...]  # undecayed - to_one: a pull that does not shrink
    half: Clause  # decay - A/2
    share: str  # "decay explains more than half", ...; "" where nothing is attributed
    roles: dict[str, str]  # "none", "frozen", "undecayed", "decayed", "to_one": the arm; "" none


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Everything that a study says."""

    headline: str  # one sentence of plain result
    verdicts: tuple[Verdict, ...]  # H1 to H5
    attributions: tuple[Attribution, ...]  # adamw, muon
    controls: tuple[Clause, ...]  # every other control against its parent, family {arm, control}
    warnings: tuple[str, ...]  # what a reader has to know first
    seeds_used: tuple[int, ...]  # seeds that have every one of the four arms
    rehearsal: bool  # scale tiny, or quick: words are computed, nothing is decided

    def verdict(self, name: str) -> Verdict:
        """The verdict of that name, "H1" to "H5"."""
        return {verdict.name: verdict for verdict in self.verdicts}[name]
