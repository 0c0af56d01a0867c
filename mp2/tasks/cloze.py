"""Examples as cloze texts, for the masked-language-model head: [MASK] stands where the label's word would."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from mp2.errors import UsageError
from mp2.tasks.card import TaskCard
from mp2.tasks.card_rules import template_parts
from mp2.tasks.example import Example
from mp2.tasks.mrc import MIN_TEXT_TOKENS, MrcInput, fair_lengths, label_words

if TYPE_CHECKING:
    from mp2.backbone.tokenizer import Tokenizer

_ASKS_FOR_OPTIONS = re.compile(r"[，。；]?选项[：:]?\{options\}")


def cloze_template(card: TaskCard) -> str:
    """The card's cloze, or its template with an answer in place of the options: ``答案：{label}。``."""
    if card.cloze is not None:
        return card.cloze
    text, n_found = _ASKS_FOR_OPTIONS.subn("答案：{label}。", card.template)
    return text if n_found else card.template.replace("{options}", "答案：{label}。")


class ClozeFormatter:
    """Writes classification examples as cloze texts of at most ``max_tokens``.

    Label words have one token or several, and a text has as many [MASK] as the word tokens: an example is
    written once for every length of word that the card has.
    """

    def __init__(self, card: TaskCard, tokenizer: Tokenizer, max_tokens: int) -> None:
        """Raises UsageError for a task that is no classification, or words that cannot be spelled."""
        if card.type != "classification":
            raise UsageError(
                f"task '{card.task}' is {card.type.replace('_', ' ')}; the masked-language-model head is for "
                "classification: use --head span with pre-trained prompts"
            )
        self.card, self.tokenizer = card, tokenizer
        self._encode = lru_cache(maxsize=1024)(tokenizer.encode)
        self.words = label_words(card, tokenizer)
        self._lengths = sorted({len(word) for word in self.words})
        self._labels = {label: index for index, label in enumerate(card.labels)}
        self._parts = [
            (self._encode(literal).ids if literal else [], name)
            for literal, name in template_parts(cloze_template(card))
        ]
        literals = sum(len(literal) for literal, _ in self._parts)
        self.room = max_tokens - 2 - literals - max(self._lengths)  # for the fields
        if self.room < MIN_TEXT_TOKENS:
            raise UsageError(
                f"task '{card.task}' does not fit {max_tokens} tokens: its cloze takes "
                f"{max_tokens - self.room}, and the text needs at least {MIN_TEXT_TOKENS}; allow more tokens"
            )

    def training_inputs(self, example: Example, index: int) -> list[MrcInput]:
        """Return the sequences of an example; see `inputs`."""
        return self.inputs(example, index)

    def inputs(self, example: Example, index: int) -> list[MrcInput]:
        """Return a sequence for each length of word; ``segments`` is its run of [MASK]."""
        names = self.card.fields
        fields = [self._encode(example.fields[name]).ids for name in names]
        caps = fair_lengths([len(ids) for ids in fields], self.room)
        cut = {name: ids[:cap] for name, ids, cap in zip(names, fields, caps, strict=True)}
        return [self._with_masks(example, index, cut, n) for n in self._lengths]

    def fits(self, example: Example) -> bool:
        """Every example does: its fields are cut."""
        return True

    def _with_masks(
        self, example: Example, index: int, fields: dict[str, list[int]], n_masks: int
    ) -> MrcInput:
        ids, at = [self.tokenizer.cls_id], 0
        for literal, name in self._parts:
            ids += literal
            if name == "label":
                at = len(ids)
                ids += [self.tokenizer.mask_id] * n_masks
            elif name is not None:
                ids += fields[name]
        ids.append(self.tokenizer.sep_id)
        return MrcInput(
            example=index,
            input_ids=np.array(ids, np.int64),
            start=0,
            end=0,
            option_spans=np.empty((0, 2), np.int64),
            label=-1 if example.label is None else self._labels[str(example.label)],
            segments=np.array([[at, at + n_masks - 1]], np.int64),
        )
