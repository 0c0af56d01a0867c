"""From span log-probabilities to predictions (paper, section 3.1).

Classification and multiple choice: the option whose span maximises log p_start + log p_end. Extraction: the
best span inside the context with start <= end and at most ``max_answer_tokens`` tokens, over all windows;
where the card says ``unanswerable``, no answer ("") wins if [CLS] scores higher in every window than the best
span does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mp2.tasks.card import TaskCard
from mp2.tasks.example import Example
from mp2.tasks.mrc import MrcInput

Floats = npt.NDArray[np.floating]
Prediction = str | int


@dataclass(frozen=True)
class Decoded:
    """The prediction for an example, and how sure the model is of it."""

    prediction: Prediction  # raw label, option index, or answer text
    probability: float  # of the option among the options; of the span among all spans


def decode(
    card: TaskCard, examples: Sequence[Example], inputs: Sequence[MrcInput], scores: Sequence[Floats]
) -> list[Decoded]:
    """Return the prediction for each example.

    ``inputs[i].example`` is an index into ``examples``; ``scores[i]`` are the log-scores [n_options] of
    ``inputs[i]`` (up to a constant) or, for extraction, the log-probabilities [T, 2] of start and end. Of an
    example with several inputs the highest score of an option counts.
    """
    of_example: list[list[int]] = [[] for _ in examples]
    for number, item in enumerate(inputs):
        of_example[item.example].append(number)
    labels = list(card.labels)
    found: list[Decoded] = []
    for index, numbers in enumerate(of_example):
        if not numbers:
            raise ValueError(f"example {index} has no input among the {len(inputs)} given")
        if card.type == "extraction":
            found.append(_answer(card, examples[index], [(inputs[n], scores[n]) for n in numbers]))
            continue
        options = np.max([np.asarray(scores[n], dtype=np.float64) for n in numbers], axis=0)
        best = int(np.argmax(options))
        probability = float(1.0 / np.exp(options - options[best]).sum())
        found.append(Decoded(labels[best] if card.type == "classification" else best, probability))
    return found


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


def _answer(card: TaskCard, example: Example, outputs: Sequence[tuple[MrcInput, Floats]]) -> Decoded:
    score, text, no_answer = -np.inf, "", np.inf
    for item, logp in outputs:
        no_answer = min(no_answer, float(logp[0, 0] + logp[0, 1]))
        if item.context_span is None:
            continue
        first, last = item.context_span
        context = logp[first : last + 1]
        found, i, j = best_span(context[:, 0], context[:, 1], card.max_answer_tokens)
        if found > score:
            score = found
            text = example.fields["context"][item.context_offsets[i][0] : item.context_offsets[j][1]]
    if not text or (card.unanswerable and no_answer > score):
        return Decoded("", float(np.exp(no_answer)))
    return Decoded(text, float(np.exp(score)))
