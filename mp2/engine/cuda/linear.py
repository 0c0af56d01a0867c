"""Matrix products and what lies between them, for the packed layers.

fp8 follows the row-wise recipe: a weight [out, in] is stored in e4m3 with one scale an output channel, an
activation row gets its own scale when it enters a product (its largest magnitude becomes 448), products
accumulate in float32 and leave in bf16. A row's scale depends on that row alone, so an example's loss does
not depend on what else is in the batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from mp2.backbone.encoder import activate

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
        )


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x`` [rows, in] in e4m3 and the scales [rows, 1] (float32) that undo it."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp_min(_TINY) / FP8_MAX
    return (wide / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """Layer norm of ``x + residual``, in float32 whatever they are in: a half-precision sum can overflow."""
    wide = x.float() + residual.float()
    return F.layer_norm(wide, wide.shape[-1:], weight, bias, eps).to(x.dtype)


class Fused:
    """`add_norm`, the activation and `quantize_rows`, each one kernel where torch can compile it.

    ``compile_s`` is what compiling took; ``reason`` says which were not compiled, and why.
    """

    def __init__(self, activation: str, device: torch.device, dtype: torch.dtype, *, fp8: bool) -> None:
        """Compile for CUDA, `quantize_rows` only for ``fp8``; elsewhere the functions run as they are."""
        self.compile_s = 0.0
        self.reason = ""
        self.add_norm: Callable[..., torch.Tensor] = add_norm
        self.activate: Callable[[torch.Tensor], torch.Tensor] = lambda x: activate(activation, x)
        self.quantize: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = quantize_rows
        if device.type == "cuda":
            self._compile(device, dtype, fp8=fp8)

    def _compile(self, device: torch.device, dtype: torch.dtype, *, fp8: bool, **options: Any) -> None:
        started = time.perf_counter()
        x = torch.randn(48, 64, device=device, dtype=dtype)
        norm = (torch.ones(64, device=device), torch.ones(64, device=device), 1e-12)
        wanted: dict[str, tuple[Any, ...]] = {"add_norm": norm, "activate": ()}
        if fp8:
            wanted["quantize"] = ()
        failed = {}
        for name, rest in wanted.items():
            plain: Callable[..., Any] = getattr(self, name)
            try:
                fused: Callable[..., Any] = torch.compile(plain, dynamic=True, **options)
                with torch.inference_mode():
                    for rows in (48, 32):  # the second count of rows makes it dynamic for good
                        inputs = (x[:rows], x[:rows], *rest) if rest else (x[:rows],)
                        _compare(fused(*inputs), plain(*inputs))
            except Exception as error:  # the compiler's failures are of many types; none may stop a run
                failed[name] = f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"
            else:
                setattr(self, name, fused)
        if failed:
            self.reason = f"not compiled: {', '.join(failed)} ({next(iter(failed.values()))})"
        self.compile_s = time.perf_counter() - started


def _compare(got: Any, expected: Any) -> None:
    """Raise AssertionError where a fused function is not the plain one up to rounding."""
    pairs = zip(got, expected, strict=True) if isinstance(got, tuple) else [(got, expected)]
    for a, b in pairs:  # e4m3 has three bits of mantissa: one step is up to 1/8
        torch.testing.assert_close(a.float(), b.float(), rtol=0.13, atol=2e-2)
