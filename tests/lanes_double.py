"""Lanes for CPU tests: work is done at once, but only where and by whom it may be."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from mp2.engine.cuda.lanes import Arrival, Lane, Lanes
from mp2.engine.cuda.replays import Capture, Graph


class Recorded:
    """Stands in for a CUDA graph: the same work on the same buffers, its result written to one place."""

    def __init__(self, lane: DoubleLane, work: Callable[[], torch.Tensor]) -> None:
        self.lane = lane
        self.work = work
        self.output = torch.full_like(work(), torch.nan)  # recording computes nothing that counts

    def replay(self) -> None:
        assert self.lane.device.current is self.lane, "replayed on another lane than its own"
        self.output.copy_(self.work())


class Device:
    """What the lanes of a runtime share: what is current, and all that happened."""

    def __init__(self, *, records: bool = True, one_thread: bool = True) -> None:
        self.records = records
        self.thread = threading.current_thread() if one_thread else None
        self._local = threading.local()
        self.lanes: list[DoubleLane] = []
        self.events: list[tuple[str, int]] = []
        self.notes: list[str] = []
        self.before_arrival: Callable[[int], None] = lambda lane: None  # in the thread that fetches

    @property
    def current(self) -> DoubleLane | None:
        """The lane that this thread queues on."""
        return getattr(self._local, "lane", None)

    def make_lanes(self) -> Lanes:
        """New lanes on this device."""

        def make() -> Lane:
            self.lanes.append(DoubleLane(self, len(self.lanes)))
            return self.lanes[-1]

        return Lanes(make, lambda: self.events.append(("free", -1)), self.notes.append)

    def check(self) -> DoubleLane:
        """Assert that work may be queued by this thread now."""
        assert self.current is not None, "work outside of any lane"
        assert self.thread in (None, threading.current_thread()), "work in a thread that may not launch"
        return self.current


class DoubleLane:
    """`Lane`."""

    def __init__(self, device: Device, number: int) -> None:
        self.device, self.number = device, number
        self.record: Capture | None = self._record if device.records else None

    def _record(self, work: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
        assert self.device.check() is self
        graph = Recorded(self, work)
        return graph, graph.output

    @contextmanager
    def queue(self) -> Iterator[None]:
        assert self.device.current is None, "one lane inside another"
        self.device._local.lane = self
        try:
            self.device.check()
            yield
        finally:
            self.device._local.lane = None

    def upload(self, x: torch.Tensor) -> torch.Tensor:
        assert self.device.check() is self
        return x.clone()

    def send(self, x: torch.Tensor) -> Arrival:
        assert self.device.check() is self
        self.device.events.append(("send", self.number))
        found = x.numpy().copy()

        def arrive() -> np.ndarray:
            self.device.before_arrival(self.number)
            self.device.events.append(("arrive", self.number))
            return found

        return arrive
