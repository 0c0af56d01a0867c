"""A backbone with modular prompts on it, and the loss of its span head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mp2.backbone.encoder import Encoder
from mp2.prompts import ModularPrompts
from mp2.training.mixture import Batch


def span_losses(start_logits: Tensor, end_logits: Tensor, mask: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Losses [N] of sequences: (start + end cross-entropy) / 2 over real positions; padding is masked."""
    start_logits = start_logits.float().masked_fill(~mask, -torch.inf)
    end_logits = end_logits.float().masked_fill(~mask, -torch.inf)
    return (
        F.cross_entropy(start_logits, start, reduction="none")
        + F.cross_entropy(end_logits, end, reduction="none")
    ) / 2


def span_loss(start_logits: Tensor, end_logits: Tensor, mask: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Mean of ``span_losses`` over the batch."""
    return span_losses(start_logits, end_logits, mask, start, end).mean()


class PromptedEncoder(nn.Module):
    """A backbone with modular prompts on it; ``encoder`` may be frozen."""

    def __init__(self, encoder: Encoder, prompts: ModularPrompts) -> None:
        super().__init__()
        self.encoder = encoder
        self.prompts = prompts

    def forward(self, batch: Batch, temperature: float, noise: torch.Generator) -> Tensor:
        """Loss of a batch, its sequences weighted by ``batch.weight``, under a relaxed router sample."""
        weights = self.prompts.router_weights(batch.task, temperature=temperature, generator=noise)
        start, end = self.prompts(self.encoder, batch.input_ids, batch.mask, weights)
        return (span_losses(start, end, batch.mask, batch.start, batch.end) * batch.weight).sum()
