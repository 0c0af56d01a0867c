"""Accuracy, and the character-level F1 of Chinese extraction tasks as CMRC 2018 defines it.

CMRC 2018: answers are lower-cased, punctuation is removed, Chinese text is split into characters and the rest
into words; the overlap is the longest common *contiguous* run of such segments; F1 is taken against the best
reference. (The official script splits runs of other scripts by NLTK's English rules; here a word is a run of
letters and digits, or a single other sign.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mp2.tasks.card import TaskCard
from mp2.tasks.example import Example

_PUNCTUATION = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』…")
_SEGMENT = re.compile(r"[\u4e00-\u9fa5]|(?:(?![\u4e00-\u9fa5_])\w)+(?:[.,](?:(?![\u4e00-\u9fa5_])\w)+)*|\S")


def score(card: TaskCard, predictions: Sequence[str | int], examples: Sequence[Example]) -> float:
    """Return the card's metric in [0, 1], the mean over the examples.

    Raises ``ValueError`` if there are no examples, lengths differ, or a label is missing.
    """
    if not examples or len(predictions) != len(examples):
        raise ValueError(
            f"{len(predictions)} predictions for {len(examples)} examples, expected as many, and some"
        )
    if card.type == "extraction":
        values = [
            max((character_f1(str(p), a.text) for a in e.answers), default=character_f1(str(p), ""))
            for p, e in zip(predictions, examples, strict=True)
        ]
        return sum(values) / len(values)
    golds = [e.label for e in examples]
    if None in golds:
        raise ValueError(f"example {golds.index(None)} has no label to score against")
    return accuracy(predictions, [gold for gold in golds if gold is not None])


def accuracy(predictions: Sequence[str | int], golds: Sequence[str | int]) -> float:
    """Return the share of predictions that equal the gold."""
    return sum(p == g for p, g in zip(predictions, golds, strict=True)) / len(golds)


def character_f1(prediction: str, reference: str) -> float:
    """Return the F1 of two answers by their longest common run; an empty answer equals only an empty one."""
    ours, theirs = segments(prediction), segments(reference)
    if not ours or not theirs:
        return float(prediction.strip() == reference.strip())
    common = longest_common_run(ours, theirs)
    return 2 * common / (len(ours) + len(theirs))


def segments(text: str) -> list[str]:
    """Return Chinese characters one by one and other words whole, lower-cased, without punctuation."""
    kept = "".join(char for char in text.lower().strip() if char not in _PUNCTUATION)
    return _SEGMENT.findall(kept)


def longest_common_run(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest run of equal neighbours in both sequences."""
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
