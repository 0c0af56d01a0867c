"""What people see while runs go on."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from mp2.optimizers.two_stage import Progress
from mp2.runs.progress import ProgressLine, clock


def steps(line: ProgressLine, n: int = 100) -> None:
    observe = line.logger().iteration
    for i in range(n + 1):
        observe(Progress(1 if i < 20 else 2, i, n, 1.0 / (i + 1), 0.5, live=True))
    line.close()


@pytest.mark.parametrize("terminal", ["none", "dumb"])
def test_a_line_every_tenth_where_nothing_can_be_overwritten(
    monkeypatch: pytest.MonkeyPatch, terminal: str
) -> None:
    stream = io.StringIO()
    if terminal == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    steps(ProgressLine(Console(file=stream, force_terminal=terminal == "dumb", width=40)))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("stage I    10/100  ETA 0:00  train loss 0.0909  dev 50.0")
    assert lines[-1].startswith("stage II  100/100")
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("width", [40, 120])
def test_one_live_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, color_system=None)
    steps(ProgressLine(console, shown_every_s=0))
    assert stream.getvalue().count("\n") == 1
    shown = [part for part in stream.getvalue().split("\r") if "stage" in part]
    assert len(shown) >= 101
    assert all(cell_len(part.split("\x1b")[0].rstrip("\n")) <= width for part in shown)
    assert "ETA" in shown[-1]
    assert ("it/s" in shown[-1]) == (width == 120)


def test_a_replay_is_silent_and_does_not_count_for_the_pace() -> None:
    stream = io.StringIO()
    observe = ProgressLine(Console(file=stream)).logger().iteration
    for i in range(0, 100, 5):
        observe(Progress(2, i, 100, 1.0, 0.5, live=False))
    assert stream.getvalue() == ""


def test_the_time_left_is_that_of_the_measured_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("mp2.runs.progress.time.perf_counter", lambda: now[0])
    stream = io.StringIO()
    observe = ProgressLine(Console(file=stream, width=200)).logger().iteration
    observe(Progress(1, 400, 1000, 1.0, 0.5, live=False))  # replayed: says nothing of the pace
    for i in range(500, 1001, 100):
        now[0] += 50 if i < 600 else 10  # stage II is faster
        observe(Progress(1 if i < 600 else 2, i, 1000, 1.0, 0.5, live=True))
    lines = stream.getvalue().splitlines()
    assert [line.split("ETA ")[1].split()[0] for line in lines[:3]] == ["4:10", "0:40", "0:30"]


def test_one_line_for_several_runs_counts_all_iterations() -> None:
    stream = io.StringIO()
    series = ProgressLine(Console(file=stream, width=200))
    observers = [series.logger().iteration for _ in range(2)]
    for i in range(0, 101, 10):
        observers[0](Progress(1 if i < 20 else 2, i, 100, 1.0, 0.5, live=True))
        observers[1](Progress(1 if i < 20 else 2, i, 100, 0.0, 0.7, live=True))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("stage I    20/200  ETA")
    assert "train loss 0.5000  dev 60.0" in lines[0]
    assert lines[-1].startswith("stage II  200/200")


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.6, 3600, float("nan"))] == ["0:00", "1:00", "1:00:00", "-"]
