"""Ctrl-C and SIGTERM during training: finish the step, save, leave."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType

SAME_S = 1.0


class StopSignals:
    """While entered, SIGINT and SIGTERM only set ``received``; a second one acts as usual.

    What comes within a second of the first is the same one: whoever stops a group of processes tells torchrun
    and each of its processes, and torchrun then tells them again.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._at = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def receive(self, number: int) -> None:
        """Take a signal as received, unless there was one."""
        if self.received is None:
            self.received, self._at = number, time.monotonic()

    def leave(self) -> None:
        """Exit with the status of a process ended by the received signal, if there was one."""
        if self.received is not None:
            raise SystemExit(128 + self.received)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and time.monotonic() - self._at > SAME_S:
            self._restore()
            signal.raise_signal(number)
        self.receive(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
