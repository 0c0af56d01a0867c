"""What the same few-shot examples give without any tuning: the lines that stand beside every result.

=================  =================================================================================
type               baselines
=================  =================================================================================
classification     the majority class; TF-IDF of character 1- to 3-grams + logistic regression; a linear
                   probe: logistic regression on the frozen encoder's states, mean over the tokens
multiple_choice    the majority index; the option most similar to question and context by TF-IDF; a linear
                   probe on the states of option and text
extraction         the whole context; the nearest clause to the question (to the training answers where
                   there is no question); where the card says ``unanswerable``, no answer
=================  =================================================================================

What is fitted is fitted on the few-shot training examples alone, the strength of the regularisation as well.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mp2.tasks.baseline_models import Similarity, TfIdf, fitted_logistic, standardised
from mp2.tasks.card import TaskCard
from mp2.tasks.example import Example
from mp2.tasks.metrics import score

Floats = npt.NDArray[np.floating[Any]]
States = Callable[[Sequence[tuple[str, ...]]], Floats]
"""Texts (one or several an input) -> the frozen encoder's states [n, H], mean over each input's tokens."""
Predictions = Sequence[str | int]

_CLAUSE = re.compile(r"[^，。！？；：、,.!?;:\s]+")


@dataclass(frozen=True)
class Baseline:
    """One line: its scores by split; ``note`` says why there are none."""

    key: str
    name: str
    scores: dict[str, float]
    note: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the line as ``result.json`` has it."""
        scores = {f"{split}_score": self.scores.get(split) for split in ("dev", "test")}
        return {"name": self.name, **scores, "note": self.note}


def baselines(
    card: TaskCard,
    train: Sequence[Example],
    scored: Mapping[str, Sequence[Example]],
    states: States | None = None,
) -> list[Baseline]:
    """Return the task's baselines, fitted on ``train`` and scored on each split of ``scored``.

    ``states`` computes what the probe looks at; without it there is no probe, and its line says so.
    """
    predictors = {
        "classification": _classification,
        "multiple_choice": _multiple_choice,
        "extraction": _extraction,
    }[card.type](card, train, states)
    lines = []
    for key, name, predict in predictors:
        if isinstance(predict, str):
            lines.append(Baseline(key, name, {}, predict))
            continue
        scores = {
            split: score(card, predict(examples), examples) for split, examples in scored.items() if examples
        }
        lines.append(Baseline(key, name, scores))
    return lines


def verdict(
    metric: str, split: str, found: float, lines: Sequence[Baseline], first: str = "", longer: str = "--iters"
) -> str | None:
    """Return what to say of a score that is at or below a baseline of the same split; None if it is above.

    ``first`` is what to try before anything else, ``longer`` the option that lets a run go on for longer. Of
    a full score nothing is to be tried.
    """
    beaten_by = [line for line in lines if line.scores.get(split, -1.0) >= found]
    if not beaten_by:
        return None
    if found >= 1.0:
        names = " and ".join(line.name for line in beaten_by)
        return f"{split} {metric} 100.0, as of {names}: there is nothing to gain on these examples"
    named = " or ".join(f"{line.name} ({100 * line.scores[split]:.1f})" for line in beaten_by)
    trivial = [line for line in beaten_by if line.key in ("majority", "no_answer", "whole_context")]
    if trivial:
        advice = (
            f"check the card and the labels with 'mp2 tasks check', then more {longer}, other --prompts or "
            "another --backbone"
        )
    else:
        advice = f"more {longer}, more examples (--shots), another --backbone, or use that baseline instead"
    return f"{split} {metric} {100 * found:.1f} is not better than {named}; what to try: {first}{advice}"


# --- what each type has: (key, name, predictions of examples or why there are none) ---------------

_Predictor = tuple[str, str, Callable[[Sequence[Example]], Predictions] | str]
_NO_STATES = "no backbone was given"


def _classification(card: TaskCard, train: Sequence[Example], states: States | None) -> list[_Predictor]:
    labels = [str(example.label) for example in train]
    counts = Counter(labels)
    most = max(card.labels, key=lambda label: counts[label])  # ties: the card's first
    tfidf = TfIdf([_text(example) for example in train])
    by_text = fitted_logistic(tfidf.train, labels)

    def from_text(examples: Sequence[Example]) -> Predictions:
        return by_text.labels(tfidf([_text(example) for example in examples]))

    probe: Callable[[Sequence[Example]], Predictions] | str = _NO_STATES
    if states is not None:
        scale, features = standardised(states([_texts(example) for example in train]))
        by_state = fitted_logistic(features, labels)

        def probe(examples: Sequence[Example]) -> Predictions:
            return by_state.labels(scale(states([_texts(example) for example in examples])))

    return [
        ("majority", "majority class", lambda examples: [most] * len(examples)),
        ("tfidf", "TF-IDF + logistic regression", from_text),
        ("probe", "linear probe", probe),
    ]


def _multiple_choice(card: TaskCard, train: Sequence[Example], states: States | None) -> list[_Predictor]:
    counts = Counter(int(example.label or 0) for example in train)
    most = max(sorted(counts), key=lambda index: counts[index])

    similarity = Similarity([text for example in train for text in (_text(example), *example.options)])

    def by_similarity(examples: Sequence[Example]) -> Predictions:
        near = similarity([_text(example) for example in examples], [e.options for e in examples])
        return [int(np.argmax(cosines)) for cosines in near]

    probe: Callable[[Sequence[Example]], Predictions] | str = _NO_STATES
    if states is not None:
        pairs = _pair_states(states, train)
        right = [index == example.label for example in train for index in range(len(example.options))]
        scale, features = standardised(np.concatenate(pairs))
        by_state = fitted_logistic(features, ["right" if r else "wrong" for r in right])

        def probe(examples: Sequence[Example]) -> Predictions:
            found = _pair_states(states, examples)
            return [int(np.argmax(by_state.log_odds(scale(pair), "right"))) for pair in found]

    return [
        ("majority", "majority index", lambda examples: [min(most, len(e.options) - 1) for e in examples]),
        ("tfidf", "TF-IDF similarity of option and text", by_similarity),
        ("probe", "linear probe on option and text", probe),
    ]


def _extraction(card: TaskCard, train: Sequence[Example], states: States | None) -> list[_Predictor]:
    answers = " ".join(answer.text for example in train for answer in example.answers)

    similarity = Similarity([text for example in train for text in example.fields.values()])

    def nearest(examples: Sequence[Example]) -> Predictions:
        contexts = [example.fields["context"] for example in examples]
        clauses = [_CLAUSE.findall(context) or [context] for context in contexts]
        others = [[text for name, text in e.fields.items() if name != "context"] for e in examples]
        questions = [" ".join(texts).strip() or answers for texts in others]
        near = similarity(questions, clauses)
        return [spans[int(np.argmax(cosines))] for spans, cosines in zip(clauses, near, strict=True)]

    lines: list[_Predictor] = [
        ("whole_context", "whole context", lambda examples: [e.fields["context"] for e in examples]),
        ("nearest", "nearest clause by TF-IDF", nearest),
        ("probe", "linear probe", "an answer is a span, not one of a set of classes"),
    ]
    if card.unanswerable:
        lines.insert(0, ("no_answer", "no answer", lambda examples: [""] * len(examples)))
    return lines


def _texts(example: Example) -> tuple[str, ...]:
    return tuple(example.fields.values())


def _text(example: Example) -> str:
    return "\n".join(example.fields.values())


def _pair_states(states: States, examples: Sequence[Example]) -> list[Floats]:
    """Return for each example what the probe sees of its options, [n_options, 3 H].

    An option's state, its distance to the text's and its product with the text's.
    """
    texts = states([_texts(example) for example in examples])
    options = states([(option,) for example in examples for option in example.options])
    found, at = [], 0
    for text, example in zip(texts, examples, strict=True):
        option = options[at : at + len(example.options)]
        at += len(example.options)
        found.append(np.concatenate([option, np.abs(option - text), option * text], axis=1))
    return found
