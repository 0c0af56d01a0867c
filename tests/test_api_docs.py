"""docs/api.md: its program, run as it is written; its table, against a result."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text("utf-8")


def test_the_program_of_the_page_runs_in_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MP2_DATA", raising=False)
    program = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    names: dict[str, object] = {}
    exec(compile(program, "docs/api.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "'label': 'negative'" in shown
    assert "router has shape (1, 6, 9), expected (..., 6, 8)" in shown
    (result_file,) = (tmp_path / "runs").glob("*/result.json")
    listed = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|.*?\|", PAGE, re.MULTILINE))))
    assert listed == set(json.loads(result_file.read_text("utf-8")))
