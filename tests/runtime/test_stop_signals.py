"""hv_batch.runtime.stop_signals: what a signal does at which moment."""

from __future__ import annotations

import os
import signal
from threading import Event

import pytest

from hv_batch.runtime import stop_signals
from hv_batch.runtime.stop_signals import STOP_SIGNALS, StopSignals


@pytest.fixture
def stop(monkeypatch, default_hangup):
    monkeypatch.setattr(stop_signals, "REPEAT_S", 0.0)
    stop = StopSignals()
    with stop.handled():
        yield stop


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_stop_lets_work_drain_and_a_second_one_does_not(stop, number):
    os.kill(os.getpid(), number)
    assert stop.stopped.is_set()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)


def test_a_stop_interrupts_what_needs_no_drain(stop):
    with pytest.raises(KeyboardInterrupt), stop.interruptible():
        Event().wait(0 if os.kill(os.getpid(), signal.SIGTERM) else 5)
    assert stop.stopped.is_set()


def test_two_signals_at_once_are_one_request(stop, monkeypatch):
    """`timeout` signals a process by itself and with its group."""
    monkeypatch.setattr(stop_signals, "REPEAT_S", 60.0)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.stopped.is_set()


def test_a_run_under_nohup_ignores_the_end_of_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals().handled():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_handlers_from_before_come_back():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopSignals().handled():
        pass
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
