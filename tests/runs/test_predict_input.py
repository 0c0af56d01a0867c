"""What `mp2 predict` takes: every format that training takes; an output line for each line, columns kept."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from command_line import mp2, mp2_json
from tuning_world import World

ONE = ("--iters", "1", "--router-search", "none", "--no-test", "--no-baselines")


@pytest.fixture(scope="module")
def runs(world: World) -> dict[str, Path]:
    cards = {"mood": world.card, "find": world.question_card, "pick": world.choice_card}
    made = {name: mp2_json("bbt", *world.options(card=card), *ONE) for name, card in cards.items()}
    return {name: Path(result["run_dir"]) for name, result in made.items()}


def printed(run: Path, source: Path, *more: str) -> str:
    done = mp2("predict", "--run", run, "--input", source, *more)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_tables_keep_blank_rows_and_may_have_one_column(runs: dict[str, Path], tmp_path: Path) -> None:
    for suffix in (".csv", ".tsv"):
        path = tmp_path / f"one{suffix}"
        path.write_text("text\n好\n\n不好\n\n", "utf-8")
        rows = list(csv.DictReader(printed(runs["mood"], path).splitlines()))
        assert [row["text"] for row in rows] == ["好", "", "不好", ""]
        assert [row["reason"] for row in rows] == ["", "empty line", "", "empty line"]
        assert [bool(row["label"]) for row in rows] == [True, False, True, False]


@pytest.mark.parametrize("begin", ["", "\ufeff"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_comes_out_as_it_came_in(
    runs: dict[str, Path], tmp_path: Path, begin: str, separator: str
) -> None:
    path = tmp_path / "new.csv"
    path.write_text(f"{begin}no{separator}text\r\n1{separator}好\r\n", "utf-8")
    text = printed(runs["mood"], path)
    assert text.startswith(f"{begin}no{separator}text{separator}label{separator}probability{separator}")
    (row,) = csv.DictReader(text.removeprefix(begin).splitlines(), delimiter=separator)
    assert (row["no"], row["text"], row["label"] in ("pos", "neg")) == ("1", "好", True)


def test_columns_of_the_input_that_are_called_like_ours_are_kept_under_another_name(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "labelled.csv"
    path.write_text("text,label,probability\n好,neg,9\n", "utf-8")
    (row,) = csv.DictReader(printed(runs["mood"], path).splitlines())
    assert (row["input_label"], row["input_probability"]) == ("neg", "9")
    assert row["label"] in ("pos", "neg")
    assert 0 <= float(row["probability"]) <= 1


def test_labels_of_the_input_are_no_matter_to_what_is_found(runs: dict[str, Path], tmp_path: Path) -> None:
    """A test file often has the column, empty, or with labels of its own."""
    path = tmp_path / "labelled.csv"
    path.write_text("text,label\n好,\n不好,unknown\n", "utf-8")
    rows = list(csv.DictReader(printed(runs["mood"], path).splitlines()))
    assert [row["input_label"] for row in rows] == ["", "unknown"]
    assert all(row["label"] in ("pos", "neg") for row in rows)
    given = {"question": "谁", "context": "天气很好"}
    lines = tmp_path / "answers.jsonl"
    lines.write_text("".join(json.dumps(given | more) + "\n" for more in ({"answers": 3}, {})), "utf-8")
    with_answers, without = printed(runs["find"], lines).splitlines()
    assert with_answers == without
    options = {"context": "天气", "question": "谁", "options": ["一", "二"]}
    lines.write_text("".join(json.dumps(options | more) + "\n" for more in ({"label": 7}, {})), "utf-8")
    with_label, without = printed(runs["pick"], lines).splitlines()
    assert with_label == without


def test_a_run_without_dev_and_test_says_that_nothing_says_how_good_it_is(
    world: World, tmp_path: Path
) -> None:
    words = ("--iters", "1", "--router-search", "none", "--no-test", "--dev", "none")
    done = mp2("bbt", *world.options(), *words, "--out", tmp_path / "my runs")
    assert done.exit_code == 0, done.stderr
    assert "no dev and no test examples: nothing here says how good it is" in done.stdout
    assert "majority class" not in done.stdout
    (run,) = (tmp_path / "my runs").iterdir()
    assert json.loads((run / "result.json").read_text("utf-8"))["baselines"] is None
    assert done.stdout.endswith(f"mp2 predict --run '{run}' --input FILE\n")


def test_a_json_array_is_read_like_lines(runs: dict[str, Path], tmp_path: Path) -> None:
    records = [{"text": "好", "id": 1}, {"text": "", "id": 2}, {"text": "不好", "id": 3}]
    array, lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    array.write_text(json.dumps(records, indent=1), "utf-8")
    lines.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    found = printed(runs["mood"], array, "--keep", "id")
    assert found == printed(runs["mood"], lines, "--keep", "id")
    assert [json.loads(line)["id"] for line in found.splitlines()] == [1, 2, 3]


def test_a_table_may_end_in_capitals_and_a_workbook_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    table = tmp_path / "A.CSV"
    table.write_text("text,nr\n好,1\n", encoding="utf-8")
    done = mp2("predict", "--run", runs["mood"], "--input", table)
    assert (done.exit_code, done.stdout.splitlines()[0]) == (0, "text,nr,label,probability,reason")
    book = table.rename(tmp_path / "a.xlsx")
    done = mp2("predict", "--run", runs["mood"], "--input", book)
    assert (done.exit_code, f"--input {book} is a workbook" in done.stderr) == (2, True)


def test_parquet_is_read(runs: dict[str, Path], tmp_path: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": ["好", "不好"]}), path)
    assert len(printed(runs["mood"], path).splitlines()) == 2


def test_fields_have_their_names_in_the_input(runs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("content,id\n好,1\n", "utf-8")
    done = mp2("predict", "--run", runs["mood"], "--input", path)
    assert done.exit_code == 2
    assert "--field text=NAME gives its name there" in done.stderr
    (row,) = csv.DictReader(printed(runs["mood"], path, "--field", "text=content").splitlines())
    assert row["content"] == "好"
    assert row["label"] in ("pos", "neg")


def test_a_column_that_is_not_there_cannot_be_kept(runs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "好", "id": 1}\n{"text": "好"}\n', "utf-8")
    done = mp2("predict", "--run", runs["mood"], "--input", path, "--keep", "idd")
    assert done.exit_code == 2
    assert "a.jsonl:1: has no 'idd' to keep, only ['text', 'id']" in done.stderr
    assert [json.loads(line)["id"] for line in printed(runs["mood"], path, "--keep", "id").splitlines()] == [
        1,
        None,
    ]


def test_multiple_choice_in_csv_has_its_option_in_every_row(
    world: World, runs: dict[str, Path], tmp_path: Path
) -> None:
    lines = (world.data / "pick" / "test.jsonl").read_text("utf-8").splitlines()
    examples: list[dict[str, Any]] = [json.loads(line) for line in lines[:2]]
    path = tmp_path / "pick.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["context", "question", "a", "b", "id"])
        writer.writerow([""] * 5)
        for i, example in enumerate(examples):
            writer.writerow([example["context"], example["question"], *example["options"][:2], i])
    found = printed(runs["pick"], path, "--field", "options=a,b")
    rows = list(csv.DictReader(found.splitlines()))
    assert [row["id"] for row in rows] == ["", "0", "1"]
    assert rows[0]["reason"] == "empty line"
    for row in rows[1:]:
        assert row["option"] == (row["a"], row["b"])[int(row["label"])]


def test_long_texts_of_extraction_are_one_line_each_whatever_windows_they_take(
    world: World, runs: dict[str, Path], tmp_path: Path
) -> None:
    lines = (world.data / "find" / "test.jsonl").read_text("utf-8").splitlines()
    examples: list[dict[str, Any]] = [json.loads(line) for line in lines[:3]]
    examples[1]["context"] = examples[1]["context"] * 40  # 96 tokens a window
    path = tmp_path / "long.jsonl"
    rows = [
        {"context": example["context"], "question": example["question"], "id": i}
        for i, example in enumerate(examples)
    ]
    rows.insert(2, {"context": "", "question": "", "id": 9})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    found = [json.loads(line) for line in printed(runs["find"], path, "--keep", "id").splitlines()]
    assert [line["id"] for line in found] == [0, 1, 9, 2]
    assert found[2] == {"id": 9, "answer": None, "probability": None, "reason": "context is empty"}
    for line, row in zip(found, rows, strict=True):
        if line["answer"] is not None:
            assert line["answer"]
            assert line["answer"] in row["context"]
