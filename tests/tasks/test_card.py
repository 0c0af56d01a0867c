from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from mp2.errors import FormatError, UnknownNameError, UsageError
from mp2.tasks import AllFaults, Example, card_names, filled_template, list_cards, load_card
from mp2.tasks.card import read_card

# Table 8 of the paper, and the task type it gives
UPSTREAM = {
    "NLI": "afqmc paws cmnli csl bq chip_sts kuake_qqr xnli nlpcc_dbqa finance_zhidao law_zhidao "
    "liantong_zhidao nonghang_zhidao touzi_zhidao baoxian_zhidao dianxin_zhidao",
    "TC": "thucnews chip_ctc finre fudan_tc kuake_qic nlpcc_tc amazon dianping dmsc online_shopping waimai "
    "weibo_sentiment toutiao_tc sanwen",
    "CR": "cluewsc",
    "KE": "cote_dp cote_mfw",
    "MRC": "dureader_checklist dureader_robust cmrc2018",
    "MCQA": "ccpm dogwhistle",
}
TYPE = {"KE": "extraction", "MRC": "extraction", "MCQA": "multiple_choice"}
# Table 2
UNSEEN_DATA = ["amazon", "thucnews", "bq", "cmnli", "cmrc2018", "ccpm", "cote_mfw"]
UNSEEN_TASK = ["chnsent", "tnews", "ocnli", "lcqmc", "drcd", "c3", "cote_bd"]
N_LABELS = {
    "amazon": 5,
    "thucnews": 10,
    "bq": 2,
    "cmnli": 3,
    "chnsent": 2,
    "tnews": 15,
    "ocnli": 3,
    "lcqmc": 2,
    "chip_ctc": 44,
    "finre": 44,
    "fudan_tc": 20,
    "sanwen": 10,
    "iflytek": 119,
}


def test_every_task_of_the_paper_has_a_card_of_its_track_and_type() -> None:
    cards = {card.task: card for card in list_cards()}
    upstream = {task for tasks in UPSTREAM.values() for task in tasks.split()}
    assert len(upstream) == 38
    assert {t for t, c in cards.items() if c.track in ("upstream", "unseen_data")} == upstream
    assert {t for t, c in cards.items() if c.track == "unseen_data"} == set(UNSEEN_DATA)
    assert {t for t, c in cards.items() if c.track == "unseen_task"} == set(UNSEEN_TASK)
    for kind, tasks in UPSTREAM.items():
        for task in tasks.split():
            assert cards[task].type == TYPE.get(kind, "classification"), task


def test_cards_have_the_papers_number_of_labels() -> None:
    assert {task: len(load_card(task).labels) for task in N_LABELS} == N_LABELS


def test_a_card_is_named_like_its_file() -> None:
    assert [card.task for card in list_cards()] == card_names()


def test_label_words_are_short_distinct_chinese() -> None:
    for card in list_cards():
        words = list(card.labels.values())
        assert len(set(words)) == len(words), card.task
        assert all(re.fullmatch(r"[\u4e00-\u9fa5]{1,4}", word) for word in words), (card.task, words)


@pytest.mark.parametrize(
    ("task", "fields", "options", "expected"),
    [
        ("amazon", {"text": "S"}, (), "打分：“S”的评价是？选项：非常差，较差，一般，较好，非常好。"),
        ("chnsent", {"text": "S"}, (), "情感分析：“S”的情感是？选项：负面，正面。"),
        ("cmnli", {"text1": "A", "text2": "B"}, (), "意思判别：“A”与“B”的关系是？选项：矛盾，蕴含，中立。"),
        ("ccpm", {"context": "S"}, tuple("ABCD"), "诗句理解：与句子“S”最相近的诗句是？选项：A，B，C，D。"),
        ("c3", {"context": "A", "question": "B"}, ("C", "D"), "阅读选择：文档：“A”，问题：“B”，选项：C，D。"),
    ],
)
def test_templates_read_as_in_table_7(
    task: str, fields: dict[str, str], options: tuple[str, ...], expected: str
) -> None:
    assert filled_template(load_card(task), Example(fields, None, options)) == expected


def test_tnews_options_start_as_in_table_7() -> None:
    assert list(load_card("tnews").labels.values())[:5] == ["房产", "汽车", "金融", "体育", "文化"]


def test_an_unknown_task_gets_the_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown task 'amzon'. Did you mean 'amazon'.*lists all"):
        load_card("amzon")


def test_a_missing_card_file_is_named() -> None:
    with pytest.raises(UsageError, match=r"no task card some/where\.toml"):
        load_card("some/where.toml")


BAD = [
    ('task = "fruit"\n', "", "task", None, "missing; expected a string"),
    ('task = "fruit"', 'task = "Fruit salad"', "task", 2, "got 'Fruit salad', expected a name like"),
    ('family = "test"', "family = 3", "family", 3, "got 3, expected a string"),
    ('family = "test"', 'family = ""', "family", 3, "empty"),
    (
        'type = "classification"',
        'type = "sorting"',
        "type",
        4,
        "got 'sorting', expected one of classification",
    ),
    ("{text}", "{text!r}", "template", 5, "not a plain field name"),
    ("{text}", "{text", "template", 5, "fields are written"),
    ("{text}", "{}", "template", 5, "not a plain field name"),
    ("{text}", "", "template", 5, "shows no text field"),
    ("{text}", "{text}{text}", "template", 5, r"shows \{text\} 2 times"),
    ("{text}", "{text}{label}", "template", 5, "give the answer away"),
    ("{options}", "", "template", 5, r"does not show \{options\}"),
    ('"accuracy"', '"f1"', "metric", 6, "got 'f1', expected 'accuracy'"),
    ('"extra"', '"side"', "track", 7, "got 'side', expected one of upstream"),
    ("version = 1", "version = 0", "version", 8, "got 0, expected 1 or more"),
    ("version = 1", "version = true", "version", 8, "got True, expected a whole number"),
    ("version = 1", "version = 1\nshots = 8", "shots", 9, "no such key; expected one of task"),
    ("version = 1", "version = 1\nunanswerable = true", "unanswerable", 9, "only an extraction task"),
    ('c = "房"', 'c = "体育"', "labels.c", 13, "the word '体育' is already that of 'a'"),
    ('c = "房"', 'c = " "', "labels.c", 13, "empty word"),
    ('c = "房"', "c = 3", "labels.c", 13, "got 3, expected a string"),
    ('c = "房"', 'c = "房"\n[source]\nurl = "x"', "source.url", 15, "no such key; expected one of hub"),
    ('c = "房"', 'c = "房"\n[source]\nconfig = "x"', "source.config", 15, "is of a hub data set, and none"),
    (
        'c = "房"',
        'c = "房"\n[source]\nhub = "x"\n[source.labels]\n0 = "z"',
        "source.labels.0",
        17,
        "unknown label 'z'; known: a, b, c",
    ),
    (
        'c = "房"',
        'c = "房"\n[source]\nhub = "x"\nsplits = {val = "v"}',
        "source.splits.val",
        16,
        "no such split",
    ),
]


@pytest.mark.parametrize(("old", "new", "field", "line", "message"), BAD)
def test_a_bad_card_names_file_line_field_and_expectation(
    tmp_path: Path, card_toml: dict[str, str], old: str, new: str, field: str, line: int | None, message: str
) -> None:
    path = tmp_path / "my.toml"
    text = card_toml["classification"]
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    where = re.escape(str(path)) + (f":{line}" if line else "")
    with pytest.raises(FormatError, match=f"^{where}: field '{re.escape(field)}': .*{message}"):
        load_card(path)


@pytest.mark.parametrize(
    ("kind", "old", "new", "message"),
    [
        ("extraction", "{context}", "{text}", r"does not show \{context\}"),
        ("extraction", "{question}", "{options}", "which an extraction task does not have"),
        ("extraction", '"f1"', '"accuracy"', "expected 'f1'"),
        (
            "extraction",
            "version = 1",
            'version = 1\n[labels]\na = "一"\nb = "二"',
            "extraction task has no labels",
        ),
        ("multiple_choice", "version = 1", "version = 1\nshots_per_label = 3", "has no shots_per_label"),
        ("classification", '[labels]\na = "体育"\nb = "财经"\nc = "房"', "", "expected a table of raw label"),
        ("classification", 'b = "财经"\nc = "房"', "", "has 1 labels, expected at least 2"),
    ],
)
def test_a_card_must_fit_its_type(
    tmp_path: Path, card_toml: dict[str, str], kind: str, old: str, new: str, message: str
) -> None:
    path = tmp_path / "my.toml"
    assert old in card_toml[kind]
    path.write_text(card_toml[kind].replace(old, new), encoding="utf-8")
    with pytest.raises(FormatError, match=message):
        load_card(path)


def test_broken_toml_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text('task = "x"\nfamily = \n', encoding="utf-8")
    with pytest.raises(FormatError, match=r"my\.toml:2: not TOML"):
        load_card(path)


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000 + "]" * 5000])
def test_toml_that_python_cannot_take_is_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "my.toml"
    path.write_text(f"version = {value}\n", encoding="utf-8")
    with pytest.raises(FormatError, match=r"my\.toml: not TOML that can be read"):
        load_card(path)


def test_a_card_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes('task = "水果"'.encode("gb18030"))
    with pytest.raises(FormatError, match="not UTF-8"):
        load_card(path)


def test_checking_reports_every_fault_of_a_card(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(
        'task = 3\ntype = "classification"\ntemplate = "{a}"\nmetric = "f1"\nodd = 1\n', encoding="utf-8"
    )
    faults = AllFaults()
    assert read_card(path, faults) is None
    found = Counter(fault.field for fault in faults.found)
    assert found == Counter(["odd", "task", "family", "track", "version", "metric", "labels", "template"])


def test_a_users_card_is_loaded_by_path(tmp_path: Path, card_toml: dict[str, str]) -> None:
    path = tmp_path / "fruit.toml"
    path.write_text(card_toml["classification"], encoding="utf-8")
    card = load_card(str(path))
    assert (card.task, card.fields, card.path) == ("fruit", ("text",), path)
    assert card.labels == {"a": "体育", "b": "财经", "c": "房"}
    assert card.gold_keys == ("label",)
