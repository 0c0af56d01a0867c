"""What people see of a training run: the progress line and TensorBoard scalars."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

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


class Scalars:
    """TensorBoard scalars in ``<out>/tensorboard``; without the package one line says so."""

    def __init__(self, out: Path, step: int, log: Callable[[str], None]) -> None:
        """Write on from ``step``: scalars of later steps, of a run that was killed, are hidden."""
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log("no TensorBoard scalars: the package is not installed (pip install 'mp2[train]')")
            return
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)  # type: ignore[no-untyped-call]

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars of a step; non-finite ones are left out."""
        if self._writer is not None:
            for name, value in values.items():
                if math.isfinite(value):
                    self._writer.add_scalar(name, value, step)

    def __enter__(self) -> Scalars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
