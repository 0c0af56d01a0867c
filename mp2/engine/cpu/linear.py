"""The matrix products of a layer on CPUs, run the fastest exact way.

`FastLinear` is one linear layer. In float32, oneDNN with pre-arranged weights runs the matrix product 1.3-1.4
times as fast as ``F.linear`` and applies bias, activation and residual while the tile is in cache. torch has
the operator (its own compiler emits it) but no public name for it, so it is probed once and ``F.linear``
takes over where it is missing or wrong.

`SecondHalf` is what follows attention in a layer, in one C kernel: the output projection, both residuals and
LayerNorms, and the feed-forward of a block of rows run while the block is in the nearest caches (see
``native/dense.c``). Up to some hundred numbers a row this is faster than one oneDNN call after the other;
wide layers are better off with those.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import torch.nn.functional as F

from mp2.backbone import Layer
from mp2.backbone.encoder import activate
from mp2.engine.cpu import native
from mp2.engine.cpu.native.interface import ACTIVATIONS, Half

_WIDEST_FFN = 1024  # of the second half in one: beyond it oneDNN is as fast or faster
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


class SecondHalf:
    """A layer from the attention's context to its output."""

    def __init__(self, library: ctypes.CDLL, layer: Layer, activation: str, eps: float) -> None:
        """Pack ``layer``'s weights for ``library``."""
        self._eps = eps
        self._kind = ACTIVATIONS[activation]
        self._ffn, self._hidden = layer.intermediate.weight.shape
        tensors = [
            *(_packed(library, layer.attention_output.weight), layer.attention_output.bias),
            *(layer.attention_norm.weight, layer.attention_norm.bias),
            *(_packed(library, layer.intermediate.weight), layer.intermediate.bias),
            *(_packed(library, layer.output.weight), layer.output.bias),
            *(layer.output_norm.weight, layer.output_norm.bias),
        ]
        self._kept = [x.detach().float().contiguous() for x in tensors]  # the addresses below are theirs
        self._weights = Half(*(x.data_ptr() for x in self._kept))

    def __call__(self, context: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return the layer's output [rows, H] for ``context`` [rows, H] and its input ``residual``.

        ``residual`` [rows or fewer, H] is repeated as often as it takes.
        """
        context, residual = context.contiguous(), residual.contiguous()
        rows, width = context.shape
        assert width == residual.shape[1] == self._hidden
        out = torch.empty_like(context)
        library = native.load()
        assert library is not None
        library.mp2_second_half(
            *(context.data_ptr(), residual.data_ptr(), len(residual), ctypes.byref(self._weights)),
            *(self._eps, self._kind, out.data_ptr(), rows, width, self._ffn, torch.get_num_threads()),
        )
        return out


def make_second_half(layer: Layer, activation: str, eps: float) -> SecondHalf | None:
    """Return the kernel for ``layer``; None where it would be slower or cannot be had."""
    ffn, hidden = layer.intermediate.weight.shape
    library = native.load() if ffn <= _WIDEST_FFN else None
    if library is None or hidden % library.mp2_panel_width() or ffn % library.mp2_panel_width():
        return None
    return SecondHalf(library, layer, activation, eps)


def _packed(library: ctypes.CDLL, weight: torch.Tensor) -> torch.Tensor:
    plain = weight.detach().float().contiguous()
    packed = torch.empty_like(plain)
    n, k = plain.shape
    library.mp2_pack(plain.data_ptr(), packed.data_ptr(), n, k)
    return packed
