from __future__ import annotations

import os
import signal

import pytest

from mp2.training.stop import StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_kept_until_the_step_is_done_and_becomes_the_exit_status(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as stop:
        stop.leave()  # nothing received: goes on
        os.kill(os.getpid(), number)
        assert stop.received == number
        assert signal.getsignal(number) == before  # a second one acts as usual
        with pytest.raises(SystemExit) as exit_:
            stop.leave()
    assert exit_.value.code == 128 + number
    assert signal.getsignal(number) == before
