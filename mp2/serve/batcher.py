"""One queue for all tasks: what waits together is computed together.

Sequences of different tasks share a forward: row i has prompt i. While one forward computes, others gather;
only when nothing computes does a sequence wait for company, ``max_wait_ms`` at most. The thread that computes
takes its next forward itself: it does not wait until the event loop, which may be busy, gives it one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mp2.export.bundle_files.reading import Row, Task
from mp2.serve.config import ServeConfig
from mp2.serve.counting import Metrics
from mp2.serve.errors import LateError, OverloadError, RequestError
from mp2.serve.model import ServedBundle, graph_of

Outputs = dict[str, np.ndarray]


@dataclass(eq=False)
class Waiting:
    """What one forward, or a part of one, is to compute."""

    key: object  # only those of one key share a forward
    n_rows: int
    n_tokens: int  # of the longest row
    result: asyncio.Future[Any]
    task: Task | None = None
    row: Row | None = None
    alone: Callable[[], Any] | None = None  # a forward of its own
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Runs what is asked for in one thread, in the order of arrival, as few forwards as there can be."""

    def __init__(self, served: ServedBundle, config: ServeConfig, metrics: Metrics) -> None:
        self._served, self._config, self._metrics = served, config, metrics
        self._changed = threading.Condition()  # holds what follows
        self._queue: list[Waiting] = []
        self._n_waiting = 0
        self._ending = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="forward", daemon=True)

    def start(self) -> None:
        """Begin to work; inside the event loop, which hears of the results."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End, once nothing waits any more."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    async def rows(self, task: Task, rows: Sequence[Row]) -> list[Outputs]:
        """Return the outputs of each of the rows of ``task``.

        Raises OverloadError, LateError, RequestError (413: more rows than may ever wait).
        """
        key = (graph_of(task), None if self._config.mix_tasks else task["name"])
        loop = asyncio.get_running_loop()
        return await self._submit(
            [Waiting(key, 1, len(row.ids), loop.create_future(), task, row) for row in rows]
        )

    async def whole(self, graph: str, feeds: Mapping[str, np.ndarray], outputs: Sequence[str]) -> Outputs:
        """Return ``outputs`` of ``graph``, in a forward of its own; raises as `rows` does."""
        n, t = feeds["input_ids"].shape
        future = asyncio.get_running_loop().create_future()
        work = Waiting(None, n, t, future, alone=lambda: self._served.run(graph, feeds, outputs))
        found: list[Outputs] = await self._submit([work])
        return found[0]

    async def _submit(self, work: list[Waiting]) -> list[Any]:
        n_rows = sum(one.n_rows for one in work)
        most = self._config.queue
        if n_rows > most and len(work) > 1:
            raise RequestError(413, f"it makes {n_rows} sequences, expected at most {most}; send it in parts")
        with self._changed:
            if self._n_waiting and self._n_waiting + n_rows > most:
                raise OverloadError(self._n_waiting, most)
            self._queue += work
            self._count(n_rows)
            self._changed.notify()
        try:
            async with asyncio.timeout(self._config.timeout_s):
                return list(await asyncio.gather(*(one.result for one in work)))
        except TimeoutError:
            raise LateError(self._config.timeout_s) from None
        finally:
            for one in work:
                one.result.cancel()  # done ones stay; the others leave the queue when it comes to them

    def _count(self, change: int) -> None:
        self._n_waiting += change
        self._metrics.waiting.set(self._n_waiting)

    def _work(self) -> None:
        assert self._loop is not None
        while (batch := self._next()) is not None:
            if not batch:
                continue
            started = time.perf_counter()
            self._metrics.batch_rows.observe(sum(one.n_rows for one in batch))
            found = self._compute(batch)
            self._metrics.forward_s.observe(time.perf_counter() - started)
            self._loop.call_soon_threadsafe(_answer, batch, found)

    def _next(self) -> list[Waiting] | None:
        """Return what the next forward computes: nothing where all was given up, None at the end."""
        with self._changed:
            while not self._queue:
                if self._ending:
                    return None
                self._changed.wait()
            self._company()
            batch: list[Waiting] = []
            gone = [one for one in self._queue if one.result.done()]
            if asked := [one for one in self._queue if not one.result.done()]:
                batch = _like(asked[0], asked, self._config.max_batch)
            taken = {id(one) for one in (*gone, *batch)}
            self._queue = [one for one in self._queue if id(one) not in taken]
            self._count(-sum(one.n_rows for one in (*gone, *batch)))
            return batch

    def _company(self) -> None:
        """Wait until a forward is full, or its first sequence has waited long enough."""
        until = self._queue[0].since + self._config.max_wait_ms / 1000
        while not self._ending and self._queue[0].alone is None and len(self._queue) < self._config.max_batch:
            left = until - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                return

    def _compute(self, batch: list[Waiting]) -> list[tuple[Any, Exception | None]]:
        """Return a value or an error for each; where a common forward fails, each is computed alone."""
        try:
            if batch[0].alone is not None:
                return [(batch[0].alone(), None)]
            tasks = [one.task for one in batch if one.task is not None]
            rows = [one.row for one in batch if one.row is not None]
            return [(found, None) for found in self._served.run_rows(tasks, rows)]
        except Exception as error:  # a runtime's own, or memory that ran out
            if len(batch) > 1:
                return [self._compute([one])[0] for one in batch]
            why = (str(error) or type(error).__name__).splitlines()[0][:200]
            return [(None, RequestError(503, f"the forward failed: {why}"))]


def _answer(batch: Sequence[Waiting], found: Sequence[tuple[Any, Exception | None]]) -> None:
    for one, (value, error) in zip(batch, found, strict=True):
        if one.result.done():
            continue  # its client has given up
        if error is None:
            one.result.set_result(value)
        else:
            one.result.set_exception(error)


def _like(first: Waiting, waiting: Sequence[Waiting], most: int) -> list[Waiting]:
    """Return ``first`` and those that may share its forward: of its key, nearest in length first.

    At most ``most``, and no more filling than tokens.
    """
    if first.alone is not None:
        return [first]
    same = [one for one in waiting if one.key == first.key and one is not first]
    same.sort(key=lambda one: abs(one.n_tokens - first.n_tokens))
    batch, longest, real = [first], first.n_tokens, first.n_tokens
    for one in same:
        longest, real = max(longest, one.n_tokens), real + one.n_tokens
        if len(batch) == most or (len(batch) + 1) * longest > 2 * real:
            break
        batch.append(one)
    return batch
