"""Silence for libraries that warn a lot, in a process where other threads have warnings to give.

``warnings.catch_warnings`` changes the filters of the whole process: two threads that enter and leave it out
of step can leave them changed for good, and a third loses its warnings. So here they are changed when the
first thread wants silence and restored when the last one is done; any number of threads (the CMA-ES of
several runs) work in silence at once, and a warning of ours waits until none does.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


class _Silence:
    """Who wants it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._n_inside = 0
        self._n_speaking = 0  # threads that have a warning to give; nobody comes in before they have
        self._filters = warnings.catch_warnings()
        self._own = threading.local()

    @property
    def here(self) -> bool:
        """Whether this thread is inside."""
        return getattr(self._own, "depth", 0) > 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if not self.here:
            self._enter()
        self._own.depth = getattr(self._own, "depth", 0) + 1
        try:
            yield
        finally:
            self._own.depth -= 1
            if not self.here:
                self._leave()

    def _enter(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._n_speaking)
            if not self._n_inside:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")
            self._n_inside += 1

    def _leave(self) -> None:
        with self._changed:
            self._n_inside -= 1
            if not self._n_inside:
                self._filters.__exit__(None, None, None)
                self._changed.notify_all()

    @contextmanager
    def broken(self) -> Iterator[None]:
        """Inside, no other thread is silent."""
        with self._changed:
            self._n_speaking += 1
            try:
                self._changed.wait_for(lambda: not self._n_inside)
                yield
            finally:
                self._n_speaking -= 1
                self._changed.notify_all()


quiet = _Silence()
"""``with quiet():`` no warnings of what runs inside."""


def warn(message: str, category: type[Warning], stacklevel: int = 2) -> None:
    """``warnings.warn`` that no :data:`quiet` of another thread can swallow."""
    if quiet.here:
        warnings.warn(message, category, stacklevel=stacklevel + 1)
        return
    with quiet.broken():
        warnings.warn(message, category, stacklevel=stacklevel + 1)
