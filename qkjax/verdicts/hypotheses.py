"""H1 to H4 and the attribution to decay: which clauses they are made of (SCIENCE.md section 8)."""

import dataclasses
import math
from collections.abc import Sequence

from qkjax import presets
from qkjax.runs.results import LOSS, PR, RunResult
from qkjax.verdicts import stability, statistics
from qkjax.verdicts.clauses import Measure, Panel, by_contrast, by_rule
from qkjax.verdicts.judgement import (
    INCONCLUSIVE,
    NON_INFERIORITY,
    REFUTED,
    SHOWN,
    SUPPORTED,
    Attribution,
    Clause,
    Verdict,
)
from qkjax.verdicts.results import Study

PR_BEFORE, AXES = "pr/key/pre_rope/centred", "aa/key"
SESOI_PR_SHARE, SESOI_LOSS = 0.05, 0.01  # of head_dim; nat
SESOI_LOG_RATIO, SESOI_AXES = math.log(1.1), 0.05
SHORT_RUN_STEP = 244  # 1M tokens at 4,096 a step, 16M at 65,536
PILOT_TOKENS = 25_000_000
MAX_LOGIT, MAX_RISE, MAX_SPIKE = 100.0, 10.0, 0.5
LOGIT_SEQUENCES = 4  # probes.ATTENTION_SEQUENCES
LABELS = {"adamw": "AdamW", "muon": "Muon"}


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
    p_values = [clause.p for clause in clauses if clause.p is not None]
    return Verdict(
        name=name,
        title=title,
        question=question,
        status=status,
        reason="; ".join(dict.fromkeys(f"{clause.name}: {clause.reason}" for clause in deciding)),
        p=max(p_values) if len(p_values) == len(clauses) else None,
        holm_rejected=None,
        clauses=tuple(clauses),
        shown=tuple(dataclasses.replace(clause, kind=SHOWN) for clause in shown),
        qualifier=qualifier,
    )


def _value(metric: str) -> Measure:
    return lambda run: run.value(metric)


def _log(run: RunResult) -> float:
    ratio = run.value(PR)
    return math.log(ratio) if ratio > 0 else math.nan


def _sesoi_pr(panel: Panel) -> float:
    return SESOI_PR_SHARE * panel.head_dim


# --------------------------------------------------------------------------------------------
# H1 and what its effect is made of.


def constraint_trap(panel: Panel) -> Verdict:
    """H1: QK-Norm lowers the participation ratio of keys, on average over the optimisers."""
    weights = {"adamw_noqk": 0.5, "adamw_qk": -0.5, "muon_noqk": 0.5, "muon_qk": -0.5}
    after, before = (
        by_contrast(
            panel,
            name,
            f"Without QK-Norm the {what} PR of keys ends higher, on average over the optimisers.",
            _value(metric),
            weights,
            sesoi=_sesoi_pr(panel),
            unit="PR",
        )
        for name, what, metric in (
            ("H1 post-RoPE", "post-RoPE raw", PR),
            ("H1 pre-RoPE", "pre-RoPE centred", PR_BEFORE),
        )
    )
    only = after.status == SUPPORTED and before.status != SUPPORTED
    return combine(
        "H1",
        "The constraint trap",
        "Does QK-Norm lower the dimensionality of attention keys?",
        [after],
        shown=[before],
        qualifier="supported for post-RoPE PR only" if only else "",
    )


def attribute(panel: Panel, optimizer: str) -> Attribution:
    """A = PR(none) - PR(decayed), cut into normalisation, learned gamma, and decay of gamma.

    none - frozen + (frozen - undecayed) + (undecayed - decayed) = A, an identity; it says
    something only where A is supported. The last part at A/2 or more: "explained by decay".
    """
    label = LABELS[optimizer]
    roles = _roles(panel, optimizer)
    none, frozen, undecayed, decayed = roles.values()

    def clause(name: str, text: str, more: str, less: str) -> Clause:
        return by_contrast(
            panel,
            f"{label}: {name}",
            text,
            _value(PR),
            {more: 1.0, less: -1.0},
            sesoi=_sesoi_pr(panel),
            unit="PR",
        )

    total = clause(
        "A",
        f"Under {label}, QK-Norm with gamma decayed at the original's tau costs PR.",
        none,
        decayed,
    )
    parts = (
        clause("normalisation", "Normalising keys with gamma fixed at 1 costs PR.", none, frozen),
        clause("learned gamma", "Learning gamma, without decay, costs PR.", frozen, undecayed),
        clause("decay", "Decaying gamma at the original's tau costs PR.", undecayed, decayed),
    )
    if total.status != SUPPORTED:
        reason = f"not attributed, the total is {total.status}: {total.reason}"
        return Attribution(optimizer, total.status, reason, total, parts, None, roles)
    lost, decay = total.estimate, parts[2].estimate
    if lost is None or decay is None:
        reason = f"not attributed: {parts[2].reason}"
        return Attribution(optimizer, INCONCLUSIVE, reason, total, parts, None, roles)
    beyond_half = by_contrast(
        panel, "", "", _value(PR), {undecayed: 1.0, none: -0.5, decayed: -0.5}, sesoi=0.0, unit=""
    )
    explained = decay >= lost / 2
    words = "explained by decay at the original's tau" if explained else "not explained by decay"
    reason = f"{words}: decay is {decay:+.3g} of {lost:+.3g} PR ({decay / lost:.0%})"
    if beyond_half.pooled is not None:
        low, high = beyond_half.pooled
        reason += f"; decay - A/2 has the interval [{low:+.3g}, {high:+.3g}]"
    return Attribution(optimizer, SUPPORTED, reason, total, parts, explained, roles)


def _roles(panel: Panel, optimizer: str) -> dict[str, str]:
    """The arms that serve as none, frozen, undecayed and decayed, in this order.

    In recipe original the parent decays its gammas; where its tau is the original pilot's it is the
    decayed arm.
    """
    parent, none = f"{optimizer}_qk", f"{optimizer}_noqk"
    undecayed, decayed = f"{parent}_undecayed", f"{parent}_decayed"
    if panel.study.plan["recipe"] == "fixed":
        undecayed = parent
    elif decayed not in panel.arms and _has_pilot_tau(panel.study.of_arm(parent)):
        decayed = parent
    return {
        "none": none,
        "frozen": f"{parent}_frozen",
        "undecayed": undecayed,
        "decayed": decayed,
    }


def _has_pilot_tau(runs: Sequence[RunResult]) -> bool:
    """Whether summed learning rate x decay of gamma is the original pilot's, within 1%."""
    taus = [
        run.config.optimizer.auxiliary_learning_rate
        * run.config.optimizer.gamma_weight_decay
        * run.config.schedule.total()
        for run in runs
    ]
    return bool(taus) and all(math.isclose(tau, presets.PILOT_TAU, rel_tol=0.01) for tau in taus)


# --------------------------------------------------------------------------------------------
# H2.


def optimizer_behaviour(panel: Panel) -> Verdict:
    """H2: QK-Norm costs AdamW more of its PR than Muon, and along the axes."""
    weights = {"adamw_noqk": 1.0, "adamw_qk": -1.0, "muon_noqk": -1.0, "muon_qk": 1.0}
    text = "QK-Norm costs AdamW a larger {} of its PR than Muon."
    ratio = by_contrast(
        panel,
        "H2 interaction",
        text.format("share"),
        _log,
        weights,
        sesoi=SESOI_LOG_RATIO,
        unit="ln PR",
    )
    additive = by_contrast(
        panel,
        "H2 additive interaction",
        text.format("amount"),
        _value(PR),
        weights,
        sesoi=_sesoi_pr(panel),
        unit="PR",
    )
    if (ratio.estimate or 0.0) * (additive.estimate or 0.0) < 0:
        ratio = dataclasses.replace(
            ratio,
            status=INCONCLUSIVE,
            seeds_needed=None,
            reason=f"the additive interaction has the other sign ({additive.estimate:+.3g} PR "
            f"against {ratio.estimate:+.3g} ln PR); without it: {ratio.status}, {ratio.reason}",
        )
    axes = by_contrast(
        panel,
        "H2 axes",
        "With QK-Norm, keys are aligned with the axes more under AdamW than under Muon.",
        _value(AXES),
        {"adamw_qk": 1.0, "muon_qk": -1.0},
        sesoi=SESOI_AXES,
        unit="aa",
    )
    return combine(
        "H2",
        "Optimiser behaviour",
        "Does AdamW collapse keys under QK-Norm, along the axes, where Muon does not?",
        [ratio, axes],
        shown=[additive],
    )


# --------------------------------------------------------------------------------------------
# H3.


def reversal(panel: Panel) -> Verdict:
    """H3: QK-Norm wins the short run, and loses PR in the long one."""
    early = by_contrast(
        panel,
        "H3(a)",
        f"After {SHORT_RUN_STEP} steps QK-Norm has the lower validation loss.",
        lambda run: run.at_step(LOSS, SHORT_RUN_STEP),
        {"adamw_noqk": 0.5, "adamw_qk": -0.5, "muon_noqk": 0.5, "muon_qk": -0.5},
        sesoi=SESOI_LOSS,
        unit="nat",
        unavailable=_too_short(panel, lambda run: SHORT_RUN_STEP),
    )
    weights = {"muon_noqk": 1.0, "adamw_qk": -1.0}
    double = by_contrast(
        panel,
        "H3(b)",
        "PR of Muon ends above twice that of AdamW+QK.",
        _log,
        weights,
        sesoi=0.0,
        unit="ln PR",
        offset=math.log(2),
    )
    growth = by_contrast(
        panel,
        "H3(c)",
        "The lead in PR of Muon over AdamW+QK grows from 25M tokens to the end.",
        _growth,
        weights,
        sesoi=_sesoi_pr(panel),
        unit="PR",
        unavailable=_too_short(panel, _pilot_step),
    )
    return combine(
        "H3",
        "The reversal",
        "Does QK-Norm win at first and collapse in the long run?",
        [early, double, growth],
    )


def _pilot_step(run: RunResult) -> int:
    return PILOT_TOKENS // run.config.train.tokens_per_step


def _growth(run: RunResult) -> float:
    """Both ends are ordinary evaluations, so both are measured on the same validation tokens."""
    return run.at_step(PR, run.config.train.num_steps) - run.at_step(PR, _pilot_step(run))


def _too_short(panel: Panel, step_of: Measure) -> str:
    """Why a probe cannot be used as an early one, if so: a run lacks it, or ends there."""
    for run in panel.study.runs.values():
        step, last = int(step_of(run)), run.config.train.num_steps
        if step >= last:
            return f"budget too short: {run.arm} ends at step {last:,}, it has to pass {step:,}"
        if step not in run.config.eval.steps:
            return f"budget too short: {run.arm} has no evaluation at step {step:,}"
    return ""


# --------------------------------------------------------------------------------------------
# H4.


def muon_alternative(panel: Panel) -> Verdict:
    """H4: Muon without QK-Norm is stable, keeps its PR, and loses nothing."""
    study, muon = panel.study, "muon_noqk"
    rules = [
        _finishes(study, muon),
        by_rule(
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
        ),
        by_rule(
            study,
            muon,
            "H4 logits",
            f"No attention logit of the {LOGIT_SEQUENCES} sequences that every evaluation looks at "
            f"reaches {MAX_LOGIT:g}.",
            stability.highest_logit,
            limit=MAX_LOGIT,
            unit="",
            too_short="no evaluation measured attention/max_logit",
        ),
        by_rule(
            study,
            muon,
            "H4 rise",
            f"The largest logit of these sequences rises by less than {MAX_RISE:g} over the last "
            "half.",
            stability.logit_rise,
            limit=MAX_RISE,
            unit="",
            too_short="budget too short: fewer than two evaluations in the last half",
        ),
    ]
    others = {"adamw_qk": "AdamW+QK", "muon_qk": "Muon+QK"}
    ranks = [
        by_contrast(
            panel,
            f"H4 PR against {label}",
            f"PR of Muon ends above that of {label}.",
            _value(PR),
            {muon: 1.0, other: -1.0},
            sesoi=_sesoi_pr(panel),
            unit="PR",
        )
        for other, label in others.items()
    ]
    losses, second_halves = [], []
    for other, label in others.items():
        weights = {muon: 1.0, other: -1.0}
        loss = by_contrast(
            panel,
            f"H4 loss against {label}",
            f"Validation loss of Muon is at most {SESOI_LOSS} nat above that of {label}.",
            _value(LOSS),
            weights,
            sesoi=SESOI_LOSS,
            unit="nat",
            kind=NON_INFERIORITY,
        )
        losses.append(dataclasses.replace(loss, notes=loss.notes + _by_sequence(panel, other)))
        second_halves.append(
            by_contrast(
                panel,
                f"H4 loss against {label}, second half",
                "The same on the second half of the sequences, which chose no learning rate.",
                _second_half,
                weights,
                sesoi=SESOI_LOSS,
                unit="nat",
                kind=NON_INFERIORITY,
            )
        )
    return combine(
        "H4",
        "The Muon alternative",
        "Is Muon without QK-Norm stable, of full dimensionality, and as good?",
        [*rules, *ranks, *losses],
        shown=second_halves,
    )


def _finishes(study: Study, arm: str) -> Clause:
    found = by_rule(
        study,
        arm,
        "H4 finishes",
        "Every run of Muon without QK-Norm finishes.",
        stability.divergences,
        limit=1.0,
        unit="",
    )
    reason = "every run finished" if found.status == SUPPORTED else found.reason
    return dataclasses.replace(found, reason=reason, sesoi=None)  # a limit would say nothing


def _second_half(run: RunResult) -> float:
    return run.value(LOSS) if run.diverged else run.half_losses()[1]


def _by_sequence(panel: Panel, other: str) -> tuple[str, ...]:
    """The same difference with the error of sampling the validation text, of each seed."""
    notes = []
    for seed in panel.study.seeds:
        pair = [panel.study.runs.get((arm, seed)) for arm in ("muon_noqk", other)]
        first, second = pair
        if first is None or second is None or first.diverged or second.diverged:
            continue
        if len(first.sequence_losses) < 2:
            continue
        found = statistics.paired_sequences(first.sequence_losses, second.sequence_losses)
        notes.append(
            f"seed {seed}: {found.estimate:+.4f} nat, standard error {found.standard_error:.4f} "
            f"over {found.num_pairs:,} validation sequences"
        )
    return tuple(notes)
