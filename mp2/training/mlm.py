"""Step 1 of the paper's Figure 1: self-supervised training of a backbone by masked language modelling.

What is masked and predicted: ``mp2.training.masking``. The run: ``mp2.training.mlm_trainer``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mp2.backbone.config import BackboneConfig
from mp2.backbone.encoder import Encoder
from mp2.backbone.mlm_head import MlmHead, MlmTransform
from mp2.training.contrastive import contrastive_loss


class MaskedLanguageModel(nn.Module):
    """Encoder, BERT's transform, and output embeddings tied to the input's."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.transform = nn.Linear(config.hidden, config.hidden)
        self.transform_norm = nn.LayerNorm(config.hidden, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Matrices N(0, 0.02), gains one, the rest zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.zero_()

    def forward(
        self, input_ids: Tensor, chosen: Tensor, targets: Tensor, starts: Tensor, shared: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Mean cross-entropy over the chosen positions; with ``shared`` the contrastive loss too.

        ``input_ids`` [N, T]; ``chosen`` [n] indices into the flattened N*T; ``targets`` [n];
        ``starts`` [N] first position of each row, so that short rows train the whole position table;
        ``shared`` [N, T]: see ``contrastive_loss``.
        """
        encoder = self.encoder
        positions = starts[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)
        positions[:, 0] = 0  # [CLS] always stands at 0
        hidden = encoder._embed(encoder.word_embeddings(input_ids), encoder.position_embeddings(positions))
        for i in range(encoder.config.n_layers):
            hidden = encoder.layer(i, hidden)
        picked = hidden.flatten(0, 1)[chosen]
        picked = self.transform_norm(F.gelu(self.transform(picked)))
        logits = F.linear(picked, encoder.word_embeddings.weight, self.bias)
        predicted = F.cross_entropy(logits.float(), targets)
        return (predicted,) if shared is None else (predicted, contrastive_loss(hidden, shared))

    def head(self) -> MlmHead:
        """Everything but the encoder, as backbones carry it; the decoder is the encoder's word embeddings."""
        config = self.encoder.config
        transform = MlmTransform(
            dense_weight=self.transform.weight.detach(),
            dense_bias=self.transform.bias.detach(),
            norm_weight=self.transform_norm.weight.detach(),
            norm_bias=self.transform_norm.bias.detach(),
            activation="gelu",
            norm_eps=config.layer_norm_eps,
        )
        words = self.encoder.word_embeddings.weight.detach()
        return MlmHead(transform=transform, decoder=words, bias=self.bias.detach(), tied=True)


def schedule(step: int, steps: int, warmup_steps: int | None, decay_steps: int | None) -> float:
    """Share of the peak learning rate: linear warm-up, constant, then linear to zero over the last steps.

    Warm-up, stable, decay (Hu et al., 2024, MiniCPM): until it decays a run does not depend on where it will
    end. ``warmup_steps`` None: a twentieth of all; ``decay_steps`` None: all that follow the warm-up.
    """
    warmup = math.ceil(steps / 20) if warmup_steps is None else warmup_steps
    decay = steps - warmup if decay_steps is None else decay_steps
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1, decay))
