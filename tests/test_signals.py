"""StopRequest: the first signal asks, the second SIGINT leaves at once."""

import concurrent.futures
import os
import signal
import subprocess
import sys

import pytest

from qkjax.runs import signals

WAIT = """
import time
from qkjax.runs import signals
with signals.StopRequest() as stop:
    print("ready", flush=True)
    while stop.signum is None:
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_only_asks(signum: int, capfd):
    with signals.StopRequest() as stop:
        assert stop.signum is None
        os.kill(os.getpid(), signum)
        assert stop.signum == signum
        os.kill(os.getpid(), signal.SIGTERM)  # a second SIGTERM changes nothing
        assert stop.signum == signum
    assert capfd.readouterr().err.count("saving, then stopping") == 1
    assert signals.Stopped(signum, "").exit_code == 128 + signum


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with signals.StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_another_thread_can_train_and_leaves_signals_alone():
    """As a notebook or a server does; Python refuses handlers that are set there."""
    before = signal.getsignal(signal.SIGTERM)

    def enter() -> tuple[int | None, object]:
        with signals.StopRequest() as stop:
            return stop.signum, signal.getsignal(signal.SIGTERM)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result() == (None, before)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.process
def test_the_second_sigint_leaves_at_once():
    process = subprocess.Popen([sys.executable, "-c", WAIT], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
