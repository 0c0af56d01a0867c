"""The tables of heads and of small tasks: from cells to means, and what is left to do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paper import heads, own_tasks


def cell(task: str, head: str, seed: int, **scores: float) -> dict[str, Any]:
    return {"task": task, "method": head, "seed": seed, "scores": scores, "provenance": {}, "cpu_s": 60.0}


def test_the_mean_over_tasks_is_of_seeds_that_have_them_all() -> None:
    cells = [
        cell("a", "ridge", 8, tuned=0.5, probe=0.25),
        cell("a", "ridge", 13, tuned=0.7, probe=0.25),
        cell("b", "ridge", 8, tuned=0.9, probe=0.75),
        cell("a", "mlm", 8, tuned=0.1),
    ]
    rows = {(row["task"], row["column"]): row for row in heads.rows_of(cells)}
    assert rows["a", "ridge, tuned"]["mean"] == 60.0
    assert rows["a", "ridge, tuned"]["sd"] == pytest.approx(14.14)
    assert rows["mean", "ridge, tuned"] == {
        "task": "mean",
        "column": "ridge, tuned",
        "mean": 70.0,
        "sd": 0.0,
        "seeds": 1,
    }
    assert rows["mean", "linear probe"]["mean"] == 50.0
    assert ("mean", "label words, tuned") not in rows  # task b has none
    lines = heads.table(list(rows.values())).splitlines()
    assert lines[0] == "| task | linear probe | ridge, tuned | label words, tuned |"
    assert lines[-1].startswith("| mean | 50.0 ± 0.0 | 70.0 ± 0.0 |")


def test_cells_that_are_there_are_not_run_again_and_the_result_names_their_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[tuple[str, str, int]] = []

    def run_cell(config: Any, work: Path, model: Any) -> dict[str, Any]:
        ran.append((config.task, config.head, config.seed))
        assert config.prompts == "scratch-deep"
        assert config.baselines == (config.head == "ridge")
        return cell(config.task, config.head, config.seed, untuned=0.5, tuned=0.6)

    monkeypatch.setattr(heads, "run_cell", run_cell)
    monkeypatch.setattr(heads, "RESULTS", tmp_path)
    words = ["heads", "--data", str(tmp_path), "--tasks", "chnsent", "bq", "--seeds", "8", "13"]
    monkeypatch.setattr(sys, "argv", [*words, "--work", str(tmp_path / "work")])
    heads.main()
    assert len(ran) == len(set(ran)) == 8
    (tmp_path / "work" / "cells" / "bq.mlm.13.json").unlink()
    heads.main()
    assert ran[8:] == [("bq", "mlm", 13)]
    result = json.loads((tmp_path / "heads_random.json").read_text("utf-8"))
    assert result["settings"]["backbone"] == "random"
    assert result["mixed_code"] == []
    assert "| mean | 50.0 ± 0.0 | 60.0 ± 0.0 | 50.0 ± 0.0 | 60.0 ± 0.0 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*words, "--work", str(tmp_path / "work"), "--iters", "7"])
    with pytest.raises(SystemExit, match="2"):
        heads.main()
    assert "were made with iters 200, got 7" in capsys.readouterr().err


def test_small_tasks_count_draws_below_the_majority_that_nothing_is_said_of() -> None:
    def draw(number: int, tuned: float, verdict: str | None) -> dict[str, Any]:
        scores = {"majority": 0.5, "tfidf": 0.9, "probe": 0.6, "untuned": 0.8, "tuned": tuned}
        return {
            "task": "hotel_reviews",
            "draw": number,
            "head": "ridge",
            "scores": scores,
            "verdict": verdict,
            "calibration": {"test": {"error": 0.1}},
        }

    (row,) = own_tasks.rows_of([draw(1, 0.9, None), draw(2, 0.5, "not better"), draw(3, 0.4, None)])
    assert row["silent"] == 1
    assert row["tuned"] == {"mean": 60.0, "sd": 26.46}
    assert row["labels"] == 2
    assert "| hotel_reviews | 2 | 50.0 ± 0.0 | 90.0 ± 0.0 | 60.0 ± 0.0 |" in own_tasks.table([row])
