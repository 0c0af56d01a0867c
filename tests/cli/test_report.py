"""Results for people, on files, pipes and narrow terminals."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
from rich.cells import cell_len

from mp2.commands.printing import show_table
from mp2.commands.report import show_series


def run(task: str, seed: int, dev: float, test: float | None) -> dict[str, Any]:
    stages = {
        "untuned": {"dev_score": 0.25, "test_score": test},
        "stage1": {"dev_score": dev, "test_score": test},
    }
    setting = {
        "method": "mp2-deep-router",
        "backbone": "mini",
        "head": {"kind": "span"},
        "metric": "accuracy",
    }
    found = {"task": task, "seed": seed, "train_loss": dev, "test_score": test, "stages": stages}
    return {**setting, **found, "baselines": None}


def test_a_line_a_run_and_mean_and_deviation_of_every_tasks_seeds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = [run("a", 13, 0.7, None), run("a", 8, 0.5, None), run("b", 8, 0.5, 0.25)]  # as a folder lists them
    show_series(runs)
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        "dev accuracy, method mp2-deep-router, head span, backbone mini",
        "task seed train loss untuned stage I",
        "a 8 0.5000 25.0 50.0",
        "a 13 0.7000 25.0 70.0",
        "a mean of 2 0.6000 25.0 ± 0.0 60.0 ± 14.1",
        "b 8 0.5000 25.0 50.0",
    ]


@pytest.mark.parametrize("columns", [40, 60])
def test_a_table_fits_a_narrow_terminal_with_wide_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    text = "主题识别：这是一条很长的新闻，它比一行要长得多，所以要折成几行" * 2
    show_table([("template", text), ("note", "[bold]not markup[/bold] :smile:")], ("field", "value"))
    lines = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
    assert max(map(cell_len, lines)) <= columns
    assert "".join(line[10:].strip() for line in lines if "note" not in line).startswith(f"value{text}")
    assert "[bold]not markup[/bold]" in "".join(lines)
    assert ":smile:" in "".join(lines)


@pytest.mark.parametrize("columns", [40, 30, 28])
def test_no_word_or_number_of_a_table_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    """As long as words fit side by side it is one table; with less room each row is a paragraph."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    rows = [
        ("TF-IDF + logistic regression", "3.7481", "30.0 ± 4.1"),
        ("stage II (selected)", "3.3311", "7.0"),
    ]
    show_table(rows, ("", "train loss", "test accuracy"), numbers_from=1)
    lines = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
    assert max(map(cell_len, lines)) <= columns
    words = " ".join(lines).split()
    for word in ("regression", "(selected)", "3.7481", "3.3311", "30.0", "accuracy"):
        assert word in words
    assert ("" in lines) == (columns < 30)


def test_a_pipe_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show_table([("template", "字" * 300)])
    assert capsys.readouterr().out == f"template  {'字' * 300}\n"
