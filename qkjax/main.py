"""Trains one arm: python -m qkjax.main --config=configs/muon_noqk.py:tiny --workdir=runs/first

The same command, run again, resumes the run. --config runs the code of the config file.
"""

import contextlib
import json
import re

from absl import flags

from qkjax import chips, errors
from qkjax.cli import command_line, config_flag, startup
from qkjax.config import Config
from qkjax.targets import estimate, target

FLAGS = flags.FlagValues()
_CONFIG = config_flag.define(FLAGS)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run directory; created if it is missing.", flag_values=FLAGS
)
_RESTORE_STEP = flags.DEFINE_integer(
    "restore_step",
    None,
    "Resume from this checkpoint; later ones are set aside.",
    lower_bound=0,
    flag_values=FLAGS,
)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_list(
    "allow_config_change",
    [],
    "Fields that may differ from the run directory's config.json.",
    flag_values=FLAGS,
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Show what the run would cost; write nothing.", flag_values=FLAGS
)
_AOT = flags.DEFINE_string(
    "aot",
    None,
    "With --dry_run: compile for this target, which you need not have: h100:8, a100, v5e:2x4.",
    flag_values=FLAGS,
)
_PRICE = flags.DEFINE_float(
    "price_per_hour",
    None,
    "With --aot: price per hour of one device, for the cost of the run.",
    lower_bound=0,
    flag_values=FLAGS,
)
_PRINT_CONFIG = flags.DEFINE_bool(
    "print_config", False, "Show the checked config as JSON.", flag_values=FLAGS
)

_INIT_FROM = flags.DEFINE_string(
    "init_from",
    None,
    "Start from the parameters of this Llama or Qwen3 directory, public or exported.",
    flag_values=FLAGS,
)
_WANDB = flags.DEFINE_bool(
    "wandb",
    False,
    "Send the metrics to Weights & Biases too; with WANDB_MODE=offline, keep them for later.",
    flag_values=FLAGS,
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "One of several processes, described by the environment of SLURM, a TPU VM, Open MPI or "
    "Kubernetes.",
    flag_values=FLAGS,
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "One of several processes: HOST:PORT of process 0, the same in every process.",
    flag_values=FLAGS,
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes",
    None,
    "With --coordinator: the number of processes.",
    lower_bound=1,
    flag_values=FLAGS,
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id",
    None,
    "With --coordinator: the number of this process, from 0.",
    lower_bound=0,
    flag_values=FLAGS,
)
_JOIN_SECONDS = flags.DEFINE_integer(
    "join_seconds",
    300,
    "How long the processes wait for each other at the start.",
    lower_bound=1,
    flag_values=FLAGS,
)


def main() -> None:
    """Checks the command line, then trains; ends the process."""
    command_line.run(
        _train,
        FLAGS,
        __doc__,
        parse=config_flag.parse,
        buckets=["config.data.dir"],
        exit_at_once=True,
    )


def _train() -> None:
    config = config_flag.read(_CONFIG)
    if not config.determinism.gpu:
        startup.allow_gpu_nondeterminism()
    if _PRINT_CONFIG.value:
        print(json.dumps(config.to_dict(), indent=2))
        return
    target.check_price(_PRICE.value, _AOT.value)
    if _DRY_RUN.value:
        _show_costs(config, None if _AOT.value is None else target.parse(_AOT.value))
        return
    if _AOT.value is not None:
        raise errors.UsageError("--aot: it compiles and trains nothing. Add --dry_run.")
    if not _WORKDIR.value:
        raise errors.UsageError("--workdir: missing. Name the run directory, --workdir=runs/NAME.")

    _check_process_flags()

    from qkjax.data import dataset as dataset_lib

    dataset_lib.require_directory(config)
    startup.check_memory_limit()

    # jax and all: only once the command line is known to be sound.
    from qkjax import processes, train
    from qkjax.export import hf

    with _processes():
        if _WANDB.value and processes.is_first():
            startup.check_wandb()
        train.train_and_evaluate(
            config,
            _WORKDIR.value,
            restore_step=_RESTORE_STEP.value,
            allow_config_change=tuple(_ALLOW_CONFIG_CHANGE.value),
            origin=hf.read_origin(_INIT_FROM.value, config.model) if _INIT_FROM.value else None,
            wandb=_WANDB.value,
        )


def _check_process_flags() -> None:
    coordinator, number, index = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    given = {"coordinator": coordinator, "num_processes": number, "process_id": index}
    missing = [name for name, value in given.items() if value is None]
    if _DISTRIBUTED.value and len(missing) < len(given):
        raise errors.UsageError(
            "--distributed: it takes everything from the environment of a cluster. Leave out "
            "--coordinator, --num_processes and --process_id, or leave out --distributed."
        )
    if len(missing) == len(given):
        return
    if coordinator is None or number is None or index is None:
        raise errors.UsageError(
            f"--{missing[0]}: missing. Several processes need --coordinator=HOST:PORT, "
            "--num_processes=N and --process_id=I in each."
        )
    if not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise errors.UsageError(
            f"--coordinator: {coordinator!r} is not an address, expected HOST:PORT of process 0, "
            "such "
            "as 10.0.0.1:8476. Add the port."
        )
    if index >= number:
        raise errors.UsageError(
            f"--process_id: {index} of {number} processes, expected 0 to {number - 1}. Number the "
            "processes from 0."
        )


def _processes() -> contextlib.AbstractContextManager[None]:
    """This process as one of several, if the command line says so."""
    if not _DISTRIBUTED.value and _COORDINATOR.value is None:
        return contextlib.nullcontext()
    from qkjax import processes

    return processes.joined(
        command_line.describe,
        _COORDINATOR.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        _JOIN_SECONDS.value,
    )


def _show_costs(config: Config, aim: target.Target | None) -> None:
    startup.check_memory_limit()
    found = None if aim is None else estimate.make(config, aim)

    import jax

    from qkjax import model, optimizer, sharding
    from qkjax.runs import attention_check, resources

    platform = jax.default_backend()
    config = attention_check.settle(config.for_platform(platform), platform)
    shapes = model.parameter_shapes(config.model)
    transformation = optimizer.make_optimizer(config, shapes)
    mesh = sharding.make_mesh()
    try:
        costs = resources.describe(config, transformation, mesh if found is None else None)
    except jax.errors.JaxRuntimeError as error:
        raise resources.explain(error, config, transformation) from error
    print(json.dumps(config.to_dict(), indent=2))
    print(optimizer.format_routing_table(optimizer.routing_table(shapes, config)))
    memory = costs["memory_bytes"]
    here = "unknown" if memory is None else f"{memory / 1e9:.2f} GB"
    print(
        f"arm             {config.arm}\n"
        f"parameters      {costs['parameters']:,}\n"
        f"tokens          {costs['tokens']:,}\n"
        f"steps           {costs['steps']:,} of {costs['tokens_per_step']:,} tokens\n"
        f"evaluations     {costs['evaluations']}\n"
        f"training        {costs['training_flop'] / 1e15:,.4g} PFLOP (PaLM convention)\n"
        + (f"device memory   {here} a device\n" if found is None else "")
        + f"disk            {costs['disk_bytes'] / 1e9:.2f} GB of checkpoints"
    )
    if found is None:
        print("\n".join(["", *chips.hours_table(costs["training_flop"])]))
    else:
        print(f"\n{estimate.describe(found, _PRICE.value)}")


if __name__ == "__main__":
    main()
