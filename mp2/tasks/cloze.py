"""Examples as cloze texts, for the masked-language-model head: [MASK] stands where the label's word would.

Multiple choice: the options are written out behind the letters A, B, ... and the answer is a letter, as in
the published BBT (txsun1997/Black-Box-Tuning, ``dataloader_cpt.py``, CCPM and C3).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from mp2.errors import UsageError
from mp2.tasks.card import TaskCard
from mp2.tasks.card_rules import template_parts
from mp2.tasks.example import Example
from mp2.tasks.mrc import CLOSING, MIN_TEXT_TOKENS, MrcInput, fair_lengths, label_words

if TYPE_CHECKING:
    from mp2.backbone.tokenizer import Tokenizer

LETTERS = "ABCDEFGHIJ"  # of the options of multiple choice
AFTER_LETTER, BETWEEN = "、", "；"
_ASKS_FOR_OPTIONS = re.compile(r"[，。；]?选项[：:]?\{options\}")


def cloze_template(card: TaskCard) -> str:
    """The card's cloze, or its template with an answer in place of the options: ``答案：{label}。``.

    Multiple choice: the answer stands after the options.
    """
    if card.cloze is not None:
        return card.cloze
    if card.type == "multiple_choice":
        return card.template.replace("{options}", f"{{options}}{CLOSING}答案：{{label}}{CLOSING}")
    text, n_found = _ASKS_FOR_OPTIONS.subn("答案：{label}。", card.template)
    return text if n_found else card.template.replace("{options}", "答案：{label}。")


def answer_words(card: TaskCard, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the token ids of what may stand at [MASK]: the words of the labels, or the options' letters.

    Raises ``UsageError`` naming what the vocabulary cannot spell.
    """
    if card.type == "classification":
        return label_words(card, tokenizer)
    letters = [list(tokenizer.encode(letter).ids) for letter in LETTERS]
    unspelled = [x for x, ids in zip(LETTERS, letters, strict=True) if not ids or tokenizer.unk_id in ids]
    if unspelled:
        raise UsageError(
            f"task '{card.task}': the tokenizer cannot spell the letters {', '.join(unspelled)} that its "
            "options would have for the masked-language-model head: use --head span with pre-trained prompts"
        )
    return letters


class ClozeFormatter:
    """Writes classification and multiple-choice examples as cloze texts of at most ``max_tokens``.

    Label words have one token or several, and a text has as many [MASK] as the word tokens: an example is
    written once for every length of word that the card has. Options of multiple choice that leave the text
    fewer than ``MIN_TEXT_TOKENS`` are cut, the longest first.
    """

    def __init__(self, card: TaskCard, tokenizer: Tokenizer, max_tokens: int) -> None:
        """Raises UsageError for an extraction task, or words that cannot be spelled."""
        if card.type == "extraction":
            raise UsageError(
                f"task '{card.task}' is extraction; the masked-language-model head is for classification and "
                "multiple choice: use --head span with pre-trained prompts"
            )
        self.card, self.tokenizer, self.max_tokens = card, tokenizer, max_tokens
        self._encode = lru_cache(maxsize=1024)(tokenizer.encode)
        self.words = answer_words(card, tokenizer)
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
        n_text = sum(map(len, fields))
        options = self._lettered(example, self.room - min(n_text, MIN_TEXT_TOKENS))
        caps = fair_lengths([len(ids) for ids in fields], self.room - sum(map(len, options)))
        cut = {name: ids[:cap] for name, ids, cap in zip(names, fields, caps, strict=True)}
        return [self._with_masks(example, index, cut, options, n) for n in self._lengths]

    def fits(self, example: Example) -> bool:
        """Every example does: its fields are cut, and options that leave them no room."""
        return True

    def _lettered(self, example: Example, room: int) -> list[list[int]]:
        """Return the options behind their letters, at most ``room`` tokens; none of a classification."""
        if self.card.type == "classification":
            return []
        n = len(example.options)
        if n > len(LETTERS):
            raise UsageError(
                f"task '{self.card.task}', line {example.source_line}: {n} options, expected at most "
                f"{len(LETTERS)} for the masked-language-model head, which answers with a letter"
            )
        before = [
            [*(self._ids(BETWEEN) if i else []), *self.words[i], *self._ids(AFTER_LETTER)] for i in range(n)
        ]
        options = [self._ids(option) for option in example.options]
        caps = fair_lengths([len(option) for option in options], room - sum(map(len, before)))
        return [[*a, *option[:cap]] for a, option, cap in zip(before, options, caps, strict=True)]

    def _ids(self, text: str) -> list[int]:
        return list(self._encode(text).ids)

    def _with_masks(
        self,
        example: Example,
        index: int,
        fields: dict[str, list[int]],
        options: Sequence[list[int]],
        n_masks: int,
    ) -> MrcInput:
        ids, at, spans = [self.tokenizer.cls_id], 0, []
        for literal, name in self._parts:
            ids += literal
            if name == "label":
                at = len(ids)
                ids += [self.tokenizer.mask_id] * n_masks
            elif name == "options":
                for option in options:
                    spans.append((len(ids), len(ids) + len(option) - 1))
                    ids += option
            elif name is not None:
                ids += fields[name]
        ids.append(self.tokenizer.sep_id)
        label = -1
        if example.label is not None:
            classes = self.card.type == "classification"
            label = self._labels[str(example.label)] if classes else int(example.label)
        return MrcInput(
            example=index,
            input_ids=np.array(ids, np.int64),
            start=0,
            end=0,
            option_spans=np.array(spans, np.int64).reshape(-1, 2),
            label=label,
            segments=np.array([[at, at + n_masks - 1]], np.int64),
        )
