"""Intrinsic prompts -> keys and values, folded into one matrix product a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from mp2.backbone.encoder import Encoder
from mp2.prompts.prompt_set import PromptSet


class PrefixProjector:
    """z -> prefix keys/values of a layer, or soft prompts for inline injection.

    p = z A is linear in z, and so are the keys and values W p + b of its m rows: both projections are folded
    into one matrix [d, 2 h m d_h] a layer, made when the layer is first asked for (float32).
    """

    def __init__(self, encoder: Encoder, prompts: PromptSet) -> None:
        self.encoder = encoder
        self.prompts = prompts
        self._folded: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.inference_mode()
    def keys_values(self, layer: int, z: Tensor) -> tuple[Tensor, Tensor]:
        """Intrinsic prompts [P, d] -> keys and values of layer ``layer``, each [P, h, m, d_h], contiguous."""
        meta = self.prompts.meta
        if meta.injection != "prefix":
            raise ValueError(f"{meta.kind} inline prompts have no prefix keys and values; use inline()")
        weight, bias = self._fold(layer)
        both = torch.addmm(bias, z.to(weight), weight)  # [P, 2 h m d_h]
        both = both.view(len(z), 2, meta.n_heads, meta.prompt_tokens, meta.hidden // meta.n_heads)
        return both[:, 0].contiguous(), both[:, 1].contiguous()

    @torch.inference_mode()
    def inline(self, z: Tensor, layer: int = 0) -> Tensor:
        """Intrinsic prompts [P, d] -> soft prompts [P, m, H] (p = z A) of a layer."""
        meta = self.prompts.meta
        projection = self.prompts.projection[layer]
        return (z.to(projection) @ projection).view(len(z), meta.prompt_tokens, meta.hidden)

    def _fold(self, layer: int) -> tuple[Tensor, Tensor]:
        if layer not in self._folded:
            meta = self.prompts.meta
            body = self.encoder.body(layer)
            # A of this layer as d*m rows of H, through both projections at once: [d*m, 2H]
            rows = self.prompts.projection[layer].view(-1, meta.hidden)
            weight = torch.cat([body.key.weight, body.value.weight])
            bias = torch.cat([body.key.bias, body.value.bias])
            d, m, h = meta.intrinsic_dim, meta.prompt_tokens, meta.n_heads
            folded = (rows @ weight.T).view(d, m, 2, h, -1).permute(0, 2, 3, 1, 4).reshape(d, -1)
            constant = bias.view(2, h, 1, -1).expand(-1, -1, m, -1).reshape(-1)
            self._folded[layer] = (folded, constant)
        return self._folded[layer]
