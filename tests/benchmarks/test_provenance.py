from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.provenance import SOURCE_SHA256, provenance, source_hash


def test_code_is_named_by_its_python_and_c_files_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "native").mkdir()
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "native" / "k.c").write_text("int k;\n")
    first = source_hash(tmp_path)
    (tmp_path / "a.pyc").write_text("compiled")
    (tmp_path / "weights.json").write_text("{}")
    assert source_hash(tmp_path) == first
    (tmp_path / "native" / "k.c").write_text("int j;\n")
    changed = source_hash(tmp_path)
    (tmp_path / "native" / "k.c").rename(tmp_path / "k.c")
    assert len({first, changed, source_hash(tmp_path)}) == 3


def test_a_run_without_git_is_still_identified(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = provenance()
    assert (found["commit"], found["dirty"]) == ("", None)
    assert found["source_sha256"] == SOURCE_SHA256
    assert len(SOURCE_SHA256) == 12
