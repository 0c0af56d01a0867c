from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mp2.backbone.tokenizer import Tokenizer
from mp2.heads import span_scores
from mp2.tasks import Answer, Example, MrcFormatter, MrcInput, TaskCard, decode, load_card, score
from mp2.tasks.decode import best_span

MakeCard = Callable[..., TaskCard]


def certain(items: list[MrcInput], spans: list[tuple[int, int]]) -> list[np.ndarray]:
    """Scores of a model that is nearly sure of one span an input."""
    found = []
    for item, (a, b) in zip(items, spans, strict=True):
        logits = np.zeros((item.n_tokens, 2), np.float32)
        logits[a, 0] = logits[b, 1] = 9
        found.append(span_scores(item, logits - np.log(np.exp(logits).sum(0))))
    return found


def test_gold_spans_decode_to_gold_predictions_of_every_type(tokenizer: Tokenizer) -> None:
    cases = [
        (load_card("tnews"), [Example({"text": "今天"}, label) for label in load_card("tnews").labels]),
        (load_card("ccpm"), [Example({"context": "今天"}, i, tuple("一二三四")[: i + 2]) for i in range(3)]),
        (
            load_card("cmrc2018"),
            [
                Example({"context": "今天去看Read电影", "question": "？"}, None, (), (Answer(text, at),))
                for text, at in [("电影", 8), ("Read", 4), ("今", 0)]
            ],
        ),
    ]
    for card, examples in cases:
        formatter = MrcFormatter(card, tokenizer, 128)
        items = [item for i, example in enumerate(examples) for item in formatter.inputs(example, i)]
        found = decode(card, examples, items, certain(items, [(i.start, i.end) for i in items]))
        predictions = [x.prediction for x in found]
        assert all(x.probability > 0.8 for x in found)
        assert score(card, predictions, examples) == 1.0
        if card.type != "extraction":
            assert predictions == [example.label for example in examples]


def test_options_are_scored_by_the_sum_of_log_probabilities(
    make_card: MakeCard, tokenizer: Tokenizer
) -> None:
    card = make_card("classification")
    examples = [Example({"text": "今天"}, "a")]
    (item,) = MrcFormatter(card, tokenizer, 64).inputs(examples[0], 0)
    start, end = np.full(item.n_tokens, -9.0), np.full(item.n_tokens, -9.0)
    (a, b, c) = item.option_spans
    start[a[0]], end[a[1]] = -1.0, -5.0  # -6
    start[b[0]], end[b[1]] = -3.0, -2.0  # -5: the best sum, though neither part is the best
    start[c[0]], end[c[1]] = -8.0, -1.0  # -9
    scores = span_scores(item, np.stack([start, end], 1))
    assert scores.tolist() == [-6, -5, -9]
    (found,) = decode(card, examples, [item], [scores])
    assert found.prediction == "b"
    assert found.probability == pytest.approx(np.exp(-5) / np.exp([-6, -5, -9]).sum())


@given(st.data())
def test_best_span_equals_brute_force(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 12))
    limit = data.draw(st.integers(1, 14))
    numbers = st.lists(st.integers(-20, 0), min_size=n, max_size=n)
    start, end = (np.array(data.draw(numbers), np.float64) for _ in range(2))
    found, i, j = best_span(start, end, limit)
    assert found == max(start[a] + end[b] for a in range(n) for b in range(a, min(n, a + limit)))
    assert 0 <= j - i < limit
    assert start[i] + end[j] == found


def test_extraction_stays_inside_the_context_and_the_length_limit(tokenizer: Tokenizer) -> None:
    card = load_card("cmrc2018")
    examples = [Example({"context": "今天" * 40, "question": "今天"}, None)]
    (item,) = MrcFormatter(card, tokenizer, 256).inputs(examples[0], 0)
    assert item.context_span is not None
    first, last = item.context_span
    for a, b in [(1, 2), (0, 0), (last + 1, last + 3), (first, last)]:
        (found,) = decode(card, examples, [item], certain([item], [(a, b)]))
        assert 1 <= len(str(found.prediction)) <= card.max_answer_tokens
    (found,) = decode(card, examples, [item], certain([item], [(first + 5, first + 3)]))
    assert str(found.prediction) in examples[0].fields["context"]


def test_the_best_of_all_windows_answers(tokenizer: Tokenizer) -> None:
    card = load_card("cmrc2018")
    context = "天" * 100 + "电影" + "气" * 100
    examples = [
        Example({"context": "看电影", "question": "？"}, None, (), (Answer("看", 0),)),
        Example({"context": context, "question": "？"}, None, (), (Answer("电影", 100),)),
    ]
    formatter = MrcFormatter(card, tokenizer, 80)
    items = [item for i, example in enumerate(examples) for item in formatter.inputs(example, i)][::-1]
    assert len(items) > 3
    # windows without the answer point at [CLS], so their spans score low
    found = decode(card, examples, items, certain(items, [(item.start, item.end) for item in items]))
    assert [x.prediction for x in found] == ["看", "电影"]


@pytest.mark.parametrize("bad", [0, 1, -1])
def test_scores_that_are_no_numbers_in_any_window_give_no_probability(tokenizer: Tokenizer, bad: int) -> None:
    card = load_card("cmrc2018")
    example = Example({"context": "今天" * 60, "question": "？"}, None, (), (Answer("今", 0),))
    items = MrcFormatter(card, tokenizer, 48).inputs(example, 0)
    assert len(items) > 2
    scores = certain(items, [(i.context_span[0], i.context_span[0]) for i in items if i.context_span])
    (sure,) = decode(card, [example], items, scores)
    scores[bad][-1, 1] = np.nan
    (found,) = decode(card, [example], items, scores)
    assert np.isfinite(sure.probability)
    assert np.isnan(found.probability)


def test_no_answer_wins_only_where_the_card_allows_it(tokenizer: Tokenizer) -> None:
    examples = [Example({"context": "今天", "question": "？"}, None)]
    for task, expected in [("dureader_checklist", ""), ("cmrc2018", "今")]:
        card = load_card(task)
        items = MrcFormatter(card, tokenizer, 64).inputs(examples[0], 0)
        (found,) = decode(card, examples, items, certain(items, [(0, 0)]))
        assert found.prediction == expected
        assert (found.probability > 0.5) == (expected == "")  # of the span that is the answer, or of [CLS]


def test_an_example_without_inputs_is_refused(make_card: MakeCard) -> None:
    with pytest.raises(ValueError, match="example 0 has no input among the 0"):
        decode(make_card("classification"), [Example({"text": "x"}, "a")], [], [])


@pytest.mark.parametrize("task", ["tnews", "cmrc2018"])
def test_a_temperature_changes_probabilities_and_no_prediction(tokenizer: Tokenizer, task: str) -> None:
    card, context = load_card(task), "今天去看电影" * 40
    fields = {"text": "今天"} if task == "tnews" else {"context": context, "question": "？"}
    examples = [Example(fields, None)]
    items = MrcFormatter(card, tokenizer, 128).inputs(examples[0], 0)
    rng = np.random.default_rng(0)
    logits = [rng.standard_normal((item.n_tokens, 2)) * 3 for item in items]
    logp = [x - np.logaddexp.reduce(x, 0) for x in logits]
    scores = [span_scores(item, x) for item, x in zip(items, logp, strict=True)]
    (plain,) = decode(card, examples, items, scores)
    for temperature in (0.5, 3.0):
        (found,) = decode(card, examples, items, scores, temperature)
        assert found.prediction == plain.prediction
        scaled = [x / temperature - np.logaddexp.reduce(x / temperature, 0) for x in logits]
        again = [span_scores(item, x) for item, x in zip(items, scaled, strict=True)]
        if card.type == "classification":
            (expected,) = decode(card, examples, items, again)
            assert found.probability == pytest.approx(expected.probability, abs=1e-12)
        else:  # the probability of the span that was chosen before, in its window
            spans = [np.exp(x[:, None, 0] + x[None, :, 1]).ravel() for x in scaled]
            assert np.isclose(np.concatenate(spans), found.probability, atol=1e-12).any()
        assert (found.probability > plain.probability) == (temperature < 1)
