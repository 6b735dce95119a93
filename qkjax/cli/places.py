"""Where the package's files are: its checkout or installation, its configs, the user's cache."""

import os
import pathlib

PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def checkout() -> pathlib.Path | None:
    """The repository that this package runs from; None where it is installed without one."""
    root = PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "configs").is_dir() else None


def configs() -> pathlib.Path:
    """The folder of the config files that come with this package."""
    root = checkout()
    return PACKAGE / "configs" if root is None else root / "configs"


def cache() -> pathlib.Path:
    """This project's folder in the user's cache; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(base) / "qkjax"


def data() -> pathlib.Path:
    """Where a corpus is made that no command has named a directory for; it need not exist."""
    root = checkout()
    return (cache() if root is None else root) / "data"
