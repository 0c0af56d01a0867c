"""A clock that jumps: durations do not depend on it, and no run takes another's folder."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from mp2.runs.run_folder import new_folder

ROOT = Path(__file__).parents[1] / "mp2"


def test_two_runs_of_the_same_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")  # put back by an hour, say
    assert len({new_folder(tmp_path, "run") for _ in range(3)}) == 3


def test_nothing_measures_time_by_the_clock_of_the_day() -> None:
    """``time.monotonic`` never jumps; MLflow alone wants the time of day, for its points."""
    daily = re.compile(r"\btime\.time(_ns)?\(|datetime\.(now|utcnow)\(")
    users = [str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py") if daily.search(p.read_text("utf-8"))]
    assert users == ["runs/loggers/mlflow.py"]
