"""A tokenizer and cards made in the test."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from mp2.backbone.tokenizer import Tokenizer
from mp2.tasks import TaskCard, list_cards, load_card

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LATIN = "abcdefghijklmnopqrstuvwxyz0123456789"
MORE = "今天气很好我们去看电影吃饭一二三四五六七八九十，。：？！“”、（）《》：:,.!-的是在和了不人有大小上下"
WORDS = ["2023", "wifi", "##ing", "read"]


def build_tokenizer(texts: Iterable[str] = ()) -> Tokenizer:
    """A character vocabulary of the cards' words and templates and ``texts``, with some word pieces."""
    chars = set(MORE)
    for card in list_cards():
        chars.update(card.template, *card.labels.values())
    chars.update(*texts)
    chars = {c.lower() for c in chars if len(c.lower()) == 1 and not c.isspace()} - set(LATIN)
    pieces = [*LATIN, *(f"##{c}" for c in LATIN), *WORDS]
    return Tokenizer.from_vocab(SPECIAL + sorted(chars) + pieces, lowercase=True)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return build_tokenizer()


CLASSIFICATION = """
task = "fruit"
family = "test"
type = "classification"
template = "主题：“{text}”是？选项：{options}"
metric = "accuracy"
track = "extra"
version = 1

[labels]
a = "体育"
b = "财经"
c = "房"
"""
EXTRACTION = """
task = "find"
family = "test"
type = "extraction"
template = "文档：“{context}”，问题：“{question}”，答案是？"
metric = "f1"
track = "extra"
version = 1
"""
CHOICE = """
task = "pick"
family = "test"
type = "multiple_choice"
template = "文档：“{context}”，问题：“{question}”，选项：{options}"
metric = "accuracy"
track = "extra"
version = 1
"""
TOML = {"classification": CLASSIFICATION, "extraction": EXTRACTION, "multiple_choice": CHOICE}

MakeCard = Callable[..., TaskCard]


@pytest.fixture(scope="session")
def make_card(tmp_path_factory: pytest.TempPathFactory) -> MakeCard:
    """Return a card of a type, after replacing ``old`` by ``new`` in its TOML."""

    def make(kind: str, *changes: tuple[str, str]) -> TaskCard:
        text = TOML[kind]
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path_factory.mktemp("cards") / "card.toml"
        path.write_text(text, encoding="utf-8")
        return load_card(path)

    return make


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def write_jsonl() -> Callable[[Path, Iterable[Any]], Path]:
    return write_lines


@pytest.fixture
def card_toml() -> dict[str, str]:
    return dict(TOML)
