from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mp2.backbone.tokenizer import Tokenizer
from mp2.cli import main
from mp2.tasks import card_names
from mp2.tasks.show import token_percentiles


@pytest.fixture
def folder(tmp_path: Path, write_jsonl: Callable[..., Path]) -> Path:
    lines: list[Any] = [{"text": "今" * n, "label": "1"} for n in range(1, 101)]
    write_jsonl(tmp_path / "chnsent" / "train.jsonl", lines)
    return tmp_path


@pytest.fixture
def backbone(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A folder with a vocabulary: weights are not needed to count tokens."""
    folder = tmp_path / "some-backbone"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(tokenizer.tokens()) + "\n", encoding="utf-8")
    return folder


def run(*args: str) -> str:
    done = CliRunner().invoke(main, ["tasks", *args])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_list_has_every_card() -> None:
    lines = run().splitlines()
    assert lines[0].split() == ["task", "type", "family", "labels", "track"]
    assert [line.split()[0] for line in lines[1:-1]] == card_names()
    rows = json.loads(run("--json"))
    assert [row["task"] for row in rows] == card_names()
    assert {"task": "tnews", "type": "classification", "family": "topic classification", "labels": 15,
            "track": "unseen_task"} in rows  # fmt: skip


def test_show_writes_the_first_example_out_and_counts_tokens(folder: Path, backbone: Path) -> None:
    args = ("show", "chnsent", "--data", str(folder), "--backbone", str(backbone))
    text = run(*args)
    assert "情感分析：“今”的情感是？选项：负面，正面。" in text
    view = json.loads(run(*args, "--json"))
    assert view["gold"] == "正面"
    assert view["template_tokens"] == len("情感分析：“”的情感是？选项：负面，正面。") + 2
    assert view["token_percentiles"]["100 %"] == view["template_tokens"] + 100
    assert view["n_measured"] == 100


def test_show_without_data_has_placeholders_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MP2_DATA", raising=False)
    text = run("show", "c3")
    assert "文档：“〈context〉”，问题：“〈question〉”，选项：〈options[0]〉，〈options[1]〉。" in text
    assert "no local data; --data DIR" in text


def test_show_names_a_data_folder_that_does_not_have_the_task(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["tasks", "show", "tnews", "--data", str(tmp_path)])
    assert done.exit_code == 2
    assert "has no folder 'tnews'" in done.output


def test_percentiles_are_lengths_that_occur() -> None:
    assert token_percentiles([5, 1, 9]) == {"50 %": 5, "90 %": 9, "99 %": 9, "100 %": 9}
    assert token_percentiles([]) == {}
