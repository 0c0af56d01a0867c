"""The CPU backend: torch, with C kernels where they compile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mp2.backbone import Backbone, Layer
from mp2.engine.backend import PopulationPrefix
from mp2.engine.chain import ChainBackend
from mp2.engine.cpu import native
from mp2.engine.cpu.attention import attend, attend_shared_text
from mp2.engine.cpu.linear import FastLinear, SecondHalf, make_second_half
from mp2.engine.forward import check_positions


@dataclass(frozen=True)
class PreparedLayer:
    """One layer's prepared weights."""

    qkv: FastLinear  # query, key and value in one product
    attention_output: FastLinear
    intermediate: FastLinear
    output: FastLinear
    attention_norm: tuple[torch.Tensor, torch.Tensor]
    output_norm: tuple[torch.Tensor, torch.Tensor]
    second_half: SecondHalf | None  # all after attention in one


class CpuBackend(ChainBackend):
    """The stages on torch's CPU; layers are prepared when they are first used."""

    name = "torch"
    device = "cpu"

    def __init__(self, backbone: Backbone, *, reason: str = "") -> None:
        """Compute in float32."""
        self.backbone = backbone
        self.precision = "fp32"
        self.reason = reason or "asked for"
        if unfit := native.unfit():
            self.reason += f"; no C kernels: {unfit}"
        self._config = backbone.config
        self._heads = (backbone.config.n_heads, backbone.config.head_size)
        self._encoder = backbone.encoder
        with torch.inference_mode():
            # what stands at each position beside the word: every token has the same type
            self._positions = self._encoder.position_embeddings.weight + self._encoder.token_type_row
        self._layers: dict[int, PreparedLayer] = {}

    @torch.inference_mode()
    def embed(self, input_ids: torch.Tensor, n_inline: int = 0) -> torch.Tensor:
        """See `ChainBackend.embed`."""
        check_positions(input_ids.shape[1], n_inline, self._config.max_positions)
        rows = torch.arange(input_ids.shape[1])
        rows[1:] += n_inline
        words = F.embedding(input_ids, self._encoder.word_embeddings.weight)
        return self._normed_embeddings(words, F.embedding(rows, self._positions)).unsqueeze(0)

    @torch.inference_mode()
    def embed_inline(self, prompts: torch.Tensor) -> torch.Tensor:
        """See `ChainBackend.embed_inline`."""
        m = prompts.shape[1]
        check_positions(1, m, self._config.max_positions)
        return self._normed_embeddings(prompts, self._positions[1 : m + 1]).unsqueeze(1)

    @torch.inference_mode()
    def layer(
        self, index: int, hidden: torch.Tensor, mask: torch.Tensor | None, prefix: PopulationPrefix | None
    ) -> torch.Tensor:
        """See `ChainBackend.layer`."""
        layer = self._layers.get(index) or self._prepare(index)
        config = self._config
        _, n, t, width = hidden.shape
        x = hidden.reshape(-1, width)
        qkv = layer.qkv(x).view(hidden.shape[0], n, t, 3, *self._heads)
        shared = False
        if prefix is not None and hidden.shape[0] == 1 and prefix[0].shape[0] > 1:
            shared = True
            context = attend_shared_text(qkv[0], mask, prefix)
        else:
            context = attend(qkv, mask, prefix)
        if layer.second_half is not None:
            return layer.second_half(context.reshape(-1, width), x).view(-1, n, t, width)
        if shared:
            y = layer.attention_output(context.reshape(-1, width)).view(-1, n, t, width).add_(hidden)
            y = y.view(-1, width)
        else:
            y = layer.attention_output.plus(context.reshape(-1, width), x)
        y = self._norm(y, layer.attention_norm)
        y = self._norm(
            layer.output.plus(layer.intermediate(y, config.activation), y),
            layer.output_norm,
        )
        return y.view(-1, n, t, width)

    def _normed_embeddings(self, words: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        norm = self._encoder.embedding_norm
        return F.layer_norm(words + positions, norm.normalized_shape, norm.weight, norm.bias, norm.eps)

    def _norm(self, x: torch.Tensor, norm: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.layer_norm(x, (self._config.hidden,), norm[0], norm[1], self._config.layer_norm_eps)

    def _prepare(self, index: int) -> PreparedLayer:
        source = self._encoder.layers[index]
        assert isinstance(source, Layer)

        def place(x: torch.Tensor) -> torch.Tensor:
            return x.detach().float()

        def linear(name: str) -> FastLinear:
            module = getattr(source, name)
            return FastLinear(place(module.weight), place(module.bias))

        def norm(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            module = getattr(source, name)
            return place(module.weight), place(module.bias)

        parts = [source.query, source.key, source.value]
        self._layers[index] = PreparedLayer(
            qkv=FastLinear(
                place(torch.cat([part.weight for part in parts])),
                place(torch.cat([part.bias for part in parts])),
            ),
            attention_output=linear("attention_output"),
            intermediate=linear("intermediate"),
            output=linear("output"),
            attention_norm=norm("attention_norm"),
            output_norm=norm("output_norm"),
            second_half=make_second_half(source, self._config.activation, self._config.layer_norm_eps),
        )
        return self._layers[index]
