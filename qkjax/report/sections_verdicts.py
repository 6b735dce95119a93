"""The head of a report: the question, H1 to H5, warnings, what is missing; and attribution."""

from collections.abc import Iterator, Mapping, Sequence

from qkjax.report import arms
from qkjax.report.blocks import (
    ABSENT,
    Block,
    Box,
    Folded,
    Notes,
    Section,
    Table,
    Text,
    counted,
    interval,
    p_value,
    seeds_named,
    short,
)
from qkjax.report.material import SKIPPED, Material
from qkjax.verdicts.judge import scope
from qkjax.verdicts.judgement import INCONCLUSIVE, RULE, Attribution, Clause
from qkjax.verdicts.results import Study

_QUESTION = (
    "Does QK-Norm (RMSNorm on queries and keys) collapse the dimensionality of attention keys in "
    "long runs, does Muon without it keep them high, and does either make a better model? "
    "Four arms, {AdamW, Muon} × {QK-Norm, none}, "
)
_ANSWER = {True: "and their controls answer. ", False: "answer. "}
_FIXED = "The rules below were fixed before the data."
_READING = Text(
    "In the small figures the thick bar is the pooled 95% interval, the thin line the paired one, "
    "dots are seeds, the solid line is 0 and the dashed one the smallest effect of interest "
    "(SESOI), the margin or the limit. Results to the right are as predicted; for the losses and "
    "logits of H4, results to the left are. PR is the Participation Ratio, aa the axis-alignment "
    "index. The "
    "thresholds of H4 that runs keep or break are conventions."
)


def verdicts(material: Material) -> Section:
    """The question and the five hypotheses."""
    judgement, study = material.judgement, material.study
    planned = study.num_planned
    used = seeds_named(judgement.seeds_used) if judgement.seeds_used else "no seed"
    state = (
        f"{len(study.runs)} of {counted(planned, 'run')} finished. All four arms, and so the "
        f"contrasts of H1 to H4, have {used}. {_extra(study)}A hypothesis is "
        "supported only where all of its clauses are, and still after correction (H1 at one-sided "
        ".0125, H2–H4 by Holm at .0125); a clause that is refuted at 97.5% refutes it."
    )
    boxes = (Box(verdict) for verdict in judgement.verdicts)
    question = _QUESTION + _ANSWER[bool(study.plan["controls"])] + _FIXED
    blocks: list[Block] = [
        Text(question),
        Text(scope(study)),
        Folded("How a verdict is made, and how to read the small figures", (Text(state), _READING)),
        *boxes,
    ]
    return Section("verdicts", "Verdicts", tuple(blocks))


def _extra(study: Study) -> str:
    """What the extra seeds of some arms are for; "" without any."""
    extra = study.plan.get("extra_seeds") or {}
    if not extra:
        return ""
    named = "; ".join(f"{arms.label(arm)}: {seeds_named(seeds)}" for arm, seeds in extra.items())
    return (
        f"Extra seeds of some arms, planned from the start ({named}), enter the tables, the "
        "rules, and every contrast whose whole family has them. "
    )


def has_data(clause: Clause) -> bool:
    """Whether the study has measured anything of the clause."""
    measured = [value for value in clause.per_seed.values() if value is not None]
    return clause.estimate is not None or bool(measured) or clause.word != INCONCLUSIVE


def without_data(clauses: Sequence[Clause]) -> str:
    """One line for the clauses of which nothing is measured, with the reasons; "" where none is."""
    by_reason: dict[str, list[str]] = {}
    for clause in clauses:
        if not has_data(clause):
            by_reason.setdefault(clause.reason, []).append(clause.name)
    said = (f"{', '.join(names)} ({why})" for why, names in by_reason.items())
    return f"Without data: {'; '.join(said)}." if by_reason else ""


def warnings(material: Material) -> Section:
    """What a reader has to know before the numbers; what the study still lacks."""
    blocks: list[Block] = []
    if material.warnings:
        blocks.append(Notes(material.warnings, tone="warning"))
    else:
        blocks.append(Text("None."))
    return Section("warnings", "Warnings", tuple(blocks))


def missing(material: Material) -> Section:
    """Runs, rates, spectra and scores that the plan names and nobody has made yet."""
    found = tuple(_missing(material))
    block: Block = Notes(found) if found else Text("Nothing: every part of the plan has a result.")
    return Section("missing", "What is missing", (block,))


def _missing(material: Material) -> Iterator[str]:
    study = material.study
    seeds: dict[tuple[str, str], list[int]] = {}
    for run in study.missing:
        noted = _in_brackets(*material.noted(f"runs/{run.arm}/seed_{run.seed}"))
        seeds.setdefault((run.arm, f"{run.why}{noted}"), []).append(run.seed)
    for (arm, why), some in seeds.items():
        yield f"{arms.label(arm)}, {seeds_named(some)}: {why}"
    if study.plan.get("sweep"):
        for arm in study.plan["arms"]:
            if arm not in (study.learning_rates or {}):
                yield f"sweep of {arms.label(arm)}: no learning rate chosen yet"
    lacking = [key for key in study.runs if key not in material.spectra]
    yield from _of_runs(study, "spectra", dict.fromkeys(lacking, ""))
    planned = study.downstream or study.plan.get("downstream") != "none"
    scores = {}
    for arm, seed in study.runs:
        status, why = material.noted(f"downstream/{arm}/seed_{seed}")
        if (arm, seed) not in study.downstream and status != SKIPPED and (planned or status):
            scores[arm, seed] = _in_brackets(status, why)
    yield from _of_runs(study, "downstream scores", scores)
    if study.plan.get("surgery"):
        yield from _of_runs(study, "rank surgery", dict(_missing_surgery(material)))


def _missing_surgery(material: Material) -> Iterator[tuple[tuple[str, int], str]]:
    for arm, seed in material.study.runs:
        step = f"surgery/{arm}/seed_{seed}"
        status, why = material.noted(step)
        if (arm, seed) in material.surgery or status == SKIPPED:
            continue
        part = (material.study.workdir / f"{step}.part.json").exists()
        yield (arm, seed), _in_brackets(status, why) or (" (a part is measured)" if part else "")


def _of_runs(study: Study, what: str, lacking: Mapping[tuple[str, int], str]) -> Iterator[str]:
    """What finished runs lack; by arm and seed the reason, for people."""
    seeds: dict[tuple[str, str], list[int]] = {}
    for (arm, seed), why in lacking.items():
        seeds.setdefault((arm, why), []).append(seed)
    reasons = {why for _, why in seeds}
    if len(reasons) == 1 and len(lacking) == len(study.runs):
        yield f"{what}: of every run{reasons.pop()}"
        return
    for (arm, why), some in seeds.items():
        yield f"{what} of {arms.label(arm)}, {seeds_named(some)}{why}"


def _in_brackets(status: str, why: str) -> str:
    return f" ({status}: {why})" if status else ""


def attribution(material: Material) -> Section:
    """What the PR that QK-Norm costs is made of, for each optimiser."""
    blocks: list[Block] = [
        Text(
            "The PR that QK-Norm costs under one optimiser, A = none - decayed, is split into "
            "normalisation (none - frozen), the learned gamma (frozen - undecayed) and the decay "
            "of gamma (undecayed - decayed). It is attributed only where A itself is supported; "
            "whether decay explains more than half of A is a contrast of its own, decay - A/2."
        )
    ]
    for found in material.judgement.attributions:
        blocks.append(Text(f"{arms.family(found.optimizer)}: {found.reason}."))
        if any(clause.per_seed for clause in (found.total, *found.parts)):
            blocks.append(_attribution_table(found))
    if material.judgement.controls:
        blocks.append(_controls_table(material.judgement.controls))
    return Section("attribution", "Attribution of H1, and controls", tuple(blocks))


def _controls_table(clauses: Sequence[Clause]) -> Table:
    """Controls that no attribution names; a clause of each quantity."""
    return Table(
        "Every other control minus its parent, at the end of training.",
        ("Control", "Of", "Remark", "Difference", "Pooled 95%", "Paired 95%", "Per seed"),
        tuple(
            (
                arms.label(control),
                what,
                clause.reason if clause.estimate is None else clause.word,
                ABSENT
                if clause.estimate is None
                else f"{short(clause.estimate, signed=True)} {clause.unit}",
                interval(clause.pooled),
                interval(clause.paired),
                per_seed(clause),
            )
            for clause in clauses
            for control, _, what in [clause.name.partition(": ")]
        ),
        words=3,
        notes=(
            "Family of the pooled error: the control and its parent. These have no prediction: "
            '"supported" says that the control ends higher by at least the smallest effect of '
            "interest. Outside the corrected family.",
        ),
    )


def _attribution_table(found: Attribution) -> Table:
    roles = "; ".join(f"{role}: {arms.label(arm)}" for role, arm in found.roles.items() if arm)
    clauses = (*found.beside, found.half, *found.parts, found.total)
    return Table(
        f"{arms.family(found.optimizer)}: parts of the loss in post-RoPE raw PR.",
        ("Part", "Status", "Estimate (PR)", "Pooled 95%", "Paired 95%", "p", "Per seed"),
        tuple(
            (
                clause.name.partition(": ")[2],
                clause.word,
                short(clause.estimate, signed=True),
                interval(clause.pooled),
                interval(clause.paired),
                p_value(clause.p),
                per_seed(clause),
            )
            for clause in clauses
        ),
        words=2,
        strong=(len(clauses) - 1,),
        notes=(f"{roles}.",),
    )


def per_seed(clause: Clause) -> str:
    """ "42: +3.1, 137: +2.8"."""
    signed = clause.kind != RULE
    cells = (f"{seed}: {short(value, signed=signed)}" for seed, value in clause.per_seed.items())
    return ", ".join(cells) or ABSENT
