"""`--config=RUN/config.json`: the config of a run, as what a config file's get_config returns.

config.json holds the steps that budgets became; here they are budgets again, so that overrides
after it act as they do after a config file.
"""

import sys
from collections.abc import Collection
from typing import Any

import ml_collections

from qkjax import config as config_lib
from qkjax import errors, files

_NUMERICS = "numerics_version"
_FIX = "Restore the file from a copy, or name the config file that the run was started with."


def get_config(path: str) -> ml_collections.ConfigDict:
    """The options of a run's config.json; `resolve` gives the same config again.

    Raises:
        UsageError: the file is damaged, or this version makes another config of its options.
    """
    stored = _read(path)
    options = to_options(stored)
    again, before = config_lib.resolve(options).to_dict(), stored.to_dict()
    different = [name for name in before if name != _NUMERICS and again[name] != before[name]]
    if different:
        raise errors.UsageError(
            f"{path}: {', '.join(different)} cannot be set from a saved config by this version of "
            f"qkjax. {_FIX}"
        )
    return options


def compare_numerics(path: str) -> None:
    """Says on stderr where a run was computed by other numerics than this version's."""
    version = _read(path).numerics_version
    if version != config_lib.NUMERICS_VERSION:
        print(
            f"config: {path} was trained under {_NUMERICS} {version}, this version of qkjax "
            f"computes under {config_lib.NUMERICS_VERSION}: other bits",
            file=sys.stderr,
        )


def _read(path: str) -> config_lib.Config:
    values = files.read_object(path, _FIX)
    if values is None:
        raise errors.UsageError(f"--config: no file {path}. Name the config.json of a run.")
    return config_lib.from_dict(values, path)


def to_options(config: config_lib.Config) -> ml_collections.ConfigDict:
    """The inverse of `config.resolve`, as far as the steps of a run tell its budgets."""
    train = config.train
    end, a_step = train.num_steps, train.tokens_per_step
    budgets: dict[str, Any] = {
        "checkpoint.every_tokens": _every(config.checkpoint.steps, end, a_step) or a_step
    }
    steps = config.eval.steps
    if isinstance(steps, config_lib.RepeatedSteps):
        budgets |= {"eval.at_tokens": steps.at_tokens, "eval.every_tokens": steps.every_tokens}
    else:
        inner = [step for step in steps if 0 < step < end]
        every = _every(steps, end, a_step) if len(inner) > 1 else None
        at = () if every else tuple(step * a_step for step in inner)
        budgets |= {"eval.at_tokens": at, "eval.every_tokens": every or 0}
    if config.optimizer.gamma_decay_tau:
        budgets["optimizer.gamma_learning_rate"] = 0.0  # tau sets it
    options = ml_collections.ConfigDict()
    for name in config_lib.OPTIONS:
        section, _, leaf = name.rpartition(".")
        if section and section not in options:
            options[section] = ml_collections.ConfigDict()
        held = getattr(config, section) if section else config
        value = budgets[name] if name in budgets else getattr(held, leaf)
        if value is None:
            value = ml_collections.config_dict.placeholder(float)
        (options[section] if section else options)[leaf] = value
    return options


def _every(steps: Collection[int], end: int, a_step: int) -> int | None:
    """The roundest N of which `steps` are the multiples, in tokens; None where there is none."""
    if isinstance(steps, config_lib.RepeatedSteps):
        return steps.every_tokens
    inner = [step for step in steps if 0 < step < end]
    beyond = -(-end * a_step // (len(inner) + 1))  # one more multiple lies after the end
    least = max([beyond, *(-(-step * a_step // k) for k, step in enumerate(inner, start=1))])
    for unit in (a_step, *(10**digits for digits in range(len(str(least)), -1, -1))):
        every = -(-least // unit) * unit
        if tuple(config_lib.RepeatedSteps(end, a_step, (), every)) == tuple(steps):
            return every
    return None
