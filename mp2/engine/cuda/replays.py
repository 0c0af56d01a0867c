"""Work recorded once and replayed: CUDA graphs over static buffers.

A recorded graph reads and writes fixed addresses. So each kind of work (its key) owns copies of its inputs;
a call copies the new inputs in, replays, and hands back the output buffer, which the next replay
overwrites: what is to be kept of it must be queued for copying before that. Work is recorded the second time
its key is seen: the first time runs it plainly, which warms up whatever must not happen while recording
(handles, compilers, autotuners, cuBLAS's workspace), and costs nothing where a key never comes again, such
as a last, smaller generation. A key that cannot be recorded, whatever the reason, goes on running plainly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any, Protocol
from weakref import WeakSet

import torch

from mp2.messages import say

Tensors = tuple[torch.Tensor, ...]
Work = Callable[[Tensors], torch.Tensor]


class Graph(Protocol):
    """Something recorded."""

    def replay(self) -> None:
        """Do the recorded work again."""
        ...


class Capture(Protocol):
    """Records work on fixed buffers."""

    def __call__(self, work: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
        """Return the graph and the buffer that every replay writes its result to."""
        ...


class _Kept:
    """A CUDA graph that its recorder knows to be alive."""

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()

    def replay(self) -> None:
        """See `Graph`."""
        self.graph.replay()


class CudaCapture:
    """Records CUDA graphs on one stream; they share a memory pool, as only one of them runs at a time.

    A pool ends with its last graph and cannot be taken up again, so that graphs after that get a new one.
    After a capture that was invalidated, some releases of torch leave their allocator pointing at its graph
    (capture_end raises before it calls endAllocateToPool): that is undone here, and the graph is kept.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._device, self._stream = device, stream
        self._pool: Any = None  # an opaque handle
        self._alive: WeakSet[_Kept] = WeakSet()
        self._broken: list[_Kept] = []

    def __call__(self, work: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
        """See `Capture`. Other threads may wait for other streams meanwhile."""
        alive = list(self._alive)  # held, so that the pool lives as long as this takes
        if not alive:
            self._pool = torch.cuda.graph_pool_handle()
        kept = _Kept()
        failure: Exception | None = None
        try:
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(
                    kept.graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                try:
                    output = work()
                except Exception as error:
                    failure = error
                    raise
        except Exception as error:
            self._broken.append(kept)
            with suppress(Exception):  # where torch has done it
                index = self._device.index
                index = torch.cuda.current_device() if index is None else index
                torch._C._cuda_endAllocateToPool(index, self._pool)
            if failure is None or error is failure:
                raise
            raise failure from error  # not what ending a broken capture says
        self._alive.add(kept)
        return kept, output


class Graphs:
    """Runs work by its key: plainly, then recorded.

    ``record`` None: always plainly. ``n_recorded`` and ``record_s`` say how much was recorded and how long
    that took; ``note`` hears once of what could not be.
    """

    def __init__(self, record: Capture | None, note: Callable[[str], None] = say) -> None:
        self._record, self._note = record, note
        self._seen: set[Hashable] = set()
        self._refused: set[Hashable] = set()
        self._recorded: dict[Hashable, tuple[Graph, Tensors, torch.Tensor]] = {}
        self.record_s = 0.0

    @property
    def n_recorded(self) -> int:
        """Graphs held."""
        return len(self._recorded)

    def __call__(self, key: Hashable, inputs: Sequence[torch.Tensor], work: Work) -> torch.Tensor:
        """Return ``work(inputs)``; of one key, inputs always have the same shapes, and work is the same.

        What ``work`` reads besides its inputs must stay at its address and be updated in place. The result
        is valid until the next call.
        """
        if self._record is None:
            return work(tuple(inputs))
        if key not in self._recorded:
            if key not in self._seen or key in self._refused:
                self._seen.add(key)
                return work(tuple(inputs))
            if not self._made(key, inputs, work, self._record):
                return work(tuple(inputs))
        graph, held, output = self._recorded[key]
        for buffer, x in zip(held, inputs, strict=True):
            buffer.copy_(x)
        graph.replay()
        return output

    def _made(self, key: Hashable, inputs: Sequence[torch.Tensor], work: Work, record: Capture) -> bool:
        """Record ``key``; False where that failed.

        Not even memory that ran out is passed on: the work has run plainly before, within the memory, and if
        it does not now, that says so.
        """
        started = time.perf_counter()
        try:
            held = tuple(x.clone() for x in inputs)
            graph, output = record(lambda: work(held))
            self._recorded[key] = (graph, held, output)
        except Exception as error:
            if not self._refused:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                self._note(f"not recorded as a CUDA graph, runs kernel by kernel ({reason})")
            self._refused.add(key)
            return False
        self.record_s += time.perf_counter() - started
        return True

    def restart(self, record: Capture | None) -> None:
        """Forget everything, which frees its memory, and go on with ``record``."""
        self._record = record
        self._refused.clear()
        self._seen.clear()
        self._recorded.clear()
