"""The verdicts of a study: H1 to H5, attributions, controls, and what a reader has to know first.

`judge` never fails on an unfinished study: what cannot be said is inconclusive, and says why.
"""

from collections.abc import Iterable, Sequence

from qkjax import presets
from qkjax.verdicts import attribution, hypotheses, items
from qkjax.verdicts.clauses import ONE_SEED, Panel
from qkjax.verdicts.judgement import INCONCLUSIVE, LABELS, REFUTED, SUPPORTED, Judgement, Verdict
from qkjax.verdicts.results import Study

STUDY_TOKENS = 300_000_000  # a run of the study's question


def judge(study: Study) -> Judgement:
    """Every verdict on a study, finished or not, by the rules of docs/statistics.md."""
    panel = Panel.of(study)
    rehearsal = is_rehearsal(study)
    verdicts = tuple(
        hypotheses.with_headline(verdict, rehearsal)
        for verdict in hypotheses.corrected(hypotheses.make(panel))
    )
    attributions = tuple(attribution.attribute(study, name) for name in LABELS)
    controls = tuple(attribution.controls(study, attributions))
    noted = [(c.name, c.notes) for v in verdicts for c in (*v.clauses, *v.shown)]
    noted += [
        (f"attribution, {c.name}", c.notes) for a in attributions for c in (a.total, *a.parts)
    ]
    return Judgement(
        headline=_headline(panel, verdicts, rehearsal),
        verdicts=verdicts,
        attributions=attributions,
        controls=controls,
        warnings=tuple(_warnings(panel, noted)),
        seeds_used=panel.seeds,
        rehearsal=rehearsal,
    )


def is_rehearsal(study: Study) -> bool:
    """Whether the study only rehearses: at scale tiny, or quick, nothing is decided."""
    return study.plan["scale"] == "tiny" or bool(study.plan.get("quick"))


def _headline(panel: Panel, verdicts: Sequence[Verdict], rehearsal: bool) -> str:
    """One sentence of plain result."""
    if len(panel.seeds) == 1:
        return f"{ONE_SEED[0].upper()}{ONE_SEED[1:]}."
    if rehearsal:
        return "A rehearsal: nothing is decided."
    asked = [verdict for verdict in verdicts if not verdict.left_out]
    parts = [
        f"{', '.join(names)} {status}"
        for status in (SUPPORTED, REFUTED, INCONCLUSIVE)
        if (names := [verdict.name for verdict in asked if verdict.status == status])
    ]
    return f"{'; '.join(parts)}." if parts else "No hypothesis can be answered by this plan."


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


def _left_out(panel: Panel, what: str) -> Iterable[str]:
    for seed in panel.left_out:
        lacking = [
            f"{run.arm} ({run.why})"
            for run in panel.study.missing
            if run.seed == seed and run.arm in panel.family
        ]
        yield f"seed {seed} is left out of {what}, it lacks {', '.join(lacking)}"


def _warnings(panel: Panel, noted: Iterable[tuple[str, Iterable[str]]]) -> Iterable[str]:
    study = panel.study
    if len(panel.seeds) == 1:
        yield f"{ONE_SEED} (seed {panel.seeds[0]})"
    yield from _left_out(panel, "H1 to H4")
    for optimizer, label in LABELS.items():
        of_parts = attribution.panel_of(study, optimizer)
        if any(arm in of_parts.family for arm, _ in study.runs) and len(of_parts.family) > 1:
            yield from _left_out(of_parts, f"{label}'s attribution")
    for run in study.runs.values():
        if run.diverged:
            yield (
                f"{run.arm} seed {run.seed} diverged at step {run.summary['diverged_step']:,}. "
                "This is an outcome: the run enters no mean, and its arm does not enter the error "
                "of other contrasts"
            )
    for (arm, seed), found in study.downstream.items():
        if items.is_sample(found):
            yield f"{arm} seed {seed}: measured on a sample of the items, which decides nothing"
    if study.plan.get("quick"):
        yield "a quick study: its budgets are too small for its question"
    for name, notes in noted:
        for note in notes:
            if "disagree" in note:
                yield f"{name}: {note}"
    yield from study.notes
