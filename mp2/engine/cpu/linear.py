"""One linear layer, run the fastest exact way that the device offers.

On CPUs in float32, oneDNN with pre-arranged weights runs the matrix product 1.3-1.4 times as fast as
``F.linear`` and applies bias, activation and residual while the tile is in cache. torch has the operator
(its own compiler emits it) but no public name for it, so it is probed once and ``F.linear`` takes over
where it is missing or wrong.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from mp2.backbone.encoder import activate

# activation name -> (oneDNN attribute, algorithm)
_ONEDNN = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}


class FastLinear:
    """``y = x W^T + b`` over rows ``x`` [rows, in], with an optional activation or residual."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Prepare ``weight`` [out, in] and ``bias`` [out]; both already have their final dtype and device."""
        self._bias = bias.detach().contiguous()
        self._packed: torch.Tensor | None = None
        self._weight = weight.detach().contiguous()
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and onednn_works():
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight, None)
            self._weight = torch.empty(0)

    def __call__(self, x: torch.Tensor, activation: str | None = None) -> torch.Tensor:
        """Return ``activation(x W^T + b)`` [rows, out]."""
        if self._packed is None:
            y = F.linear(x, self._weight, self._bias)
            return y if activation is None else activate(activation, y)
        attribute, algorithm = ("none", "") if activation is None else _ONEDNN[activation]
        y = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, attribute, [], algorithm)
        return torch.as_tensor(y)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return ``x W^T + b + residual`` [rows, out]."""
        if self._packed is None:
            return F.linear(x, self._weight, self._bias).add_(residual)
        y = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._packed, self._bias, "add")
        return torch.as_tensor(y)


@functools.cache
def onednn_works() -> bool:
    """Tell whether torch's fused oneDNN linear operator is there and agrees with ``F.linear`` here."""
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (there and torch.backends.mkldnn.enabled):
        return False
    rng = torch.Generator().manual_seed(0)
    x, r = torch.randn(5, 32, generator=rng), torch.randn(5, 48, generator=rng)
    weight, bias = torch.randn(48, 32, generator=rng), torch.randn(48, generator=rng)
    expected = F.linear(x, weight, bias)
    try:
        with torch.inference_mode():
            op = torch.ops.mkldnn._linear_pointwise
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
            close = torch.allclose(op.binary(x, r, packed, bias, "add"), expected + r, atol=1e-4)
            for name, (attribute, algorithm) in _ONEDNN.items():
                got = op(x, packed, bias, attribute, [], algorithm)
                close = close and torch.allclose(got, activate(name, expected), atol=1e-4)
    except (RuntimeError, AttributeError, TypeError):
        return False
    return close
