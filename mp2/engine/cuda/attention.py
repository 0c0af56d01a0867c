"""Attention over packs with a prefix that is never copied.

A query attends to its own sequence and to m prefix rows that all examples of a candidate share. Both parts
are computed apart, each with the log-sum-exp of its scores, and merged:

    out = (1 - w) * text + w * prefix,    w = sigmoid(lse_prefix - lse_text),

which are the weights of one softmax over both, exactly. The text part runs over packed sequences
(variable-length flash attention), the prefix part as one dense product of a candidate's whole row against
its m rows; where no candidate has touched the text yet, the text part is computed once for all.

``flash`` needs CUDA, a half precision and a head size that is a multiple of 8; it is tried once against the
plain way, which runs on any device and stands in where flash is missing or wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from mp2.engine.cuda.pack import Spans

Part = tuple[torch.Tensor, torch.Tensor]
"""Contexts [B, S, h, d_h] and log-sum-exps [B, S, h] (float32)."""

_ULPS = 2  # of the type, at the largest context: what rounding alone may do to the probe
_SCORES_OFF = 1e-2  # of log-sum-exps (float32), about 2 here: scores are summed in float32, in another order


Attend = Callable[[torch.Tensor, Spans, "tuple[torch.Tensor, torch.Tensor] | None"], torch.Tensor]
"""`attend` over some kernels."""


class Kernels(Protocol):
    """The two attention products."""

    name: str

    def text(self, qkv: torch.Tensor, spans: Spans) -> Part:
        """``qkv`` [B, S, 3, h, d_h]: every sequence with itself."""
        ...

    def prefix(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Part:
        """``query`` [B, S, h, d_h] (B may be expanded) with ``keys`` and ``values`` [B, h, m, d_h]."""
        ...


class PlainKernels:
    """Scores, softmax and products spelled out; any device and precision."""

    name = "plain"

    def text(self, qkv: torch.Tensor, spans: Spans) -> Part:
        """See `Kernels.text`; sequences are padded to the longest for the product only."""
        b, _, _, h, d = qkv.shape
        n, t = spans.n_sequences, spans.longest
        grid = qkv.new_zeros(b, n * t, 3, h, d)
        grid[:, spans.cells] = qkv
        query, key, value = grid.view(b * n, t, 3, h, d).permute(2, 0, 3, 1, 4)
        bias = torch.zeros(spans.real.shape, device=qkv.device).masked_fill_(~spans.real, float("-inf"))
        bias = bias.view(1, n, 1, 1, t).expand(b, -1, -1, -1, -1).reshape(b * n, 1, 1, t)
        context, lse = _softmax_product(query, key, value, bias)
        context = context.transpose(1, 2).reshape(b, n * t, h, d)[:, spans.cells]
        return context, lse.transpose(1, 2).reshape(b, n * t, h)[:, spans.cells]

    def prefix(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Part:
        """See `Kernels.prefix`."""
        context, lse = _softmax_product(query.transpose(1, 2), keys, values, None)
        return context.transpose(1, 2), lse.transpose(1, 2)


def _softmax_product(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2)).float()
    if bias is not None:
        scores = scores + bias
    lse = torch.logsumexp(scores, -1, keepdim=True)
    return torch.matmul(torch.exp(scores - lse).to(value.dtype), value), lse.squeeze(-1)


class FlashKernels:
    """torch's flash attention on CUDA."""

    name = "flash"

    def text(self, qkv: torch.Tensor, spans: Spans) -> Part:
        """See `Kernels.text`."""
        b, s, _, h, d = qkv.shape
        query, key, value = qkv.view(b * s, 3, h, d).unbind(1)
        longest = spans.longest
        context, lse, *_ = torch.ops.aten._flash_attention_forward(
            query, key, value, spans.offsets, spans.offsets, longest, longest, 0.0, False, False
        )
        return context.view(b, s, h, d), lse.transpose(0, 1).reshape(b, s, h)

    def prefix(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Part:
        """See `Kernels.prefix`."""
        context, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query.transpose(1, 2), keys, values
        )
        return context.transpose(1, 2), lse[..., : query.shape[1]].transpose(1, 2)


def choose_kernels(
    device: torch.device, dtype: torch.dtype, n_heads: int, head_size: int
) -> tuple[Kernels, str]:
    """Return the kernels to use, and why not flash (empty when it is)."""
    if device.type != "cuda" or dtype == torch.float32:
        return PlainKernels(), f"{dtype} on {device.type}".replace("torch.", "")
    if head_size % 8:
        return PlainKernels(), f"head size {head_size}, expected a multiple of 8"
    why = what_is_wrong(FlashKernels(), device, dtype, n_heads, head_size)
    return (PlainKernels(), why) if why else (FlashKernels(), "")


def what_is_wrong(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, n_heads: int, head_size: int
) -> str:
    """Return how ``kernels`` differ from the plain way in float32 by more than rounding, or why they fail.

    Empty when they are right. Contexts may be off by ``_ULPS`` units in the last place of ``dtype`` at the
    largest of them (bf16 rounds 3.9 to 0.016), and must not be by much more: a wrong mask or scale is off by
    a tenth and more.
    """
    rng = torch.Generator().manual_seed(0)
    spans = Spans(np.array([5, 17, 3, 200]), 2, device)
    qkv = torch.randn(2, spans.row_slots, 3, n_heads, head_size, generator=rng).to(device, dtype)
    prefix = torch.randn(2, 2, n_heads, 7, head_size, generator=rng).to(device, dtype)
    wide, wide_prefix = qkv.float(), prefix.float()
    plain = PlainKernels()
    expected = (*plain.text(wide, spans), *plain.prefix(wide[:, :, 0], *wide_prefix))
    try:
        found = (*kernels.text(qkv, spans), *kernels.prefix(qkv[:, :, 0], *prefix))
        for k, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            most = _SCORES_OFF if k % 2 else _ULPS * torch.finfo(dtype).eps * float(theirs.abs().max())
            error = float((ours.float() - theirs).abs().max())
            if not error <= most:
                return f"{kernels.name} attention is off by {error:.1e} here, expected at most {most:.1e}"
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        return f"no {kernels.name} attention here: {str(error).splitlines()[0]}"
    return ""


def attend(
    kernels: Kernels,
    qkv: torch.Tensor,
    spans: Spans,
    prefix: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Return contexts [P, S, h, d_h].

    ``qkv`` is [B, S, 3, h, d_h] of B rows, ``prefix`` keys and values [C, h, m, d_h]; B = C = P, or one of
    both is 1: one prefix for all rows, or one text under P prefixes.
    """
    context, lse = kernels.text(qkv, spans)
    if prefix is None or prefix[0].shape[2] == 0:
        return context
    b, s, _, h, d = qkv.shape
    c = prefix[0].shape[0]
    query = qkv[:, :, 0]
    if c == 1 < b:  # one prefix: all rows are one long row
        own, own_lse = kernels.prefix(query.reshape(1, b * s, h, d), *prefix)
        own, own_lse = own.reshape(b, s, h, d), own_lse.reshape(b, s, h)
    else:
        own, own_lse = kernels.prefix(query.expand(c, -1, -1, -1), *prefix)
    weight = torch.sigmoid(own_lse - lse).to(context.dtype).unsqueeze(-1)
    return torch.lerp(context.expand_as(own), own, weight)
