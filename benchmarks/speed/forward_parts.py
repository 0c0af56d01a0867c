"""What a forward's time goes to: every torch operator and C kernel called in it, timed one by one.

Operators are timed from inside torch's dispatcher (``TorchDispatchMode``), C kernels where they are called.
The mode itself costs Python time between the operators, but not in them; so the time of the same work
without it, less the operators' time with it, is what Python and dispatching take.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mp2.engine.cpu import native

CUSTOM = "C: "


def clock() -> float:
    """Seconds: of this thread on one thread, which other processes do not lengthen, else of the wall."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Parts(TorchDispatchMode):
    """Seconds and calls of operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Time one operator."""
        return self.timed(str(func), func, *args, **(kwargs or {}))

    def timed(self, name: str, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``work`` on the account of ``name``."""
        start = clock()
        try:
            return work(*args, **kwargs)
        finally:
            self.seconds[name] += clock() - start
            self.calls[name] += 1


class _Library:
    """A library of C kernels whose calls are timed."""

    def __init__(self, library: Any, parts: Parts) -> None:
        self._library, self._parts = library, parts

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._library, name)
        return lambda *args: self._parts.timed(CUSTOM + name, function, *args)


@contextmanager
def measured() -> Iterator[Parts]:
    """Time what runs inside; kernels of runtimes made inside or with the library looked up at every call."""
    parts = Parts()
    library = native.load()
    timed = None if library is None else _Library(library, parts)
    with mock.patch.object(native, "load", return_value=timed), parts:
        yield parts
