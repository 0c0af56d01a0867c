"""Work recorded once and replayed: CUDA graphs over static buffers.

A recorded graph reads and writes fixed addresses. So each kind of work (its key) owns copies of its inputs;
a call copies the new inputs in, replays, and hands back the output buffer, which the next replay
overwrites. Work is recorded the second time its key is seen: the first time runs it plainly, which warms
up whatever must not happen while recording (handles, compilers, autotuners), and costs nothing where a key
never comes again, such as a last, smaller generation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch

Tensors = tuple[torch.Tensor, ...]
Work = Callable[[Tensors], torch.Tensor]


class Graph(Protocol):
    """Something recorded."""

    def replay(self) -> None:
        """Do the recorded work again."""
        ...


class Recorder(Protocol):
    """Records work on fixed buffers."""

    def __call__(self, work: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
        """Return the graph and the buffer that every replay writes its result to."""
        ...


class CudaRecorder:
    """Records CUDA graphs that share one memory pool, as only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None  # an opaque handle

    def __call__(self, work: Callable[[], torch.Tensor]) -> tuple[Graph, torch.Tensor]:
        """See `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, pool=self._pool):
                output = work()
        return graph, output


class Graphs:
    """Runs work by its key: plainly, then recorded.

    ``record`` None: always plainly. ``n_recorded`` and ``record_s`` say how much was recorded and how long
    that took.
    """

    def __init__(self, record: Recorder | None) -> None:
        self._record = record
        self._seen: set[Hashable] = set()
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
            if key not in self._seen:
                self._seen.add(key)
                return work(tuple(inputs))
            started = time.perf_counter()
            held = tuple(x.clone() for x in inputs)
            graph, output = self._record(lambda: work(held))
            self._recorded[key] = (graph, held, output)
            self.record_s += time.perf_counter() - started
        graph, held, output = self._recorded[key]
        for buffer, x in zip(held, inputs, strict=True):
            buffer.copy_(x)
        graph.replay()
        return output

    def clear(self) -> None:
        """Forget everything, and free its memory."""
        self._seen.clear()
        self._recorded.clear()
