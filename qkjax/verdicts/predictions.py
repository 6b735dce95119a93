"""H1 to H4 as data: which contrasts of which quantity each predicts, and from where it counts.

The clauses of a study and the simulations of `qkjax.verdicts.power` are made of the same tables.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

from qkjax.runs.results import LOSS, PR, RunResult
from qkjax.study import questions
from qkjax.verdicts.judgement import NON_INFERIORITY, RATIO, SUPERIORITY

PR_BEFORE, AXES = "pr/key/pre_rope/centred", "aa/key"
SESOI_PR_SHARE, SESOI_LOSS, SESOI_AXES = 0.05, 0.01, 0.05  # of head_dim; nat; index
SESOI_LOG_RATIO = math.log(1.1)


@dataclasses.dataclass(frozen=True)
class Quantity:
    """One number of a run, and the smallest difference of it that is of interest."""

    unit: str
    sesoi: float  # of PR and directions as a share of head_dim
    measure: Callable[[RunResult], float]  # NaN where the run has none
    step: Callable[[RunResult], int | None]  # an early evaluation that it needs, if any
    worse: int = 0  # +1: the higher is the worse; -1: the lower; 0: neither
    early: bool = False  # measured at that evaluation alone, also in a run that diverges later

    def limit(self, head_dim: int) -> float:
        """The SESOI in `unit`."""
        return self.sesoi * head_dim if self.unit in ("PR", "directions") else self.sesoi

    def diverged(self, run: RunResult) -> bool:
        """Whether the run diverged before the quantity could be measured."""
        step = self.step(run) if self.early else None
        return run.diverged and (step is None or run.summary["step"] < step)


def _at_the_end(run: RunResult) -> None:
    del run


def _value(metric: str) -> Callable[[RunResult], float]:
    return lambda run: run.value(metric)


def _log(run: RunResult) -> float:
    ratio = run.value(PR)
    return math.log(ratio) if ratio > 0 else math.nan


def _second_half(run: RunResult) -> float:
    return math.nan if run.diverged else run.half_losses()[1]


def _functional_rank(run: RunResult) -> float:
    return math.nan if run.functional_rank is None else run.functional_rank


def _short_run(run: RunResult) -> int:
    del run
    return questions.SHORT_RUN_STEP


def _growth_step(run: RunResult) -> int | None:
    return questions.growth_step(run.config)


def _growth(run: RunResult) -> float:
    """Both ends are ordinary evaluations, so both are measured on the same validation tokens."""
    step = _growth_step(run)
    if step is None:
        return math.nan
    return run.at_step(PR, run.config.train.num_steps) - run.at_step(PR, step)


def _early_loss(run: RunResult) -> float:
    return run.at_step(LOSS, questions.SHORT_RUN_STEP)


QUANTITIES: dict[str, Quantity] = {
    "PR": Quantity("PR", SESOI_PR_SHARE, _value(PR), _at_the_end, worse=-1),
    "PR before RoPE": Quantity("PR", SESOI_PR_SHARE, _value(PR_BEFORE), _at_the_end, worse=-1),
    "ln PR": Quantity("ln PR", SESOI_LOG_RATIO, _log, _at_the_end, worse=-1),
    "PR growth": Quantity("PR", SESOI_PR_SHARE, _growth, _growth_step, worse=-1),
    "functional rank": Quantity(
        "directions", SESOI_PR_SHARE, _functional_rank, _at_the_end, worse=-1
    ),
    "aa": Quantity("aa", SESOI_AXES, _value(AXES), _at_the_end),
    "loss": Quantity("nat", SESOI_LOSS, _value(LOSS), _at_the_end, worse=1),
    "loss, second half": Quantity("nat", SESOI_LOSS, _second_half, _at_the_end, worse=1),
    "early loss": Quantity("nat", SESOI_LOSS, _early_loss, _short_run, worse=1, early=True),
}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """sum weights x quantity, and the side of the limit on which it is expected."""

    name: str
    text: str  # one sentence; positive = as predicted
    quantity: str  # of QUANTITIES
    weights: Mapping[str, float]  # by arm, with sum 0
    kind: str = SUPERIORITY
    limit: float | None = None  # None: the quantity's SESOI, which is a loss's margin too


NONE_MINUS_QK = {"adamw_noqk": 0.5, "adamw_qk": -0.5, "muon_noqk": 0.5, "muon_qk": -0.5}
_INTERACTION = {"adamw_noqk": 1.0, "adamw_qk": -1.0, "muon_noqk": -1.0, "muon_qk": 1.0}
_MUON_MINUS_ADAMW_QK = {"muon_noqk": 1.0, "adamw_qk": -1.0}
_MUON_MINUS_MUON_QK = {"muon_noqk": 1.0, "muon_qk": -1.0}
_OTHERS = {"AdamW+QK": _MUON_MINUS_ADAMW_QK, "Muon+QK": _MUON_MINUS_MUON_QK}


def _costs(name: str, what: str, quantity: str) -> Prediction:
    text = f"Without QK-Norm the {what} PR of keys ends higher, on average over the optimisers."
    return Prediction(name, text, quantity, NONE_MINUS_QK)


AFTER_ROPE = _costs("H1 post-RoPE", "post-RoPE raw", "PR")
BEFORE_ROPE = _costs("H1 pre-RoPE", "pre-RoPE centred", "PR before RoPE")

# By hypothesis the contrasts that decide it; the rules of H4 stand in `hypotheses`.
DECIDING: dict[str, tuple[Prediction, ...]] = {
    "H1": (AFTER_ROPE,),
    "H2": (
        Prediction(
            "H2 interaction",
            "QK-Norm costs AdamW a larger share of its PR than Muon.",
            "ln PR",
            _INTERACTION,
        ),
        Prediction(
            "H2 axes",
            "With QK-Norm, keys are aligned with the axes more under AdamW than under Muon.",
            "aa",
            {"adamw_qk": 1.0, "muon_qk": -1.0},
        ),
    ),
    "H3": (
        Prediction(
            "H3(a)",
            f"After {questions.SHORT_RUN_STEP} steps QK-Norm has the lower validation loss.",
            "early loss",
            NONE_MINUS_QK,
        ),
        Prediction(
            "H3(b)",
            "PR of Muon ends above twice that of AdamW+QK.",
            "ln PR",
            _MUON_MINUS_ADAMW_QK,
            RATIO,
            math.log(2),
        ),
        Prediction(
            "H3(c)",
            "The lead in PR of Muon over AdamW+QK grows from 25M tokens (at scale small, from a "
            "quarter of the steps) to the end.",
            "PR growth",
            _MUON_MINUS_ADAMW_QK,
        ),
    ),
    "H4": (
        *(
            Prediction(
                f"H4 PR against {label}", f"PR of Muon ends above that of {label}.", "PR", weights
            )
            for label, weights in _OTHERS.items()
        ),
        *(
            Prediction(
                f"H4 loss against {label}",
                f"Validation loss of Muon is at most {SESOI_LOSS} nat above that of {label}.",
                "loss",
                weights,
                NON_INFERIORITY,
            )
            for label, weights in _OTHERS.items()
        ),
    ),
}
# Shown beside them, without deciding.
SHOWN: dict[str, tuple[Prediction, ...]] = {
    "H1": (BEFORE_ROPE,),
    "H2": (
        Prediction(
            "H2 additive interaction",
            "QK-Norm costs AdamW a larger amount of its PR than Muon.",
            "PR",
            _INTERACTION,
        ),
    ),
    "H3": (),
    "H4": tuple(
        Prediction(
            f"H4 loss against {label}, second half",
            "The same on the second half of the sequences, which chose no learning rate.",
            "loss, second half",
            weights,
            NON_INFERIORITY,
        )
        for label, weights in _OTHERS.items()
    ),
}
# Shown where runs have rank surgery: the fewest directions within 0.01 nat, contrasts as for PR.
FUNCTIONAL: dict[str, tuple[Prediction, ...]] = {
    "H1": (
        Prediction(
            "H1 functional rank",
            "Without QK-Norm the model uses more directions of its keys, on average over the "
            "optimisers.",
            "functional rank",
            NONE_MINUS_QK,
        ),
    ),
    "H4": tuple(
        Prediction(
            f"H4 functional rank against {label}",
            f"Muon uses more directions of its keys than {label}.",
            "functional rank",
            weights,
        )
        for label, weights in _OTHERS.items()
    ),
}


def deciding(name: str, pilot: bool) -> tuple[Prediction, ...]:
    """The contrasts of H1 to H4; at scale pilot H3(c), which starts where it ends, is none."""
    return tuple(p for p in DECIDING[name] if not (pilot and p.quantity == "PR growth"))
