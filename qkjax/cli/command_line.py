"""What every command of this project shares: flags, --help, --debug, exit codes.

A command defines its flags with absl in a FlagValues of its own, so that importing it leaves no
trace, and ends with `command_line.run(work, FLAGS, __doc__)`. Exit codes: 0 done; 1 internal error;
2 usage, config, data or checkpoint mistake; 3 non-finite training; 4 disk; 130 / 143 stopped by
SIGINT / SIGTERM; 141 nobody reads the output any more.
"""

import io
import os
import sys
import traceback
from collections.abc import Callable, Collection, Sequence

from absl import flags

from qkjax import errors
from qkjax.cli import arguments, startup

_BROKEN_PIPE = 141  # as of a program that SIGPIPE has ended
_FIXABLE = (flags.Error, errors.QkjaxError, OSError, KeyboardInterrupt)
_NO_MEMORY = (
    "memory: this process could not get more ({reason}). Close other programs, raise its limit "
    "(ulimit -v), or lower its need, for example with a smaller train.microbatch_sequences."
)
_NO_DEVICE = (RuntimeError, AssertionError)  # of jax, where the wanted platform is not here
_HELP = ("-h", "-help", "--help", "--helpfull", "--helpshort")


def run(
    work: Callable[..., int | None],
    values: flags.FlagValues,
    doc: str | None,
    parse: Callable[[flags.FlagValues, list[str]], list[str]] = flags.FlagValues.__call__,
    positionals: Sequence[str] = (),
    texts: Collection[str] = (),
    buckets: Collection[str] = (),
    exit_at_once: bool = False,
) -> None:
    """Prepares the process, parses sys.argv, calls `work`, exits with its code (None counts as 0).

    Heavy imports belong inside `work`, so that --help and flag errors answer at once.

    Args:
        values: the command's flags.
        doc: what --help shows above them.
        parse: reads the flags and returns argv[0] and what is left; `config_flag.parse` where
            the command takes a --config.
        positionals: names of the arguments without --name= that the command needs; `work` is
            called with their values. A last name that ends in "..." takes one or more.
        texts: flags whose value is text, and no path or name.
        buckets: flags whose path may be at gs:// or s3://; "" stands for the positionals.
        exit_at_once: leave without waiting for threads; a failed Orbax save would keep the
            process for five minutes.
    """
    startup.prepare_process()
    startup.keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not if a notebook replaces it
            # For terminals that are not UTF-8, and so that a pipe or file has each line at once.
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    command = _Command(work, values, doc or "", parse, positionals, texts, buckets)
    if not exit_at_once:
        sys.exit(command.run())
    code = 1
    try:
        code = command.run()
    except BaseException:  # an internal error
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Command:
    """The arguments of `run`."""

    def __init__(
        self,
        work: Callable[..., int | None],
        values: flags.FlagValues,
        doc: str,
        parse: Callable[[flags.FlagValues, list[str]], list[str]],
        positionals: Sequence[str],
        texts: Collection[str],
        buckets: Collection[str],
    ) -> None:
        self.work, self.values, self.parse = work, values, parse
        self.positionals, self.texts, self.buckets = positionals, texts, buckets
        self.debug = flags.DEFINE_bool(
            "debug", False, "Show the traceback of an error.", flag_values=values
        )
        names = values.flags_by_module_dict()
        self.help = "\n".join([doc.strip(), *(values.module_help(name) for name in names)])
        values.append_flag_values(flags.FLAGS)  # absl's own, as --verbosity

    def run(self) -> int:
        return exit_code(self._run, lambda: self.values.is_parsed() and self.debug.value)

    def _run(self) -> int | None:
        if any(argument in _HELP for argument in sys.argv[1:]):
            print(self.help, flush=True)
            return 0
        sys.argv = arguments.check(sys.argv, self.texts, self.buckets)
        positionals = self.parse(self.values, sys.argv)[1:]
        flags.FLAGS.mark_as_parsed()  # absl's logging looks there
        self._check_number(positionals)
        return self.work(*positionals)

    def _check_number(self, found: Sequence[str]) -> None:
        repeated = bool(self.positionals) and self.positionals[-1].endswith("...")
        if len(found) > len(self.positionals) and not repeated:
            stray = found[len(self.positionals)]
            is_workdir = "workdir" in self.values and os.path.isdir(stray)
            raise errors.UsageError(
                f"{stray}: an unexpected argument, which nothing reads. "
                + (f"Did you mean --workdir={stray}? " if is_workdir else "")
                + "Write options as --name=value, with '=' and without spaces."
            )
        if len(found) < len(self.positionals):
            raise errors.UsageError(
                f"{self.positionals[len(found)]}: missing, expected "
                f"{' '.join(self.positionals)} on the command line. See --help."
            )


def exit_code(work: Callable[[], int | None], debug: Callable[[], bool] = lambda: False) -> int:
    """The exit code of `work`; a failure that a user can fix is one ERROR line on stderr.

    Args:
        debug: whether its traceback is shown too, as it is where --debug is on the command line.
    """
    try:
        code = work() or 0
        sys.stdout.flush()  # here, where a reader that has left is no traceback
        return code
    except BrokenPipeError:  # the reader has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return _BROKEN_PIPE
    except (*_FIXABLE, *_NO_DEVICE, MemoryError) as error:
        if isinstance(error, _NO_DEVICE) and not _is_of_jax_start(error):
            raise
        if "--debug" in sys.argv or debug():
            traceback.print_exc()
        code, text = describe(error)
        print(f"ERROR: {text}", file=sys.stderr, flush=True)
        return code


def _is_of_jax_start(error: BaseException) -> bool:
    """Whether jax raised it while it looked for devices, where it says so or fails an assertion."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.name == "backends" and last.filename.endswith("xla_bridge.py")


def describe(error: BaseException) -> tuple[int, str]:
    """The exit code of an error, and its text after ERROR:; 1 and one line for an internal one."""
    if isinstance(error, errors.QkjaxError):
        return error.exit_code, str(error)
    if isinstance(error, flags.Error):
        return errors.UsageError.exit_code, f"{' '.join(str(error).split())} See --help."
    if isinstance(error, MemoryError):
        return errors.OutOfMemoryError.exit_code, _NO_MEMORY.format(reason=errors.one_line(error))
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped by SIGINT"
    if isinstance(error, _NO_DEVICE) and _is_of_jax_start(error):
        wanted = os.environ.get("JAX_PLATFORMS", "")
        return errors.UsageError.exit_code, (
            f"JAX_PLATFORMS: jax finds no device of {wanted!r} here ({errors.one_line(error)}). "
            "Unset it, or install the jax of that device."
        )
    if isinstance(error, OSError) and isinstance(error.filename, str):
        from qkjax import files  # numpy and all, which --help does without

        return errors.StorageError.exit_code, str(files.storage_error(error.filename, error))
    if isinstance(error, OSError):
        return errors.StorageError.exit_code, f"{type(error).__name__}: {error}"
    return 1, errors.one_line(error)
