"""Limits of a process that stand in for a full disk: root ignores mode bits."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def file_size(num_bytes: int) -> Iterator[None]:
    """No file grows beyond `num_bytes`: a write then fails as one on a full disk does (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
