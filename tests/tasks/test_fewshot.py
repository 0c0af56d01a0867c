from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from mp2.errors import UsageError
from mp2.tasks import Answer, Example, TaskCard, few_shot_split, load_card

MakeCard = Callable[..., TaskCard]


def pool(card: TaskCard, each: int) -> list[Example]:
    return [Example({"text": f"{label}-{i}"}, label, (), (), i) for i in range(each) for label in card.labels]


def counts(examples: list[Example]) -> Counter[object]:
    return Counter(example.label for example in examples)


@pytest.mark.parametrize(
    ("task", "sizes"), [("chnsent", [16, 16]), ("cmnli", [10, 11, 11]), ("amazon", [6, 6, 6, 7, 7])]
)
def test_up_to_five_labels_share_32(task: str, sizes: list[int]) -> None:
    card = load_card(task)
    for seed in (8, 13, 21, 42, 100):
        split = few_shot_split(card, pool(card, 40), seed)
        assert sorted(counts(split.train).values()) == sizes
        assert counts(split.train) == counts(split.dev)


def test_what_does_not_divide_goes_to_labels_drawn_by_the_seed() -> None:
    card = load_card("amazon")
    lucky = {
        frozenset(
            label for label, n in counts(few_shot_split(card, pool(card, 20), seed).train).items() if n == 7
        )
        for seed in range(30)
    }
    assert len(lucky) > 5
    assert set().union(*lucky) == set(card.labels)


def test_what_does_not_divide_goes_to_labels_that_have_so_many() -> None:
    card = load_card("cmnli")  # three labels: 11, 11 and 10
    for few in card.labels:
        examples = [e for e in pool(card, 11) if e.label != few or e.source_line < 10]
        for seed in range(6):
            split = few_shot_split(card, examples, seed)
            assert counts(split.train) == {label: 11 - (label == few) for label in card.labels}
            assert not any("fewer examples" in remark for remark in split.remarks)


def test_a_text_with_two_labels_has_the_first_and_a_remark_says_so() -> None:
    card = load_card("chnsent")
    examples = pool(card, 40)
    again = replace(examples[3], label="1" if examples[3].label == "0" else "0", source_line=99)
    split = few_shot_split(card, [*examples, again, replace(examples[5], source_line=100)], 1)
    of_first = f"{examples[3].label} in line {examples[3].source_line}, {again.label} in line 99"
    assert split.remarks == (
        f"1 example has several labels in the training data, the first of which is taken: {of_first}",
    )
    assert again not in split.train + split.dev


def test_more_than_five_labels_get_8_each(make_card: MakeCard) -> None:
    for task in ("tnews", "thucnews"):
        card = load_card(task)
        split = few_shot_split(card, pool(card, 20), 1)
        assert set(counts(split.train).values()) == set(counts(split.dev).values()) == {8}
    six = make_card("classification", ('c = "房"', 'c = "房"\nd = "一"\ne = "二"\nf = "三"'))
    assert set(counts(few_shot_split(six, pool(six, 16), 1).train).values()) == {8}


def test_train_and_dev_are_disjoint_and_drawn_from_the_pool() -> None:
    card = load_card("tnews")
    examples = pool(card, 16)
    split = few_shot_split(card, examples, 8)
    train, dev = ({e.fields["text"] for e in part} for part in (split.train, split.dev))
    assert not train & dev
    assert train | dev == {e.fields["text"] for e in examples}


def test_copies_of_an_example_cannot_be_in_both_halves() -> None:
    card = load_card("chnsent")
    examples = pool(card, 32)
    for seed in range(5):
        split = few_shot_split(card, examples * 3, seed)
        train, dev = ({e.fields["text"] for e in part} for part in (split.train, split.dev))
        assert len(train) == len(dev) == 32
        assert not train & dev


def test_the_same_seed_draws_the_same_and_another_one_not() -> None:
    card = load_card("chnsent")
    examples = pool(card, 100)
    assert few_shot_split(card, examples, 13) == few_shot_split(card, examples, 13)
    assert few_shot_split(card, examples, 13) != few_shot_split(card, examples, 21)


def test_extraction_and_choice_draw_32_or_the_shots_given() -> None:
    card = load_card("cote_mfw")
    examples = [Example({"context": f"上海{i}"}, None, (), (Answer("上海", 0),), i) for i in range(80)]
    split = few_shot_split(card, examples, 1)
    assert (len(split.train), len(split.dev), split.remarks) == (32, 32, ())
    assert len(few_shot_split(card, examples, 1, shots=5).dev) == 5
    card = load_card("ccpm")
    examples = [Example({"context": f"{i}"}, i % 2, ("一", "二"), (), i) for i in range(64)]
    assert len(few_shot_split(card, examples, 1).train) == 32


def test_shots_count_a_label(make_card: MakeCard) -> None:
    card = load_card("tnews")
    assert set(counts(few_shot_split(card, pool(card, 9), 1, shots=3).train).values()) == {3}
    card = make_card("classification", ("version = 1", "version = 1\nshots_per_label = 4"))
    assert set(counts(few_shot_split(card, pool(card, 9), 1).train).values()) == {4}


def test_fewer_examples_than_asked_for_are_taken_with_a_remark() -> None:
    card = load_card("chnsent")
    examples = [e for e in pool(card, 40) if e.label == "0" or e.source_line < 11]
    split = few_shot_split(card, examples, 1)
    assert counts(split.train) == {"0": 16, "1": 11}
    assert counts(split.dev) == {"0": 16}
    assert split.remarks == (
        "train has fewer examples than asked for: 11 of 16 with label '1'",
        "dev has 16 examples: all that train leaves",
    )


def test_32_examples_are_enough_and_leave_no_dev() -> None:
    card = load_card("chnsent")
    split = few_shot_split(card, pool(card, 16), 1)
    assert counts(split.train) == {"0": 16, "1": 16}
    assert split.dev == []
    assert split.remarks == (
        "no dev set: train takes 32 of 32 examples, and the 0 left are too few to select by; "
        "the training loss selects",
    )
    split = few_shot_split(card, pool(card, 20), 1)  # 8 left: less than half
    assert (len(split.train), split.dev) == (32, [])
    assert len(few_shot_split(card, pool(card, 24), 1).dev) == 16


def test_without_selection_there_is_no_dev_and_train_stays_the_same() -> None:
    card = load_card("chnsent")
    split = few_shot_split(card, pool(card, 40), 1, select=False)
    assert (split.dev, split.remarks) == ([], ())
    assert split.train == few_shot_split(card, pool(card, 40), 1).train


def test_dev_examples_of_their_own_are_dev_and_never_also_in_train() -> None:
    card = load_card("chnsent")
    examples = pool(card, 16)
    own = [Example({"text": f"dev-{label}-{i}"}, label) for label in "01" for i in range(16)]
    split = few_shot_split(card, examples, 1, dev_examples=own)
    assert counts(split.dev) == {"0": 16, "1": 16}
    assert {e.fields["text"] for e in split.dev} == {e.fields["text"] for e in own}
    assert split.train == few_shot_split(card, examples, 1).train
    split = few_shot_split(card, examples, 1, dev_examples=[*examples, *own[:3]])
    assert {e.fields["text"] for e in split.dev} == {e.fields["text"] for e in own[:3]}
    assert split.remarks == ("dev has 3 examples: all there are that train does not have",)
    with pytest.raises(
        UsageError, match=r"every dev example .* is also in train; give others, or --dev none"
    ):
        few_shot_split(card, examples, 1, dev_examples=examples)


def test_fewer_than_two_a_label_are_refused() -> None:
    card = load_card("chnsent")
    examples = pool(card, 40)
    with pytest.raises(
        UsageError, match="too few different training examples: 1 with label '1'; expected at"
    ):
        few_shot_split(card, [e for e in examples if e.label == "0" or e.source_line < 1], 1)
    with pytest.raises(
        UsageError, match=r"0 with label '1'.*add examples, or take the label out of the card"
    ):
        few_shot_split(card, [e for e in examples if e.label == "0"], 1)
    with pytest.raises(UsageError, match="got 0 shots"):
        few_shot_split(card, examples, 1, shots=0)
    assert len(few_shot_split(card, examples, 1, shots=1).train) == 2  # what is asked for is given
