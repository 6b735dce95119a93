"""Progress: rates over several steps, the warning about slow data, what the lines show."""

import logging

import numpy as np
import pytest

from qkjax import config as config_lib
from qkjax.runs import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until the test moves clock[0]."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def make(kind: str = "cpu", devices: int = 1) -> progress.Progress:
    resolved = config_lib.resolve(config_lib.base("muon", "none", "tiny")).for_platform("cpu")
    return progress.Progress(resolved, 1_000_000, kind, devices)


def row(step: int, rates: dict) -> dict:
    return {"step": step, "tokens": step * 2048, "train/loss": 3.25, **rates}


def test_rates_average_over_the_steps_since_the_clock_was_restarted(clock):
    shown = make()
    shown.restart_clock(10)
    clock[0] += 1
    assert shown.rates(11, 0.5)["perf/tokens_per_second"] == pytest.approx(2048)
    rates = shown.rates(12, 0.1)  # read at once: both steps took the second together
    assert rates["perf/tokens_per_second"] == pytest.approx(2 * 2048)
    assert rates["perf/data_wait"] == pytest.approx(0.2)
    clock[0] += 1000
    shown.restart_clock(12)
    clock[0] += 2
    assert shown.rates(13, 0.0)["perf/tokens_per_second"] == pytest.approx(1024)


def test_a_clock_of_the_day_that_jumps_changes_no_rate(clock, monkeypatch, capsys):
    days = iter([2e9, 1e9, 0.0, -1e9] * 100)
    monkeypatch.setattr(progress.time, "time", lambda: next(days))
    shown = make()
    shown.restart_clock(0)
    clock[0] += 1
    rates = shown.rates(1, 0.0)
    assert rates["perf/tokens_per_second"] == pytest.approx(2048)
    shown.show_step(1, row(1, rates))
    shown.show_step(195, row(195, rates))
    assert "-" not in capsys.readouterr().out  # of the time that is left


def test_mfu_counts_all_devices_and_is_null_where_the_peak_is_unknown(clock):
    found = {}
    for kind, devices in (("cpu", 1), ("NVIDIA H200", 1), ("NVIDIA H200", 4)):
        shown = make(kind, devices)
        shown.restart_clock(0)
        clock[0] += 1
        found[kind, devices] = shown.rates(1, 0.0)["perf/mfu"]
    work = 6e6 + 12 * 4 * 4 * 32 * 256
    assert found["cpu", 1] is None
    assert found["NVIDIA H200", 1] == pytest.approx(2048 * work / 989e12)
    assert found["NVIDIA H200", 4] == pytest.approx(2048 * work / 989e12 / 4)


@pytest.mark.parametrize(("wait", "warns"), [(0.3, True), (0.1, False)])
def test_slow_data_is_said_once(clock, caplog, wait, warns):
    shown = make()
    shown.restart_clock(0)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 60):
            clock[0] += 1
            shown.rates(step, wait)
    assert caplog.text.count("waits for data") == warns


def test_a_spike_is_warned_of_against_the_last_hundred_losses(clock, caplog):
    shown = make()
    for step in range(1, 200):  # a loss that falls, with noise of 0.1 either way
        loss = 8 - step / 100 + (0.1 if step % 2 else -0.1)
        (shown.remember_loss if step < 60 else lambda x, step=step: shown.watch_loss(step, x))(loss)
    assert not caplog.records
    shown.watch_loss(200, 12.0)
    shown.watch_loss(201, 6.0)
    (record,) = caplog.records
    assert "step 200: the training loss 12.0000 is a spike, z-score 18." in record.getMessage()
    assert "against the last 100 (mean 6.5" in record.getMessage()


def test_too_few_losses_make_no_spike(clock, caplog):
    shown = make()
    shown.remember_loss(None)  # rows of step 0 and of non-finite steps have none
    for step in range(1, 20):
        shown.watch_loss(step, 8.0)
    shown.watch_loss(20, 80.0)
    assert not caplog.records


def test_what_is_not_known_is_left_out_of_a_line(clock, capsys):
    shown = make()
    shown.restart_clock(0)
    clock[0] += 1
    rates = shown.rates(1, 0.0)
    shown.show_step(1, row(1, rates))
    assert capsys.readouterr().out.count("  ") == 3  # step, tokens, loss, speed
    shown = make("NVIDIA H200")
    shown.restart_clock(0)
    clock[0] += 1
    shown.show_step(1, row(1, {**rates, "perf/mfu": 0.4321}))
    assert capsys.readouterr().out.endswith("tokens/s  MFU (PaLM) 43.2%\n")


def test_heads_without_a_pr_are_said(clock, caplog, capsys):
    shown = make()
    shown.show_evaluation(
        7,
        {
            progress.PR: None,
            progress.UNDEFINED: np.float32(3),
            "pr/key/pre_rope/centred": None,
            "val/loss": 8.0,
            "perf/eval_seconds": 2.0,
        },
    )
    (record,) = caplog.records
    assert "step 7: the keys of 3 heads are all 0 or not finite" in record.getMessage()


def test_lines_show_step_loss_pr_speed_and_time_left(clock, capsys):
    shown = make()
    shown.restart_clock(0)
    metrics = {progress.PR: 21.46, progress.UNDEFINED: 0, "pr/key/pre_rope/centred": 19.0}
    shown.show_evaluation(0, {**metrics, "val/loss": 8.1234, "perf/eval_seconds": 2.0})
    for step in range(1, 96):
        clock[0] += 1
        shown.show_step(step, row(step, shown.rates(step, 0.0)))
    lines = capsys.readouterr().out.splitlines()
    assert "val/loss 8.1234" in lines[0] and "21.46" in lines[0] and "of 32" in lines[0]
    assert len(lines) == 1 + 10  # one every 10 seconds
    assert lines[1].startswith("step 1/195") and lines[1].endswith("tokens/s")
    assert "tokens 186,368  loss 3.2500  PR 21.5  2,048 tokens/s" in lines[-1]
    assert lines[-1].endswith("tokens/s  0:01:44 left")
