"""What people see while a run goes on."""

from __future__ import annotations

import io

from mp2.optimizers.report import ProgressLine, seeds_line
from mp2.optimizers.two_stage import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps(line: ProgressLine, n: int = 100) -> None:
    for i in range(0, n + 1):
        line(Progress(1 if i < 20 else 2, i, n, 1.0 / (i + 1), 0.5, live=True))
    line.close()


def test_a_line_every_tenth_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    steps(ProgressLine(stream))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("stage I    10/100  train loss 0.0909  dev 50.0")
    assert lines[-1].startswith("stage II  100/100")
    assert "\r" not in stream.getvalue()


def test_one_live_line_on_a_terminal() -> None:
    stream = Terminal()
    steps(ProgressLine(stream, min_interval_s=0))
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().count("\r") == 101
    assert "it/s  ETA" in stream.getvalue()


def test_a_replay_is_silent_and_does_not_count_for_the_rate() -> None:
    stream = io.StringIO()
    line = ProgressLine(stream)
    for i in range(0, 100, 5):
        line(Progress(2, i, 100, 1.0, 0.5, live=False))
    assert stream.getvalue() == ""


def test_mean_and_standard_deviation_over_seeds() -> None:
    runs = [{"task": "t", "seed": s, "dev_score": d, "test_score": None} for s, d in ((8, 0.5), (13, 0.7))]
    assert seeds_line(runs) == "t  2 seeds (8, 13)  dev 60.0 ± 14.1"
