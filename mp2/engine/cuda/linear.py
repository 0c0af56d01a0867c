"""Matrix products and what lies between them, for the packed layers.

fp8 follows the row-wise recipe: a weight [out, in] is stored in e4m3 with one scale an output channel, an
activation row gets its own scale when it enters a product (its largest magnitude becomes 448). Products are
summed inside the tensor cores (``use_fast_accum``: where these sum at fewer bits than float32, as Hopper's
do, the other way moves partial sums out of them again and again) and leave in bf16. A row's scale depends on
that row alone, so an example's loss does not depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
_TINY = 1e-12  # a row of zeros has scale 0 otherwise


class Linear(Protocol):
    """``y = x W^T + b`` over rows ``x`` [rows, in]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return [rows, out]."""
        ...


class HalfLinear:
    """The product in the weights' own precision (fp32, fp16, bf16)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Keep ``weight`` [out, in] and ``bias`` [out] as they are."""
        self._weight, self._bias = weight.contiguous(), bias.contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Linear`."""
        return F.linear(x, self._weight, self._bias)


class ActivatedLinear:
    """The product with its activation, ``gelu_tanh`` or ``relu``, in the product's own epilogue.

    ``gelu`` is taken, too: on CUDA cuBLAS has only its approximation by tanh, which is off by 5e-4 at most;
    on a CPU torch computes it exactly.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, activation: str) -> None:
        """Keep ``weight`` [out, in] and ``bias`` [out] as they are."""
        self._weight, self._bias = weight.contiguous().t(), bias.contiguous()
        self._gelu = activation != "relu"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Linear`; activated."""
        return torch._addmm_activation(self._bias, x, self._weight, use_gelu=self._gelu)


class Fp8Linear:
    """The product in fp8 with row-wise scales; inputs and outputs are bf16."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor,
        quantize: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> None:
        """Quantise ``weight`` [out, in] (any float), a scale an output channel; ``bias`` [out]."""
        quantized, scale = quantize_rows(weight.float())
        self._weight = quantized.t()  # [in, out], column-major as the kernel wants it
        self._scale = scale.t().contiguous()  # [1, out]
        self._bias = bias.to(torch.bfloat16).contiguous()
        self._quantize = quantize or quantize_rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Linear`."""
        rows, scale = self._quantize(x)
        return torch._scaled_mm(
            rows,
            self._weight,
            scale_a=scale,
            scale_b=self._scale,
            bias=self._bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x`` [rows, in] in e4m3 and the scales [rows, 1] (float32) that undo it."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(_TINY) / FP8_MAX
    return (wide / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """Return the layer norm of ``x + residual``, in ``x``'s type.

    Computed in float32 whatever they are in: a half-precision sum can overflow.
    """
    wide = x.float() + residual.float()
    return F.layer_norm(wide, wide.shape[-1:], weight, bias, eps).to(x.dtype)
