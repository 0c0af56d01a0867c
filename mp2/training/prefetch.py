"""Batches made ahead by a background thread, so that the device does not wait for data."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, Full, Queue
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
_POLL_S = 0.1


class Prefetcher(Generic[T]):
    """Makes ``make(first)``, ``make(first + 1)`` ... ``make(last - 1)`` in order, at most ``ahead`` early.

    ``make`` must depend on the step alone: then it does not matter how far ahead the thread was when a run
    was killed. What it raises is raised by ``next``. ``waited_s`` counts the seconds that ``next`` blocked.
    """

    def __init__(self, make: Callable[[int], T], first: int, last: int, ahead: int = 4) -> None:
        self.waited_s = 0.0
        self._queue: Queue[tuple[T | None, BaseException | None]] = Queue(ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(make, first, last), daemon=True)

    def __enter__(self) -> Prefetcher[T]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        with suppress(Empty):
            self._queue.get_nowait()  # the thread may be waiting for room
        self._thread.join()

    def next(self) -> T:
        """Return the next step's batch; may be called ``last - first`` times."""
        start = time.perf_counter()
        batch, error = self._queue.get()
        self.waited_s += time.perf_counter() - start
        if error is not None:
            raise error
        assert batch is not None
        return batch

    def _fill(self, make: Callable[[int], T], first: int, last: int) -> None:
        for step in range(first, last):
            item: tuple[T | None, BaseException | None]
            try:
                item = make(step), None
            except BaseException as error:  # handed over to ``next``
                item = None, error
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=_POLL_S)
                    break
                except Full:
                    continue
            if self._closed.is_set() or item[1] is not None:
                return
