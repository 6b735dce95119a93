"""SIGTERM and SIGINT as a request to stop after the running step."""

import os
import signal
import threading
import types
from typing import Any

from qkjax import errors


class Stopped(errors.QkjaxError):
    """The run was asked to stop, and has saved what it needs to resume."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class StopRequest:
    """While entered, the first SIGTERM or SIGINT only sets `signum`; a second SIGINT exits.

    Python handles signals in the main thread alone: in another one nothing is handled here, and
    the code that started the thread decides what a signal does.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: types.FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            os._exit(128 + signal.SIGINT)
        if self.signum is None:
            self.signum = signum
            os.write(2, f"{signal.Signals(signum).name}: saving, then stopping\n".encode())
