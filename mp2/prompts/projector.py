"""Intrinsic prompts -> keys and values, folded into one matrix product a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mp2.backbone.encoder import Encoder
from mp2.prompts.prompt_set import PromptSet


class PrefixProjector:
    """z -> prefix keys/values of a layer, or soft prompts for inline injection, on any device.

    p = z A is linear in z, and so are the keys and values W p + b of its m rows: both projections are folded
    into one matrix [d, 2 h m d_h] a layer, made when the layer is first asked for. It stays in float32
    whatever ``dtype`` the results have: a CMA-ES step of 1e-2 on a z of order 1 would drown in half
    precision.
    """

    def __init__(
        self,
        encoder: Encoder,
        prompts: PromptSet,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        """Fold ``prompts`` into ``encoder``'s projections on ``device``.

        ``settle`` completes what was queued on the device before anything folded is kept: work on other
        queues may read it from then on.
        """
        self._encoder, self._prompts = encoder, prompts
        self._device, self._dtype, self._settle = torch.device(device), dtype, settle
        self._folded: dict[int, tuple[Tensor, Tensor]] = {}
        self._inline: dict[int, Tensor] = {}

    @torch.inference_mode()
    def keys_values(self, layer: int, z: Tensor) -> tuple[Tensor, Tensor]:
        """Intrinsic prompts [P, d] -> keys and values of layer ``layer``, each [P, h, m, d_h], contiguous."""
        meta = self._prompts.meta
        if meta.injection != "prefix":
            raise ValueError(f"{meta.kind} inline prompts have no prefix keys and values; use inline()")
        if layer not in self._folded:
            folded = self._fold(layer)
            self._settle()
            self._folded[layer] = folded
        weight, bias = self._folded[layer]
        both = torch.addmm(bias, self._place(z), weight).to(self._dtype)  # [P, 2 h m d_h]
        both = both.view(len(z), 2, meta.n_heads, meta.prompt_tokens, meta.hidden // meta.n_heads)
        return both[:, 0].contiguous(), both[:, 1].contiguous()

    @torch.inference_mode()
    def inline(self, z: Tensor, layer: int = 0) -> Tensor:
        """Intrinsic prompts [P, d] -> soft prompts [P, m, H] (p = z A) of a layer, float32."""
        meta = self._prompts.meta
        if layer not in self._inline:
            projection = self._place(self._prompts.projection[layer])
            self._settle()
            self._inline[layer] = projection
        return (self._place(z) @ self._inline[layer]).view(len(z), meta.prompt_tokens, meta.hidden)

    def _place(self, x: Tensor) -> Tensor:
        return x.detach().to(self._device, torch.float32)

    def _fold(self, layer: int) -> tuple[Tensor, Tensor]:
        meta = self._prompts.meta
        body = self._encoder.body(layer)
        # A of this layer as d*m rows of H, through both projections at once: [d*m, 2H]
        rows = self._place(self._prompts.projection[layer]).view(-1, meta.hidden)
        weight = torch.cat([self._place(body.key.weight), self._place(body.value.weight)])
        bias = torch.cat([self._place(body.key.bias), self._place(body.value.bias)])
        d, m, h = meta.intrinsic_dim, meta.prompt_tokens, meta.n_heads
        folded = (rows @ weight.T).view(d, m, 2, h, -1).permute(0, 2, 3, 1, 4).reshape(d, -1)
        constant = bias.view(2, h, 1, -1).expand(-1, -1, m, -1).reshape(-1)
        return folded, constant
