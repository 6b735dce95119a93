"""The arms of a study: which config file and words each is, and the config of its runs."""

import ast
import dataclasses
import hashlib
import json
import math
import pathlib
from typing import Any

import ml_collections

from qkjax import config as config_lib
from qkjax import errors, files, presets
from qkjax.cli import config_flag, places
from qkjax.runs import directory as run_directory
from qkjax.study.plan_config import StudyConfig

# Rates and decays of gamma closer than this make one arm (recipe original's pilot has tau 7.32).
_SAME_EXPOSURE = 0.01


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm or control of a study."""

    name: str
    parent: str  # the arm whose learning rate a control takes; of an arm its own name
    file: str  # its config file, configs/NAME.py
    words: str  # after the file's colon
    base_rate: float  # of the grid
    auxiliary_rate: float | None  # of Muon's auxiliary AdamW at the base rate
    config: config_lib.Config  # of a run with the first seed, at the recipe's own rate


def make_arms(study: StudyConfig) -> tuple[dict[str, Arm], dict[str, str]]:
    """The arms by name, controls after them, and the optional controls that were left out.

    Returns:
        Of those left out, the arm that trains the same.
    Raises:
        UsageError: an arm that does not exist, a control without its arm, or two arms that would
            train the same.
    """
    arms: dict[str, Arm] = {}
    left_out: dict[str, str] = {}
    for name in dict.fromkeys((*study.arms, *study.controls, *study.optional_controls)):
        arm = _arm(study, name)
        if arm.parent not in study.arms:
            raise errors.UsageError(
                f"controls: {name} belongs to {arm.parent}, which is not among arms "
                f"({', '.join(study.arms)}). Add {arm.parent} or drop the control."
            )
        twin = next((other for other in arms.values() if _train_the_same(other, arm)), None)
        if twin is None:
            arms[name] = arm
        elif name not in study.controls:
            left_out[name] = twin.name
        else:
            rates, decays = zip(*map(_exposure, (arm, twin)), strict=True)
            raise errors.UsageError(
                f"arms: {name} and {twin.name} would train the same (gamma's learning rate "
                f"{rates[0]:.4g} and {rates[1]:.4g}, weight decay {decays[0]:.4g} and "
                f"{decays[1]:.4g}). Drop one of them."
            )
    return arms, left_out


def _arm(study: StudyConfig, name: str) -> Arm:
    """An arm by its name: the file of configs/, and control words after it."""
    files = {path.stem for path in places.configs().glob("*.py")} - {"study"}
    stem = name
    controls: list[str] = []
    while stem not in files:
        word = next((word for word in presets.CONTROLS if stem.endswith(f"_{word}")), "")
        stem = stem.removesuffix(f"_{word}")
        if not word or not stem:
            shipped = sorted(files)
            raise errors.UsageError(
                f"arms: no arm {name!r}.{presets.suggest(name, tuple(shipped))} An arm is a file "
                f"of configs/ ({', '.join(shipped)}), with controls after it as in muon_qk_frozen."
            )
        controls.insert(0, word)
    words = ",".join([study.scale, study.recipe, *controls])
    file = f"configs/{stem}.py"
    fields = {"train.tokens": study.tokens, "seed": study.seeds[0]}
    run = config_lib.resolve(_values(study, file, words, fields))
    if run.arm != name:
        raise errors.UsageError(
            f"{file}: trains the arm {run.arm}, but the study calls it {name}. Rename the file, "
            "list it by the other name, or drop the override that changes it."
        )
    rate = run.optimizer.learning_rate
    if run.optimizer.name == "muon" and run.muon.scale == "rms":  # updates as large as AdamW's
        rate = presets.Choice(study.scale, study.recipe, "adamw", "none", frozenset()).rate
    return Arm(name, stem, file, words, rate, run.optimizer.adam_learning_rate, run)


def _train_the_same(one: Arm, other: Arm) -> bool:
    def apart_from_exposure(arm: Arm) -> dict[str, Any]:
        values = arm.config.to_dict()
        values.pop("arm")
        for field in ("gamma_weight_decay", "gamma_decay_tau", "gamma_learning_rate"):
            values["optimizer"].pop(field)
        return values

    return apart_from_exposure(one) == apart_from_exposure(other) and all(
        math.isclose(ours, theirs, rel_tol=_SAME_EXPOSURE)
        for ours, theirs in zip(_exposure(one), _exposure(other), strict=True)
    )


def _exposure(arm: Arm) -> tuple[float, float]:
    """Rate and decay of gamma_q and gamma_k, 0 where no gamma is learned."""
    found = config_lib.gamma_exposure(arm.config)
    return (0.0, 0.0) if found is None else (found.learning_rate, found.weight_decay)


# --------------------------------------------------------------------------------------------
# The config of a run.


def run_config(study: StudyConfig, arm: Arm, fields: dict[str, Any]) -> config_lib.Config:
    """The resolved config of a run of the arm: overrides of the study, then `fields`.

    Raises:
        UsageError: an override of a field that there is not, or of a wrong value.
    """
    return config_lib.resolve(_values(study, arm.file, arm.words, fields))


def flags(study: StudyConfig, arm: Arm, fields: dict[str, Any]) -> list[str]:
    """The flags of qkjax.main, but for --workdir, that make it train `run_config`."""
    values = {**_overrides(study), **fields}
    return [
        f"--config={arm.file}:{arm.words}",
        *(f"--config.{field}={_text(value)}" for field, value in values.items()),
    ]


def identity(config: config_lib.Config) -> dict[str, Any]:
    """Everything that a run's result depends on but for its data: all fields that matter."""
    values = run_directory.flatten(files.plain(config.to_dict()))
    return {name: v for name, v in values.items() if name not in config_lib.FREE_FIELDS}


def digest(value: Any) -> str:
    """sha256 of a value as JSON."""
    text = json.dumps(files.plain(value), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _overrides(study: StudyConfig) -> dict[str, str]:
    return {field: value for field, _, value in (text.partition("=") for text in study.overrides)}


def _values(
    study: StudyConfig, file: str, words: str, fields: dict[str, Any]
) -> ml_collections.ConfigDict:
    values = config_flag.load(places.configs() / pathlib.Path(file).name, words)
    for field, text in _overrides(study).items():
        _set(values, field, _parsed(values, field, text))
    for field, value in fields.items():
        _set(values, field, value)
    return values


def _parsed(values: ml_collections.ConfigDict, field: str, text: str) -> Any:
    """A value as the command line would read it for this field."""
    section = values
    for part in field.split(".")[:-1]:
        section = section.get(part, ml_collections.ConfigDict())
    leaf = field.rpartition(".")[2]
    if not isinstance(section, ml_collections.ConfigDict) or leaf not in section:
        known = run_directory.flatten(values.to_dict())
        raise errors.UsageError(
            f"overrides: no field {field!r}.{presets.suggest(field, tuple(known))} See "
            "python -m qkjax.main --config=configs/muon_noqk.py --print_config."
        )
    kind = section.get_type(leaf)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is int:
            value = float(text)
            if not value.is_integer():
                raise ValueError
            return int(value)
        return ast.literal_eval(text) if kind is tuple else kind(text)
    except (ValueError, KeyError, SyntaxError):
        raise errors.UsageError(
            f"overrides: {field}={text} is not of type {kind.__name__}. Write FIELD=VALUE as on "
            "the command line of qkjax.main."
        ) from None


def _set(values: ml_collections.ConfigDict, field: str, value: Any) -> None:
    *sections, leaf = field.split(".")
    for section in sections:
        values = values[section]
    values[leaf] = value


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + "".join(f"{item}," for item in value) + ")"
    return str(value)
