"""What follows attention in a layer, in one C kernel: for narrow encoders on CPUs in float32.

The output projection, both residuals, both LayerNorms and the feed-forward of a block of rows run while the
block is in the nearest caches (see ``native/dense.c``). Up to some hundred numbers a row this is faster than
one oneDNN call after the other; wide layers are better off with those.
"""

from __future__ import annotations

import ctypes

import torch

from mp2.backbone import Layer
from mp2.engine.cpu import native
from mp2.engine.cpu.native.interface import ACTIVATIONS, Half

_WIDEST_FFN = 1024  # beyond it oneDNN is as fast or faster


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
