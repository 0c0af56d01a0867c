"""What a mean loss is over: inputs with a gold span, not windows that do not hold the answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mp2.backbone import load_backbone
from mp2.runs.few_shot_problem import has_gold
from mp2.tasks import Answer, Example, MrcFormatter, load_card

CONTEXT = "今天天气很好，" * 30
EXAMPLES = (
    Example({"context": CONTEXT + "北京", "question": "哪里？"}, None, (), (Answer("北京", len(CONTEXT)),)),
    Example({"context": CONTEXT, "question": "哪里？"}, None),
)


def test_windows_without_the_answer_do_not_count_and_unanswerable_questions_do() -> None:
    card = load_card("cmrc2018")
    formatter = MrcFormatter(card, load_backbone("mini").tokenizer, 64)
    inputs = [item for i, example in enumerate(EXAMPLES) for item in formatter.inputs(example, i)]
    with_answer = [item.start > 0 for item in inputs]
    assert 0 < sum(with_answer) < sum(item.example == 0 for item in inputs)  # several windows, few hold it
    assert has_gold(replace(card, unanswerable=False), inputs) == with_answer
    assert has_gold(replace(card, unanswerable=True), inputs) == [
        found or item.example == 1 for found, item in zip(with_answer, inputs, strict=True)
    ]


def test_where_no_input_has_an_answer_all_count() -> None:
    card = load_card("cmrc2018")
    formatter = MrcFormatter(card, load_backbone("mini").tokenizer, 64)
    inputs = formatter.inputs(EXAMPLES[1], 0)
    assert np.all(has_gold(card, inputs))
