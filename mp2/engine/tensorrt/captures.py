"""Calls of TensorRT engines that were captured as CUDA graphs: which are worth it, which are kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tensorrt as trt

Replay = Callable[[], None]

CAPTURE_AFTER = 2  # calls with the same shapes
# 24 layers x some 8 buckets x (under visit, above it, stage I, dev). Each holds an execution context of one
# layer and its graph's nodes; the layer's working memory, which is what is large, is all engines' one block.
KEPT = 1024
IDLE_CALLS = 16 * KEPT  # rounds of visits through all layers: what was not called in them has gone


class Captures:
    """The captured calls of all engines of a backend, at most ``kept``.

    When there is no room, calls run as they are: to make room for each new one by giving up the one used
    longest ago would, with more calls in a round than there is room for, capture every call every time. Only
    those that were not used in the last ``idle_calls`` calls give way.
    """

    def __init__(self, kept: int = KEPT, idle_calls: int = IDLE_CALLS) -> None:
        """Start with none."""
        self._kept, self._idle_calls = kept, idle_calls
        self._graphs: OrderedDict[Hashable, tuple[trt.IExecutionContext | None, Replay]] = OrderedDict()
        self._last: dict[Hashable, int] = {}  # call -> when it was used
        self._seen: dict[Hashable, int] = {}
        self._refused: set[Hashable] = set()
        self._n_calls = 0

    def __len__(self) -> int:
        """Captured calls."""
        return len(self._graphs)

    def find(self, key: Hashable) -> Replay | None:
        """Return what queues the call ``key`` again; None if it is not captured."""
        self._n_calls += 1
        if key not in self._graphs:
            return None
        self._graphs.move_to_end(key)
        self._last[key] = self._n_calls
        return self._graphs[key][1]

    def wants(self, key: Hashable) -> bool:
        """Tell whether the call ``key``, which has just run, comes often enough and there is room for it."""
        if key in self._refused or not self._has_room():
            return False
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] < CAPTURE_AFTER:
            if len(self._seen) > 16 * self._kept:  # shapes that never come back
                self._seen.clear()
            return False
        del self._seen[key]
        return True

    def add(self, key: Hashable, context: trt.IExecutionContext | None, replay: Replay) -> None:
        """Keep a captured call with the context that its graph belongs to."""
        self._graphs[key], self._last[key] = (context, replay), self._n_calls

    def refuse(self, key: Hashable) -> None:
        """Never want the call ``key`` again: it cannot be captured."""
        self._refused.add(key)

    def clear(self) -> None:
        """Forget all of them: the memory that they use, or an engine, goes."""
        self._graphs.clear()
        self._last.clear()
        self._refused.clear()

    def _has_room(self) -> bool:
        while len(self._graphs) >= self._kept:
            oldest = next(iter(self._graphs))
            if self._n_calls - self._last[oldest] <= self._idle_calls:
                return False
            del self._graphs[oldest], self._last[oldest]
        return True
