"""The load test of servers: bundles with many tasks, clients that ask them, and the table."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from export.test_bundle import make_run

from benchmarks.serve.load import compared, table, with_tasks
from mp2.engine.bundle import Bundle
from mp2.export import write_bundle


@pytest.mark.slow
def test_all_systems_answer_and_are_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "demo_sentiment", "mini-deep", max_tokens=60)
    write_bundle([run], tmp_path / "one")
    bundle = Bundle.open(with_tasks(tmp_path / "one", tmp_path / "three", ["a", "b", "c"]))  # hashes hold
    assert list(bundle.manifest["tasks"]) == ["a", "b", "c"]
    assert bundle.files["tasks/a.safetensors"] != bundle.files["tasks/b.safetensors"]
    args = argparse.Namespace(clients=4, rounds=1, seconds=0.3, most_processes=2)
    row = compared(tmp_path / "one", tmp_path, 2, args)
    for name in ("mixed", "a task a batch", "a process a task"):
        assert row[name]["requests_per_s"]["median"] > 0
        assert row[name]["p99_ms"]["median"] >= row[name]["p50_ms"]["median"]
        assert row[name]["rows_per_forward"]["median"] >= 1
        assert row[name]["cpu_ms"]["median"] >= 0
    args.most_processes = 1
    more = compared(tmp_path / "one", tmp_path, 3, args)
    assert "| 3 | a process a task | not run | | | | |" in table([{"rows": [row, more]}])
