"""From span log-probabilities to predictions (paper, section 3.1).

Classification and multiple choice: the option whose span maximises log p_start + log p_end. Extraction: the
best span inside the context with start <= end and at most ``max_answer_tokens`` tokens, over all windows;
where the card says ``unanswerable``, no answer ("") wins if [CLS] scores higher in every window than the best
span does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mp2.tasks.card import TaskCard
from mp2.tasks.example import Example
from mp2.tasks.mrc import MrcInput

Floats = npt.NDArray[np.floating]
Prediction = str | int


def decode(
    card: TaskCard,
    examples: Sequence[Example],
    inputs: Sequence[MrcInput],
    start_logp: Sequence[Floats],
    end_logp: Sequence[Floats],
) -> list[Prediction]:
    """Return a prediction for each example: raw label, option index, or answer text.

    ``inputs[i].example`` is an index into ``examples``; ``start_logp[i]`` and ``end_logp[i]`` are [T] of
    ``inputs[i]``.
    """
    of_example: list[list[int]] = [[] for _ in examples]
    for number, item in enumerate(inputs):
        of_example[item.example].append(number)
    labels = list(card.labels)
    predictions: list[Prediction] = []
    for index, numbers in enumerate(of_example):
        if not numbers:
            raise ValueError(f"example {index} has no input among the {len(inputs)} given")
        if card.type == "extraction":
            outputs = [(inputs[n], start_logp[n], end_logp[n]) for n in numbers]
            predictions.append(_answer(card, examples[index], outputs))
            continue
        n = numbers[0]
        spans = inputs[n].option_spans
        best = int(np.argmax(start_logp[n][spans[:, 0]] + end_logp[n][spans[:, 1]]))
        predictions.append(labels[best] if card.type == "classification" else best)
    return predictions


def best_span(start_logp: Floats, end_logp: Floats, max_tokens: int) -> tuple[float, int, int]:
    """Return (score, start, end) of the best span of at most ``max_tokens``; ties go to the shortest."""
    n = len(start_logp)
    best = (-np.inf, 0, 0)
    for extra in range(min(max_tokens, n)):
        scores = start_logp[: n - extra] + end_logp[extra:]
        at = int(np.argmax(scores))
        if scores[at] > best[0]:
            best = (float(scores[at]), at, at + extra)
    return best


def _answer(card: TaskCard, example: Example, outputs: Sequence[tuple[MrcInput, Floats, Floats]]) -> str:
    score, text, no_answer = -np.inf, "", np.inf
    for item, start_logp, end_logp in outputs:
        no_answer = min(no_answer, float(start_logp[0] + end_logp[0]))
        if item.context_span is None:
            continue
        first, last = item.context_span
        found, i, j = best_span(
            start_logp[first : last + 1], end_logp[first : last + 1], card.max_answer_tokens
        )
        if found > score:
            score = found
            text = example.fields["context"][item.context_offsets[i][0] : item.context_offsets[j][1]]
    return "" if card.unanswerable and no_answer > score else text
