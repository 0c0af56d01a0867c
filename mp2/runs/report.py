"""What people see of a run: the progress line, the result's table, the curve."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TextIO

from mp2.files import whole_file
from mp2.optimizers.two_stage import Outcome, Progress


class ProgressLine:
    """A live line on a terminal; elsewhere a line every tenth of the run."""

    def __init__(self, stream: TextIO | None = None, min_interval_s: float = 0.2) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._min_interval_s = min_interval_s
        self._start: tuple[float, int] | None = None  # of the rate: where this session began the stage
        self._last: tuple[int, float, int] | None = None  # stage, time, iteration
        self._shown_s = -math.inf
        self._tenth = 0
        self._width = 0

    def __call__(self, progress: Progress) -> None:
        """Show where the run is; cheap enough for every generation."""
        now = time.perf_counter()
        if self._start is None or self._last is None or not progress.live:
            self._start = (now, progress.iteration)
        elif self._last[0] != progress.stage:
            self._start = self._last[1:]
        self._last = (progress.stage, now, progress.iteration)
        if not progress.live:
            return
        end = progress.iteration >= progress.iters
        tenth = 10 * progress.iteration // max(1, progress.iters)
        if self._live:
            if now - self._shown_s < self._min_interval_s and not end:
                return
            text = self._text(progress, now)
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        elif tenth > self._tenth:
            self._stream.write(self._text(progress, now) + "\n")
        self._tenth, self._shown_s = max(tenth, self._tenth), now
        self._stream.flush()

    def close(self) -> None:
        """End the live line, so that what follows starts on its own."""
        if self._live and self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0

    def _text(self, progress: Progress, now: float) -> str:
        assert self._start is not None
        done, spent = progress.iteration - self._start[1], now - self._start[0]
        rate = done / spent if spent > 0 and done > 0 else math.nan
        eta = (progress.iters - progress.iteration) / rate if rate > 0 else math.nan
        stage = "I " if progress.stage == 1 else "II"
        return (
            f"stage {stage}  {progress.iteration:>{len(str(progress.iters))}}/{progress.iters}"
            f"  train loss {progress.train_loss:.4f}  dev {_percent(progress.dev_score)}"
            f"  {f'{rate:.1f}' if rate > 0 else '-'} it/s  ETA {clock(eta)}"
        )


class SeriesProgress:
    """One line for the runs of a series: iterations in all, losses and scores in the mean.

    Each run calls an :meth:`observer` of its own, from any thread.
    """

    def __init__(self, line: ProgressLine | None = None) -> None:
        self._line = line or ProgressLine()
        self._lock = threading.Lock()
        self._latest: list[Progress | None] = []

    def observer(self) -> _Observer:
        """What the next run is to call."""
        self._latest.append(None)
        return _Observer(self, len(self._latest) - 1)

    def show(self, number: int, progress: Progress) -> None:
        """Take up where run ``number`` is."""
        with self._lock:
            self._latest[number] = progress
            self._line(self._sum())

    def close(self) -> None:
        """End the live line."""
        with self._lock:
            self._line.close()

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


@dataclass(frozen=True)
class _Observer:
    """One run's share of the line."""

    series: SeriesProgress
    number: int

    def __call__(self, progress: Progress) -> None:
        self.series.show(self.number, progress)

    def close(self) -> None:
        self.series.close()


def result_table(result: dict[str, Any]) -> str:
    """The result for people: a line a stage, then where and how long."""
    rows = [("", "train loss", f"dev {result['metric']}", f"test {result['metric']}")]
    names = {
        "untuned": "untuned (every module on)",
        "stage1": "stage I (router)",
        "stage2": "stage II (selected)",
    }
    for name, label in names.items():
        stage = result["stages"].get(name)
        if stage is not None:
            loss = stage["train_loss"]
            test = "-" if stage["test_score"] is None else _percent(stage["test_score"])
            rows.append((label, "-" if loss is None else f"{loss:.4f}", _percent(stage["dev_score"]), test))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{result['task']}  {result['method']}  seed {result['seed']}  backbone {result['backbone']}"
        f"  router search {result['router_search']}"
    ]
    for row in rows:
        lines.append(
            "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))]).rstrip()
        )
    seconds, engine = result["seconds"], result["engine"]
    lines.append(
        f"{result['iterations']} iterations in {clock(seconds['stage1'] + seconds['stage2'])}"
        f" (stage I {seconds['stage1']:.1f} s, stage II {seconds['stage2']:.1f} s;"
        f" forward {seconds['forward']:.1f} s, suggest {seconds['suggest']:.1f} s,"
        f" journal {seconds['journal']:.1f} s, other {seconds['other']:.1f} s),"
        f" dev {seconds['dev']:.1f} s  [{engine['runtime']}, {engine['precision']}, {engine['device']}]"
    )
    if result["non_finite_losses"]:
        lines.append(f"{result['non_finite_losses']} candidates had losses that were NaN or infinite")
    if result["stages"].get("stage2") and result["selected"]["at"] != "stage2":
        lines.append(f"selected by dev: {result['selected']['at']}, no later prompt was better")
    lines.append(result["run_dir"])
    return "\n".join(lines)


def series_table(results: Sequence[dict[str, Any]]) -> str:
    """A line a run, and for every task the mean and standard deviation over its seeds."""
    columns = ["untuned", "stage1", "stage2"]
    columns = [name for name in columns if any(name in r["stages"] for r in results)]
    titles = {"untuned": "untuned", "stage1": "stage I", "stage2": "stage II"}
    rows = [["task", "seed", "train loss", *(f"{titles[c]} dev / test" for c in columns)]]
    for task in dict.fromkeys(r["task"] for r in results):
        members = sorted((r for r in results if r["task"] == task), key=lambda r: r["seed"])
        for r in members:
            scores = [_pair(r["stages"].get(c, {})) for c in columns]
            rows.append([task, str(r["seed"]), f"{r['train_loss']:.4f}", *scores])
        if len(members) > 1:
            losses = f"{mean(r['train_loss'] for r in members):.4f}"
            scores = [_mean_pair([r["stages"].get(c, {}) for r in members]) for c in columns]
            rows.append([task, f"mean of {len(members)}", losses, *scores])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _pair(stage: dict[str, Any]) -> str:
    scores = (stage.get("dev_score"), stage.get("test_score"))
    return " / ".join("-" if s is None else _percent(s) for s in scores)


def _mean_pair(stages: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation of the dev and of the test scores."""
    parts = []
    for name in ("dev_score", "test_score"):
        scores = [s.get(name) for s in stages]
        known = [s for s in scores if s is not None]
        whole = len(known) == len(scores)
        parts.append(f"{100 * mean(known):.1f} ± {100 * stdev(known):.1f}" if whole else "-")
    return " / ".join(parts)


def draw_curve(path: Path, outcome: Outcome, title: str, metric: str) -> None:
    """Training loss of the incumbent and dev score over iterations, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axis = figure.subplots()
    loss_axis.step(*zip(*outcome.loss_curve, strict=True), where="post", color="tab:blue", label="train loss")
    loss_axis.set_xlabel("iterations")
    loss_axis.set_ylabel("train loss of the incumbent", color="tab:blue")
    dev_axis = loss_axis.twinx()
    dev_axis.plot(*zip(*outcome.dev_curve, strict=True), ".-", color="tab:orange", label="dev")
    dev_axis.set_ylabel(f"dev {metric}", color="tab:orange")
    loss_axis.axvline(outcome.stage1.iteration, color="0.7", linestyle=":")
    loss_axis.set_title(title)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120, metadata={"Software": None})


def _percent(score: float) -> str:
    return f"{100 * score:.1f}" if math.isfinite(score) else "-"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
