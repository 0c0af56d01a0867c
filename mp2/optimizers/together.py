"""Several runs as one: each drives itself in a thread, their evaluations run in the thread that serves them.

A run asks, through its :class:`~mp2.optimizers.recorder.Recorder`, for one evaluation after another. Here
these go into one queue. What is in the queue is computed one after another, in the order asked for, by
exactly the calls that the run alone would make: so each result has the same bits as alone. While one run's
forwards are computed, the others suggest, hash and journal: the engine waits for nobody as long as two runs
are under way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

from mp2.errors import Mp2Error

T = TypeVar("T")

AT_ONCE = 8  # runs under way at a time: more would only take more memory


class Stopped(BaseException):
    """Raised in a run's thread when all of them are to end."""


@dataclass(frozen=True)
class _Call:
    compute: Callable[[], Any]
    answer: SimpleQueue[tuple[Any, float, BaseException | None]]


@dataclass(frozen=True)
class _End:
    number: int
    value: Any
    error: BaseException | None


class Server:
    """Computes what the threads of several runs ask for."""

    def __init__(self) -> None:
        self._inbox: SimpleQueue[_Call | _End] = SimpleQueue()

    def timed(self, compute: Callable[[], T]) -> tuple[T, float]:
        """In a run's thread: the result of ``compute``, run by the server, and the seconds it took itself."""
        answer: SimpleQueue[tuple[Any, float, BaseException | None]] = SimpleQueue()
        self._inbox.put(_Call(compute, answer))
        value, seconds, error = answer.get()
        if error is not None:
            raise error
        return value, seconds

    def run(self, works: Sequence[Callable[[], T]], at_once: int = AT_ONCE) -> Iterator[tuple[int, T]]:
        """Do the works, each in a thread that may call :meth:`timed`; yields (number, result) as they end.

        An :class:`Mp2Error` ends its own work only and is raised when the others are done; anything else
        (Ctrl-C included) stops all of them.
        """
        waiting = list(enumerate(works))[::-1]
        errors: list[Mp2Error] = []
        n_alive = 0
        try:
            while waiting or n_alive:
                while waiting and n_alive < at_once:
                    self._start(*waiting.pop())
                    n_alive += 1
                message = self._inbox.get()
                if isinstance(message, _Call):
                    self._answer(message)
                    continue
                n_alive -= 1
                if message.error is None:
                    yield message.number, message.value
                elif isinstance(message.error, Mp2Error):
                    errors.append(message.error)
                else:
                    raise message.error
        finally:
            while n_alive:
                message = self._inbox.get()
                if isinstance(message, _Call):
                    message.answer.put((None, 0.0, Stopped()))
                else:
                    n_alive -= 1
        if errors:
            raise errors[0]

    def _start(self, number: int, work: Callable[[], Any]) -> None:
        def run() -> None:
            try:
                end = _End(number, work(), None)
            except BaseException as error:
                end = _End(number, None, error)
            self._inbox.put(end)

        threading.Thread(target=run, name=f"mp2-run-{number}", daemon=True).start()

    def _answer(self, call: _Call) -> None:
        try:
            value, seconds = timed(call.compute)
        except Exception as error:
            call.answer.put((None, 0.0, error))
        except BaseException:  # Ctrl-C here, in the thread that serves: everything ends
            call.answer.put((None, 0.0, Stopped()))
            raise
        else:
            call.answer.put((value, seconds, None))


def timed(compute: Callable[[], T]) -> tuple[T, float]:
    """The result of ``compute`` and the seconds that it took."""
    start = time.perf_counter()
    value = compute()
    return value, time.perf_counter() - start
