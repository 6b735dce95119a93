"""`--config=FILE.py[:words]` and its `--config.FIELD=VALUE` overrides, with errors for people."""

import pathlib
import re
import traceback

import ml_collections
from absl import flags
from ml_collections import config_flags

from qkjax import config, errors, presets

_EXPONENT = re.compile(r"(--config\.[\w.]+=)(\d+(?:\.\d*)?[eE]\+?\d+)")
_OVERRIDE = re.compile(r"--(?:no)?config\.([\w.]+)")


def define() -> flags.FlagHolder:
    """Defines the flag --config of a command that trains."""
    return config_flags.DEFINE_config_file(
        "config", None, "Config file, with words after a colon: configs/muon_noqk.py:tiny,seed"
    )


def parse(argv: list[str]) -> list[str]:
    """Reads all flags; returns argv[0] and the arguments that are no flags.

    Integers may be written 300e6.

    Raises:
        UsageError: the config file, an override, or what is set by words alone.
        flags.Error: any other flag.
    """
    for argument in argv:
        override = _OVERRIDE.match(argument)
        if override and override[1] in presets.WORD_FIELDS:
            raise errors.UsageError(
                f"--config.{override[1]}: an override would only relabel the run. Write the word "
                "after the config's colon: --config=configs/muon_noqk.py:tiny,seed."
            )
    path = _config_path(argv)
    if path and not pathlib.Path(path).is_file():
        shipped = sorted(str(p) for p in pathlib.Path("configs").glob("*.py"))
        raise errors.UsageError(
            f"--config: no file {path}. Configs here: {', '.join(shipped) or 'none'}; run from "
            "the repository's root or give the whole path."
        )
    try:
        return flags.FLAGS([_EXPONENT.sub(_integral, argument) for argument in argv])
    except (flags.Error, errors.QkjaxError):
        raise
    except Exception as error:  # whatever a config file may raise
        raise _explain(error, argv) from error


def _integral(match: re.Match[str]) -> str:
    value = float(match[2])
    return f"{match[1]}{int(value)}" if value.is_integer() else match[0]


def _config_path(argv: list[str]) -> str:
    given = next((a.partition("=")[2] for a in argv if a.startswith("--config=")), "")
    return given.partition(":")[0]


def _explain(error: Exception, argv: list[str]) -> errors.UsageError:
    """The mistake behind an exception that loading or overriding the config raised."""
    if isinstance(error, SyntaxError):
        return errors.UsageError(
            f"{error.filename}:{error.lineno}: {error.msg}. Mend the config file's syntax."
        )
    if isinstance(error, AttributeError) and "get_config" in str(error):
        return errors.UsageError(
            f"{_config_path(argv)}: no function get_config. A config file defines "
            "get_config(words), which returns qkjax.config.base(...)."
        )
    if isinstance(error, AttributeError | KeyError):
        unknown = _first_unknown_field(argv)
        if unknown is not None:
            return unknown
    where = traceback.extract_tb(error.__traceback__)[-1]
    return errors.UsageError(
        f"{where.filename}:{where.lineno}: {type(error).__name__}: {error}. Mend the config file."
    )


def _first_unknown_field(argv: list[str]) -> errors.UsageError | None:
    known = _fields(config.base("muon", "none"))
    for argument in argv:
        override = _OVERRIDE.match(argument)
        if override and override[1] not in known:
            section, _, leaf = override[1].rpartition(".")
            siblings = [name for name in known if not section or name.startswith(section + ".")]
            hint = presets.suggest(leaf, tuple(name.rpartition(".")[2] for name in siblings))
            listed = ", ".join(siblings or known)
            return errors.UsageError(
                f"--config.{override[1]}: no such field.{hint} Known: {listed}."
            )
    return None


def _fields(values: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    names: list[str] = []
    for name in values:
        value = values[name]
        if isinstance(value, ml_collections.ConfigDict):
            names += _fields(value, f"{prefix}{name}.")
        else:
            names.append(f"{prefix}{name}")
    return names


def read(holder: flags.FlagHolder) -> config.Config:
    """The checked config of the command line.

    Raises:
        UsageError: no --config, or fields that are wrong.
    """
    if holder.value is None:
        raise errors.UsageError(
            "--config: missing. Pass a config file, such as --config=configs/muon_noqk.py:tiny."
        )
    return config.resolve(holder.value)
