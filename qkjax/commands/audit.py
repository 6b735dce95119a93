"""What weight decay does to gammas over a run.

qkjax audit --config=FILE | --workdir=RUN | --recipe=NAME

Prints tau = sum over the steps of learning rate x decay, e^-tau (the part that is left of a gamma
without gradients), the value that gamma is pulled to, and what is known about such a tau.
--recipe=all lists public recipes, each with its source.
"""

import math
from typing import TYPE_CHECKING

from absl import flags

from qkjax import errors
from qkjax.cli import command_line, config_flag
from qkjax.runs.directory import RunDirectory

if TYPE_CHECKING:
    from qkjax.audit import Recipe
    from qkjax.config import Config

FLAGS = flags.FlagValues()
_CONFIG = config_flag.define(FLAGS)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory.", flag_values=FLAGS)
_RECIPE = flags.DEFINE_string(
    "recipe", None, "A public recipe by name, or all of them.", flag_values=FLAGS
)


def main() -> None:
    """Reads the command line and does the work; ends the process."""
    command_line.run(_audit, FLAGS, __doc__, parse=config_flag.parse, buckets=["config.data.dir"])


def _audit() -> None:
    given = {"--config": _CONFIG.value, "--workdir": _WORKDIR.value, "--recipe": _RECIPE.value}
    named = [name for name, value in given.items() if value]
    if len(named) != 1:
        raise errors.UsageError(
            f"{' '.join(named) or '--config'}: expected one of {', '.join(given)}, "
            f"found {len(named)}. Give one. See --help."
        )
    if _RECIPE.value:
        _show_recipes(_RECIPE.value)
    elif _WORKDIR.value:
        _show_config(RunDirectory(_WORKDIR.value).need_config())
    else:
        _show_config(config_flag.read(_CONFIG))


def _show_recipes(name: str) -> None:
    from qkjax import audit

    if name not in (*audit.RECIPES, "all"):
        raise errors.UsageError(
            f"--recipe: {name!r} is unknown. Known: {', '.join(audit.RECIPES)}, all."
        )
    for each, recipe in audit.RECIPES.items():
        if name in (each, "all"):
            print(_describe(each, recipe))


def _describe(name: str, recipe: "Recipe") -> str:
    from qkjax import audit

    lines = [f"{name}: {recipe.title}"]
    if recipe.has_gamma:
        lines += [
            f"  gammas    rate {recipe.rate:g}, decay {recipe.decay:g}, {recipe.steps:,} steps",
            f"  tau       {_numbers(recipe.tau, recipe.target)}",
            f"  known     {audit.what_is_known(recipe.tau, recipe.target)}",
        ]
    else:
        lines.append("  gammas    none: there is nothing to decay")
    if recipe.note:
        lines.append(f"  note      {recipe.note}")
    return "\n".join([*lines, f"  source    {recipe.source}"])


def _numbers(tau: float, target: float | None) -> str:
    if tau == 0:
        return "0: no decay"
    if math.isnan(tau):
        return "none: the pull is not proportional to the distance"
    return f"{tau:.3g}: e^-tau {math.exp(-tau):.2g} of the distance from {target:g} is left"


def _show_config(config: "Config") -> None:
    from qkjax import audit

    print(
        f"{config.arm}: scale {config.scale}, recipe {config.recipe}, "
        f"{config.schedule.num_steps:,} steps"
    )
    rows = audit.of_config(config)
    width = max(len(row.name) for row in rows)
    for row in rows:
        print(f"  {row.name:<{width}}  tau {_numbers(row.tau, row.target)}")
    gammas = [row for row in rows if "_norm/gamma" in row.name and "attention/" in row.name]
    if not gammas:
        print("no gammas of QK-Norm in this arm")
    for tau, target in dict.fromkeys((row.tau, row.target) for row in gammas):
        print(f"gammas of QK-Norm: {audit.what_is_known(tau, target)}")
