"""Accuracy, and the character-level F1 and exact match of extraction tasks as CMRC 2018 defines them.

CMRC 2018 (Cui et al. 2019, the script ``cmrc2018_evaluate.py``): answers are lower-cased, punctuation is
removed, Chinese text is split into characters and the rest into words; the overlap is the longest common
*contiguous* run of such segments; F1 is taken against the best reference, and is 0 without an overlap. Exact
match compares what is left of both texts without punctuation. Two things about the script:

- Its punctuation list has the ellipsis as one string of two characters, which no single character equals:
  "…" is not removed. Neither is it here.
- It splits runs of other scripts by NLTK's English rules. Here a word is a run of letters and digits, a run
  of ellipses, or a single other sign.

Where an example has no answer (cards with ``unanswerable``, unknown to the script), only the empty prediction
is right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from mp2.tasks.card import TaskCard
from mp2.tasks.example import Example

_PUNCTUATION = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_SEGMENT = re.compile(
    r"[\u4e00-\u9fa5]|(?:(?![\u4e00-\u9fa5_])\w)+(?:[.,](?:(?![\u4e00-\u9fa5_])\w)+)*|…+|\S"
)


def score(card: TaskCard, predictions: Sequence[str | int], examples: Sequence[Example]) -> float:
    """Return the card's metric in [0, 1], the mean over the examples.

    Raises ``ValueError`` if there are no examples, lengths differ, or a label is missing.
    """
    if not examples or len(predictions) != len(examples):
        raise ValueError(
            f"{len(predictions)} predictions for {len(examples)} examples, expected as many, and some"
        )
    if card.type == "extraction":
        values = [_best(character_f1, str(p), e) for p, e in zip(predictions, examples, strict=True)]
        return sum(values) / len(values)
    golds = [e.label for e in examples]
    if None in golds:
        raise ValueError(f"example {golds.index(None)} has no label to score against")
    return accuracy(predictions, [gold for gold in golds if gold is not None])


def exact_match(predictions: Sequence[str | int], examples: Sequence[Example]) -> float:
    """Return the share of extraction examples whose prediction is one of the answers, punctuation aside."""
    values = [is_right(e, p) for p, e in zip(predictions, examples, strict=True)]
    return sum(values) / len(values)


def is_right(example: Example, prediction: str | int) -> bool:
    """Tell whether it is the example's label or option or, punctuation aside, one of its answers."""
    if example.label is not None:
        return prediction == example.label
    return bool(_best(equal_text, str(prediction), example))


def _best(measure: Callable[[str, str], float], prediction: str, example: Example) -> float:
    """Return the measure against the best answer; without one, whether the prediction is empty."""
    empty = float(not prediction.strip())
    return max((measure(prediction, answer.text) for answer in example.answers), default=empty)


def accuracy(predictions: Sequence[str | int], golds: Sequence[str | int]) -> float:
    """Return the share of predictions that equal the gold."""
    return sum(p == g for p, g in zip(predictions, golds, strict=True)) / len(golds)


def character_f1(prediction: str, reference: str) -> float:
    """Return the F1 of two answers by their longest common run; 0 without one."""
    ours, theirs = segments(prediction), segments(reference)
    common = longest_common_run(ours, theirs)
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def equal_text(prediction: str, reference: str) -> float:
    """Return 1 where two answers are equal without case, outer blanks and punctuation, else 0."""
    return float(_bare(prediction) == _bare(reference))


def segments(text: str) -> list[str]:
    """Return Chinese characters one by one and other words whole, lower-cased, without punctuation."""
    return _SEGMENT.findall(_bare(text))


def _bare(text: str) -> str:
    return "".join(char for char in text.lower().strip() if char not in _PUNCTUATION)


def longest_common_run(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest run of equal neighbours in both sequences."""
    short, long = sorted((a, b), key=len)
    if "\0".join(["", *short, ""]) in "\0".join(
        ["", *long, ""]
    ):  # an answer and its context: no table is needed
        return len(short)
    best = 0
    previous = [0] * (len(b) + 1)
    for x in a:
        current = [0] * (len(b) + 1)
        for j, y in enumerate(b, 1):
            if x == y:
                current[j] = previous[j - 1] + 1
                best = max(best, current[j])
        previous = current
    return best
