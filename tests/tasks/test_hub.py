from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from mp2.errors import FormatError, MissingDependencyError, UsageError
from mp2.tasks import Answer, TaskCard, load_card, load_examples


class Rows(list[dict[str, Any]]):
    """A stand-in for a ``datasets.Dataset``: rows and features."""

    def __init__(self, rows: list[dict[str, Any]], names: list[str] | None = None) -> None:
        super().__init__(rows)
        self.features = {"label": types.SimpleNamespace(names=names)} if names else {}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str | None, str], Any]:
    """A local hub: (name, config, split) -> rows, or an exception to raise."""
    store: dict[tuple[str, str | None, str], Any] = {}

    def load_dataset(name: str, config: str | None = None, *, split: str) -> Any:
        found = store[(name, config, split)]
        if isinstance(found, Exception):
            raise found
        return found

    stub = types.ModuleType("datasets")
    stub.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stub)
    monkeypatch.delenv("MP2_DATA", raising=False)
    return store


def test_class_indices_become_raw_labels(hub: dict[Any, Any]) -> None:
    names = [str(code) for code in range(100, 117) if code not in (105, 111)]
    hub[("clue/clue", "tnews", "train")] = Rows([{"sentence": "新车上市", "label": 6, "idx": 0}], names)
    (example,) = load_examples(load_card("tnews"), "train")
    assert example.fields == {"text": "新车上市"}
    assert example.label == "news_car"  # index 6 is code 107


def test_our_test_split_is_the_hubs_labelled_one(hub: dict[Any, Any]) -> None:
    hub[("clue/clue", "afqmc", "validation")] = Rows([{"sentence1": "一", "sentence2": "二", "label": 1}])
    (example,) = load_examples(load_card("afqmc"), "test")
    assert (example.fields, example.label) == ({"text1": "一", "text2": "二"}, "1")
    with pytest.raises(
        UsageError, match=r"has no dev data for task 'afqmc', only train, test; give a folder"
    ):
        load_examples(load_card("afqmc"), "dev")


def test_an_unlabelled_row_is_named(hub: dict[Any, Any]) -> None:
    row = {"sentence1": "一", "sentence2": "二", "label": -1}
    hub[("clue/clue", "ocnli", "train")] = Rows([row], ["neutral", "entailment", "contradiction"])
    with pytest.raises(FormatError, match=r"clue/clue \(ocnli\) train:1: field 'label': unknown label '-1'"):
        load_examples(load_card("ocnli"), "train")


def test_nested_and_listed_columns_are_reached(hub: dict[Any, Any]) -> None:
    target = {"span1_text": "小明", "span2_text": "他", "span1_index": 0, "span2_index": 5}
    hub[("clue/clue", "cluewsc2020", "train")] = Rows(
        [{"text": "小明说他来", "label": 1, "target": target}], ["true", "false"]
    )
    (example,) = load_examples(load_card("cluewsc"), "train")
    assert example.fields == {"text": "小明说他来", "pronoun": "他", "quote": "小明"}
    assert example.label == "false"
    hub[("clue/clue", "csl", "train")] = Rows(
        [{"abst": "摘要", "keyword": ["一", "二"], "label": 1}], ["0", "1"]
    )
    (example,) = load_examples(load_card("csl"), "train")
    assert example.fields["keywords"] == "一、二"


def test_squad_answers_are_converted_and_repeats_dropped(hub: dict[Any, Any]) -> None:
    answers = {"text": ["天气", "天气", "今天"], "answer_start": [2, 2, 0]}
    hub[("hfl/cmrc2018", None, "train")] = Rows(
        [{"context": "今天天气", "question": "?", "answers": answers}]
    )
    (example,) = load_examples(load_card("cmrc2018"), "train")
    assert example.answers == (Answer("天气", 2), Answer("今天", 0))


def test_an_answer_text_becomes_the_options_index(
    hub: dict[Any, Any], make_card: Callable[..., TaskCard]
) -> None:
    source = '\n[source]\nhub = "x/y"\nfields = { options = "choice", label = "answer" }\n'
    card = make_card("multiple_choice", ("version = 1\n", "version = 1\n" + source))
    row = {"context": ["男：好", "女：不"], "question": "谁", "choice": ["男", "女"], "answer": "女", "id": 1}
    hub[("x/y", None, "train")] = Rows([row])
    (example,) = load_examples(card, "train")
    assert example.fields["context"] == "男：好 女：不"
    assert (example.options, example.label) == (("男", "女"), 1)


def test_a_missing_column_is_named(hub: dict[Any, Any]) -> None:
    hub[("clue/clue", "tnews", "train")] = Rows([{"title": "x", "label": 0}], ["100"])
    with pytest.raises(FormatError, match="field 'text': missing"):
        load_examples(load_card("tnews"), "train")


def test_offline_the_error_names_both_ways(hub: dict[Any, Any]) -> None:
    hub[("clue/clue", "tnews", "train")] = ConnectionError("no route to the hub")
    with pytest.raises(
        UsageError, match=r"--data DIR .*tnews/train\.jsonl.*online.*clue/clue.*no route to the hub"
    ):
        load_examples(load_card("tnews"), "train")


def test_without_the_library_the_error_names_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delenv("MP2_DATA", raising=False)
    with pytest.raises(MissingDependencyError, match=r"--data DIR.*pip install 'mp2\[hub\]'"):
        load_examples(load_card("tnews"), "train")


def test_a_task_without_a_source_asks_for_a_folder(hub: dict[Any, Any]) -> None:
    with pytest.raises(
        UsageError, match=r"names no hub data set; give a folder with --data.*mp2 tasks fetch dogwhistle"
    ):
        load_examples(load_card("dogwhistle"), "train")
