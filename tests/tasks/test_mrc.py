from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mp2.backbone.tokenizer import Tokenizer
from mp2.errors import UsageError
from mp2.tasks import Answer, Example, MrcFormatter, MrcInput, TaskCard, filled_template, load_card
from mp2.tasks.mrc import MIN_TEXT_TOKENS, fair_lengths, windows

MakeCard = Callable[..., TaskCard]
TEXTS = st.text(alphabet="今天气很好我们去看电影吃饭，。 ab1X　é\u200b", max_size=60)


def tokens(tokenizer: Tokenizer, item: MrcInput, first: int, last: int) -> str:
    """What the tokens first..last (inclusive) spell."""
    vocab = tokenizer.tokens()
    return "".join(vocab[i] for i in item.input_ids[first : last + 1].tolist()).replace("##", "")


def spelled(tokenizer: Tokenizer, text: str) -> str:
    vocab = tokenizer.tokens()
    return "".join(vocab[i] for i in tokenizer.encode(text).ids).replace("##", "")


def test_a_classification_input_is_the_filled_template(make_card: MakeCard, tokenizer: Tokenizer) -> None:
    card = make_card("classification")
    example = Example({"text": "今天wifi很好"}, "b")
    item = MrcFormatter(card, tokenizer, 64).training_input(example, 7)
    text = tokens(tokenizer, item, 0, item.n_tokens - 1)
    assert text == "[CLS]主题：“今天wifi很好”是？选项：体育，财经，房。[SEP]"
    assert text == f"[CLS]{filled_template(card, example)}[SEP]"
    assert item.example == 7
    assert item.input_ids.dtype == item.option_spans.dtype == np.int64
    assert [tokens(tokenizer, item, a, b) for a, b in item.option_spans] == ["体育", "财经", "房"]
    assert (item.start, item.end) == tuple(item.option_spans[1])
    assert item.context_span is None


def test_predicting_and_training_inputs_of_a_classification_are_equal(
    make_card: MakeCard, tokenizer: Tokenizer
) -> None:
    formatter = MrcFormatter(make_card("classification"), tokenizer, 64)
    example = Example({"text": "今天"}, "c")
    (item,) = formatter.inputs(example, 0)
    assert (item.input_ids == formatter.training_input(example, 0).input_ids).all()
    assert (item.start, item.end) != (0, 0)
    (bare,) = formatter.inputs(Example({"text": "今天"}, None), 0)
    assert (bare.start, bare.end) == (0, 0)


@given(
    texts=st.lists(TEXTS, min_size=2, max_size=2), max_tokens=st.integers(26, 90), gold=st.sampled_from("01")
)
def test_options_are_never_truncated_and_spans_decode_back(
    tokenizer: Tokenizer, texts: list[str], max_tokens: int, gold: str
) -> None:
    card = load_card("lcqmc")
    formatter = MrcFormatter(card, tokenizer, max_tokens + MIN_TEXT_TOKENS)
    item = formatter.training_input(Example({"text1": texts[0], "text2": texts[1]}, gold), 0)
    assert item.n_tokens <= max_tokens + MIN_TEXT_TOKENS
    assert [tokens(tokenizer, item, a, b) for a, b in item.option_spans] == list(card.labels.values())
    assert tokens(tokenizer, item, item.start, item.end) == card.labels[gold]
    whole = tokens(tokenizer, item, 0, item.n_tokens - 1)
    assert whole.startswith("[CLS]意思判别：“")
    assert whole.endswith("”的关系是？选项：不同，相似。[SEP]")
    n_texts = item.n_tokens - formatter.n_fixed_tokens
    lengths = [len(tokenizer.encode(text).ids) for text in texts]
    room = max_tokens + MIN_TEXT_TOKENS - formatter.n_fixed_tokens
    assert n_texts == min(sum(lengths), room)  # no token is given away


@given(
    context=TEXTS,
    question=TEXTS,
    options=st.lists(
        st.text(alphabet="今天气很好我们ab1", min_size=1, max_size=12), min_size=2, max_size=10, unique=True
    ),
    max_tokens=st.integers(150, 200),
    data=st.data(),
)
def test_options_of_multiple_choice_vary_in_number_and_length(
    tokenizer: Tokenizer,
    context: str,
    question: str,
    options: list[str],
    max_tokens: int,
    data: st.DataObject,
) -> None:
    card = load_card("c3")
    label = data.draw(st.integers(0, len(options) - 1))
    formatter = MrcFormatter(card, tokenizer, max_tokens)
    item = formatter.training_input(
        Example({"context": context, "question": question}, label, tuple(options)), 0
    )
    assert item.n_tokens <= max_tokens
    assert [tokens(tokenizer, item, a, b) for a, b in item.option_spans] == [
        spelled(tokenizer, option) for option in options
    ]
    assert (item.start, item.end) == tuple(item.option_spans[label])


def test_119_options_fit_512_tokens_and_leave_room(tokenizer: Tokenizer) -> None:
    card = load_card("iflytek")
    item = MrcFormatter(card, tokenizer, 512).training_input(Example({"text": "好" * 999}, "其他"), 0)
    assert item.n_tokens == 512
    assert item.option_spans.shape == (119, 2)
    assert [tokens(tokenizer, item, a, b) for a, b in item.option_spans] == list(card.labels.values())


def test_the_longest_field_is_cut_first(tokenizer: Tokenizer) -> None:
    card = load_card("finre")
    formatter = MrcFormatter(card, tokenizer, 220)
    fields = {"text": "天" * 300, "subject": "好" * 5, "object": "气" * 7}
    item = formatter.training_input(Example(fields, "合作"), 0)
    text = tokens(tokenizer, item, 0, item.n_tokens - 1)
    assert "“好好好好好”和“气气气气气气气”" in text
    assert text.count("天") == 220 - formatter.n_fixed_tokens - 12


@pytest.mark.parametrize("unit", ["今天看电影", "read1 ", "a" * 150 + "天", "今" + "ab1 " * 40, " 　"])
def test_a_very_long_text_gives_the_tokens_of_its_beginning(tokenizer: Tokenizer, unit: str) -> None:
    card = load_card("tnews")
    text = "今" + unit * (4000 // len(unit))
    formatter = MrcFormatter(card, tokenizer, 100)
    item = formatter.training_input(Example({"text": text}, "news_car"), 0)
    shown = min(100 - formatter.n_fixed_tokens, len(tokenizer.encode(text).ids))
    at = 1 + len(tokenizer.encode("主题识别：“").ids)
    assert item.input_ids[at : at + shown].tolist() == tokenizer.encode(text).ids[:shown]
    assert item.n_tokens == formatter.n_fixed_tokens + shown


def slow_fair_lengths(lengths: list[int], room: int) -> list[int]:
    """Take one token at a time from the longest (the last of equals)."""
    kept = list(lengths)
    while sum(kept) > room:
        longest = max(kept)
        kept[max(i for i, n in enumerate(kept) if n == longest)] -= 1
    return kept


@given(st.lists(st.integers(0, 30), max_size=5), st.integers(0, 80))
def test_fair_lengths_equal_taking_from_the_longest(lengths: list[int], room: int) -> None:
    assert fair_lengths(lengths, room) == slow_fair_lengths(lengths, room)


@given(st.integers(0, 300), st.integers(2, 60), st.integers(1, 64))
def test_windows_cover_the_context_and_overlap(n_tokens: int, size: int, overlap: int) -> None:
    spans = windows(n_tokens, size, overlap)
    assert {i for first, last in spans for i in range(first, last)} == set(range(n_tokens))
    assert all(last - first <= size for first, last in spans)
    # any run of up to `overlap` tokens (half a window at most) stands whole in some window
    longest = min(overlap, size // 2, n_tokens)
    for start in range(n_tokens - longest + 1):
        assert any(first <= start and start + longest <= last for first, last in spans)


@given(
    context=st.text(alphabet="今天气很好我们去看电影，。 ab1X", min_size=1, max_size=150).filter(str.strip),
    question=st.text(alphabet="今天ab？", max_size=20),
    max_tokens=st.integers(40, 120),
    data=st.data(),
)
def test_extraction_windows_hold_the_answer_and_decode_back(
    tokenizer: Tokenizer, context: str, question: str, max_tokens: int, data: st.DataObject
) -> None:
    card = load_card("cmrc2018")
    start = data.draw(st.integers(0, len(context) - 1))
    end = data.draw(st.integers(start + 1, min(len(context), start + 8)))
    answer = Answer(context[start:end], start)
    example = Example({"context": context, "question": question}, None, (), (answer,))
    formatter = MrcFormatter(card, tokenizer, max_tokens)
    items = formatter.inputs(example, 3)
    covered = set()
    for item in items:
        assert item.n_tokens <= max_tokens
        assert item.example == 3
        assert item.option_spans.shape == (0, 2)
        assert item.context_span is not None
        first, last = item.context_span
        assert len(item.context_offsets) == last - first + 1
        for position, (a, b) in enumerate(item.context_offsets, first):
            covered.update(range(a, b))
            token = tokens(tokenizer, item, position, position)
            assert token in ("[UNK]", context[a:b].lower())
    assert {i for i, c in enumerate(context) if not c.isspace()} <= covered
    wanted = {i for i in range(start, end) if not context[i].isspace()}
    for item in [*items, formatter.training_input(example, 3)]:
        if (item.start, item.end) == (0, 0):
            continue
        first = item.context_span[0] if item.context_span else 0
        a, b = item.context_offsets[item.start - first][0], item.context_offsets[item.end - first][1]
        assert wanted <= set(range(a, b))  # the answer, widened to token edges
    if wanted:
        assert any((item.start, item.end) != (0, 0) for item in items)
        assert formatter.training_input(example, 3).start > 0


def test_an_answer_inside_a_word_is_widened_to_the_token(tokenizer: Tokenizer) -> None:
    card = load_card("cmrc2018")
    example = Example({"context": "在2023年", "question": "何时"}, None, (), (Answer("02", 2),))
    item = MrcFormatter(card, tokenizer, 64).training_input(example, 0)
    assert tokens(tokenizer, item, item.start, item.end) == "2023"
    assert item.context_offsets[item.start - item.context_span[0]] == (1, 5)  # type: ignore[index]


def test_unanswerable_questions_point_at_cls(tokenizer: Tokenizer) -> None:
    formatter = MrcFormatter(load_card("dureader_checklist"), tokenizer, 64)
    example = Example({"context": "今天" * 80, "question": "何时"}, None)
    assert {(item.start, item.end) for item in formatter.inputs(example, 0)} == {(0, 0)}
    item = formatter.training_input(example, 0)
    assert (item.start, item.end) == (0, 0)
    assert item.input_ids[0] == tokenizer.cls_id


def test_the_training_window_has_text_on_both_sides_of_the_answer(tokenizer: Tokenizer) -> None:
    context = "天" * 100 + "电影" + "气" * 100
    example = Example({"context": context, "question": "什么"}, None, (), (Answer("电影", 100),))
    item = MrcFormatter(load_card("cmrc2018"), tokenizer, 80).training_input(example, 0)
    assert tokens(tokenizer, item, item.start, item.end) == "电影"
    first, last = item.context_span or (0, 0)
    assert min(item.start - first, last - item.end) >= 10


def test_an_answer_longer_than_a_window_is_clipped(tokenizer: Tokenizer) -> None:
    example = Example({"context": "天" * 200, "question": "什么"}, None, (), (Answer("天" * 150, 20),))
    item = MrcFormatter(load_card("cmrc2018"), tokenizer, 80).training_input(example, 0)
    assert (item.start, item.end) == item.context_span


def test_a_long_question_leaves_half_of_the_room_to_the_context(tokenizer: Tokenizer) -> None:
    formatter = MrcFormatter(load_card("cmrc2018"), tokenizer, 80)
    example = Example({"context": "天" * 200, "question": "气" * 200}, None, (), (Answer("天", 0),))
    room = 80 - formatter.n_fixed_tokens
    for item in formatter.inputs(example, 0):
        first, last = item.context_span or (0, 0)
        assert last - first + 1 == room - room // 2


def test_keyword_extraction_needs_no_question(tokenizer: Tokenizer) -> None:
    example = Example({"context": "今天去看电影"}, None, (), (Answer("电影", 4),))
    item = MrcFormatter(load_card("cote_mfw"), tokenizer, 64).training_input(example, 0)
    assert tokens(tokenizer, item, item.start, item.end) == "电影"


def test_a_context_of_characters_that_the_tokenizer_drops_has_no_span(tokenizer: Tokenizer) -> None:
    example = Example({"context": "\u200b\x01", "question": "？"}, None, (), (Answer("\x01", 1),))
    (item,) = MrcFormatter(load_card("cmrc2018"), tokenizer, 64).inputs(example, 0)
    assert (item.context_span, item.start, item.end) == (None, 0, 0)


def test_a_label_word_the_tokenizer_cannot_spell_is_refused(
    make_card: MakeCard, tokenizer: Tokenizer
) -> None:
    card = make_card("classification", ('c = "房"', 'c = "龘龘"'))
    with pytest.raises(UsageError, match=r"cannot spell the label words '龘龘' \(c\); choose words"):
        MrcFormatter(card, tokenizer, 64)


def test_label_words_of_the_same_tokens_are_refused(make_card: MakeCard, tokenizer: Tokenizer) -> None:
    card = make_card("classification", ('b = "财经"', 'b = "wifi"'), ('c = "房"', 'c = "WIFI"'))
    with pytest.raises(UsageError, match="'WIFI' and 'wifi' are the same tokens"):
        MrcFormatter(card, tokenizer, 64)


def test_options_that_fill_the_sequence_are_refused_at_once(tokenizer: Tokenizer) -> None:
    card = load_card("iflytek")
    with pytest.raises(UsageError, match=r"does not fit 256 tokens: its template and 119 options take 3\d\d"):
        MrcFormatter(card, tokenizer, 256)
    need = MrcFormatter(card, tokenizer, 512).n_fixed_tokens + MIN_TEXT_TOKENS
    MrcFormatter(card, tokenizer, need)
    with pytest.raises(UsageError, match=f"allow {need} tokens or more"):
        MrcFormatter(card, tokenizer, need - 1)


def test_long_options_of_one_example_are_refused_and_can_be_asked_for(tokenizer: Tokenizer) -> None:
    formatter = MrcFormatter(load_card("c3"), tokenizer, 64)
    fields = {"context": "今天" * 20, "question": "谁"}
    long = Example(fields, 0, ("好" * 40, "天"), (), 12)
    assert not formatter.fits(long)
    assert formatter.fits(Example(fields, 0, ("好", "天")))
    with pytest.raises(UsageError, match=r"task 'c3', line 12: template and options take \d+ of 64 tokens"):
        formatter.training_input(long, 0)


def test_a_template_may_put_fields_side_by_side(make_card: MakeCard, tokenizer: Tokenizer) -> None:
    card = make_card("classification", ("“{text}”", "{text}{more}"))
    item = MrcFormatter(card, tokenizer, 64).training_input(Example({"text": "wi", "more": "fi"}, "a"), 0)
    assert tokens(tokenizer, item, 0, item.n_tokens - 1) == "[CLS]主题：wifi是？选项：体育，财经，房。[SEP]"
