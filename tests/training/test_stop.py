from __future__ import annotations

import os
import signal

import pytest

from mp2.training import ranks as ranks_module
from mp2.training.ranks import StopSignals

NUMBERS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_kept_until_the_step_is_done_and_becomes_the_exit_status(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as stop:
        stop.leave()  # nothing received: goes on
        os.kill(os.getpid(), number)
        assert stop.received == number
        with pytest.raises(SystemExit) as exit_:
            stop.leave()
    assert exit_.value.code == 128 + number
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("first", NUMBERS)
@pytest.mark.parametrize("second", NUMBERS)
def test_a_second_signal_acts_as_usual_but_not_within_a_second(
    monkeypatch: pytest.MonkeyPatch, first: signal.Signals, second: signal.Signals
) -> None:
    came: list[int] = []
    usual = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in NUMBERS}
    try:
        now = 100.0
        monkeypatch.setattr(ranks_module.time, "monotonic", lambda: now)
        with StopSignals() as stop:
            os.kill(os.getpid(), first)
            now += ranks_module.SAME_S
            os.kill(os.getpid(), second)
            assert (came, stop.received) == ([], first)
            now += 0.1
            os.kill(os.getpid(), second)
            assert (came, stop.received) == ([second], first)
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def test_a_signal_that_another_process_received_counts_as_the_first() -> None:
    with StopSignals() as stop:
        stop.receive(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # would end the tests
        stop.receive(signal.SIGINT)
        assert stop.received == signal.SIGTERM
