"""What people see while a run goes on."""

from __future__ import annotations

import io

from mp2.optimizers.two_stage import Progress
from mp2.runs.report import ProgressLine, SeriesProgress, series_table


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


def run(task: str, seed: int, dev: float, test: float | None) -> dict[str, object]:
    stages = {
        "untuned": {"dev_score": 0.25, "test_score": test},
        "stage1": {"dev_score": dev, "test_score": test},
    }
    return {"task": task, "seed": seed, "train_loss": dev, "stages": stages}


def test_a_line_a_run_and_mean_and_deviation_of_every_tasks_seeds() -> None:
    runs = [run("a", 13, 0.7, None), run("a", 8, 0.5, None), run("b", 8, 0.5, 0.25)]  # as a folder lists them
    assert [" ".join(line.split()) for line in series_table(runs).splitlines()] == [
        "task seed train loss untuned dev / test stage I dev / test",
        "a 8 0.5000 25.0 / - 50.0 / -",
        "a 13 0.7000 25.0 / - 70.0 / -",
        "a mean of 2 0.6000 25.0 ± 0.0 / - 60.0 ± 14.1 / -",
        "b 8 0.5000 25.0 / 25.0 50.0 / 25.0",
    ]


def test_one_line_for_several_runs_counts_all_iterations() -> None:
    stream = io.StringIO()
    series = SeriesProgress(ProgressLine(stream))
    observers = [series.observer() for _ in range(2)]
    for i in range(0, 101, 10):
        observers[0](Progress(1 if i < 20 else 2, i, 100, 1.0, 0.5, live=True))
        observers[1](Progress(1 if i < 20 else 2, i, 100, 0.0, 0.7, live=True))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0].startswith("stage I    20/200  train loss 0.5000  dev 60.0")
    assert lines[-1].startswith("stage II  200/200  train loss 0.5000  dev 60.0")
