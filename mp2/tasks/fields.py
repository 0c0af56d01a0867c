"""Examples as their bare text fields, for heads that read the fields' states and no options."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from mp2.errors import UsageError
from mp2.tasks.card import TaskCard
from mp2.tasks.example import Example
from mp2.tasks.mrc import MIN_TEXT_TOKENS, MrcInput, fair_lengths

if TYPE_CHECKING:
    from mp2.backbone.tokenizer import Tokenizer


class FieldFormatter:
    """Writes classification examples as ``[CLS] field [SEP] field [SEP]``; the longest fields are cut."""

    def __init__(self, card: TaskCard, tokenizer: Tokenizer, max_tokens: int) -> None:
        """Raises UsageError for a task that is no classification, or no room for its fields."""
        if card.type != "classification":
            raise UsageError(
                f"task '{card.task}' is {card.type.replace('_', ' ')}; the ridge head is for classification: "
                "use --head span with pre-trained prompts"
            )
        self.card, self.tokenizer, self.max_tokens = card, tokenizer, max_tokens
        self._encode = lru_cache(maxsize=1024)(tokenizer.encode)
        self.room = max_tokens - 1 - len(card.fields)  # for the fields
        if self.room < MIN_TEXT_TOKENS:
            raise UsageError(
                f"task '{card.task}' does not fit {max_tokens} tokens: allow {MIN_TEXT_TOKENS} for the text "
                f"and {1 + len(card.fields)} for [CLS] and [SEP]"
            )
        self._labels = {label: index for index, label in enumerate(card.labels)}

    def training_inputs(self, example: Example, index: int) -> list[MrcInput]:
        """Return the one sequence of an example; see `inputs`."""
        return self.inputs(example, index)

    def inputs(self, example: Example, index: int) -> list[MrcInput]:
        """Return the one sequence; ``segments`` are the fields, ``index`` the example's number."""
        fields = [self._encode(example.fields[name]).ids for name in self.card.fields]
        caps = fair_lengths([len(ids) for ids in fields], self.room)
        ids, segments = [self.tokenizer.cls_id], []
        for field, cap in zip(fields, caps, strict=True):
            segments.append((len(ids), len(ids) + min(cap, len(field)) - 1))
            ids += [*field[:cap], self.tokenizer.sep_id]
        return [
            MrcInput(
                example=index,
                input_ids=np.array(ids, np.int64),
                start=0,
                end=0,
                option_spans=np.empty((0, 2), np.int64),
                label=-1 if example.label is None else self._labels[str(example.label)],
                segments=np.array(segments, np.int64),
            )
        ]

    def fits(self, example: Example) -> bool:
        """Every example does: its fields are cut."""
        return True
