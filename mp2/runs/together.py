"""Several runs as one: each drives itself in a thread, evaluations go through the thread that serves them.

A run asks, through its :class:`~mp2.runs.recorder.Recorder`, for one evaluation after another. Here
these go into one queue, and are taken from it in the order asked for, by exactly the calls that the run alone
would make: so each result has the same bits as alone.

On a CPU an evaluation is computed before the next is taken: it has all cores. While one run's forwards are
computed, the others suggest, hash and journal: the engine never waits as long as two runs are under way.

On a GPU an evaluation is only launched (`mp2.engine.Pending`), and the run that asked for it waits
for it in its own thread. The serving thread waits for no result, so whatever several runs ask for is on the
device at once, each run's on a CUDA stream of its own (``mp2.engine.cuda.lanes``). All launches, captures
and allocations are made by this one thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

from mp2.engine.forward import Pending
from mp2.errors import Mp2Error

T = TypeVar("T")

AT_ONCE = 8  # runs under way at a time: more would only take more memory


class Stopped(BaseException):
    """Raised in a run's thread when all of them are to end."""


@dataclass(frozen=True)
class _Answer:
    value: Any
    started: float
    ended: float  # computed, or launched
    error: BaseException | None = None


@dataclass(frozen=True)
class _Call:
    compute: Callable[[], Any]
    answer: SimpleQueue[_Answer]


@dataclass(frozen=True)
class _End:
    number: int
    value: Any
    error: BaseException | None


class Server:
    """Computes or launches what the threads of several runs ask for."""

    def __init__(self) -> None:
        self._inbox: SimpleQueue[_Call | _End] = SimpleQueue()

    def timed(self, compute: Callable[[], Pending[T]]) -> tuple[T, float]:
        """In a run's thread: the result of ``compute``, run by the server, and the seconds it took itself.

        These begin when the server takes it up; of what was launched, they end when it is fetched, and the
        device may have worked for other runs, too.
        """
        answer: SimpleQueue[_Answer] = SimpleQueue()
        self._inbox.put(_Call(compute, answer))
        got = answer.get()
        if got.error is not None:
            raise got.error
        value = got.value.fetch()
        return value, (got.ended if got.value.ready else time.perf_counter()) - got.started

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
                    message.answer.put(_Answer(None, 0.0, 0.0, Stopped()))
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
        started = time.perf_counter()
        try:
            value = call.compute()
        except Exception as error:
            call.answer.put(_Answer(None, 0.0, 0.0, error))
        except BaseException:  # Ctrl-C here, in the thread that serves: everything ends
            call.answer.put(_Answer(None, 0.0, 0.0, Stopped()))
            raise
        else:
            call.answer.put(_Answer(value, started, time.perf_counter()))
