"""Commands of this package as child processes, which run the very code of their parent."""

import os
import sys

from qkjax.cli import places


def command(verb: str, *arguments: str) -> list[str]:
    """What starts `qkjax VERB ARGUMENTS`; takes `environment()`.

    -P: the current folder, which may hold another checkout, provides no module.
    """
    return [sys.executable, "-P", "-m", "qkjax.commands", verb, *arguments]


def environment() -> dict[str, str]:
    """This process's environment variables, for a child that finds this same package."""
    root = places.checkout()
    if root is None:  # the interpreter has it installed
        return dict(os.environ)
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, "PYTHONPATH": path}
