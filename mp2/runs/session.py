"""What holds while a process tunes: how it ends, how many threads the optimizers may use."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """SIGTERM becomes ``SystemExit(143)``, so that it ends a run as tidily as Ctrl-C does."""

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, on_sigterm)
    except ValueError:  # not the main thread: whoever owns it decides
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """CMA-ES at d = 300 is faster with one thread, and its sums then never depend on the number of cores."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(limits=1, user_api="blas"):
        yield
