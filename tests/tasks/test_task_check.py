from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mp2.cli import main
from mp2.tasks import check_task

Write = Callable[[Path, Any], Path]


@pytest.fixture
def user(tmp_path: Path, card_toml: dict[str, str], write_jsonl: Write) -> Path:
    """A user's card and good data; returns the folder that has both."""
    (tmp_path / "fruit.toml").write_text(card_toml["classification"], encoding="utf-8")
    lines = [{"text": f"今天{i}", "label": "abc"[i % 3]} for i in range(90)]
    write_jsonl(tmp_path / "fruit" / "train.jsonl", lines)
    write_jsonl(tmp_path / "fruit" / "test.jsonl", lines[:3])
    return tmp_path


def test_a_good_task_is_ok_and_summed_up(user: Path) -> None:
    report = check_task(str(user / "fruit.toml"), user)
    assert report.ok
    assert report.n_examples == {"train": 90, "test": 3}
    assert report.n_by_label["train"] == {"a": 30, "b": 30, "c": 30}
    assert report.remarks == ("3 of the test examples are also in train",)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_a_folder_in_a_files_place_is_called_that(user: Path, split: str) -> None:
    path = user / "fruit" / f"{split}.jsonl"
    path.unlink(missing_ok=True)
    path.mkdir()
    (problem,) = check_task(str(user / "fruit.toml"), user).problems
    assert str(problem) == f"{path}: is a folder, expected a file of JSON lines"


def test_every_problem_is_reported_with_its_line(user: Path, write_jsonl: Write) -> None:
    bad = [{"text": "x", "label": "z"}, "{", {"label": "a"}, {"text": "x", "label": "a"}]
    path = write_jsonl(user / "fruit" / "train.jsonl", bad)
    (user / "fruit" / "test.jsonl").unlink()
    write_jsonl(user / "fruit" / "dev.jsonl", [])
    report = check_task(str(user / "fruit.toml"), user)
    assert [(Path(p.path).name, p.line, p.field) for p in report.problems] == [
        (path.name, 1, "label"),
        (path.name, 2, None),
        (path.name, 3, "text"),
        ("dev.jsonl", None, None),
    ]
    assert report.n_examples == {"train": 1, "dev": 0}


def test_without_test_examples_a_task_is_ok_with_a_note(user: Path) -> None:
    (user / "fruit" / "test.jsonl").unlink()
    report = check_task(str(user / "fruit.toml"), user)
    assert report.ok
    (remark,) = report.remarks
    assert "test.jsonl; tune with --no-test" in remark
    (user / "fruit" / "train.jsonl").unlink()
    (problem,) = check_task(str(user / "fruit.toml"), user).problems
    assert Path(problem.path).name == "train.jsonl"


def test_the_command_exits_0_or_2_and_prints_the_report(user: Path, write_jsonl: Write) -> None:
    card = str(user / "fruit.toml")
    done = CliRunner().invoke(main, ["tasks", "check", card, "--data", str(user)])
    assert (done.exit_code, done.output.splitlines()[-1]) == (0, "no problems")
    path = write_jsonl(user / "fruit" / "test.jsonl", [{"text": "", "label": "q"}])
    done = CliRunner().invoke(main, ["tasks", "check", card, "--data", str(user)])
    assert done.exit_code == 2
    assert f"{path}:1: field 'text': empty" in done.output
    assert f"{path}:1: field 'label': unknown label 'q'; the card knows a, b, c" in done.output
    assert done.output.splitlines()[-1] == "2 problems"
    done = CliRunner().invoke(main, ["tasks", "check", card, "--data", str(user), "--json"])
    assert done.exit_code == 2
    assert [p["field"] for p in json.loads(done.output)["problems"]] == ["text", "label"]


def test_a_bad_card_is_reported_whole_before_its_data(user: Path) -> None:
    path = user / "fruit.toml"
    path.write_text('task = "fruit"\ntype = "sorting"\n', encoding="utf-8")
    done = CliRunner().invoke(main, ["tasks", "check", str(path), "--data", str(user)])
    assert done.exit_code == 2
    assert f"{path}:2: field 'type': got 'sorting'" in done.output
    assert "the data is checked once the card is right" in done.output
    assert done.output.splitlines()[-1] == "6 problems"


def test_too_few_examples_for_few_shots_are_a_remark(user: Path, write_jsonl: Write) -> None:
    write_jsonl(user / "fruit" / "train.jsonl", [{"text": f"好{i}", "label": "abc"[i % 3]} for i in range(9)])
    report = check_task(str(user / "fruit.toml"), user)
    assert report.ok
    assert any("too few examples a label" in remark for remark in report.remarks)


def test_without_data_only_the_card_is_checked(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MP2_DATA", raising=False)
    report = check_task(str(user / "fruit.toml"))
    assert report.ok
    assert report.remarks == ("no data was checked; --data DIR (or MP2_DATA) names it",)


def test_every_card_of_the_package_is_fine() -> None:
    from mp2.tasks import card_names
    from mp2.tasks.card import CARDS_DIR, read_card
    from mp2.tasks.problems import AllProblems

    for name in card_names():
        problems = AllProblems()
        assert read_card(CARDS_DIR / f"{name}.toml", problems), problems.found


def test_an_unknown_card_exits_2_with_the_nearest_name() -> None:
    done = CliRunner().invoke(main, ["tasks", "check", "tnew"])
    assert done.exit_code == 2
    assert "Did you mean 'tnews'" in done.output
