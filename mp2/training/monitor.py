"""What people see of a training run: the progress line."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

EVERY_S = 20.0
SCALARS_EVERY = 10  # steps; TensorBoard gets the mean loss of as many


class Progress:
    """A line every 20 seconds and at the end: mean loss since the last one, pace, data wait, time left."""

    def __init__(self, first: int, n_steps: int, log: Callable[[str], None], amount: int, unit: str) -> None:
        """Start at step ``first`` of ``n_steps``; a step handles ``amount`` of ``unit``."""
        self._first, self._n_steps, self._log = first, n_steps, log
        self._amount, self._unit = amount, unit
        self._start = self._last = time.monotonic()
        self._losses: list[float] = []

    def step(self, step: int, loss: float, wait_share: float) -> None:
        """Count a step; non-finite losses are left out of the mean."""
        if math.isfinite(loss):
            self._losses.append(loss)
        now = time.monotonic()
        if now - self._last <= EVERY_S and step < self._n_steps:
            return
        pace = (step - self._first) / max(1e-9, now - self._start)
        mean = sum(self._losses) / len(self._losses) if self._losses else math.nan
        shown = f"{mean:.4f}" if self._losses else "-"
        self._log(
            f"step {step}/{self._n_steps} loss {shown} {pace:.2f} steps/s "
            f"{pace * self._amount:,.0f} {self._unit}/s "
            f"data wait {100 * wait_share:.1f} % ETA {clock((self._n_steps - step) / pace)}"
        )
        self._losses, self._last = [], now


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: 2:05, 3:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
