"""What shares a forward, what waits and what is refused: the queue alone, over a forward that is slow."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mp2.export.bundle_files.reading import Row, Task
from mp2.serve.batcher import Batcher
from mp2.serve.config import ServeConfig
from mp2.serve.counting import Metrics
from mp2.serve.errors import LateError, OverloadError, RequestError


class SlowForward:
    """Stands for a `ServedBundle`: remembers its batches; each takes as long as it is told."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.batches = seconds, list[list[tuple[str, int]]]()
        self.threads = set[int]()

    def run_rows(self, tasks: Sequence[Task], rows: Sequence[Row]) -> list[dict[str, np.ndarray]]:
        self.threads.add(threading.get_ident())
        self.batches.append([(task["name"], len(row.ids)) for task, row in zip(tasks, rows, strict=True)])
        time.sleep(self.seconds)
        if any(row.ids[0] == 666 for row in rows):
            raise RuntimeError("this row is poison")
        return [{"first": row.ids[:1]} for row in rows]


def task(name: str, graph: str = "backbone.onnx") -> Task:
    return {"name": name, "graph": graph}


def row(first: int, n_tokens: int = 10) -> Row:
    return Row(np.array([first] + [0] * (n_tokens - 1)), np.zeros((1, 2), np.int64))


def run(batcher_of: Any, forward: SlowForward, **options: Any) -> Any:
    async def inside() -> Any:
        batcher = Batcher(forward, ServeConfig(bundle="", **options), Metrics())  # type: ignore[arg-type]
        batcher.start()
        try:
            return await asyncio.wait_for(batcher_of(batcher), 30)
        finally:
            await batcher.stop()

    return asyncio.run(inside())


async def ask(batcher: Batcher, name: str, number: int, **where: Any) -> int:
    (found,) = await batcher.rows(task(name, **where), [row(number)])
    return int(found["first"][0])


def test_tasks_share_a_forward_and_each_gets_its_own() -> None:
    forward = SlowForward()

    async def many(batcher: Batcher) -> list[int]:
        return await asyncio.gather(*(ask(batcher, f"t{k % 5}", k) for k in range(20)))

    assert run(many, forward, max_wait_ms=50) == list(range(20))
    assert [len(batch) for batch in forward.batches] == [20]
    assert {name for name, _ in forward.batches[0]} == {f"t{k}" for k in range(5)}


def test_batches_can_be_kept_to_a_task_and_always_are_to_a_graph() -> None:
    forward = SlowForward()

    async def many(batcher: Batcher) -> list[int]:
        return await asyncio.gather(*(ask(batcher, f"t{k % 5}", k) for k in range(20)))

    assert run(many, forward, max_wait_ms=50, mix_tasks=False) == list(range(20))
    assert sorted(len(batch) for batch in forward.batches) == [4] * 5
    forward = SlowForward()

    async def graphs(batcher: Batcher) -> list[int]:
        each = (ask(batcher, "t", k, graph=("a.onnx", "b.onnx")[k % 2]) for k in range(6))
        return await asyncio.gather(*each)

    assert run(graphs, forward, max_wait_ms=50) == list(range(6))
    assert [len(batch) for batch in forward.batches] == [3, 3]


def test_a_batch_has_its_most_rows_and_no_more_filling_than_tokens() -> None:
    forward = SlowForward()

    async def many(batcher: Batcher) -> None:
        await asyncio.gather(*(ask(batcher, "t", k) for k in range(70)))

    run(many, forward, max_wait_ms=50, max_batch=32)
    assert [len(batch) for batch in forward.batches] == [32, 32, 6]
    forward = SlowForward()

    async def mixed(batcher: Batcher) -> None:
        lengths = [10, 400, 12, 390, 11, 410]
        await asyncio.gather(*(batcher.rows(task("t"), [row(k, n)]) for k, n in enumerate(lengths)))

    run(mixed, forward, max_wait_ms=50)
    assert [sorted(n for _, n in batch) for batch in forward.batches] == [[10, 11, 12], [390, 400, 410]]


def test_rows_that_wait_while_others_are_computed_are_computed_next() -> None:
    forward = SlowForward(0.2)

    async def many(batcher: Batcher) -> None:
        first = asyncio.create_task(ask(batcher, "t", 0))
        await asyncio.sleep(0.1)
        await asyncio.gather(first, *(ask(batcher, "t", k) for k in range(8)))

    run(many, forward, max_wait_ms=0)
    assert [len(batch) for batch in forward.batches] == [1, 8]
    assert len(forward.threads) == 1


def test_more_than_may_wait_is_refused_and_the_rest_is_served() -> None:
    forward = SlowForward(0.2)

    async def many(batcher: Batcher) -> list[Any]:
        first = asyncio.create_task(ask(batcher, "t", 0))
        while not forward.batches:  # being computed
            await asyncio.sleep(0.01)
        rest = await asyncio.gather(*(ask(batcher, "t", k) for k in range(1, 8)), return_exceptions=True)
        return [await first, *rest]

    found = run(many, forward, max_wait_ms=0, queue=4)
    assert found[:5] == [0, 1, 2, 3, 4]
    assert [type(x) for x in found[5:]] == [OverloadError] * 3
    assert found[5].status == 429

    async def one(batcher: Batcher) -> Any:
        return await batcher.rows(task("t"), [row(k) for k in range(5)])

    with pytest.raises(RequestError, match="it makes 5 sequences, expected at most 4"):
        run(one, SlowForward(), queue=4)


def test_what_is_late_is_told_so_and_not_computed() -> None:
    forward = SlowForward(0.3)

    async def many(batcher: Batcher) -> list[Any]:
        first = asyncio.create_task(ask(batcher, "slow", 0))
        await asyncio.sleep(0.05)
        late = (ask(batcher, "late", k) for k in range(3))
        found = await asyncio.gather(first, *late, return_exceptions=True)
        await asyncio.sleep(0.4)
        return found

    found = run(many, forward, max_wait_ms=0, timeout_s=0.1)
    assert [type(x) for x in found] == [LateError] * 4
    assert found[0].status == 504
    assert [name for batch in forward.batches for name, _ in batch] == ["slow"]


def test_a_row_that_fails_does_not_take_others_with_it() -> None:
    forward = SlowForward()

    async def many(batcher: Batcher) -> list[Any]:
        return await asyncio.gather(*(ask(batcher, "t", k) for k in (1, 666, 3)), return_exceptions=True)

    found = run(many, forward, max_wait_ms=50)
    assert (found[0], found[2]) == (1, 3)
    assert (found[1].status, "this row is poison" in str(found[1])) == (503, True)


def test_a_server_that_stops_computes_what_waits() -> None:
    forward = SlowForward(0.1)

    async def inside() -> list[int]:
        config = ServeConfig(bundle="", max_wait_ms=0, max_batch=2)
        batcher = Batcher(forward, config, Metrics())  # type: ignore[arg-type]
        batcher.start()
        asked = asyncio.gather(*(ask(batcher, "t", k) for k in range(7)))
        await asyncio.sleep(0.05)
        await batcher.stop()
        return await asyncio.wait_for(asked, 1)

    assert asyncio.run(inside()) == list(range(7))
