"""Silence for libraries that warn a lot, in a process where other threads have warnings to give.

``warnings.catch_warnings`` changes the filters of the whole process: two threads inside it at once can leave
them changed for good, and a third loses its warnings. So all of ours goes through one lock.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.RLock()


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of what runs inside; one thread at a time."""
    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def warn(message: str, category: type[Warning], stacklevel: int = 2) -> None:
    """``warnings.warn`` that no :func:`quiet` of another thread can swallow."""
    with _LOCK:
        warnings.warn(message, category, stacklevel=stacklevel + 1)
