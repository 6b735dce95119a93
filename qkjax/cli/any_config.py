"""Stands in for a --config that ml_collections cannot open: JSON, or a path with a colon."""

import pathlib

import ml_collections

from qkjax.cli import config_flag


def get_config(given: str) -> ml_collections.ConfigDict:
    """What the file of `given`, a path with words after a colon, holds.

    Raises:
        UsageError: the file is missing, broken, or gives no config.
    """
    path, words = config_flag.split(given)
    return config_flag.load(pathlib.Path(path), words)
