"""Attention with a prefix: in C on CPUs in float32 where that compiles, else with torch's operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mp2.engine.backend import PopulationPrefix
from mp2.engine.cpu import native
from mp2.engine.cpu.native.interface import MAX_HEAD


def attend(qkv: torch.Tensor, mask: torch.Tensor | None, prefix: PopulationPrefix | None) -> torch.Tensor:
    """Return contexts [P, N, T, h, d_h] for ``qkv`` [P, N, T, 3, h, d_h], the prefix before the text."""
    if _native(qkv):
        return _native_attend(qkv, mask, prefix)
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


def attend_shared_text(
    qkv: torch.Tensor, mask: torch.Tensor | None, prefix: PopulationPrefix
) -> torch.Tensor:
    """Return contexts [P, N, T, h, d_h] of P prefixes over one text ``qkv`` [N, T, 3, h, d_h].

    The text's own attention is computed once. For each candidate it then enters the softmax as one further
    key, whose score is the log-sum-exp of the text scores and whose value is the text's context: the same
    weights, exactly.
    """
    if _native(qkv):
        return _native_attend_shared_text(qkv, mask, prefix)
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


def _native(qkv: torch.Tensor) -> bool:
    small = qkv.device.type == "cpu" and qkv.dtype == torch.float32 and qkv.shape[-1] <= MAX_HEAD
    return small and native.load() is not None


def _native_attend(
    qkv: torch.Tensor, mask: torch.Tensor | None, prefix: PopulationPrefix | None
) -> torch.Tensor:
    p, n, t, _, h, d = qkv.shape
    out = qkv.new_empty(p, n, t, h, d)
    return _call(qkv, mask, prefix, out)


def _native_attend_shared_text(
    qkv: torch.Tensor, mask: torch.Tensor | None, prefix: PopulationPrefix
) -> torch.Tensor:
    n, t, _, h, d = qkv.shape
    text, total = attend_text(qkv, mask)
    out = qkv.new_empty(prefix[0].shape[0], n, t, h, d)
    return _call(qkv.unsqueeze(0), mask, prefix, out, text=text, text_total=total)


def attend_text(qkv: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return contexts [N, T, h, d_h] of a text alone and its scores' log-sum-exp [N, T, h], in C."""
    n, t, _, h, d = qkv.shape
    text, total = qkv.new_empty(n, t, h, d), qkv.new_empty(n, t, h)
    _call(qkv.unsqueeze(0), mask, None, text.unsqueeze(0), total=total)
    return text, total


def _call(
    qkv: torch.Tensor,
    mask: torch.Tensor | None,
    prefix: PopulationPrefix | None,
    out: torch.Tensor,
    *,
    text: torch.Tensor | None = None,
    text_total: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fill ``out`` [P, N, T, h, d_h]; ``total`` takes the scores' log-sum-exp (see native/attention.c)."""
    library = native.load()
    assert library is not None
    p, n, t, h, d = out.shape
    keys, values = (qkv.new_empty(1, 1, h, 0, d),) * 2 if prefix is None else prefix
    tensors = [None if x is None else x.contiguous() for x in (qkv, keys, values, mask, text, text_total)]
    address = [None if x is None else x.data_ptr() for x in [*tensors, out, total]]
    library.mp2_attend(
        *(address[0], qkv.shape[0] == 1, address[1], address[2]),
        *(keys.shape[0] == 1, keys.shape[1] == 1, *address[3:]),
        *(p, n, t, h, d, keys.shape[3], torch.get_num_threads()),
    )
    return out


def _bias(mask: torch.Tensor, m: int, dtype: torch.dtype) -> torch.Tensor:
    """Return [N, 1, m + T]: 0 where attended (the whole prefix, real tokens), -inf on padding."""
    bias = torch.zeros(mask.shape[0], 1, m + mask.shape[1], dtype=dtype, device=mask.device)
    bias[:, 0, m:].masked_fill_(~mask, float("-inf"))
    return bias
