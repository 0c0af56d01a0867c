"""What is done row by row between the matrix products: Triton kernels where they work, eager torch elsewhere.

A GPU runs eager torch's residual sum and layer norm as five kernels and its quantisation as seven, each of
which reads and writes all rows. `torch.compile` fused them until its cache of shapes and types was full, and
ran eager then without a word; a Triton kernel is compiled once for each width and type.
"""

from __future__ import annotations

from typing import Protocol

import torch

from mp2.engine.cuda.linear import FP8, FP8_MAX, add_norm, quantize_rows


class Steps(Protocol):
    """The row-wise steps of a packed layer."""

    name: str

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Return the layer norm of ``x`` [P, ..., H] and ``residual`` [P or 1, ..., H], in ``x``'s type."""
        ...

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``x`` [rows, in] in e4m3 and the scales [rows, 1] (float32) that undo it."""
        ...


class EagerSteps:
    """Plain torch; any device."""

    name = "eager"
    add_norm = staticmethod(add_norm)
    quantize = staticmethod(quantize_rows)


class TritonSteps:
    """`mp2.engine.cuda.triton_steps`; CUDA, and CPUs in Triton's interpreter."""

    name = "triton"

    def __init__(self) -> None:
        """Raises ImportError without triton."""
        from mp2.engine.cuda import triton_steps

        self.add_norm = triton_steps.add_norm
        self.quantize = triton_steps.quantize


def choose_steps(device: torch.device, dtype: torch.dtype, hidden: int, *, fp8: bool) -> tuple[Steps, str]:
    """Return the steps to use on ``device``, and on a GPU why they are not Triton's (empty when they are)."""
    if device.type != "cuda":
        return EagerSteps(), ""
    try:
        steps = TritonSteps()
        _check(steps, device, dtype, hidden, fp8=fp8)
    except Exception as error:  # a compiler's failures are of many types; none may stop a run
        return EagerSteps(), f"{type(error).__name__}: {(str(error) or '-').strip().splitlines()[0]}"
    return steps, ""


def _check(steps: Steps, device: torch.device, dtype: torch.dtype, hidden: int, *, fp8: bool) -> None:
    """Raise AssertionError where ``steps`` differ from the eager ones by more than rounding."""
    rng = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 6, hidden, generator=rng), torch.randn(1, 6, hidden, generator=rng)
    x, residual = (3 * x).to(device, dtype), residual.to(device, dtype)
    norm = (torch.randn(hidden, generator=rng).to(device), torch.randn(hidden, generator=rng).to(device))
    near = 4 * torch.finfo(dtype).eps
    got, expected = steps.add_norm(x, residual, *norm, 1e-12), add_norm(x, residual, *norm, 1e-12)
    torch.testing.assert_close(got, expected, rtol=near, atol=near)
    if fp8:
        rows = x.view(12, hidden)
        (quantized, scales), (plain, plain_scales) = steps.quantize(rows), quantize_rows(rows)
        torch.testing.assert_close(scales, plain_scales)
        assert quantized.dtype == FP8
        # e4m3 has three bits of mantissa: where a quotient lies between two, either may be taken
        torch.testing.assert_close(quantized.float(), plain.float(), rtol=0.13, atol=FP8_MAX / 2**15)
