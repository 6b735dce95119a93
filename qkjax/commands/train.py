"""Trains one arm; the same as `python -m qkjax.main`."""

from qkjax.main import main

__all__ = ["main"]
