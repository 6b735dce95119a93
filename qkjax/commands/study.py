"""The whole study by one command: sweep, runs, controls, exports, downstream, report.

qkjax study --config=configs/study.py:tiny,quick --workdir=studies/quick
qkjax study --config=configs/study.py:pilot --config.data_dir=DATA --dry_run

The same command, run again, resumes; --status shows from another terminal how far it is.
Exit codes: 0 complete (a diverged run is a result), 1 steps are missing, which the last line names.
"""

import os
import pathlib
import sys

from absl import flags

from qkjax import errors
from qkjax.cli import command_line, config_flag, startup
from qkjax.study import plan, plan_cost, run, states, table
from qkjax.targets import target
from qkjax.verdicts import power, results

FLAGS = flags.FlagValues()
_EXAMPLE = "configs/study.py:tiny,quick"
_CONFIG = config_flag.define(FLAGS, _EXAMPLE)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Study directory; created if it is missing.", flag_values=FLAGS
)
_ONLY = flags.DEFINE_list(
    "only",
    [],
    "Steps to run: names with wildcards (sweep/*), arms, or kinds (run, export, report).",
    flag_values=FLAGS,
)
_JOBS = flags.DEFINE_integer(
    "jobs",
    None,
    "Runs at the same time. Default: one per device of --devices, else one.",
    lower_bound=1,
    flag_values=FLAGS,
)
_DEVICES = flags.DEFINE_list(
    "devices",
    [],
    "Accelerators over which runs are spread, such as 0,1,2,3. Default: each run uses all.",
    flag_values=FLAGS,
)
_STATUS = flags.DEFINE_bool(
    "status", False, "Show how far every step is, and end.", flag_values=FLAGS
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Show steps and costs; write nothing.", flag_values=FLAGS
)
_RATE = flags.DEFINE_float(
    "tokens_per_second",
    None,
    "Rate for the time of --dry_run, instead of the measured one.",
    lower_bound=1e-9,
    flag_values=FLAGS,
)
_AOT = flags.DEFINE_string(
    "aot",
    None,
    "With --dry_run: compile the arms for this target, which need not be here: h100:8, v5e:2x4.",
    flag_values=FLAGS,
)
_PRICE = flags.DEFINE_float(
    "price_per_hour",
    None,
    "With --aot: price per hour of one device, for the cost of the study.",
    lower_bound=0,
    flag_values=FLAGS,
)
_POWER_FROM = flags.DEFINE_string(
    "power_from",
    None,
    "For the power of --dry_run: a finished study whose spreads replace the assumed ones.",
    flag_values=FLAGS,
)
_WANDB = flags.DEFINE_bool(
    "wandb",
    False,
    "Every run sends its metrics to Weights & Biases too; with WANDB_MODE=offline, later.",
    flag_values=FLAGS,
)
_PRINT_COMMANDS = flags.DEFINE_bool(
    "print_commands",
    False,
    "Print one shell line per step, for a scheduler; run nothing.",
    flag_values=FLAGS,
)


def main() -> None:
    """Reads the command line and does the work; ends the process."""
    command_line.run(_study, FLAGS, __doc__, parse=config_flag.parse, buckets=["config.data_dir"])


def _costs(study: plan.Plan, workdir: pathlib.Path | None) -> str:
    if _AOT.value is not None:
        aim = target.parse(_AOT.value)
        return plan_cost.describe(study, plan_cost.rates_on(study, aim), aim, _PRICE.value)
    if _RATE.value:
        return plan_cost.describe(study, {"": _RATE.value})
    return plan_cost.describe(study, {} if workdir is None else plan_cost.measured_rates(workdir))


def _study() -> None:
    study = plan.make_plan(config_flag.given(_CONFIG, _EXAMPLE))
    workdir = None if not _WORKDIR.value else pathlib.Path(_WORKDIR.value).absolute()
    target.check_price(_PRICE.value, _AOT.value)
    if _DRY_RUN.value:
        print(_costs(study, workdir))
        finished = results.load_study(_POWER_FROM.value) if _POWER_FROM.value else None
        print("\n".join(["", *power.describe(study, finished)]))
        return
    if _AOT.value is not None:
        raise errors.UsageError("--aot: it compiles and runs nothing. Add --dry_run.")
    if workdir is None:
        raise errors.UsageError("--workdir: missing. Name the directory, --workdir=studies/NAME.")
    study, said = states.as_recorded(study, workdir)
    if said:
        print(said, flush=True)
    if _PRINT_COMMANDS.value:
        command = [
            sys.executable,
            "-m",
            "qkjax.commands",
            "study",
            *config_flag.as_flags(FLAGS),
            f"--workdir={workdir}",
            *(["--wandb"] if _WANDB.value else []),
        ]
        print("\n".join(plan.shell_lines(study, command, os.getcwd())))
        return
    if _STATUS.value:
        table.print_status(states.StudyFiles(study, workdir))
        return
    if _WANDB.value:
        startup.check_wandb()
    places = run.places_of(_JOBS.value, _DEVICES.value)
    run.execute(study, workdir, _ONLY.value, places, _WANDB.value)
