"""The torch runtime: the reference on any device and the fast path on CPUs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mp2.backbone import Backbone, Layer, resolve_device
from mp2.engine.linear import FastLinear
from mp2.engine.runtime import PRECISIONS, Prefix
from mp2.errors import UnknownNameError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class _Layer:
    """One layer's prepared weights."""

    qkv: FastLinear  # query, key and value in one product
    attention_output: FastLinear
    intermediate: FastLinear
    output: FastLinear
    attention_norm: tuple[torch.Tensor, torch.Tensor]
    output_norm: tuple[torch.Tensor, torch.Tensor]


class TorchRuntime:
    """`Runtime` on torch; layers are prepared when they are first used."""

    name = "torch"

    def __init__(
        self, backbone: Backbone, *, device: str = "cpu", precision: str = "fp32", reason: str = ""
    ) -> None:
        """Prepare for ``device`` ("cpu", "cuda", "cuda:1") in ``precision`` ("fp32" or "bf16").

        bf16 keeps weights and activations in bf16; LayerNorm statistics, softmax, logits and losses stay in
        float32.
        """
        if precision not in PRECISIONS:
            raise UnknownNameError("precision", precision, PRECISIONS)
        resolve_device(device)
        self.device = device
        self.precision = precision
        self.reason = reason or "asked for"
        self._dtype = _DTYPES[precision]
        self._config = backbone.config
        self._encoder = backbone.encoder
        self._layers: dict[int, _Layer] = {}

    @torch.inference_mode()
    def embed(self, input_ids: torch.Tensor, n_inline: int = 0) -> torch.Tensor:
        """See `Runtime.embed`."""
        home = self._encoder.word_embeddings.weight.device
        hidden = self._encoder.embed(input_ids.to(home), n_inline)
        return hidden.to(self.device, self._dtype).unsqueeze(0)

    @torch.inference_mode()
    def embed_inline(self, prompts: torch.Tensor) -> torch.Tensor:
        """See `Runtime.embed_inline`."""
        home = self._encoder.word_embeddings.weight.device
        return self._encoder.embed_inline(prompts.to(home)).to(self.device, self._dtype).unsqueeze(1)

    @torch.inference_mode()
    def layer(
        self, index: int, hidden: torch.Tensor, mask: torch.Tensor | None, prefix: Prefix | None
    ) -> torch.Tensor:
        """See `Runtime.layer`."""
        layer = self._layers.get(index) or self._prepare(index)
        config = self._config
        _, n, t, width = hidden.shape
        x = hidden.reshape(-1, width)
        qkv = layer.qkv(x).view(hidden.shape[0], n, t, 3, config.n_heads, config.head_size)
        if prefix is not None:
            prefix = (prefix[0].to(self._dtype), prefix[1].to(self._dtype))
        if prefix is not None and hidden.shape[0] == 1 and prefix[0].shape[0] > 1:
            context = _attend_shared_text(qkv[0], mask, prefix)
            y = layer.attention_output(context.reshape(-1, width)).view(-1, n, t, width).add_(hidden)
            y = y.view(-1, width)
        else:
            context = _attend(qkv, mask, prefix)
            y = layer.attention_output.plus(context.reshape(-1, width), x)
        y = self._norm(y, layer.attention_norm)
        y = self._norm(
            layer.output.plus(layer.intermediate(y, config.activation), y),
            layer.output_norm,
        )
        return y.view(-1, n, t, width)

    @torch.inference_mode()
    def head(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """See `Runtime.head`."""
        return F.linear(hidden.float(), weight.to(self.device), bias.to(self.device))

    def _norm(self, x: torch.Tensor, norm: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.layer_norm(x, (self._config.hidden,), norm[0], norm[1], self._config.layer_norm_eps)

    def _prepare(self, index: int) -> _Layer:
        source = self._encoder.layers[index]
        assert isinstance(source, Layer)

        def place(x: torch.Tensor) -> torch.Tensor:
            return x.detach().to(self.device, self._dtype)

        def linear(name: str) -> FastLinear:
            module = getattr(source, name)
            return FastLinear(place(module.weight), place(module.bias))

        def norm(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            module = getattr(source, name)
            return place(module.weight), place(module.bias)

        parts = [source.query, source.key, source.value]
        self._layers[index] = _Layer(
            qkv=FastLinear(
                place(torch.cat([part.weight for part in parts])),
                place(torch.cat([part.bias for part in parts])),
            ),
            attention_output=linear("attention_output"),
            intermediate=linear("intermediate"),
            output=linear("output"),
            attention_norm=norm("attention_norm"),
            output_norm=norm("output_norm"),
        )
        return self._layers[index]


def _attend(qkv: torch.Tensor, mask: torch.Tensor | None, prefix: Prefix | None) -> torch.Tensor:
    """Return contexts [P, N, T, h, d_h] for ``qkv`` [P, N, T, 3, h, d_h], the prefix before the text."""
    p, n, t, _, h, d = qkv.shape
    m = 0 if prefix is None else prefix[0].shape[3]
    query, key, value = qkv.view(p * n, t, 3, h, d).unbind(2)
    if prefix is not None and m > 0:
        # one buffer for prefix and text: a single fused attention call beats two and a merge
        both = qkv.new_empty(p, n, m + t, 2, h, d)
        both[:, :, :m, 0] = prefix[0].transpose(2, 3)
        both[:, :, :m, 1] = prefix[1].transpose(2, 3)
        both[:, :, m:] = qkv[:, :, :, 1:]
        key, value = both.view(p * n, m + t, 2, h, d).unbind(2)
    bias = None
    if mask is not None:
        bias = _bias(mask, m, qkv.dtype).expand(p, n, 1, m + t).reshape(p * n, 1, 1, m + t)
        bias = bias.expand(-1, -1, t, -1)  # the fused CPU kernel wants the query axis spelled out
    context = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=bias
    )
    return context.transpose(1, 2).reshape(p, n, t, h, d)


def _attend_shared_text(qkv: torch.Tensor, mask: torch.Tensor | None, prefix: Prefix) -> torch.Tensor:
    """Return contexts [P, N, T, h, d_h] of P prefixes over one text ``qkv`` [N, T, 3, h, d_h].

    The text's own attention is computed once. For each candidate it then enters the softmax as one further
    key, whose score is the log-sum-exp of the text scores and whose value is the text's context: the same
    weights, exactly.
    """
    n, t, _, h, d = qkv.shape
    keys, values = prefix  # [P, N or 1, h, m, d_h]
    p, per_example, _, m, _ = keys.shape
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [N, h, T, d_h] each
    query = query * d**-0.5
    scores = torch.matmul(query, key.transpose(-1, -2)).float()  # [N, h, T, T]
    if mask is not None:
        scores = scores + _bias(mask, 0, scores.dtype).unsqueeze(1)
    total = torch.logsumexp(scores, -1, keepdim=True)  # [N, h, T, 1]
    text = torch.matmul(torch.exp(scores - total).to(qkv.dtype), value)  # [N, h, T, d_h]

    if per_example == 1:  # a prefix's product runs over the rows of all examples at once
        query, text, total = (x.transpose(0, 1).reshape(1, 1, h, n * t, -1) for x in (query, text, total))
    else:
        query, text, total = (x.unsqueeze(0) for x in (query, text, total))
    rows = query.shape[3]
    scores = torch.matmul(query, keys.transpose(-1, -2)).float()  # [P, 1 or N, h, rows, m]
    weights = torch.cat([scores, total.expand(p, -1, h, rows, 1)], -1).softmax(-1).to(qkv.dtype)
    context = torch.matmul(weights[..., :m], values).addcmul_(
        weights[..., m:], text.expand(p, -1, h, rows, d)
    )
    return context.transpose(2, 3).reshape(p, n, t, h, d)


def _bias(mask: torch.Tensor, m: int, dtype: torch.dtype) -> torch.Tensor:
    """Return [N, 1, m + T]: 0 where attended (the whole prefix, real tokens), -inf on padding."""
    bias = torch.zeros(mask.shape[0], 1, m + mask.shape[1], dtype=dtype, device=mask.device)
    bias[:, 0, m:].masked_fill_(~mask, float("-inf"))
    return bias
