"""What every command of this project shares: flags, --help, --debug, exit codes.

A command defines its flags with absl, then ends with `command_line.run(main)`. Exit codes: 0 done;
1 internal error; 2 usage, config, data or checkpoint mistake; 3 non-finite training; 4 disk;
130 / 143 stopped by SIGINT / SIGTERM; 141 nobody reads the output any more.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import flags

from qkjax import errors
from qkjax.cli import startup

_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
_BROKEN_PIPE = 141  # as of a program that SIGPIPE has ended
_HELP = ("-h", "-help", "--help", "--helpfull", "--helpshort")


def run(
    main: Callable[..., int | None],
    parse: Callable[[list[str]], list[str]] = flags.FLAGS,
    positionals: Sequence[str] = (),
    exit_at_once: bool = False,
) -> None:
    """Parses sys.argv, calls `main` and exits with its code (None counts as 0).

    Heavy imports belong inside `main`, so that --help and flag errors answer at once.

    Args:
        parse: reads the flags and returns argv[0] and what is left; `config_flag.parse` where
            the command takes a --config.
        positionals: names of the arguments without --name= that the command needs; `main` is
            called with their values. A last name that ends in "..." takes one or more.
        exit_at_once: leave without waiting for threads; a failed Orbax save would keep the
            process for five minutes.
    """
    startup.keep_freed_memory()
    if not exit_at_once:
        sys.exit(_run(main, parse, positionals, sys.argv))
    code = 1
    try:
        code = _run(main, parse, positionals, sys.argv)
    except BaseException:  # an internal error
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(
    main: Callable[..., int | None],
    parse: Callable[[list[str]], list[str]],
    positionals: Sequence[str],
    argv: list[str],
) -> int:
    try:
        if any(argument in _HELP for argument in argv[1:]):
            print(_help_text(), flush=True)
            return 0
        values = parse(argv)[1:]
        repeated = bool(positionals) and positionals[-1].endswith("...")
        if len(values) > len(positionals) and not repeated:
            raise errors.UsageError(
                f"{values[len(positionals)]}: a stray argument, which nothing reads. "
                "Write options as --name=value, with '=' and without spaces."
            )
        if len(values) < len(positionals):
            raise errors.UsageError(
                f"{positionals[len(values)]}: missing, expected {' '.join(positionals)} on the "
                "command line. See --help."
            )
        return main(*values) or 0
    except BrokenPipeError:  # whoever read this has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return _BROKEN_PIPE
    except (flags.Error, errors.QkjaxError, OSError, KeyboardInterrupt) as error:
        if _debug_wanted(argv):
            traceback.print_exc()
        code, text = _describe(error)
        print(f"ERROR: {text}", file=sys.stderr, flush=True)
        return code


def _debug_wanted(argv: list[str]) -> bool:
    return "--debug" in argv or (flags.FLAGS.is_parsed() and _DEBUG.value)


def _describe(error: BaseException) -> tuple[int, str]:
    if isinstance(error, errors.QkjaxError):
        return error.exit_code, str(error)
    if isinstance(error, flags.Error):
        return errors.UsageError.exit_code, f"{' '.join(str(error).split())} See --help."
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped by SIGINT"
    return errors.StorageError.exit_code, f"{type(error).__name__}: {error}"


def _help_text() -> str:
    doc = (sys.modules["__main__"].__doc__ or "").strip()
    modules = [name for name in flags.FLAGS.flags_by_module_dict() if not name.startswith("absl")]
    return "\n".join([doc, *(flags.FLAGS.module_help(name) for name in modules)])
