from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mp2.tasks import Answer, Example, accuracy, character_f1, exact_match, load_card, score
from mp2.tasks.metrics import longest_common_run, segments


def test_accuracy_of_three_right_in_four() -> None:
    assert accuracy(["a", "b", "a", "c"], ["a", "b", "b", "c"]) == 0.75


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("北京大学", "北京大学", 1.0),
        # 2 common of 2 and 4 characters: precision 1, recall 1/2, F1 = 2 * 2 / (2 + 4)
        ("北京", "北京大学", 2 / 3),
        # the longest common run is 大学 (2): precision 2/4, recall 2/4, although 北 is common too
        ("北方大学", "北京大学", 0.5),
        # no contiguous run longer than one: 京 or 北, precision 1/2, recall 1/2
        ("京北", "北京", 0.5),
        ("上海", "北京", 0.0),
        # punctuation is removed: 《红楼梦》 has 3 characters
        ("红楼梦", "《红楼梦》", 1.0),
        ("红，楼：梦", "红楼梦", 1.0),
        # a run of letters or digits is one segment: 1998 | 年, common 年
        ("1997年", "1998年", 0.5),
        # BERT | 模 | 型 against 模 | 型, case does not matter: 2 * 2 / 5
        ("BERT模型", "模型", 0.8),
        ("bert", "BERT", 1.0),
        # 3.5 | 米 against 3.5 | 公 | 里
        ("3.5米", "3.5公里", 0.4),
        ("", "", 0.0),  # the script: no common run
        ("", "北京", 0.0),
        ("北京", "", 0.0),
        ("，", "，", 0.0),  # nothing is left of either
        ("，", "。", 0.0),
        # the ellipsis stays, a run of them is one segment: 2 common of 2 and 3 segments
        ("等等", "等等……", 0.8),
        ("等等…", "等等……", 2 / 3),  # two runs that differ
        ("等等……", "等等……", 1.0),
    ],
)
def test_character_f1_equals_the_hand_computed(prediction: str, reference: str, expected: float) -> None:
    assert character_f1(prediction, reference) == pytest.approx(expected, abs=1e-12)


def test_segments_are_characters_and_words() -> None:
    assert segments(" 在2008年的Beijing，GDP-增长 ") == ["在", "2008", "年", "的", "beijinggdp", "增", "长"]


def test_f1_takes_the_best_reference() -> None:
    card = load_card("cmrc2018")
    example = Example(
        {"context": "北京大学", "question": "?"}, None, (), (Answer("大", 2), Answer("北京", 0))
    )
    assert score(card, ["北京大"], [example]) == pytest.approx(0.8)  # against 北京: 2 * 2 / (3 + 2)


def test_no_answer_counts_where_there_is_none() -> None:
    card = load_card("dureader_checklist")
    example = Example({"context": "北京", "question": "?"}, None)
    assert score(card, ["", "北"], [example, example]) == 0.5
    assert exact_match(["", "北"], [example, example]) == 0.5
    answered = Example({"context": "北京", "question": "?"}, None, (), (Answer("北", 0),))
    assert score(card, [""], [answered]) == exact_match([""], [answered]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("北京大学", ["北京大学"], 1.0),
        ("北京", ["北京大学"], 0.0),
        ("《红楼梦》", ["红楼梦"], 1.0),  # punctuation is removed from both
        (" BERT", ["bert "], 1.0),
        ("3.5米", ["3．5米"], 0.0),  # the full-width point is not in the script's list, nor is the other
        ("等等", ["等等……"], 0.0),  # the script keeps the ellipsis
        ("北京 大学", ["北京大学"], 0.0),  # blanks inside count
        ("上海", ["北京", "上海"], 1.0),  # any of the references
        ("，", ["。"], 1.0),  # nothing is left of either: the script's rule
    ],
)
def test_exact_match_equals_the_hand_computed(
    prediction: str, references: list[str], expected: float
) -> None:
    example = Example({"context": "x"}, None, (), tuple(Answer(text, 0) for text in references))
    assert exact_match([prediction], [example]) == expected


def test_score_of_classification_and_choice_is_accuracy() -> None:
    examples = [Example({"text": "x"}, "0"), Example({"text": "x"}, "1")]
    assert score(load_card("chnsent"), ["0", "0"], examples) == 0.5
    choices = [Example({"context": "x"}, 2, tuple("abcd")), Example({"context": "x"}, 0, tuple("ab"))]
    assert score(load_card("ccpm"), [2, 1], choices) == 0.5


def test_scoring_without_labels_or_with_other_lengths_is_refused() -> None:
    card = load_card("chnsent")
    with pytest.raises(ValueError, match="example 0 has no label"):
        score(card, ["0"], [Example({"text": "x"}, None)])
    with pytest.raises(ValueError, match="2 predictions for 1 examples"):
        score(card, ["0", "1"], [Example({"text": "x"}, "0")])


@given(st.lists(st.sampled_from("abc"), max_size=8), st.lists(st.sampled_from("abc"), max_size=8))
def test_longest_common_run_equals_brute_force(a: list[str], b: list[str]) -> None:
    runs = [n for n in range(1, len(a) + 1) for i in range(len(a) - n + 1) for j in range(len(b) - n + 1)
            if a[i : i + n] == b[j : j + n]]  # fmt: skip
    assert longest_common_run(a, b) == max(runs, default=0)


@given(st.text(alphabet="北京大学ab1，。 ", max_size=10), st.text(alphabet="北京大学ab1，。 ", max_size=10))
def test_character_f1_is_symmetric_and_in_range(a: str, b: str) -> None:
    assert 0.0 <= character_f1(a, b) <= 1.0
    assert character_f1(a, b) == character_f1(b, a)
    assert character_f1(a, a) == float(bool(segments(a)))
