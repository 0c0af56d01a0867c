"""Cloze texts and bare fields: where the [MASK] tokens stand, what is cut, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mp2.backbone import load_backbone
from mp2.errors import UsageError
from mp2.tasks import ClozeFormatter, Example, FieldFormatter, TaskCard, load_card
from mp2.tasks.cloze import cloze_template

TOKENIZER = load_backbone("mini").tokenizer


@pytest.fixture(scope="module")
def card() -> TaskCard:
    card = load_card("demo_sentiment")
    return replace(card, labels={"good": "很好", "bad": "差"}, cloze="{text}总之{label}。")


def example(text: str, label: str | None = "good") -> Example:
    return Example(fields={"text": text}, label=label)


def test_there_is_a_text_for_each_length_of_word_with_as_many_masks(card: TaskCard) -> None:
    made = ClozeFormatter(card, TOKENIZER, 60).inputs(example("房间干净", "bad"), 3)
    assert [(item.example, item.label) for item in made] == [(3, 1), (3, 1)]
    for n, item in zip((1, 2), made, strict=True):
        first, last = item.segments[0]
        assert last - first + 1 == n
        expected = [
            *TOKENIZER.encode("房间干净总之").ids,
            *[TOKENIZER.mask_id] * n,
            *TOKENIZER.encode("。").ids,
        ]
        assert item.input_ids.tolist() == [TOKENIZER.cls_id, *expected, TOKENIZER.sep_id]
        assert set(item.input_ids[first : last + 1]) == {TOKENIZER.mask_id}


def test_only_the_text_is_cut(card: TaskCard) -> None:
    for item in ClozeFormatter(card, TOKENIZER, 20).inputs(example("好" * 100), 0):
        assert item.n_tokens <= 20
        assert item.input_ids[item.segments[0][0]] == TOKENIZER.mask_id


def test_a_card_without_a_cloze_has_the_answer_in_place_of_the_options() -> None:
    card = replace(load_card("demo_sentiment"), template="情感：{text}的情感是？选项：{options}", cloze=None)
    assert cloze_template(card) == "情感：{text}的情感是？答案：{label}。"


def test_words_that_cannot_be_spelled_are_named(card: TaskCard) -> None:
    odd = replace(card, labels={"good": "\U0001f600", "bad": "差"})
    with pytest.raises(UsageError, match=r"cannot spell the label words .*good"):
        ClozeFormatter(odd, TOKENIZER, 60)


@pytest.mark.parametrize("formatter", [ClozeFormatter, FieldFormatter])
def test_other_types_of_tasks_are_refused(formatter: type[ClozeFormatter] | type[FieldFormatter]) -> None:
    with pytest.raises(UsageError, match="extraction"):
        formatter(load_card("cmrc2018"), TOKENIZER, 100)


def test_fields_stand_alone_and_the_longest_is_cut() -> None:
    card = load_card("lcqmc")
    (item,) = FieldFormatter(card, TOKENIZER, 14).inputs(
        Example(fields={"text1": "好" * 50, "text2": "不错"}, label=None), 1
    )
    (a, b), (c, d) = item.segments
    assert item.n_tokens == 14
    assert item.label == -1
    assert item.input_ids[a : b + 1].tolist() == TOKENIZER.encode("好").ids * 9
    assert item.input_ids[c : d + 1].tolist() == TOKENIZER.encode("不错").ids
    assert item.input_ids[[0, b + 1, d + 1]].tolist() == [
        TOKENIZER.cls_id,
        TOKENIZER.sep_id,
        TOKENIZER.sep_id,
    ]


def choice(*options: str, text: str = "春眠不觉晓") -> Example:
    return Example(fields={"context": text}, label=1, options=options)


def test_options_stand_behind_letters_and_a_letter_is_the_answer() -> None:
    card = replace(load_card("ccpm"), cloze=None, template="哪句像“{context}”？选项：{options}")
    (item,) = ClozeFormatter(card, TOKENIZER, 80).inputs(choice("花落", "夜来风雨"), 2)
    written = TOKENIZER.encode("哪句像“春眠不觉晓”？选项：A、花落；B、夜来风雨。答案：").ids
    mask = [TOKENIZER.mask_id, *TOKENIZER.encode("。").ids, TOKENIZER.sep_id]
    assert item.input_ids.tolist() == [TOKENIZER.cls_id, *written, *mask]
    assert (item.example, item.label) == (2, 1)
    assert item.input_ids[item.segments[0]].tolist() == [TOKENIZER.mask_id] * 2
    spans = [item.input_ids[a : b + 1].tolist() for a, b in item.option_spans]
    assert spans == [TOKENIZER.encode(text).ids for text in ("A、花落", "；B、夜来风雨")]


def test_the_cards_of_multiple_choice_have_the_cloze_of_the_published_bbt() -> None:
    (item,) = ClozeFormatter(load_card("ccpm"), TOKENIZER, 80).inputs(choice("花落", "风雨"), 0)
    written = TOKENIZER.encode("在选项A、花落；B、风雨中，与语段“春眠不觉晓”意思最接近的选项是").ids
    assert item.input_ids[1 : 1 + len(written)].tolist() == written


def test_long_options_are_cut_so_that_the_text_keeps_its_room() -> None:
    card = load_card("ccpm")
    (item,) = ClozeFormatter(card, TOKENIZER, 60).inputs(choice("好" * 90, "差", text="晓" * 50), 0)
    (dawn,) = TOKENIZER.encode("晓").ids
    assert item.n_tokens == 60
    assert (item.input_ids == dawn).sum() == 8
    (first, last) = item.option_spans[1]
    assert item.input_ids[first : last + 1].tolist() == TOKENIZER.encode("；B、差").ids


def test_more_options_than_letters_are_refused() -> None:
    with pytest.raises(UsageError, match="11 options, expected at most 10"):
        ClozeFormatter(load_card("ccpm"), TOKENIZER, 80).inputs(choice(*"一二三四五六七八九十百"), 0)
