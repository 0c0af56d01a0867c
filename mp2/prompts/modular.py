"""Modular prompts and routers as trainable parameters (paper section 3.2)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mp2.backbone.encoder import Encoder, Prefix
from mp2.prompts.bernoulli import inference_weights, relaxed_bernoulli
from mp2.prompts.prompt_set import PromptMeta, PromptSet, fuse


def _full_precision(like: Tensor) -> torch.autocast:
    """Autocast off, on the device of a tensor: a cast of the inputs alone would be undone by autocast."""
    return torch.autocast(like.device.type, enabled=False)


def prefix_of(encoder: Encoder, layer: int, prompts: Tensor) -> Prefix:
    """Projected prefix: prompts [P, m, H] through layer ``layer``'s own key and value projections.

    Returns keys and values, each [P, h, m, d_h].
    """
    body = encoder.body(layer)
    return body.split_heads(body.key(prompts)), body.split_heads(body.value(prompts))


class ModularPrompts(nn.Module):
    """K intrinsic prompts a layer, a shared projection a layer, a router a task and layer, and the span head.

    Initialisation (authors' code): router logits and z from U(+-1e-3), A from U(+-1/sqrt(m H)).
    """

    def __init__(self, meta: PromptMeta, generator: torch.Generator) -> None:
        super().__init__()
        self.meta = meta
        shapes = meta.shapes()

        def uniform(name: str, bound: float) -> nn.Parameter:
            return nn.Parameter((torch.rand(shapes[name], generator=generator) * 2 - 1) * bound)

        self.z = uniform("z", 1e-3)
        self.projection = uniform("projection", max(1, meta.prompt_tokens * meta.hidden) ** -0.5)
        self.routers = uniform("routers", 1e-3)
        self.span_weight = uniform("span_weight", meta.hidden**-0.5)
        self.span_bias = nn.Parameter(torch.zeros(2))

    def router_weights(
        self, task: int, *, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Router weights [L', K] of a task: a relaxed sample with a generator, else as at inference.

        Those of a single soft prompt are 1: divided by its own weight it is itself, whatever the weight.
        """
        logits = self.routers[task]
        if self.meta.is_single:
            return torch.ones_like(logits)
        if generator is not None:
            return relaxed_bernoulli(logits, temperature, generator)
        return inference_weights(logits, self.meta.router_inference)

    def prompts(self, weights: Tensor) -> Tensor:
        """Fused soft prompts p = z A of every layer: router weights [L', K] -> [L', m, H] (eq. 1).

        In the parameters' precision, under autocast too.
        """
        with _full_precision(weights):
            z = fuse(self.z, weights, self.meta.router_normalisation)  # eq. 1
            flat = torch.einsum("ld,ldx->lx", z, self.projection)  # p = z A, section 3.2
        return flat.view(len(flat), self.meta.prompt_tokens, self.meta.hidden)

    def forward(
        self, encoder: Encoder, input_ids: Tensor, mask: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Start and end logits [N, T] each, under router weights [L', K] (the same for the whole batch).

        Autocast is for the encoder alone: prompts and span head keep the parameters' precision.
        """
        return self.logits(encoder, input_ids, mask, self.prompts(weights))

    def logits(
        self, encoder: Encoder, input_ids: Tensor, mask: Tensor, prompts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Start and end logits [N, T] each, under soft prompts [L', m, H]."""
        if self.meta.injection == "prefix":
            prefixes = [prefix_of(encoder, i, p[None]) for i, p in enumerate(prompts)]
            hidden = encoder(input_ids, mask, prefixes=prefixes)
        elif self.meta.on_placeholders:
            hidden = encoder(input_ids, mask, added=prompts)
        else:
            hidden = encoder(input_ids, mask, inline=prompts)
        with _full_precision(hidden):
            logits = nn.functional.linear(hidden.float(), self.span_weight, self.span_bias)
        return logits[..., 0], logits[..., 1]

    def to_set(self) -> PromptSet:
        """A frozen float32 copy."""
        tensors = {name: getattr(self, name).detach().float().cpu().clone() for name in self.meta.shapes()}
        return PromptSet(meta=self.meta, **tensors)


def new_meta(
    encoder_name: str, sha256: str, encoder: Encoder, kind: Literal["deep", "shallow"], **settings: object
) -> PromptMeta:
    """Metadata of fresh prompts for an encoder."""
    config = encoder.config
    return PromptMeta(
        kind=kind,
        backbone=encoder_name,
        backbone_sha256=sha256,
        n_layers=config.n_layers,
        hidden=config.hidden,
        n_heads=config.n_heads,
        **settings,  # type: ignore[arg-type]
    )
