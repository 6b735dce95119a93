"""What the PR that QK-Norm costs is made of, per optimiser; and every other control."""

import dataclasses
from collections.abc import Iterator, Sequence

from qkjax.verdicts import exposure
from qkjax.verdicts.clauses import Panel, by_contrast
from qkjax.verdicts.judgement import (
    LABELS,
    OPPOSITE,
    SUPPORTED,
    Attribution,
    Clause,
)
from qkjax.verdicts.predictions import QUANTITIES, Prediction
from qkjax.verdicts.results import Study

_OUTSIDE = "outside the corrected family, two-sided 95%"


def attribute(study: Study, optimizer: str) -> Attribution:
    """A = PR(none) - PR(decayed), split into normalisation, learned gamma, and decay of gamma.

    none - frozen + (frozen - undecayed) + (undecayed - decayed) = A, an identity; it says
    something only where A is supported and the steps of gamma do not dominate. Whether decay
    makes more than half of A is a contrast of its own: decay - A/2.
    """
    roles = _roles(study, optimizer)
    panel = panel_of(study, optimizer)
    found = exposure.of_runs(study.of_arm(roles["decayed"]))
    at = f"at {exposure.words(found)}" if found else "at the original's exposure"

    def clause(name: str, text: str, limit: float | None = None, **weights: float) -> Clause:
        arms = {roles[role]: weight for role, weight in weights.items()}
        prediction = Prediction(f"{LABELS[optimizer]}: {name}", text, "PR", arms, limit=limit)
        return dataclasses.replace(by_contrast(panel, prediction), level=_OUTSIDE)

    total = clause(
        "A",
        f"Under {LABELS[optimizer]}, QK-Norm with gamma decayed {at} costs PR.",
        none=1.0,
        decayed=-1.0,
    )
    parts = (
        clause(
            "normalisation",
            "Normalising keys with gamma fixed at 1 costs PR.",
            none=1.0,
            frozen=-1.0,
        ),
        clause(
            "learned gamma",
            "Learning gamma, without decay, costs PR.",
            frozen=1.0,
            undecayed=-1.0,
        ),
        clause("decay", f"Decaying gamma {at} costs PR.", undecayed=1.0, decayed=-1.0),
    )
    beside = clause(
        "a pull to 1",
        "Pulling gamma to 1, which does not shrink it, costs PR.",
        undecayed=1.0,
        to_one=-1.0,
    )
    half = clause(
        "decay - A/2",
        "Decay explains more than half of A.",
        limit=0.0,
        undecayed=1.0,
        none=-0.5,
        decayed=-0.5,
    )
    share, reason = _share(total, parts[2], half, found.noise if found else None)
    return Attribution(
        optimizer=optimizer,
        status=total.status,
        reason=reason,
        total=total,
        parts=parts,
        beside=(beside,) if roles["to_one"] in study.arms else (),
        half=half,
        share=share,
        roles={role: arm if arm in study.arms else "" for role, arm in roles.items()},
    )


def panel_of(study: Study, optimizer: str) -> Panel:
    """The seeds that have all arms of an attribution, and those that lack one."""
    roles = _roles(study, optimizer).values()
    return Panel.of(study, [arm for arm in dict.fromkeys(roles) if arm in study.arms])


def _share(total: Clause, decay: Clause, half: Clause, noise: float | None) -> tuple[str, str]:
    """(the words of decay's share, the reason in one line)."""
    if noise is not None and noise > exposure.MOST_NOISE:
        return "", (
            f"dominated by step noise (sd of gamma {noise:.2f}, above {exposure.MOST_NOISE}): "
            "nothing is attributed"
        )
    if total.word != SUPPORTED:
        return "", f"not attributed, A is {total.word}: {total.reason}"
    if total.estimate is None or decay.estimate is None or half.deciding is None:
        return "", f"not attributed: {decay.reason or half.reason}"
    percent = f"{decay.estimate / total.estimate:.0%}"
    if half.word == SUPPORTED:
        share = "decay explains more than half"
    elif half.word == OPPOSITE:
        share = "decay explains less than half"
    else:
        share = f"share undecided ({percent})"
    low, high = half.deciding
    return share, (
        f"{share}: decay is {decay.estimate:+.3g} of {total.estimate:+.3g} PR ({percent}); "
        f"decay - A/2 is {half.estimate:+.3g}, 95% {low:+.3g} to {high:+.3g}, {_OUTSIDE}"
    )


def _roles(study: Study, optimizer: str) -> dict[str, str]:
    """The arms that serve as none, frozen, undecayed, decayed and to_one.

    A control of that name, or the parent where it is its twin: as decayed where it has the
    original pilot's tau and force, as undecayed where it does not decay and moves gamma at the
    decayed arm's rate.
    """
    parent = f"{optimizer}_qk"
    own = exposure.of_runs(study.of_arm(parent))
    roles = {
        "none": f"{optimizer}_noqk",
        **{role: f"{parent}_{role}" for role in ("frozen", "undecayed", "decayed", "to_one")},
    }
    if roles["decayed"] not in study.arms:
        earlier = f"{parent}_decayed_1"  # at another force, which the words name
        roles["decayed"] = earlier if earlier in study.arms else roles["decayed"]
        twin = own is None and study.plan.get("left_out", {}).get(f"{parent}_decayed") == parent
        roles["decayed"] = parent if twin or exposure.is_pilot(own) else roles["decayed"]
    decayed = exposure.of_runs(study.of_arm(roles["decayed"]))
    undecayed = own is not None and not own.weight_decay and exposure.same_rate(own, decayed)
    if roles["undecayed"] not in study.arms and undecayed:
        roles["undecayed"] = parent
    return roles


# --------------------------------------------------------------------------------------------
# Every other control against its parent.


def controls(study: Study, attributed: Sequence[Attribution]) -> Iterator[Clause]:
    """PR and loss of each control that no attribution names, minus its parent's.

    Family {arm, control}; outside the corrected family. A control that is equal to its parent bit
    for bit, as a clip that never acted, is said to be, without a contrast.
    """
    named = {arm for found in attributed for arm in found.roles.values()}
    for control in study.plan["controls"]:
        parent = study.plan["parents"][control]
        if control in named or parent not in study.arms:
            continue
        panel = Panel.of(study, (parent, control))
        same = bool(panel.seeds) and all(
            first.summary["params_sha256"] == second.summary["params_sha256"]
            for first, second in zip(panel.runs(parent), panel.runs(control), strict=True)
        )
        for quantity, what in (("PR", "the PR"), ("loss", "the validation loss")):
            prediction = Prediction(
                f"{control}: {quantity}",
                f"{control} ends with {what} above that of {parent}.",
                quantity,
                {control: 1.0, parent: -1.0},
            )
            if same:
                yield _never_acted(prediction, parent)
            else:
                yield dataclasses.replace(by_contrast(panel, prediction), level=_OUTSIDE)


def _never_acted(prediction: Prediction, parent: str) -> Clause:
    return Clause(
        name=prediction.name,
        text=prediction.text,
        kind=prediction.kind,
        unit=QUANTITIES[prediction.quantity].unit,
        sesoi=None,
        reason=f"equal to {parent} bit for bit: the clip never acted, so there is no contrast",
        level=_OUTSIDE,
    )
