"""Step 1 of the paper's Figure 1: self-supervised training of a backbone by masked language modelling.

What is masked and predicted: ``mp2.training.masking``. The run: ``mp2.training.mlm_trainer``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mp2.backbone.config import BackboneConfig
from mp2.backbone.encoder import Encoder
from mp2.backbone.mlm_head import MlmHead, MlmTransform
from mp2.errors import UsageError
from mp2.limits import check_seed
from mp2.training.contrastive import contrastive_loss


@dataclass(frozen=True, kw_only=True)
class MlmConfig:
    """How a backbone is trained; the defaults are the command line's, and step 1 of recipes/mini.sh."""

    n_layers: int = 4
    hidden: int = 128
    n_heads: int = 4
    ffn: int = 512
    vocab_size: int = 5300
    max_positions: int = 256
    length: int = 128
    batch_size: int = 32
    steps: int = 3600
    learning_rate: float = 1e-3
    warmup_steps: int | None = None  # None: a twentieth of all
    decay_steps: int | None = None  # None: all that follow the warm-up
    weight_decay: float = 0.01
    masking: Literal["char", "span", "mixed"] = "char"
    mask_rate: float = 0.15
    contrastive: float = 0.0  # weight of mp2.training.contrastive
    ppmi_init: bool = True
    precision: str = "bf16"
    seed: int = 0
    checkpoint_minutes: float = 5.0

    def __post_init__(self) -> None:
        for name, option in (
            ("n_layers", "layers"),
            ("hidden", "hidden"),
            ("n_heads", "heads"),
            ("ffn", "ffn"),
            ("max_positions", "max-positions"),
            ("steps", "steps"),
            ("batch_size", "batch-size"),
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"--{option} {getattr(self, name)}, expected at least 1")
        for name in ("warmup_steps", "decay_steps"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"--{name.replace('_', '-')} {value}, expected at least 0")
        if self.hidden % self.n_heads:
            raise UsageError(f"--hidden {self.hidden} is not a multiple of {self.n_heads} heads")
        check_seed(self.seed)
        if self.length > self.max_positions:
            raise UsageError(
                f"--length {self.length} exceeds the {self.max_positions} positions of the backbone"
            )
        if self.length < 3:
            raise UsageError(f"--length {self.length}, expected at least 3: [CLS], a character, [SEP]")
        if self.precision not in ("fp32", "bf16"):
            raise UsageError(f"precision '{self.precision}', expected fp32 or bf16")
        if self.masking not in ("char", "span", "mixed"):
            raise UsageError(f"masking '{self.masking}', expected char, span or mixed")
        if not 0 < self.mask_rate < 1:
            raise UsageError(f"mask rate {self.mask_rate}, expected a share between 0 and 1")
        if not 0 <= self.contrastive < math.inf:
            raise UsageError(f"--contrastive {self.contrastive}, expected a weight of 0 or more")
        if self.contrastive and self.batch_size % 2:
            raise UsageError(
                f"--batch-size {self.batch_size}, expected an even one with --contrastive: rows come in pairs"
            )
        if not 0 < self.learning_rate < 1:
            raise UsageError(f"--lr {self.learning_rate}, expected 0 < rate < 1")
        if not 0 <= self.checkpoint_minutes < math.inf:
            raise UsageError(f"--checkpoint-minutes {self.checkpoint_minutes}, expected 0 or more")


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
