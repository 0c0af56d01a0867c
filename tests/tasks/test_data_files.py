"""Data as people have it: formats, encodings, names of columns, where it lies."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mp2.errors import FormatError, MissingDependencyError, UsageError
from mp2.tasks import AllFaults, Answer, TaskCard, load_card, load_examples
from mp2.tasks.encodings import looks_like
from mp2.tasks.place import DataSet, Files, find_place, tasks_in
from mp2.tasks.record import parse_fields
from mp2.tasks.record_files import csv_separator, read_records
from tests.command_line import mp2

MakeCard = Callable[..., TaskCard]

ROWS = [("今天天气很好", "a"), ("我们，“去”看电影", "b"), ("吃饭", "c")]
TEXTS = [text for text, _ in ROWS]


def file_of(folder: Path, name: str, encoding: str = "utf-8") -> Path:
    """ROWS in the format that the name ends in, with columns text and label."""
    path = folder / name
    records = [{"text": text, "label": label} for text, label in ROWS]
    if path.suffix == ".json":
        text = json.dumps(records, ensure_ascii=False, indent=1)
    elif path.suffix == ".jsonl":
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    elif path.suffix == ".csv":
        text = "text,label\r\n" + "".join(f'"{text}",{label}\r\n' for text, label in ROWS)
    else:
        text = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_every_format_is_read_with_and_without_a_byte_order_mark(
    make_card: MakeCard, tmp_path: Path, suffix: str, encoding: str
) -> None:
    file_of(tmp_path, f"fruit/train{suffix}", encoding)
    examples = load_examples(make_card("classification"), "train", tmp_path)
    assert [(e.fields["text"], e.label) for e in examples] == ROWS


NUMBERED = [(f'\n{label} = "', f'\n{i} = "') for i, label in enumerate("abc")]  # labels 0, 1, 2


def test_parquet_is_read_where_its_library_is(make_card: MakeCard, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "fruit").mkdir()
    columns = {"text": TEXTS, "label": [0, 1, 2]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "fruit" / "train.parquet")
    card = make_card("classification", *NUMBERED)
    assert [e.label for e in load_examples(card, "train", tmp_path)] == ["0", "1", "2"]


def test_without_its_library_parquet_names_what_to_install(
    make_card: MakeCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "fruit").mkdir()
    (tmp_path / "fruit" / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingDependencyError, match=r"parquet needs pyarrow; pip install 'mp2\[hub\]'"):
        load_examples(make_card("classification"), "train", tmp_path)


def test_cells_keep_quotes_commas_and_line_breaks(make_card: MakeCard, tmp_path: Path) -> None:
    path = tmp_path / "fruit" / "train.csv"
    path.parent.mkdir()
    path.write_text('label,text\na,"一,二""三""\n四"\n\nb,五\u2028六\n', encoding="utf-8")
    examples = load_examples(make_card("classification"), "train", tmp_path)
    assert [e.fields["text"] for e in examples] == ['一,二"三"\n四', "五\u2028六"]
    tsv = tmp_path / "t.tsv"
    tsv.write_text('text\tlabel\n他说"好\ta\n', encoding="utf-8")  # published files have such quotes
    assert list(read_records(tsv, AllFaults())) == [(2, {"text": '他说"好', "label": "a"})]


@pytest.mark.parametrize(
    ("begin", "separator"), [("", ";"), ("", "\t"), ("\ufeff", ";"), ("sep=;\r\n", ";"), ("sep=|\n", "|")]
)
def test_cells_of_a_csv_file_may_stand_between_other_signs(
    make_card: MakeCard, tmp_path: Path, begin: str, separator: str
) -> None:
    path = tmp_path / "fruit" / "train.csv"
    path.parent.mkdir()
    lines = [["id", "text", "label"], ["1", '"一, 二; ""三"""', "a"], ["2", "四,五,六", "b"]]
    path.write_text(begin + "".join(separator.join(line) + "\n" for line in lines), encoding="utf-8")
    examples = load_examples(make_card("classification"), "train", tmp_path)
    assert [(e.fields["text"], e.label) for e in examples] == [('一, 二; "三"', "a"), ("四,五,六", "b")]
    assert csv_separator(path) == separator
    path.write_text(f"{begin}text{separator}label\n好{separator}a{separator}b\n", encoding="utf-8")
    n_before = begin.count("\n")
    with pytest.raises(
        FormatError, match=rf"train\.csv:{2 + n_before}: has 3 cells, expected 2: text, label"
    ):
        load_examples(make_card("classification"), "train", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,label\n好,a,b\n", r"train\.csv:2: has 3 cells, expected 2: text, label"),
        (
            "text|label\n好|a\n",
            r"'text\|label'\], .* each once, with commas, semicolons or tabs between them",
        ),
        ("text\n好\n", r"train\.csv:1: the first line is \['text'\], expected the names of 2 or more"),
        ("text,text\n好,a\n", "each once"),
        ('text,label\n"好,a\n', r"not CSV: unexpected end of data"),
    ],
)
def test_a_bad_table_names_its_line(make_card: MakeCard, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "fruit").mkdir()
    (tmp_path / "fruit" / "train.csv").write_text(text, encoding="utf-8")
    with pytest.raises(FormatError, match=message):
        load_examples(make_card("classification"), "train", tmp_path)


LONG = "我们今天去看了一场很好的电影，回来的时候在路上吃了晚饭，大家都说这家店的菜味道不错，价格也合适。" * 4
TRADITIONAL = (
    "我們今天去看了一場很好的電影，回來的時候在路上吃了晚飯，大家都說這家店的菜味道不錯，價格也合適。" * 4
)


@pytest.mark.parametrize(
    ("text", "encoding", "name"),
    [
        (LONG, "gbk", "GB18030"),
        (LONG + "朱镕基", "gb18030", "GB18030"),
        (TRADITIONAL, "big5", "BIG5"),
        (LONG, "utf-16", "UTF-16"),
        ("text,label\nhello,a\n", "utf-16-le", "UTF-16"),
        ("déjà vu à la carte", "latin-1", None),
    ],
)
def test_encodings_are_told_apart(text: str, encoding: str, name: str | None) -> None:
    assert looks_like(text.encode(encoding)) == name


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_a_file_in_gbk_is_named_with_the_command_that_converts_it(
    make_card: MakeCard, tmp_path: Path, suffix: str
) -> None:
    path = file_of(tmp_path, f"fruit/train{suffix}", "gbk")
    with pytest.raises(FormatError, match=rf"train\{suffix}:\d: not UTF-8.*looks like GBK: convert it with"):
        load_examples(make_card("classification"), "train", tmp_path)
    faults = AllFaults()
    list(read_records(path, faults))
    assert f"iconv -f GB18030 -t UTF-8 train{suffix} > utf8-train{suffix}" in str(faults.found[0])


def test_cards_may_have_a_byte_order_mark_and_name_their_encoding(
    card_toml: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "fruit.toml"
    path.write_text(card_toml["classification"], encoding="utf-8-sig")
    assert load_card(path).labels["a"] == "体育"
    path.write_text(card_toml["classification"], encoding="gbk")
    with pytest.raises(FormatError, match="looks like GBK"):
        load_card(path)


# --- names of columns ----------------------------------------------------------------------------


def test_names_come_from_field_then_the_record_then_the_card(make_card: MakeCard, tmp_path: Path) -> None:
    source = '\n[source.fields]\ntext = "content"\nlabel = "meta.cat"\n[source.labels]\n7 = "b"\n'
    card = make_card("classification", ('c = "房"\n', 'c = "房"\n' + source))
    path = tmp_path / "train.jsonl"
    lines: list[dict[str, Any]] = [
        {"content": "一", "meta": {"cat": 7}},
        {"text": "二", "content": "不", "label": "a", "meta": {"cat": 7}},
        {"title": "三", "text": "不", "label": "c"},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    first, second = load_examples(card, "train", path, limit=2)
    assert (first.fields["text"], first.label) == ("一", "b")
    assert (second.fields["text"], second.label) == ("二", "a")
    with pytest.raises(
        FormatError, match=r":1: field 'text': missing.*the line has \['content', 'meta.*--field text=NAME"
    ):
        load_examples(card, "train", path, fields={"text": "title"})
    path.write_text(json.dumps(lines[2]), encoding="utf-8")
    (third,) = load_examples(card, "train", path, fields=parse_fields(["text=title"], card))
    assert third.fields["text"] == "三"


def test_options_may_be_columns_of_their_own(make_card: MakeCard, tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("context,question,A,B,C,answer\n文,问,一,二,三,C\n", encoding="utf-8")
    card = make_card("multiple_choice")
    (example,) = load_examples(card, "train", path, fields={"options": "A,B,C", "label": "answer"})
    assert (example.options, example.label) == (("一", "二", "三"), 2)


def test_a_field_that_the_card_lacks_is_refused(make_card: MakeCard) -> None:
    for given in ("txt=content", "text", "text="):
        with pytest.raises(UsageError, match=f"--field {given}: expected KEY=NAME.*one of text, label"):
            parse_fields([given], make_card("classification"))


# --- where it lies -------------------------------------------------------------------------------


def test_a_folder_may_hold_the_files_itself(make_card: MakeCard, tmp_path: Path) -> None:
    for name in ("train.csv", "validation.jsonl", "test.tsv"):
        file_of(tmp_path, name)
    card = make_card("classification")
    for split in ("train", "dev", "test"):
        assert len(load_examples(card, split, tmp_path)) == 3
    file_of(tmp_path, "train.jsonl")
    with pytest.raises(UsageError, match=r"has train\.jsonl and train\.csv; keep one of them, or name the"):
        load_examples(card, "train", tmp_path)
    assert len(load_examples(card, "train", tmp_path / "train.csv")) == 3


def test_names_may_end_in_capitals_and_workbooks_are_called_that(make_card: MakeCard, tmp_path: Path) -> None:
    card = make_card("classification")
    train = file_of(tmp_path, "train.csv").rename(tmp_path / "train.CSV")
    assert len(load_examples(card, "train", tmp_path)) == len(load_examples(card, "train", train)) == 3
    assert (
        mp2("tasks", "new", train, "--out", tmp_path / "card.toml").exit_code == 2
    )  # three texts, no labels
    book = train.rename(tmp_path / "train.xlsx")
    for command in (("check", make_card("classification").path, "--data", book), ("new", book)):
        done = mp2("tasks", *command)
        assert (done.exit_code, "train.xlsx is a workbook" in done.output) == (2, True), done.output


def test_a_training_file_brings_the_files_named_like_it(make_card: MakeCard, tmp_path: Path) -> None:
    train = file_of(tmp_path, "reviews-train.csv")
    file_of(tmp_path, "reviews-dev.csv")
    place = find_place(make_card("classification"), train)
    assert isinstance(place, Files)
    assert {split: path.name for split, path in place.by_split.items()} == {
        "train": "reviews-train.csv",
        "dev": "reviews-dev.csv",
    }
    alone = find_place(make_card("classification"), file_of(tmp_path, "tickets.jsonl"))
    assert isinstance(alone, Files)
    assert list(alone.by_split) == ["train"]
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(UsageError, match=r"notes\.txt: expected a file that ends in \.jsonl"):
        find_place(make_card("classification"), tmp_path / "notes.txt")


def fewclue(folder: Path, name: str, records: list[dict[str, Any]]) -> None:
    """Files named and written as FewCLUE publishes them: JSON lines that end in .json."""
    folder.mkdir(exist_ok=True)
    text = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (folder / name).write_text(text + "\n", encoding="utf-8")


def test_fewclues_published_splits_work_as_they_stand(tmp_path: Path) -> None:
    """The layouts of FewCLUE's datasets/tnews, csl, cluewsc and iflytek, with texts of our own."""
    codes = {"100": "news_story", "116": "news_game"}
    for fold in range(2):
        for split in ("train", "dev"):
            lines = [
                {
                    "label": code,
                    "label_desc": name,
                    "sentence": f"{split}{fold}好{code}",
                    "keywords": "",
                    "id": 7,
                }
                for code, name in codes.items()
            ]
            fewclue(tmp_path / "tnews", f"{split}_{fold}.json", lines)
    fewclue(tmp_path / "tnews", "test.json", [{"id": 0, "sentence": "无标签"}])
    fewclue(tmp_path / "tnews", "test_public.json", lines)
    card = load_card("tnews")
    train = load_examples(card, "train", tmp_path)
    assert [(e.fields["text"], e.label) for e in train] == [
        ("train0好100", "news_story"),
        ("train0好116", "news_game"),
    ]
    assert load_examples(card, "dev", tmp_path)[0].fields["text"] == "dev0好100"
    assert len(load_examples(card, "test", tmp_path)) == 2
    other = tmp_path / "tnews" / "train_1.json"
    assert load_examples(card, "dev", other)[0].fields["text"] == "dev1好100"
    assert len(load_examples(card, "test", other)) == 2
    fewclue(
        tmp_path / "csl", "train_0.json", [{"id": 1, "abst": "摘要", "keyword": ["一", "二"], "label": "1"}]
    )
    (example,) = load_examples(load_card("csl"), "train", tmp_path)
    assert (example.fields, example.label) == ({"abstract": "摘要", "keywords": "一、二"}, "1")
    target = {"span2_index": 3, "span1_index": 0, "span1_text": "小明", "span2_text": "他"}
    fewclue(
        tmp_path / "cluewsc",
        "train_0.json",
        [{"target": target, "idx": 1, "text": "小明说他来", "label": "true"}],
    )
    (example,) = load_examples(load_card("cluewsc"), "train", tmp_path)
    assert (example.fields["pronoun"], example.label) == ("他", "true")
    fewclue(
        tmp_path / "iflytek",
        "train_0.json",
        [{"label": "108", "label_des": "外卖", "sentence": "送餐", "id": 1}],
    )
    (example,) = load_examples(load_card("iflytek"), "train", tmp_path)
    assert example.label == "外卖"


def test_pretraining_finds_the_tasks_that_a_folder_has(tmp_path: Path) -> None:
    file_of(tmp_path, "fruit/train.csv")
    file_of(tmp_path, "other/test.jsonl")
    assert tasks_in(tmp_path) == {"fruit"}
    with pytest.raises(UsageError, match=r"--data: there is no folder .*nowhere"):
        tasks_in(tmp_path / "nowhere")


class Set(dict[str, Any]):
    """A stand-in for a ``datasets.DatasetDict``."""


class Rows(list[dict[str, Any]]):
    """A stand-in for a ``datasets.Dataset``."""

    features: dict[str, Any] = {}  # noqa: RUF012


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the stand-in library was asked for; it has content and cat, train and validation."""
    asked: list[tuple[Any, ...]] = []
    rows = Rows([{"content": text, "cat": i} for i, text in enumerate(TEXTS)])
    rows.features = {"cat": types.SimpleNamespace(names=["a", "b", "c"])}

    def load_dataset(*arguments: Any) -> Set:
        asked.append(arguments)
        return Set(train=rows, validation=Rows(rows[:1]))

    stub = types.ModuleType("datasets")
    stub.load_dataset = load_dataset  # type: ignore[attr-defined]
    stub.load_from_disk = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stub)
    from mp2.tasks.hub import _load

    _load.cache_clear()
    return asked


def test_a_set_of_the_hub_is_loaded_by_name(make_card: MakeCard, loaded: list[Any]) -> None:
    card = make_card("classification")
    names = {"text": "content", "label": "cat"}
    examples = load_examples(card, "train", "hub:someone/fruits:zh", fields=names)
    assert [(e.fields["text"], e.label) for e in examples] == ROWS
    assert loaded == [("someone/fruits", "zh")]
    with pytest.raises(
        UsageError, match=r"someone/fruits \(zh\) has no test split.*its splits: train, validation"
    ):
        load_examples(card, "test", "hub:someone/fruits:zh", fields=names)


def test_a_folder_that_datasets_saved_is_loaded(
    make_card: MakeCard, loaded: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "dataset_dict.json").write_text("{}", encoding="utf-8")
    card = make_card("classification")
    assert find_place(card, tmp_path) == DataSet(str(tmp_path), saved=True)
    assert len(load_examples(card, "train", tmp_path, fields={"text": "content", "label": "cat"})) == 3


@pytest.mark.parametrize(
    "how", ["saved", "saved, one split", "parquet files by path", "csv files by path", "parquet"]
)
def test_what_the_library_itself_wrote_is_loaded_by_it(
    make_card: MakeCard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    names = datasets.ClassLabel(names=["a", "b", "c"])
    kinds = datasets.Features({"content": datasets.Value("string"), "cat": names})
    rows = datasets.Dataset.from_dict({"content": list(TEXTS), "cat": [0, 1, 2]}, features=kinds)
    folder = tmp_path / "fruits"
    folder.mkdir()
    if how == "saved":
        datasets.DatasetDict(train=rows, validation=rows).save_to_disk(str(folder))
    elif how == "saved, one split":
        rows.save_to_disk(str(folder))
    elif "parquet" in how:
        rows.to_parquet(str(folder / "train.parquet"))
    else:
        rows.to_csv(str(folder / "train.csv"))
    data = f"hub:{folder}" if "path" in how else str(folder)
    card = make_card("classification")
    if "csv" in how:  # which has the classes' numbers, not their names
        card = make_card("classification", *NUMBERED)
    fields = {"text": "content", "label": "cat"}
    examples = load_examples(card, "train", data, fields=fields)
    assert [e.fields["text"] for e in examples] == list(TEXTS)
    assert [e.label for e in examples] == (["0", "1", "2"] if "csv" in how else ["a", "b", "c"])
    if how == "saved":
        assert len(load_examples(card, "dev", data, fields=fields)) == 3
    with pytest.raises(UsageError, match="has no test"):
        load_examples(card, "test", data, fields=fields)
    if how != "csv files by path":
        three = datasets.Dataset.from_dict(
            {"content": list("今天气好我们"), "cat": [0, 1, 2] * 2}, features=kinds
        )
        monkeypatch.setattr("mp2.tasks.hub._load", lambda place: {"train": three})
    if "saved" in how or how == "parquet files by path":
        done = mp2("tasks", "new", data, "--out", tmp_path / "set.toml")
        assert done.exit_code == 0, done.output
        made = load_card(tmp_path / "set.toml")
        assert (made.task, list(made.labels)) == ("fruits", ["a", "b", "c"])
        assert f"mp2 tasks check {tmp_path / 'set.toml'} --data {data} --no-test" in done.output
    if how == "parquet":  # without the library: the names stand in the file
        numbered = make_card("classification", *NUMBERED)
        assert [e.label for e in load_examples(numbered, "train", data, fields=fields)] == ["0", "1", "2"]
        rows = datasets.Dataset.from_dict({"content": list("今天气好"), "cat": [0, 1] * 2}, features=kinds)
        rows.to_parquet(str(folder / "train.parquet"))
        done = mp2("tasks", "new", folder, "--out", tmp_path / "card.toml")
        assert done.exit_code == 0, done.output
        assert load_card(tmp_path / "card.toml").labels == {"a": "a", "b": "b"}
        assert mp2("tasks", "check", tmp_path / "card.toml", "--data", folder, "--no-test").exit_code == 0
        (folder / "train.parquet").rename(folder / "train-00000-of-00001.parquet")
        with pytest.raises(UsageError, match=f"is read with --data hub:{folder}"):
            load_examples(card, "train", folder)


def test_without_the_library_a_set_names_what_to_install(
    make_card: MakeCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"needs datasets; pip install 'mp2\[hub\]'"):
        load_examples(make_card("classification"), "train", "hub:someone/never")


# --- a first card --------------------------------------------------------------------------------


def test_new_writes_a_card_that_check_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{i},今天{i},{'好' if i % 2 else '不好'}\n" for i in range(40))
    Path("tickets.csv").write_text("id,content,category\n" + rows, encoding="utf-8")
    done = mp2("tasks", "new", "tickets.csv")
    assert done.exit_code == 0, done.output
    assert "classification: 2 labels in 'category', texts in 'content'" in done.output
    assert "  不好: 20 examples" in done.output
    card = load_card("tickets.toml")
    assert card.labels == {"不好": "不好", "好": "好"}
    assert card.source is not None
    assert card.source.fields == {"text": "content", "label": "category"}
    words = "tickets.toml --data tickets.csv --no-test"
    assert f"\n  mp2 tasks check {words}\n  mp2 bbt --task {words}\n" in done.output
    done = mp2("tasks", "check", "tickets.toml", "--data", "tickets.csv")
    assert done.exit_code == 2
    way = "tickets.csv is read alone; call it train.csv and put test.csv beside it"
    assert f"tickets.csv: task 'tickets' has no test examples: {way}; without test examples tune with" in (
        done.output
    )
    done = mp2("tasks", "check", *words.split())
    assert done.exit_code == 0, done.output
    assert "no faults" in done.output
    done = mp2("tasks", "new", "tickets.csv")
    assert done.exit_code == 2
    assert "tickets.toml is there already" in done.output


@pytest.mark.parametrize(
    ("train", "test", "is_read"),
    [
        ("train.csv", "test.csv", True),
        ("tickets-train.tsv", "tickets-test.tsv", True),
        ("train_0.json", "test_public.json", True),
        ("train_0.json", "test.json", False),
        ("tickets.csv", "test.csv", False),
        ("tickets.csv", None, False),
    ],
)
def test_new_proposes_what_suits_the_test_file_that_is_there(
    tmp_path: Path, train: str, test: str | None, is_read: bool
) -> None:
    lines = [{"text": f"今天{i}", "label": "ab"[i % 2]} for i in range(8)]
    for name in filter(None, (train, test)):
        tab = "\t" if name.endswith("tsv") else ","
        table = ["text" + tab + "label", *(tab.join(line.values()) for line in lines)]
        text = map(json.dumps, lines) if name.endswith("json") else table
        (tmp_path / name).write_text("\n".join(text) + "\n", "utf-8")
    done = mp2("tasks", "new", tmp_path / train, "--out", tmp_path / "card.toml")
    assert done.exit_code == 0, done.output
    assert ("--no-test" in done.output) is not is_read
    assert ("is not read with" in done.output) is ((train, test) == ("tickets.csv", "test.csv"))


def test_new_takes_a_folder_and_the_words_for_numbers_that_stand_beside_them(tmp_path: Path) -> None:
    """FewCLUE's tnews: label 108, label_desc news_edu."""
    from mp2.tasks.new_card import new_card

    lines = [
        {"label": str(100 + i % 3), "label_desc": f"news_{'abc'[i % 3]}", "sentence": f"好{i}", "id": i}
        for i in range(12)
    ]
    fewclue(tmp_path / "own", "train_0.json", lines)
    fewclue(tmp_path / "own", "test_public.json", lines)
    done = mp2("tasks", "new", tmp_path / "own", "--out", tmp_path / "own.toml")
    assert done.exit_code == 0, done.output
    assert "the words for them are those of 'label_desc'" in done.output
    assert load_card(tmp_path / "own.toml").labels == {"100": "news_a", "101": "news_b", "102": "news_c"}
    done = mp2("tasks", "check", tmp_path / "own.toml", "--data", tmp_path / "own")
    assert (done.exit_code, "12 train, 12 test" in done.output) == (0, True)
    lines[0]["label_desc"] = "news_b"  # no word for each number any more
    fewclue(tmp_path / "own", "train_0.json", lines)
    assert '"100" = "类别100"' in new_card(tmp_path / "own" / "train_0.json").text
    (tmp_path / "none").mkdir()
    done = mp2("tasks", "new", tmp_path / "none")
    assert (done.exit_code, f"there is no file {tmp_path / 'none'}; give" in done.output) == (2, True)


def test_new_proposes_the_type_that_the_columns_show(tmp_path: Path) -> None:
    from mp2.tasks.new_card import new_card

    def made(name: str, records: list[dict[str, Any]]) -> TaskCard:
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps(record) for record in records), encoding="utf-8"
        )
        found = new_card(tmp_path / f"{name}.jsonl")
        path = tmp_path / f"{found.task}.toml"
        path.write_text(found.text, encoding="utf-8")
        card = load_card(path)
        assert load_examples(card, "train", tmp_path / f"{name}.jsonl")
        return card

    choice = made("quiz", [{"question": "谁", "choices": ["一", "二"], "answer": 1}])
    assert (choice.type, choice.fields) == ("multiple_choice", ("question",))
    find = made(
        "find",
        [
            {"passage": "今天天气", "query": "问", "answers": ["天气"]},
            {"passage": "x", "query": "y", "answers": []},
        ],
    )
    assert (find.type, find.unanswerable) == ("extraction", True)
    pairs = made("pairs", [{"a": f"一{i}", "b": f"二{i}", "label": i % 2} for i in range(4)])
    assert pairs.labels == {"0": "类别0", "1": "类别1"}
    assert pairs.fields == ("text1", "text2")
    with pytest.raises(UsageError, match="no column looks like labels"):
        made("texts", [{"content": f"一{i}"} for i in range(5)])


def test_answers_in_a_cell_are_found_in_the_context(make_card: MakeCard, tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("context,question,answers\n今天天气,问,天气\n", encoding="utf-8")
    (example,) = load_examples(make_card("extraction"), "train", path)
    assert example.answers == (Answer("天气", 2),)


@pytest.mark.parametrize("name", ["a" * 65, "a" * 160, "My Task", "酒店", "", "7up"])
def test_new_makes_no_card_of_a_name_that_check_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("text,label\n" + "好,是\n坏,不\n" * 2, encoding="utf-8")
    done = mp2("tasks", "new", "a.csv", "--name", name)
    assert (done.exit_code, "expected a name like 'my_task'" in done.stderr) == (2, True)
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < 400
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
    done = mp2("tasks", "new", "a.csv", "--name", "a" * 64)
    assert done.exit_code == 0, done.stderr
    card = next(tmp_path.glob("*.toml"))
    card.write_text(card.read_text("utf-8").replace("a" * 64, name), encoding="utf-8")
    done = mp2("tasks", "check", card, "--data", "a.csv", "--no-test")
    assert (done.exit_code, "expected a name like 'my_task'" in done.output) == (2, True)


def test_new_takes_names_and_columns_as_files_have_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digits at a name's end stay, numbers are no texts, what is to be typed next is quoted for a shell."""
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{i},{i * 1.5},今天{i},{'好' if i % 2 else '不好'}\n" for i in range(8))
    Path("2024 hotel v2.csv").write_text("nr,price,content,label\n" + rows, encoding="utf-8")
    done = mp2("tasks", "new", "2024 hotel v2.csv")
    assert "texts in 'content'\n" in done.output
    assert "mp2 tasks check hotel_v2.toml --data '2024 hotel v2.csv' --no-test" in done.output
    assert load_card("hotel_v2.toml").fields == ("text",)
    long = f"{'a' * 100}.csv"
    Path(long).write_text("text,label\n" + "好,是\n坏,不\n" * 2, encoding="utf-8")
    assert f"wrote {'a' * 64}.toml" in mp2("tasks", "new", long).output
    Path("headless.csv").write_text("好,yes\n坏,no\n" * 3, encoding="utf-8")
    done = mp2("tasks", "new", "headless.csv")
    assert (done.exit_code, "expected the names of the columns" in done.stderr) == (2, True)
