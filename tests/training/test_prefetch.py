"""Batches made ahead by a thread."""

from __future__ import annotations

import threading

import pytest

from mp2.training.prefetch import Prefetcher


def test_batches_come_in_order_once_each() -> None:
    with Prefetcher(lambda step: step * step, 3, 40) as batches:
        assert [batches.next() for _ in range(37)] == [step * step for step in range(3, 40)]


def test_the_thread_is_ahead_but_not_further_than_allowed() -> None:
    made: list[int] = []
    fifth = threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if step == 4:
            fifth.set()
        return step

    with Prefetcher(make, 0, 100, ahead=4) as batches:
        assert fifth.wait(30)  # four in the queue and one that waits for room
        assert made == [0, 1, 2, 3, 4]
        assert batches.next() == 0


def test_an_error_comes_where_its_batch_would() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise ValueError("step two")
        return step

    with Prefetcher(make, 0, 5) as batches:
        assert [batches.next(), batches.next()] == [0, 1]
        with pytest.raises(ValueError, match="step two"):
            batches.next()


def test_leaving_early_ends_the_thread() -> None:
    before = threading.active_count()
    with Prefetcher(lambda step: step, 0, 10**9) as batches:
        batches.next()
    assert threading.active_count() == before


def test_waiting_is_counted() -> None:
    go = threading.Event()

    def make(step: int) -> int:
        go.wait(30)
        return step

    with Prefetcher(make, 0, 2) as batches:
        threading.Timer(0.05, go.set).start()
        batches.next()
        waited = batches.waited_s
        assert waited >= 0.04
        batches.next()
        assert batches.waited_s >= waited
