"""What lies between the matrix products of a packed layer, as Triton kernels; to import where triton is.

`mp2.engine.cuda.steps` holds them against the plain way before it uses them; tests run them in Triton's
interpreter. Widths are static, counts of rows are not: a kernel is compiled once for each width and type. All
sums are in float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from mp2.engine.cuda.linear import FP8, FP8_MAX
from mp2.engine.cuda.pack import Spans

_TINY = tl.constexpr(1e-12)  # a row of zeros has scale 0 otherwise
_LOG2E = 1.4426950408889634
_QUERIES, _KEYS = 64, 64  # of a program of `attend`, and of one turn of its loops


@triton.jit(do_not_specialize=["n_residual"])
def _add_norm(  # type: ignore[no-untyped-def]
    x, residual, weight, bias, out, n_residual, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    wide = tl.load(x + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    other = residual + (row % n_residual) * WIDTH + columns
    wide += tl.load(other, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, wide - tl.sum(wide, 0) / WIDTH, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
    gain = tl.load(weight + columns, mask=inside, other=0.0)
    y = centred * scale * gain + tl.load(bias + columns, mask=inside, other=0.0)
    tl.store(out + row * WIDTH + columns, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _quantize(  # type: ignore[no-untyped-def]
    x, rows, scales, LARGEST: tl.constexpr, ACTIVATION: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    wide = tl.load(x + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "gelu":
        wide = 0.5 * wide * (1.0 + tl.erf(wide * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        wide *= tl.sigmoid(1.5957691216057308 * (wide + 0.044715 * wide * wide * wide))
    elif ACTIVATION == "relu":
        wide = tl.maximum(wide, 0.0)
    scale = tl.maximum(tl.max(tl.abs(wide), 0), _TINY) / LARGEST
    y = tl.minimum(tl.maximum(wide / scale, -LARGEST), LARGEST)
    tl.store(rows + row * WIDTH + columns, y.to(rows.dtype.element_ty), mask=inside)
    tl.store(scales + row, scale)


@triton.jit
def _take_in(  # type: ignore[no-untyped-def]
    query, key, value, seen, scale, top, total, sums, PRECISION: tl.constexpr
):
    """Take keys [d, k] and values [k, d] into a softmax under way: largest score, sum of weights, sums."""
    scores = tl.dot(query, key, input_precision=PRECISION) * scale
    scores = tl.where(seen[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(weights, 1)
    own = tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
    return higher, total, sums * shrink[:, None] + own


@triton.jit(do_not_specialize=["n_slots", "n_prefix"])
def _attend(  # type: ignore[no-untyped-def]
    qkv, keys, values, out, tiles, n_slots, n_prefix, scale,
    HEADS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    ONE_TEXT: tl.constexpr, ONE_PREFIX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # every offset is a multiple of the static SIZE, or loads would go number by number
    tile, head, candidate = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start = tl.load(tiles + 3 * tile).to(tl.int64)  # the slot of the sequence's first token
    length = tl.load(tiles + 3 * tile + 1)
    own = tl.load(tiles + 3 * tile + 2) + tl.arange(0, QUERIES)
    d = tl.arange(0, WIDE)
    part = HEADS * SIZE  # queries, keys and values of a slot lie one after another
    row = start if ONE_TEXT else candidate * n_slots + start
    text = qkv + row * (3 * part) + head * SIZE
    real = (own < length)[:, None] & (d < SIZE)[None, :]
    query = tl.load(text + own[:, None] * (3 * part) + d[None, :], mask=real, other=0.0)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    sums = tl.zeros([QUERIES, WIDE], tl.float32)
    prefix = (head if ONE_PREFIX else candidate * HEADS + head) * n_prefix * SIZE
    for first in range(0, n_prefix, KEYS):
        n = first + tl.arange(0, KEYS)
        seen = n < n_prefix
        where, mask = prefix + n[:, None] * SIZE + d[None, :], seen[:, None] & (d < SIZE)[None, :]
        key = tl.load(keys + where, mask=mask, other=0.0)
        value = tl.load(values + where, mask=mask, other=0.0)
        top, total, sums = _take_in(query, tl.trans(key), value, seen, scale, top, total, sums, PRECISION)
    for first in range(0, length, KEYS):
        n = first + tl.arange(0, KEYS)
        seen = n < length
        where, mask = part + n[:, None] * (3 * part) + d[None, :], seen[:, None] & (d < SIZE)[None, :]
        key = tl.load(text + where, mask=mask, other=0.0)
        value = tl.load(text + where + part, mask=mask, other=0.0)
        top, total, sums = _take_in(query, tl.trans(key), value, seen, scale, top, total, sums, PRECISION)
    to = out + ((candidate * n_slots + start) * HEADS + head) * SIZE
    y = (sums / total[:, None]).to(out.dtype.element_ty)
    tl.store(to + own[:, None] * part + d[None, :], y, mask=real)


def add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """See `mp2.engine.cuda.steps.Steps.add_norm`."""
    x, residual = x.contiguous(), residual.contiguous()
    width, out = x.shape[-1], torch.empty_like(x)
    n_rows, n_residual = x.numel() // width, residual.numel() // width
    block = triton.next_power_of_2(width)
    with _on(x):
        _add_norm[(n_rows,)](
            x, residual, weight, bias, out, n_residual, eps,
            WIDTH=width, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return out


def quantize(x: torch.Tensor, activation: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """See `mp2.engine.cuda.steps.Steps.quantize`; of ``activation`` of x, where one is named."""
    x = x.contiguous()
    n_rows, width = x.shape
    rows = torch.empty(n_rows, width, dtype=FP8, device=x.device)
    scales = torch.empty(n_rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    with _on(x):
        _quantize[(n_rows,)](
            x, rows, scales,
            LARGEST=FP8_MAX, ACTIVATION=activation, WIDTH=width, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return rows, scales


def attend(qkv: torch.Tensor, spans: Spans, prefix: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """See `mp2.engine.cuda.attention.attend`: all in one softmax and one kernel.

    Text that all candidates share is attended to once for each of them.
    """
    b, s, _, heads, size = qkv.shape
    keys, values = (qkv.new_empty(1, heads, 0, size),) * 2 if prefix is None else prefix
    qkv, keys, values = qkv.contiguous(), keys.contiguous(), values.contiguous()
    c = len(keys)
    p = max(b, c) if keys.shape[2] else b
    out = qkv.new_empty(p, s, heads, size)
    tiles = spans.tiles(_QUERIES)
    with _on(qkv):
        _attend[(len(tiles), heads, p)](
            qkv, keys, values, out, tiles, s, keys.shape[2], _LOG2E * size**-0.5,
            HEADS=heads, SIZE=size, WIDE=max(16, triton.next_power_of_2(size)), QUERIES=_QUERIES, KEYS=_KEYS,
            ONE_TEXT=b == 1, ONE_PREFIX=c == 1,
            PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32", num_warps=4, num_stages=2,
        )  # fmt: skip
    return out


def _warps(block: int) -> int:
    return min(8, max(1, block // 256))


def _on(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
