"""How far runs are: a live line on a terminal, elsewhere a line every tenth, with the measured time left."""

from __future__ import annotations

import math
import threading
import time
from statistics import mean
from typing import TYPE_CHECKING

from mp2.optimizers.two_stage import Checkpoint, Progress
from mp2.runs.loggers.logger import Logger

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

_SHOWN_EVERY_S = 0.2


class ProgressLine:
    """One line for all runs under way: iterations in all, losses and scores in the mean.

    Each run has a :meth:`logger` of its own, and calls it from any thread. What is printed to stderr
    meanwhile comes above the line.
    """

    def __init__(self, console: Console | None = None, shown_every_s: float = _SHOWN_EVERY_S) -> None:
        """``console``: where to; None: standard error."""
        from rich.console import Console

        self._console = console or Console(stderr=True)
        self._shown_every_s = shown_every_s
        self._lock = threading.Lock()
        self._latest: list[Progress | None] = []
        self._live: Live | None = None
        self._began: tuple[int, float, int] | None = None  # of the pace: stage, time, iteration
        self._last: tuple[float, int] | None = None
        self._shown_s, self._tenth = -math.inf, 0

    def logger(self) -> Logger:
        """What the next run tells of its progress; it costs next to nothing."""
        with self._lock:
            number = len(self._latest)
            self._latest.append(None)
        return _OfRun(self, number)

    def close(self) -> None:
        """End the live line, so that what follows starts on its own."""
        with self._lock:
            if self._live is not None:
                self._live.stop()
                self._live = None

    def show(self, number: int, progress: Progress) -> None:
        """The run ``number`` is there now."""
        with self._lock:
            self._latest[number] = progress
            now, whole = time.perf_counter(), self._sum()
            if self._began is None or self._last is None or not whole.live:
                self._began = (whole.stage, now, whole.iteration)
            elif self._began[0] != whole.stage:  # another pace
                self._began = (whole.stage, *self._last)
            self._last = (now, whole.iteration)
            if whole.live:
                self._print(whole, now)

    def _print(self, progress: Progress, now: float) -> None:
        tenth = 10 * progress.iteration // max(1, progress.iters)
        if not self._console.is_terminal or self._console.is_dumb_terminal:
            if tenth > self._tenth:
                self._console.print(self._text(progress, now), soft_wrap=True)
        elif now - self._shown_s >= self._shown_every_s or progress.iteration >= progress.iters:
            from rich.live import Live

            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False)
                self._live.start()
            self._live.update(self._text(progress, now), refresh=True)
            self._shown_s = now
        self._tenth = max(tenth, self._tenth)

    def _sum(self) -> Progress:
        begun = [p for p in self._latest if p is not None]
        # a run that has not begun yet will take as long as the others
        iters = sum(p.iters for p in begun) * len(self._latest) // len(begun)
        scores = [p.dev_score for p in begun if math.isfinite(p.dev_score)]
        return Progress(
            stage=min(p.stage for p in begun) if len(begun) == len(self._latest) else 1,
            iteration=sum(p.iteration for p in begun),
            iters=iters,
            train_loss=mean(p.train_loss for p in begun),
            dev_score=mean(scores) if scores else math.nan,
            live=any(p.live for p in begun),
        )

    def _text(self, progress: Progress, now: float) -> Text:
        """The most important first: what a narrow terminal has no room for is cut off at its end."""
        from rich.text import Text

        assert self._began is not None
        done, spent = progress.iteration - self._began[2], now - self._began[1]
        pace = done / spent if spent > 0 and done > 0 else math.nan
        left = (progress.iters - progress.iteration) / pace if pace > 0 else math.nan
        parts = [
            f"stage {'I ' if progress.stage == 1 else 'II'}",
            f"{progress.iteration:>{len(str(progress.iters))}}/{progress.iters}",
            f"ETA {clock(left)}",
            f"train loss {progress.train_loss:.4f}",
            f"dev {percent(progress.dev_score)}",
            f"{f'{pace:.1f}' if pace > 0 else '-'} it/s",
        ]
        return Text("  ".join(parts), no_wrap=True, overflow="ellipsis")


class _OfRun(Logger):
    """One run's part of the line."""

    def __init__(self, line: ProgressLine, number: int) -> None:
        self._line, self._number = line, number

    def iteration(self, progress: Progress) -> None:
        self._line.show(self._number, progress)

    def checkpoint(self, checkpoint: Checkpoint, progress: Progress) -> None:
        self._line.show(self._number, progress)


def percent(score: float) -> str:
    """A share of 1 in per cent."""
    return f"{100 * score:.1f}" if math.isfinite(score) else "-"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
