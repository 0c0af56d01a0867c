"""The paper's head: start and end of the answer's span, each a softmax over the tokens (section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from mp2.heads.head import States

if TYPE_CHECKING:
    from mp2.tasks import MrcInput


class SpanHead:
    """One linear layer to two logits a token."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, layer: int | None = None) -> None:
        """Take ``weight`` [2, H] and ``bias`` [2]: start, end; computed with in float32.

        ``layer``: see `Head.layer`; None for what was trained on the last one.
        """
        self.layer = layer
        self._weight, self._bias = weight.detach().float(), bias.detach().float()

    @property
    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight [2, H] and bias [2], float32."""
        return self._weight, self._bias

    def to(self, device: torch.device) -> SpanHead:
        """See `Head.to`."""
        return SpanHead(self._weight.to(device), self._bias.to(device), self.layer)

    def targets(self, inputs: Sequence[MrcInput]) -> np.ndarray:
        """Return the gold spans [N, 2], ends inclusive."""
        return np.array([[int(x.start), int(x.end)] for x in inputs], dtype=np.int64).reshape(-1, 2)

    def scoring_outputs(self, states: States) -> torch.Tensor:
        """Return float64 log-probabilities [p, n, T, 2]; -inf after an example's last token."""
        logits = states.each(lambda x: F.linear(x.float(), self._weight, self._bias).double(), float("-inf"))
        return torch.log_softmax(logits, 2)

    def training_outputs(self, states: States) -> torch.Tensor:
        """Return the losses [p, n] float64: (CE of the start + CE of the end) / 2."""
        logp = self.scoring_outputs(states)
        gold = states.targets.view(1, -1, 1, 2).expand(len(logp), -1, -1, -1)
        start, end = logp.gather(2, gold).squeeze(2).unbind(-1)
        return -(start + end) / 2

    def losses(self, outputs: np.ndarray) -> np.ndarray:
        """Return their mean over the examples."""
        found: np.ndarray = outputs.mean(axis=1)
        return found

    def fit(self, outputs: Callable[[], np.ndarray]) -> SpanHead:
        """Return itself."""
        return self

    def scores(self, item: MrcInput, output: np.ndarray) -> np.ndarray:
        """Return `span_scores`."""
        return span_scores(item, output)

    def gold_losses(self, inputs: Sequence[MrcInput], outputs: Sequence[np.ndarray]) -> list[float]:
        """Return the losses of the gold spans, as `training_outputs` has them."""
        return [
            -(float(output[item.start, 0]) + float(output[item.end, 1])) / 2
            for item, output in zip(inputs, outputs, strict=True)
        ]


def span_scores(item: MrcInput, logp: np.ndarray) -> np.ndarray:
    """Return log p_start + log p_end of each option's span; ``logp`` [T, 2] itself if there are no options.

    ``logp`` may go on after the item's own tokens.
    """
    if not len(item.option_spans):
        return logp[: len(item.input_ids)]
    found: np.ndarray = logp[item.option_spans[:, 0], 0] + logp[item.option_spans[:, 1], 1]
    return found
