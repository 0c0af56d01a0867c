from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mp2.errors import FormatError, UnknownNameError, UsageError
from mp2.tasks import AllFaults, Answer, Example, TaskCard, load_card, load_examples, read_examples
from mp2.tasks.place import DEMO_DIR
from mp2.tasks.record import Columns, RecordParser, mapped
from mp2.tasks.record_files import json_lines

MakeCard = Callable[..., TaskCard]
GOOD: dict[str, dict[str, Any]] = {
    "classification": {"text": "今天", "label": "a"},
    "extraction": {"context": "今天天气很好", "question": "哪天", "answers": [{"text": "天气", "start": 2}]},
    "multiple_choice": {"context": "", "question": "", "options": ["一", "二", "三"], "label": 2},
}


def parse_lines(
    card: TaskCard, lines: list[str], path: str, faults: AllFaults, *, labelled: bool = True
) -> list[Example]:
    """As training reads lines, or (``labelled=False``) as `mp2 predict` does."""
    records = mapped(Columns(card), json_lines(lines, path, faults))
    found = [RecordParser(card, path, line, faults, labelled).example(record) for line, record in records]
    return [example for example in found if example is not None]


@pytest.fixture
def folder(tmp_path: Path, write_jsonl: Callable[..., Path]) -> Callable[..., Path]:
    def write(card: TaskCard, *lines: Any, split: str = "train") -> Path:
        return write_jsonl(tmp_path / card.task / f"{split}.jsonl", lines)

    return write


def test_good_lines_of_every_type_are_read(
    make_card: MakeCard, folder: Callable[..., Path], tmp_path: Path
) -> None:
    for kind, record in GOOD.items():
        card = make_card(kind)
        folder(card, record, "", {**record, "extra": [1]})
        first, second = load_examples(card, "train", tmp_path)
        assert (first.source_line, second.source_line) == (1, 3)
        assert first.fields == {k: record[k] for k in card.fields}
    assert first.options == ("一", "二", "三")
    assert first.label == 2
    (example,) = load_examples(make_card("extraction"), "train", tmp_path, limit=1)
    assert example.answers == (Answer("天气", 2),)


BAD: list[tuple[str, Any, str | None, str]] = [
    ("classification", "{", None, "not JSON: .* expected one object a line"),
    (
        "classification",
        '{"text": %s}' % ("9" * 5000),
        None,
        "not JSON that can be read: a number has too many digits",
    ),
    ("classification", [1, 2], None, r'got \[1, 2\], expected an object like {"text": ..., "label": ...}'),
    (
        "classification",
        {"label": "a"},
        "text",
        r"missing; the card's template shows {text}, the line has \['label'\]",
    ),
    ("classification", {"text": 3, "label": "a"}, "text", "got 3, expected a string"),
    ("classification", {"text": " ", "label": "a"}, "text", "empty"),
    ("classification", '{"text": "\\ud800", "label": "a"}', "text", "surrogate"),
    ("classification", {"text": "x"}, "label", "missing; expected one of a, b, c"),
    ("classification", {"text": "x", "label": "d"}, "label", "unknown label 'd'; the card knows a, b, c"),
    ("classification", {"text": "x", "label": 0}, "label", "unknown label '0'; the card knows a, b, c"),
    ("classification", {"text": "x", "label": [0]}, "label", r"got \[0\], expected one of a, b, c"),
    ("extraction", {"context": "天气", "question": "?", "answers": 3}, "answers", "expected a list of"),
    ("extraction", {"context": "", "question": "?", "answers": []}, "context", "empty"),
    (
        "extraction",
        {"context": "天", "question": "?", "answers": []},
        "answers",
        "the card needs 'unanswerable",
    ),
    (
        "extraction",
        {"context": "天", "question": "?", "answers": ["地"]},
        "answers",
        "answer 0: '地' does not occur",
    ),
    ("extraction", {"context": "天", "question": "?", "answers": [3]}, "answers", "answer 0: got 3"),
    (
        "extraction",
        {"context": "今天", "question": "?", "answers": [{"text": "天", "start": 0}]},
        "answers",
        "answer 0: context has '今' at 0, expected '天'; it first stands at 1",
    ),
    (
        "extraction",
        {"context": "今天", "question": "?", "answers": [{"text": "地", "start": 9}]},
        "answers",
        "context has nothing at 9, expected '地'; it does not occur",
    ),
    (
        "extraction",
        {"context": "今天", "question": "?", "answers": [{"text": "天", "start": -1}]},
        "answers",
        "context has nothing at -1",
    ),
    (
        "extraction",
        {"context": "天", "question": "?", "answers": [{"text": "", "start": 0}]},
        "answers",
        "empty",
    ),
    ("multiple_choice", {"context": "", "question": "", "label": 0}, "options", "expected a list of strings"),
    ("multiple_choice", {**GOOD["multiple_choice"], "options": ["一"]}, "options", "has 1 options"),
    (
        "multiple_choice",
        {**GOOD["multiple_choice"], "options": ["一", "", "二"]},
        "options",
        "option 1 is empty",
    ),
    (
        "multiple_choice",
        {**GOOD["multiple_choice"], "options": ["一", "一", "二"]},
        "options",
        "option 1 repeats",
    ),
    ("multiple_choice", {**GOOD["multiple_choice"], "label": 3}, "label", "got 3, expected 0 to 2"),
    ("multiple_choice", {**GOOD["multiple_choice"], "label": "3"}, "label", "got 3, expected 0 to 2"),
    ("multiple_choice", {**GOOD["multiple_choice"], "label": "四"}, "label", "its index from 0, its letter"),
    ("multiple_choice", {**GOOD["multiple_choice"], "label": True}, "label", "its index from 0, its letter"),
    (
        "multiple_choice",
        {**GOOD["multiple_choice"], "options": ["1", "0"], "label": "1"},
        "label",
        "'1' is both an index and the text of option 0; write its letter",
    ),
]


@pytest.mark.parametrize(("kind", "bad", "field", "message"), BAD)
def test_a_bad_line_names_file_line_field_and_expectation(
    make_card: MakeCard,
    folder: Callable[..., Path],
    tmp_path: Path,
    kind: str,
    bad: Any,
    field: str | None,
    message: str,
) -> None:
    card = make_card(kind)
    path = folder(card, GOOD[kind], bad)
    named = f"field '{field}': .*" if field else ""
    with pytest.raises(FormatError, match=f"^{re.escape(str(path))}:2: {named}{message}"):
        load_examples(card, "train", tmp_path)


@pytest.mark.parametrize(
    ("label", "raw"), [(1, "1"), (1.0, "1"), ("1", "1"), (" 1 ", "1"), (True, "true"), ("True", "true")]
)
def test_whole_numbers_and_truth_values_are_labels(make_card: MakeCard, label: object, raw: str) -> None:
    card = make_card("classification", ('a = "体育"', '1 = "体育"'), ('b = "财经"', 'true = "财经"'))
    (example,) = parse_lines(card, [json.dumps({"text": "x", "label": label})], "f", AllFaults())
    assert example.label == raw


@pytest.mark.parametrize("label", [1, "1", "B", "二"])
def test_the_right_option_is_an_index_a_letter_or_its_text(make_card: MakeCard, label: object) -> None:
    line = json.dumps({**GOOD["multiple_choice"], "label": label})
    (example,) = parse_lines(make_card("multiple_choice"), [line], "f", AllFaults())
    assert example.label == 1


def test_an_answer_without_a_start_is_where_the_context_has_it_first(make_card: MakeCard) -> None:
    for answers in (
        "天气",
        ["天气"],
        '[{"text": "天气", "start": 2}]',
        {"text": ["天气"], "answer_start": [2]},
    ):
        line = json.dumps({**GOOD["extraction"], "answers": answers})
        (example,) = parse_lines(make_card("extraction"), [line], "f", AllFaults())
        assert example.answers == (Answer("天气", 2),)


def test_collecting_keeps_the_good_lines_and_every_fault(
    make_card: MakeCard, folder: Callable[..., Path]
) -> None:
    card = make_card("classification")
    path = folder(card, "{", GOOD["classification"], {"label": "z"}, {"text": "", "label": "a"})
    faults = AllFaults()
    examples = list(read_examples(card, path, faults))
    assert [e.source_line for e in examples] == [2]
    assert [(p.line, p.field) for p in faults.found] == [(1, None), (3, "text"), (3, "label"), (4, "text")]


def test_bytes_that_are_not_utf8_are_a_fault_of_their_line(make_card: MakeCard, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "x", "label": "a"}\n{"text": "\xff"}\n')
    faults = AllFaults()
    assert len(list(read_examples(make_card("classification"), path, faults))) == 1
    assert [p.line for p in faults.found] == [2]
    assert "not UTF-8" in faults.found[0].message


def test_unicode_line_separators_and_a_byte_order_mark_do_not_break_lines(
    make_card: MakeCard, tmp_path: Path
) -> None:
    path = tmp_path / "x.jsonl"
    line = json.dumps({"text": "一\u2028二\x85三", "label": "a"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n{line}\n".encode())
    examples = list(read_examples(make_card("classification"), path, AllFaults()))
    assert [e.fields["text"] for e in examples] == ["一\u2028二\x85三"] * 2


def test_unlabelled_lines_can_be_read_for_prediction(make_card: MakeCard) -> None:
    for kind, record in GOOD.items():
        bare = {k: v for k, v in record.items() if k not in ("label", "answers")}
        faults = AllFaults()
        (example,) = parse_lines(make_card(kind), [json.dumps(bare)], "-", faults, labelled=False)
        assert example.label is None
        assert not faults.found


def test_unanswerable_questions_need_the_cards_leave(make_card: MakeCard) -> None:
    card = make_card("extraction", ("version = 1", "version = 1\nunanswerable = true"))
    line = json.dumps({"context": "天", "question": "?", "answers": []})
    (example,) = parse_lines(card, [line], "-", AllFaults())
    assert example.answers == ()


def test_limit_reads_no_further(make_card: MakeCard, folder: Callable[..., Path], tmp_path: Path) -> None:
    card = make_card("classification")
    folder(card, GOOD["classification"], "{")
    assert len(load_examples(card, "train", tmp_path, limit=1)) == 1


def test_the_data_folder_can_come_from_the_environment(
    make_card: MakeCard, folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = make_card("classification")
    folder(card, GOOD["classification"])
    monkeypatch.setenv("MP2_DATA", str(tmp_path))
    assert len(load_examples(card, "train")) == 1


def test_missing_folders_and_splits_say_what_is_there(
    make_card: MakeCard, folder: Callable[..., Path], tmp_path: Path
) -> None:
    card = make_card("classification")
    folder(card, GOOD["classification"])
    with pytest.raises(UsageError, match=r"has no test\.jsonl \(.*\); .*fruit has train\.jsonl"):
        load_examples(card, "test", tmp_path)
    (tmp_path / "deep" / "fruit").mkdir(parents=True)
    (tmp_path / "fruit").rename(tmp_path / "deep" / "other")
    with pytest.raises(UsageError, match=rf"did you mean --data {re.escape(str(tmp_path / 'deep'))}\?"):
        load_examples(card, "train", tmp_path)
    with pytest.raises(UsageError, match=r"has no folder 'tnews'.*its folders: 'deep'"):
        load_examples(load_card("tnews"), "train", tmp_path)
    with pytest.raises(UsageError, match="there is no file or folder /no/such"):
        load_examples(card, "train", "/no/such")
    with pytest.raises(UnknownNameError, match="unknown split 'tset'"):
        load_examples(card, "tset", tmp_path)


def test_an_empty_file_is_an_error(make_card: MakeCard, folder: Callable[..., Path], tmp_path: Path) -> None:
    card = make_card("classification")
    folder(card)
    with pytest.raises(UsageError, match="train data of task 'fruit' is empty"):
        load_examples(card, "train", tmp_path)


@pytest.mark.skipif(not DEMO_DIR.is_dir(), reason="the demo data is not written yet")
@pytest.mark.parametrize("task", ["demo_sentiment", "demo_topic"])
def test_demo_tasks_are_embedded(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MP2_DATA", raising=False)
    card = load_card(task)
    for split in ("train", "dev", "test"):
        labels = {e.label for e in load_examples(card, split)}
        assert labels == set(card.labels)
    assert load_examples(card, "train", tmp_path) == load_examples(card, "train")
