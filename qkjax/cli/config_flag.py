"""`--config=FILE.py[:words]` and its `--config.FIELD=VALUE` overrides, with errors for people.

FILE may be the config.json of a run as well: its fields, to which overrides apply.
"""

import difflib
import importlib.machinery
import importlib.util
import itertools
import math
import pathlib
import re
import sys
import traceback
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from qkjax import config as config_lib
from qkjax import errors, presets
from qkjax.cli import places, saved_config

_EXPONENT = re.compile(r"(--?config\.[\w.]+=)(\d+(?:\.\d*)?[eE]\+?\d+)")
_OVERRIDE = re.compile(r"--?(?:no)?config\.([\w.]+)")  # absl takes one dash as well
_NAMES = ("--config", "-config")
_SAVED = ".json"


def define(
    values: flags.FlagValues, example: str = "configs/muon_noqk.py:tiny,original"
) -> flags.FlagHolder:
    """Defines the flag --config among the flags of a command."""
    return config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file, or the name of one that comes with qkjax, words after a colon: "
        f"{example}; or the config.json of a run.",
        flag_values=values,
    )


def find(path: str) -> pathlib.Path:
    """The config file of a path or name: the file itself, else the one that comes with qkjax.

    Args:
        path: FILE.py, or of those that come with qkjax configs/NAME.py, NAME.py or NAME.
    Raises:
        UsageError: neither is there.
    """
    given = pathlib.Path(path)
    if given.is_file():
        return given
    ours = places.configs() / f"{given.name.removesuffix('.py')}.py"
    if given.parent.as_posix() in (".", "configs") and ours.is_file():
        return ours
    raise _no_file(path)


def split(given: str) -> tuple[str, str]:
    """Path and words of a --config: the longest path before a colon that is a file."""
    ends = [*(match.start() for match in re.finditer(":", given)), len(given)]
    is_file = [end for end in ends if pathlib.Path(given[:end]).is_file()]
    end = max(is_file, default=ends[0])
    return given[:end], given[end + 1 :]


def load(path: pathlib.Path, words: str) -> ml_collections.ConfigDict:
    """What get_config(words) of a config file returns; runs the code of the file.

    Of a config.json it is the config that the file holds; no code runs.

    Raises:
        UsageError: the file is missing, broken, or gives no config.
    """
    path = find(str(path))
    if path.suffix == _SAVED:
        if words:
            raise errors.UsageError(
                f"--config: {path} is the config of a run, which takes no words, found {words!r}. "
                "Give overrides, as --config.train.tokens=1e6, or a config file with the words."
            )
        return saved_config.get_config(str(path))
    try:
        loader = importlib.machinery.SourceFileLoader(f"configs_{path.stem}", str(path))
        spec = importlib.util.spec_from_file_location(loader.name, path, loader=loader)
        assert spec is not None
        module: Any = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise errors.UsageError(
                f"{path}: no function get_config. A config file defines get_config(words), which "
                "returns qkjax.config.base(...)."
            )
        values = module.get_config(*filter(None, [words]))
    except errors.QkjaxError:
        raise
    except (Exception, SystemExit) as error:  # of code that is not ours
        raise _explain(error, path) from error
    if not isinstance(values, ml_collections.ConfigDict):
        raise errors.UsageError(
            f"{path}: get_config returned {type(values).__name__}, expected a ConfigDict. Return "
            "qkjax.config.base(...)."
        )
    return values


def parse(values: flags.FlagValues, argv: list[str]) -> list[str]:
    """Reads all flags; returns argv[0] and the arguments that are no flags.

    Integers may be written 300e6. A config that comes with qkjax is found by name, which is said on
    stderr.

    Raises:
        UsageError: the config file, an override, or what is set by words alone.
        flags.Error: any other flag.
    """
    for argument in argv:
        override = _OVERRIDE.match(argument)
        if override and override[1] in presets.WORD_FIELDS:
            raise errors.UsageError(
                f"--config.{override[1]}: an override would only relabel the run. Write the word "
                "after the config's colon: --config=configs/muon_noqk.py:tiny,original."
            )
    named = _given(argv)
    path, words = split(named)
    if path:
        _check_overrides(argv, _fields(load(pathlib.Path(path), words)))
        if find(path) != pathlib.Path(path):
            print(f"config: {find(path)}, because there is no file {path} here", file=sys.stderr)
            argv = _replaced(argv, path, str(find(path)))
        elif ":" in path or path.endswith(_SAVED):  # which ml_collections cannot open
            argv = _replaced(argv, named, f"{places.PACKAGE / 'cli' / 'any_config.py'}:{named}")
        if path.endswith(_SAVED):
            saved_config.compare_numerics(path)
    try:
        return values([_integral(argument) for argument in argv])
    except (SyntaxError, TypeError, ValueError) as error:  # flags.Error is none of them
        raise errors.UsageError(
            f"--config: {errors.one_line(error)}. Fix the value of an override."
        ) from error


def _no_file(path: str) -> errors.UsageError:
    shipped = sorted(f"configs/{file.name}" for file in places.configs().glob("*.py"))
    return errors.UsageError(
        f"--config: no file {path}. Configs here: {', '.join(shipped)}; give "
        "one of them, or the path of your own file."
    )


def _integral(argument: str) -> str:
    match = _EXPONENT.fullmatch(argument)
    value = float(match[2]) if match else math.nan
    return f"{match[1]}{int(value)}" if match and value.is_integer() else argument


def _given(argv: list[str]) -> str:
    """The value of --config, which absl also takes after a space."""
    for argument, following in itertools.pairwise([*argv, ""]):
        name, equals, value = argument.partition("=")
        if name in _NAMES:
            return value if equals else following
    return ""


def _replaced(argv: list[str], path: str, found: str) -> list[str]:
    """The arguments with another path in the value of --config."""
    result = list(argv)
    for number, argument in enumerate(argv):
        for start in (f"{name}=" for name in _NAMES):
            if argument.startswith(start + path):
                result[number] = start + found + argument[len(start + path) :]
        if number and argv[number - 1] in _NAMES and argument.startswith(path):
            result[number] = found + argument[len(path) :]
    return result


def _explain(error: BaseException, path: pathlib.Path) -> errors.UsageError:
    """The place in a config file where its code raised an exception."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.lineno:
        lines = [error.lineno]
    where = f"{path}:{lines[-1]}" if lines else str(path)
    return errors.UsageError(f"{where}: {errors.one_line(error)}. Fix the config file.")


def _check_overrides(argv: list[str], known: list[str]) -> None:
    """Refuses the first override of a field that the config does not have."""
    for argument in argv:
        override = _OVERRIDE.match(argument)
        if override and override[1] not in known:
            section, _, leaf = override[1].rpartition(".")
            siblings = [name for name in known if not section or name.startswith(section + ".")]
            listed = siblings or known
            leaves = [name.rpartition(".")[2] for name in listed]
            close = difflib.get_close_matches(leaf, leaves, n=1)
            meant = [repr(name) for name, of in zip(listed, leaves, strict=True) if of in close]
            hint = f" Did you mean {' or '.join(meant)}?" if meant else ""
            raise errors.UsageError(
                f"--config.{override[1]}: no such field.{hint} Known: {', '.join(listed)}."
            )


def _fields(values: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    names: list[str] = []
    for name in values:
        value = values[name]
        if isinstance(value, ml_collections.ConfigDict) and len(value):
            names += _fields(value, f"{prefix}{name}.")
        else:
            names.append(f"{prefix}{name}")
    return names


def read(holder: flags.FlagHolder) -> config_lib.Config:
    """The checked config of the command line.

    Raises:
        UsageError: no --config, that of a study, or fields that are wrong.
    """
    values = given(holder, "configs/muon_noqk.py:tiny")
    if "model" not in values:
        raise errors.UsageError(
            f"--config: {_given(sys.argv)} is not the config of a run. Pass one of an arm, such as "
            "--config=configs/muon_noqk.py:tiny; `qkjax study` takes that of a study."
        )
    return config_lib.resolve(values)


def given(holder: flags.FlagHolder, example: str) -> ml_collections.ConfigDict:
    """The config of the command line, overrides applied and nothing checked.

    Raises:
        UsageError: no --config.
    """
    if holder.value is None:
        raise errors.UsageError(
            f"--config: missing. Pass a config file, such as --config={example}."
        )
    return holder.value


def as_flags(values: flags.FlagValues) -> list[str]:
    """The flags --config... of the command line as they were read, for a command like this one."""
    holder = values["config"]
    overrides = config_flags.get_override_values(holder)
    return [
        f"--config={config_flags.get_config_filename(holder)}",
        *(f"--config.{field}={_as_read(value)}" for field, value in overrides.items()),
    ]


def _as_read(value: Any) -> Any:
    """A section that is set as a whole as the dictionary that it was written as."""
    return value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value
