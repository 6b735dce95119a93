"""The failures that a user can fix, and the exit code of each.

Every message has the form `<file or field>: <what is wrong, expected vs found>. <how to fix>`.
"""

from collections.abc import Sequence


class QkjaxError(Exception):
    """A failure with a message for the user: one ERROR line, no traceback unless --debug."""

    exit_code = 1


class UsageError(QkjaxError):
    """A wrong flag, config field, dataset or checkpoint: the user has to change something."""

    exit_code = 2


class NonFiniteError(QkjaxError):
    """Loss or gradient became NaN or infinite: the run is recorded as diverged."""

    exit_code = 3


class StorageError(QkjaxError):
    """The disk or the file system failed: full, not writable, a file in place of a folder."""

    exit_code = 4


class OutOfMemoryError(QkjaxError):
    """Memory, of a device or of this process, does not hold the work."""


def listed(parts: Sequence[str], most: int = 6) -> str:
    """The first `most` parts in one line, and how many more there are."""
    more = f"; and {len(parts) - most} more" if len(parts) > most else ""
    return "; ".join(parts[:most]) + more


def one_line(error: BaseException) -> str:
    """Type and message of an error that is not ours, in one line of at most 200 characters."""
    return ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))[:200]
