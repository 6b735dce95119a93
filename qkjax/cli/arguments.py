"""Checks the arguments of every command: what an argument of any flag may hold."""

import os
import re
import sys
import unicodedata
from collections.abc import Collection, Iterator, Sequence

from qkjax import errors

_FLAG = re.compile(r"--?[\w.]+=")
_KIND = re.compile(r"[a-z]+:(?=~)")  # of a source, as in jsonl:~/texts/*.jsonl
# Control characters, halves of characters (bytes that are not UTF-8), separators of lines.
_REFUSED = ("Cc", "Cs", "Zl", "Zp")
_BUCKET = re.compile(r"(?:^|[:,'\"(])(?:gs|gcs|s3|s3a|r2|az|abfss?|hdfs)://", re.IGNORECASE)
_SERVED = re.compile("(gs|s3)://")  # as `qkjax.buckets` takes them
_LINE_BREAKS = "\n\t\r"


def check(
    argv: Sequence[str], texts: Collection[str] = (), buckets: Collection[str] = ()
) -> list[str]:
    """The arguments with every leading ~ expanded, also after a flag's =.

    A shell expands ~ at the start of a word alone: --out=~/data would make a folder called ~.

    Args:
        argv: argv[0] is left as it is.
        texts: flags whose value is text: it may hold line breaks, and a ~ in it stays.
        buckets: flags whose path may be at gs:// or s3://; "" stands for the positionals.
    Raises:
        UsageError: control characters, as the carriage return at the end of a line of a script
            that was written on Windows; a path in a bucket (gs://, s3://) elsewhere; bytes not
            of UTF-8; or other letters than ASCII where the locale is not UTF-8, so that Python
            misreads them.
    """
    return [*argv[:1], *_checked(argv[1:], texts, buckets)]


def _checked(
    arguments: Sequence[str], texts: Collection[str], buckets: Collection[str]
) -> Iterator[str]:
    flag = ""  # that the argument before named without a value
    for argument in arguments:
        match = _FLAG.match(argument)
        start = match.end() if match else 0
        name = match[0].strip("-=") if match else flag
        value = argument[start:]
        is_text = name in texts
        if not value.isascii() and sys.getfilesystemencoding() != "utf-8":
            raise errors.UsageError(_misread(f"--{name}" if name else "argument", value))
        for character in value:
            if unicodedata.category(character) in _REFUSED and not (
                is_text and character in _LINE_BREAKS
            ):
                raise errors.UsageError(_refusal(f"--{name}" if name else "argument", value))
        if not is_text and _BUCKET.search(value):
            may_be_there = name in buckets
            if not (may_be_there and _SERVED.match(value)):
                raise errors.UsageError(_in_a_bucket(name, value, may_be_there))
        flag = "" if match or not argument.startswith("-") else argument.lstrip("-")
        yield argument if is_text else argument[:start] + _expanded(value)


def _expanded(value: str) -> str:
    kind = _KIND.match(value)
    start = kind.end() if kind else 0
    return value[:start] + os.path.expanduser(value[start:])


def _in_a_bucket(name: str, value: str, may_be_there: bool) -> str:
    where = f"--{name}" if name else "argument"
    if may_be_there:
        return f"{where}: {value} is in a bucket, expected one at gs:// or s3://. Write it so."
    if name == "workdir":
        return (
            f"{where}: {value} is in a bucket, expected a local path: a run and a study hold "
            "locks and append rows, and a bucket has neither. Use a local directory and copy it "
            "there when it is finished; docs/scaling.md has the commands."
        )
    return (
        f"{where}: {value} is in a bucket, expected a local path: only datasets (data.dir) and "
        "what prepare and export make (--out) may be there. Copy it here first; docs/scaling.md "
        "has the commands."
    )


def _misread(where: str, value: str) -> str:
    return (
        f"{where}: {visible(value)} holds letters that Python cannot read in this locale "
        f"({sys.getfilesystemencoding()}). Set PYTHONUTF8=1."
    )


def _refusal(where: str, value: str) -> str:
    shown = visible(value)
    if any(unicodedata.category(character) == "Cs" for character in value):
        return f"{where}: {shown} holds bytes that are not UTF-8. Rename it, or type it in UTF-8."
    if value.endswith("\r"):
        return (
            f"{where}: {shown} ends with a carriage return. Save the script that holds the "
            "command with Unix line ends."
        )
    return f"{where}: {shown} holds a control character. Remove it."


def visible(text: str) -> str:
    """The text with everything that a terminal cannot show as an escape, such as \\r or \\xe9."""
    decoded = text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in decoded)
