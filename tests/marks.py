"""Parameters of which some are tried in the long set alone."""

from collections.abc import Collection, Iterable

import pytest


def with_long(names: Iterable[str], long: Collection[str]) -> list:
    """For `pytest.mark.parametrize`; those in `long` have the marker `long`."""
    found = list(names)
    assert set(long) < set(found)
    return [pytest.param(n, marks=pytest.mark.long) if n in long else n for n in found]
