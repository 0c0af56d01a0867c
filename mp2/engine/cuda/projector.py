"""Intrinsic prompts -> keys and values, on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mp2.backbone import Backbone
from mp2.engine.runtime import Prefix
from mp2.prompts import PromptSet


class DeviceProjector:
    """z -> a layer's prefix keys and values, on the device.

    Folded projections [d, 2 h m d_h] stay in float32 whatever the runtime's precision: a CMA-ES step of 1e-2
    on a z of order 1 would drown in half precision. Only the keys and values are rounded.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompts: PromptSet,
        place: torch.device,
        dtype: torch.dtype,
        settle: Callable[[], None],
    ) -> None:
        """Fold ``prompts`` into ``backbone``'s projections, a layer when it is first asked for.

        ``settle`` completes what was queued: several objectives, on lanes of their own, share a projector.
        """
        self._encoder, self._prompts = backbone.encoder, prompts
        self._place, self._dtype, self._settle = place, dtype, settle
        self._folded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._inline: torch.Tensor | None = None

    @torch.inference_mode()
    def __call__(self, layer: int, z: torch.Tensor) -> Prefix:
        """Return keys and values [P, h, m, d_h] of ``z`` [P, d] at ``layer``."""
        meta = self._prompts.meta
        if layer not in self._folded:
            folded = self._fold(layer)
            self._settle()
            self._folded[layer] = folded
        weight, bias = self._folded[layer]
        both = torch.addmm(bias, z.to(self._place, torch.float32), weight).to(self._dtype)
        both = both.view(len(z), 2, meta.n_heads, meta.prompt_tokens, meta.hidden // meta.n_heads)
        return both[:, 0].contiguous(), both[:, 1].contiguous()

    @torch.inference_mode()
    def inline(self, z: torch.Tensor) -> torch.Tensor:
        """Return inline prompts [P, m, H] (float32) of ``z`` [P, d]."""
        meta = self._prompts.meta
        if self._inline is None:
            inline = self._prompts.projection[0].detach().to(self._place, torch.float32)
            self._settle()
            self._inline = inline
        rows = z.to(self._place, torch.float32) @ self._inline
        return rows.view(len(z), meta.prompt_tokens, meta.hidden)

    def _fold(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        meta = self._prompts.meta
        body = self._encoder.body(layer)

        def here(x: torch.Tensor) -> torch.Tensor:
            return x.detach().to(self._place, torch.float32)

        weight = torch.cat([here(body.key.weight), here(body.value.weight)])
        bias = torch.cat([here(body.key.bias), here(body.value.bias)])
        rows = here(self._prompts.projection[layer]).view(-1, meta.hidden)  # [d m, H]
        d, m, h = meta.intrinsic_dim, meta.prompt_tokens, meta.n_heads
        folded = (rows @ weight.T).view(d, m, 2, h, -1).permute(0, 2, 3, 1, 4).reshape(d, -1)
        constant = bias.view(2, h, 1, -1).expand(-1, -1, m, -1).reshape(-1)
        return folded, constant
