"""The checkpoint's own masked-language-model head, read at label words: BBT and BBTv2 as published.

Sun et al. 2022, "Black-Box Tuning for Language-Model-as-a-Service": the template has [MASK] where the answer
stands, and a label's score is what the model gives its word there. Label words may have several tokens: the
template then has as many [MASK], and the score is the mean log-probability of the word's tokens (an input for
each length of word, see `mp2.tasks.ClozeFormatter`). The loss is the cross-entropy over the labels' scores;
of multiple choice, whose words are the letters of its options, over those that the example has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mp2.heads.head import States

if TYPE_CHECKING:
    from mp2.backbone.mlm_head import MlmHead
    from mp2.tasks import MrcInput

Floats = NDArray[np.float64]


class LabelWordHead:
    """Scores of label words at [MASK]; the last layer's states."""

    layer: int | None = None

    def __init__(self, mlm: MlmHead, words: Sequence[Sequence[int]], train: Sequence[MrcInput] = ()) -> None:
        """Take the checkpoint's head, the token ids of each label's word, and what losses are asked for."""
        self._mlm, self._words, self._train = mlm, [list(word) for word in words], list(train)
        numbers = np.array([item.example for item in self._train], dtype=np.int64)
        self._of_example = [np.flatnonzero(numbers == number) for number in np.unique(numbers)]
        self._lengths = torch.tensor([len(word) for word in self._words])
        longest = int(self._lengths.max())
        tokens = torch.tensor([[*word, *[word[0]] * (longest - len(word))] for word in self._words])
        self._known, places = torch.unique(tokens, return_inverse=True)  # ids that any label needs
        self._places = places.view_as(tokens)  # [C, longest], into them

    @property
    def sha256(self) -> str:
        """Hash of the checkpoint's head."""
        return self._mlm.sha256()

    def to(self, device: torch.device) -> LabelWordHead:
        """See `Head.to`."""
        moved = LabelWordHead(self._mlm.to(device), self._words, self._train)
        moved._lengths, moved._known, moved._places = (
            x.to(device) for x in (self._lengths, self._known, self._places)
        )
        return moved

    def targets(self, inputs: Sequence[MrcInput]) -> NDArray[np.int64]:
        """Return the first [MASK] and the last of each input [N, 2]."""
        return np.stack([item.segments[0] for item in inputs])

    def training_outputs(self, states: States) -> Tensor:
        """Return log-scores [p, n, C] float32; -inf for words of another length than the input's [MASK]s."""
        first, last = states.targets.unbind(-1)  # [n]
        n_masks = last - first + 1
        at_slot = []
        for slot in range(self._places.shape[1]):
            hidden = states.at(torch.minimum(first + slot, last))  # [p, n, H]
            log_probs = torch.log_softmax(self._mlm.logits(hidden.float()), -1)
            at_slot.append(log_probs[..., self._known])
        log_probs = torch.stack(at_slot, -1)  # [p, n, known, longest]
        slots = torch.arange(log_probs.shape[-1], device=log_probs.device)
        of_word = log_probs[:, :, self._places, slots]  # [p, n, C, longest]
        inside = slots < self._lengths[:, None]  # [C, longest]
        scores = of_word.masked_fill(~inside, 0.0).sum(-1) / self._lengths
        return scores.masked_fill(n_masks[:, None] != self._lengths, float("-inf"))

    def scoring_outputs(self, states: States) -> Tensor:
        """Return what `training_outputs` does."""
        return self.training_outputs(states)

    def losses(self, outputs: NDArray[np.floating]) -> Floats:
        """Mean cross-entropy [P] over the training examples, from their inputs' log-scores [P, N, C]."""
        losses = []
        for own in self._of_example:  # its inputs, one for each length of word
            item = self._train[own[0]]
            scores = outputs[:, own, : _n_words(item)].max(1).astype(np.float64)  # [P, C]
            gold = scores[:, item.label]
            losses.append(np.logaddexp.reduce(scores, 1) - gold)
        mean: Floats = np.mean(losses, axis=0)
        return mean

    def fit(self, outputs: Callable[[], NDArray[np.floating]]) -> LabelWordHead:
        """Return itself."""
        return self

    def scores(self, item: MrcInput, output: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return the log-scores [C] of this input's words, the others -inf; as many as it has options."""
        return output[: _n_words(item)]

    def gold_losses(self, inputs: Sequence[MrcInput], outputs: Sequence[NDArray[np.floating]]) -> list[float]:
        """Return the cross-entropy of each example's gold label."""
        rows: dict[int, Floats] = {}
        labels: dict[int, int] = {}
        for item, output in zip(inputs, outputs, strict=True):
            row = np.asarray(self.scores(item, output), dtype=np.float64)
            rows[item.example] = np.maximum(rows.get(item.example, row), row)
            labels[item.example] = item.label
        return [float(np.logaddexp.reduce(row) - row[labels[i]]) for i, row in rows.items()]


def _n_words(item: MrcInput) -> int | None:
    """How many of the words are answers to this input: all of them where it brings no options of its own."""
    return len(item.option_spans) or None
