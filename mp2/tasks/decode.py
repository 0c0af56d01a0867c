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
    card: TaskCard,
    examples: Sequence[Example],
    inputs: Sequence[MrcInput],
    scores: Sequence[Floats],
    temperature: float = 1.0,
) -> list[Decoded]:
    """Return the prediction for each example.

    ``inputs[i].example`` is an index into ``examples``; ``scores[i]`` are the log-scores [n_options] of
    ``inputs[i]`` (up to a constant) or, for extraction, the log-probabilities [T, 2] of start and end. Of an
    example with several inputs the highest score of an option counts. Probabilities are those of scores
    divided by ``temperature``, predictions those of the scores.
    """
    if card.type != "extraction":
        rows = option_scores(len(examples), inputs, scores)
        labels = list(card.labels) if card.type == "classification" else None
        return [_option(row, labels, temperature) for row in rows]
    of_example = _inputs_of(len(examples), inputs)
    return [
        _answer(card, example, [(inputs[n], scores[n]) for n in numbers], temperature)
        for example, numbers in zip(examples, of_example, strict=True)
    ]


def option_scores(n_examples: int, inputs: Sequence[MrcInput], scores: Sequence[Floats]) -> list[Floats]:
    """Return the log-scores float64 [n_options] of each example: the highest of its inputs."""
    return [
        np.max([np.asarray(scores[n], dtype=np.float64) for n in numbers], axis=0)
        for numbers in _inputs_of(n_examples, inputs)
    ]


def _inputs_of(n_examples: int, inputs: Sequence[MrcInput]) -> list[list[int]]:
    """Return the numbers of each example's inputs."""
    found: list[list[int]] = [[] for _ in range(n_examples)]
    for number, item in enumerate(inputs):
        found[item.example].append(number)
    if [] in found:
        raise ValueError(f"example {found.index([])} has no input among the {len(inputs)} given")
    return found


def _option(scores: Floats, labels: Sequence[str] | None, temperature: float) -> Decoded:
    best = int(np.argmax(scores))
    probability = float(1.0 / np.exp((scores - scores[best]) / temperature).sum())
    return Decoded(best if labels is None else labels[best], probability)


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


def _answer(
    card: TaskCard, example: Example, outputs: Sequence[tuple[MrcInput, Floats]], temperature: float
) -> Decoded:
    if any(np.isnan(logp).any() for _, logp in outputs):  # in any window: what it says is not known
        return Decoded("", float("nan"))
    best, text, span = -np.inf, "", None
    no_answer, empty = np.inf, outputs[0][1]
    for item, logp in outputs:
        if (at_cls := float(logp[0, 0] + logp[0, 1])) < no_answer:
            no_answer, empty = at_cls, logp
        if item.context_span is None:
            continue
        first, last = item.context_span
        context = logp[first : last + 1]
        found, i, j = best_span(context[:, 0], context[:, 1], card.max_answer_tokens)
        if found > best:
            best, span = found, (logp, first + i, first + j)
            text = example.fields["context"][item.context_offsets[i][0] : item.context_offsets[j][1]]
    if span is None or not text or (card.unanswerable and no_answer > best):
        return Decoded("", _span_probability(empty, 0, 0, temperature))
    return Decoded(text, _span_probability(*span, temperature))


def _span_probability(logp: Floats, start: int, end: int, temperature: float) -> float:
    """Probability of a span among all spans, from log-probabilities [T, 2] that a temperature divides."""
    scaled = np.asarray(logp, dtype=np.float64) / temperature
    total = np.logaddexp.reduce(scaled, axis=0)
    return float(np.exp(scaled[start, 0] - total[0] + scaled[end, 1] - total[1]))
