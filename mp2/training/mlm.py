"""Step 1 of the paper's Figure 1: self-supervised training of a backbone by masked language modelling.

What is masked and predicted: ``mp2.training.masking``. The run: ``mp2.training.mlm_trainer``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

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
        """Embeddings N(0, 0.02), positions sinusoids of that size, gains one, biases zero.

        The other matrices are N(0, s), s = 0.02 at BERT's width of 768 and as 1 / sqrt(H) otherwise: a narrow
        layer adds as much to its input as a wide one.
        """
        scale = 0.02 * math.sqrt(768 / self.encoder.config.hidden)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif parameter.dim() > 1:
                size = 0.02 if "embeddings" in name else scale
                parameter.normal_(0.0, size, generator=generator)
            else:
                parameter.zero_()
        positions = self.encoder.position_embeddings.weight
        positions.copy_(0.02 * math.sqrt(2) * sinusoids(*positions.shape))

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


def sinusoids(n_positions: int, hidden: int) -> Tensor:
    """Sine and cosine of each position at wavelengths from 2 pi to 20,000 pi, [n_positions, H].

    Vaswani et al. (2017, section 3.5). As a start of the position table they let attention find a token's
    neighbours from the first step on; random rows must first learn who stands beside whom.
    """
    at = torch.arange(n_positions)[:, None]
    rates = 10_000.0 ** (-torch.arange(0, hidden, 2) / hidden)  # [H / 2, rounded up]
    angles = at * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :hidden]


def schedule(step: int, steps: int, warmup_steps: int | None, decay_steps: int | None) -> float:
    """Share of the peak learning rate: linear warm-up, constant, then linear to zero over the last steps.

    Warm-up, stable, decay (Hu et al., 2024, MiniCPM): until it decays a run does not depend on where it will
    end. ``warmup_steps`` None: a twentieth of all; ``decay_steps`` None: all that follow the warm-up.
    """
    warmup = math.ceil(steps / 20) if warmup_steps is None else warmup_steps
    decay = steps - warmup if decay_steps is None else decay_steps
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1, decay))


@contextmanager
def trainable_attention(device: torch.device) -> Iterator[None]:
    """Run forward passes of the block with the attention that trains fastest on ``device``.

    On CPUs the fused kernel keeps no probabilities, and its backward pass takes several times as long as
    the plain formula's (torch 2.13, bf16, sequences of 128: 140 ms a layer against 30). The plain formula
    multiplies in the type that it is given; torch's default computes it in float32.
    """
    if device.type != "cpu":
        yield
        return
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # named for CUDA, read on CPUs too
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


@contextmanager
def tiny_numbers_as_zero() -> Iterator[None]:
    """While entered, CPU arithmetic takes numbers below 1.2e-38 (denormals) as zero; before, as it was.

    A processor handles each of them in microcode. Once attention has become sharp, its backward pass is full
    of them: over the checkpoint of step 5,300 of a 6 x 256 model a step took 1.6 s with them, 0.93 without.
    Threads that OpenMP has started before stay as they were, so this is entered before the first product.
    """
    as_zero = bool(torch.tensor(1e-39).mul(0.5) == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(as_zero)
