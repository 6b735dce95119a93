"""Trains one arm: python -m qkjax.main --config=configs/muon_noqk.py:tiny --workdir=runs/first

The same command again goes on where the run stopped. --config runs the code of the config file.
"""

from absl import flags

from qkjax import command_line, config_flag, errors

_CONFIG = config_flag.define()
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; made where it is missing.")
_RESTORE_STEP = flags.DEFINE_integer(
    "restore_step", None, "Go on from this checkpoint; later ones are set aside.", lower_bound=0
)
_ALLOW_CONFIG_CHANGE = flags.DEFINE_list(
    "allow_config_change", [], "Fields that may differ from the run directory's config.json."
)


def main() -> None:
    """Checks the command line, then trains."""
    config = config_flag.read(_CONFIG)
    if not _WORKDIR.value:
        raise errors.UsageError("--workdir: missing. Name the run directory, --workdir=runs/NAME.")

    from qkjax.data import dataset

    dataset.require_directory(config)

    from qkjax import train  # jax and all: only once the command line is known to be sound

    train.train_and_evaluate(
        config,
        _WORKDIR.value,
        restore_step=_RESTORE_STEP.value,
        allow_config_change=tuple(_ALLOW_CONFIG_CHANGE.value),
    )


if __name__ == "__main__":
    command_line.run(main, parse=config_flag.parse)
