"""Silence of several threads at once, which costs nobody a warning."""

from __future__ import annotations

import threading
import warnings

import pytest

from mp2.runs.quiet import quiet, warn

PATIENCE_S = 60.0


def in_threads(*works: object) -> None:
    threads = [threading.Thread(target=work) for work in works]  # type: ignore[arg-type]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)


def test_threads_are_silent_at_once_and_leave_the_filters_as_they_were() -> None:
    before = list(warnings.filters)
    both, first_left = threading.Barrier(2), threading.Event()
    ends: list[str] = []

    def first() -> None:
        with quiet():
            both.wait(PATIENCE_S)  # would never end if silence were one thread's at a time
            with quiet():
                warnings.warn("nobody hears this", UserWarning, stacklevel=1)
        first_left.set()
        ends.append("first")

    def second() -> None:
        with quiet():
            both.wait(PATIENCE_S)
            first_left.wait(PATIENCE_S)
            warnings.warn("nor this", UserWarning, stacklevel=1)  # warnings are errors in tests
        ends.append("second")

    in_threads(first, second)
    assert ends == ["first", "second"]
    assert warnings.filters == before
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", UserWarning, stacklevel=1)


def test_a_warning_of_ours_is_heard_beside_silence_and_keeps_nobody_for_long() -> None:
    inside, heard, end = threading.Event(), threading.Event(), threading.Event()

    def silent_again_and_again() -> None:
        while not end.is_set():
            with quiet():
                inside.set()

    def speaks() -> None:
        inside.wait(PATIENCE_S)
        for _ in range(20):
            with pytest.raises(UserWarning, match="loud"):  # a filter makes it an error: here, in this thread
                warn("loud", UserWarning)
        heard.set()
        end.set()

    before = list(warnings.filters)
    in_threads(silent_again_and_again, silent_again_and_again, speaks)
    assert heard.is_set()
    assert warnings.filters == before


def test_one_who_is_silent_does_not_wait_for_itself() -> None:
    with quiet():
        warn("swallowed", UserWarning)
