from __future__ import annotations

from typing import Any

from benchmarks.paper.cell_code import code_line, codes, made_by, mixed

OLD = {"commit": "aaa", "dirty": False, "time": "1", "command": "x", "sgemm_gflops": 80.0}
SNAPSHOT = {"commit": "", "dirty": None, "source_sha256": "5555", "time": "2", "command": "y"}


def cells(method: str, *where_from: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"method": method, "provenance": found} for found in where_from]


def test_every_methods_cells_are_counted_by_the_code_that_made_them() -> None:
    made = cells("deep", OLD, SNAPSHOT, {**OLD, "time": "0"}) + cells("bbt", {"commit": "", "dirty": False})
    assert made_by(made) == {"deep": {"aaa": 2, "no commit, source 5555": 1}, "bbt": {"unknown code": 1}}
    assert codes(made)["aaa"] == {
        "cells": 2,
        "commit": ["aaa"],
        "dirty": [False],
        "time": ["0", "1"],
        "command": ["x"],
    }


def test_code_differs_by_its_sources_and_by_commits_only_where_those_are_unknown() -> None:
    committed = {**SNAPSHOT, "commit": "bbb", "dirty": True}
    assert mixed(cells("deep", SNAPSHOT, committed)) == []
    assert mixed(cells("deep", SNAPSHOT, {**SNAPSHOT, "source_sha256": "6666"})) == ["deep"]
    assert mixed(cells("deep", OLD, OLD)) == []
    assert mixed(cells("deep", OLD, {**OLD, "dirty": True})) == ["deep"]
    assert mixed(cells("deep", OLD) + cells("bbt", {**OLD, "commit": "ccc"})) == []
    assert mixed(cells("bbt", OLD) + cells("deep", OLD, SNAPSHOT)) == ["deep"]


def test_the_tables_line_hides_no_difference() -> None:
    made = cells("deep", OLD, OLD) + cells("bbt", OLD, OLD)
    assert code_line(made) == "Code of the cells: deep, bbt: aaa (2 cells each)."
    line = code_line(made + cells("shallow", OLD, {**OLD, "commit": "ccc", "dirty": True}))
    assert line == (
        "Code of the cells: deep, bbt: aaa (2 cells each); shallow: aaa (1 cells) + "
        "ccc with changes (1 cells); NOT the same code within shallow."
    )
