"""Layers of bf16 differences through AMX's tiles, in C (``native/tiles.c``), where a processor has them.

`TileAttention` is attention made of differences; it takes the place of float32 attention in every layer that
has a reference and candidates. `TileLayer` is what is before and after it in narrow layers, whose rows stay
in the nearest caches from the context to the layer's output; in wide ones oneDNN's products of many rows are
as fast. Shapes: P candidates behind a reference, N examples, T tokens, R = N T rows, H hidden, F
feed-forward, h heads of d_h, m rows of prompt.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from mp2.backbone import BackboneConfig, Layer
from mp2.engine.backend import PopulationPrefix
from mp2.engine.cpu import native
from mp2.engine.cpu.attention import attend_text
from mp2.engine.cpu.native.interface import ACTIVATIONS, MAX_HEAD, SPARE_ROWS

_STEP = 32  # numbers of bfloat16 in a tile's row
_WIDEST_FFN = 1024  # of a `TileLayer`: beyond it a layer's weights leave the second cache with every block


@dataclass(frozen=True)
class Reference:
    """What a layer's second half is of the reference, in float32, biases included."""

    attended: torch.Tensor  # [R, H], the output projection
    normed: torch.Tensor  # [R, H]
    raised: torch.Tensor  # [R, F], before the activation
    lowered: torch.Tensor  # [R, H]


def load_tiles() -> ctypes.CDLL | None:
    """Return the C kernels if they can use AMX's tiles here, else None."""
    library = native.load()
    return library if library is not None and library.mp2_tiles_ready() else None


class TileAttention:
    """Attention of a reference and of candidates that are held as differences from it.

    Contexts are returned as the reference's [N, T, h, d_h] and the candidates' differences [P R, H] in
    bfloat16, with `SPARE_ROWS` behind them.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        """Call ``library``."""
        self._library = library

    def __call__(
        self,
        qkv: torch.Tensor,
        moved: torch.Tensor,
        mask: torch.Tensor | None,
        prefix: PopulationPrefix | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return contexts of P candidates that differ in their texts (and prefixes, if these have P).

        ``qkv`` [N, T, 3, h, d_h] is the reference's, ``moved`` [P, N, T, 3, h, d_h] the bfloat16 differences
        from it.
        """
        return self._call(qkv, moved.contiguous(), len(moved), mask, prefix, None)

    def shared_text(
        self, qkv: torch.Tensor, mask: torch.Tensor | None, prefix: PopulationPrefix
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return contexts of 1 + P prefixes, the reference's first, over one text ``qkv``."""
        return self._call(qkv, None, len(prefix[0]) - 1, mask, prefix, attend_text(qkv, mask))

    def _call(
        self,
        qkv: torch.Tensor,
        moved: torch.Tensor | None,
        p: int,
        mask: torch.Tensor | None,
        prefix: PopulationPrefix | None,
        finished: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n, t, _, h, d = qkv.shape
        keys, values = (qkv.new_empty(1, 1, h, 0, d),) * 2 if prefix is None else prefix
        context, out = qkv.new_empty(n, t, h, d), rows_for_tiles(p * n * t, h * d)
        given = [qkv, moved, keys, values, mask, *(finished or (None, None))]
        tensors = [None if x is None else x.contiguous() for x in given]
        address = [None if x is None else x.data_ptr() for x in (*tensors, context, out)]
        self._library.mp2_tiles_attend(
            *(*address[:4], keys.shape[0] == 1, keys.shape[1] == 1, *address[4:]),
            *(p, n, t, h, d, keys.shape[3], torch.get_num_threads()),
        )
        return context, out


class TileLayer:
    """The linear layers of one layer, for differences."""

    def __init__(self, library: ctypes.CDLL, layer: Layer, config: BackboneConfig) -> None:
        """Round and pack ``layer``'s weights."""
        self._library = library
        self._eps, self._kind = config.layer_norm_eps, ACTIVATIONS[config.activation]
        self._hidden, self._ffn = config.hidden, config.ffn
        self._qkv = self._packed(torch.cat([layer.query.weight, layer.key.weight, layer.value.weight]))
        parts = (layer.attention_output, layer.intermediate, layer.output)
        self._second_half = [self._packed(part.weight) for part in parts]
        self._norms = [
            x.detach().float().contiguous()
            for norm in (layer.attention_norm, layer.output_norm)
            for x in (norm.weight, norm.bias)
        ]

    def qkv(self, x: torch.Tensor) -> torch.Tensor:
        """Return differences of queries, keys, values [P, R, 3 H] in bfloat16 for ``x`` [1 + P, R, H]."""
        p, r, n = len(x) - 1, x.shape[1], 3 * self._hidden
        out = torch.empty(p, r, n, dtype=torch.bfloat16)
        self._library.mp2_tiles_linear(
            *(x.data_ptr(), self._qkv.data_ptr(), out.data_ptr()),
            *(p, r, n, self._hidden, torch.get_num_threads()),
        )
        return out

    def second_half(
        self, context: torch.Tensor, residual: torch.Tensor, reference: Reference, out: torch.Tensor
    ) -> None:
        """Fill the candidates' rows of ``out`` [1 + P, R, H]; the reference's are there.

        ``context`` [P R, H] (see `rows_for_tiles`) are differences, ``residual`` [1 + P or 1, R, H] is the
        layer's input.
        """
        tensors = [*self._second_half, *self._norms]
        own = (reference.attended, reference.normed, reference.raised, reference.lowered)
        assert all(x.is_contiguous() for x in (context, residual, *own, out))
        self._library.mp2_tiles_second_half(
            *(context.data_ptr(), residual.data_ptr(), len(residual) == 1),
            *(x.data_ptr() for x in (*own, *tensors)),
            *(self._eps, self._kind, out.data_ptr(), len(out) - 1, out.shape[1]),
            *(self._hidden, self._ffn, torch.get_num_threads()),
        )

    def _packed(self, weight: torch.Tensor) -> torch.Tensor:
        plain = weight.detach().float().contiguous()
        packed = torch.empty_like(plain, dtype=torch.bfloat16)
        self._library.mp2_tiles_pack(plain.data_ptr(), packed.data_ptr(), *plain.shape)
        return packed


def rows_for_tiles(n_rows: int, width: int) -> torch.Tensor:
    """Return an empty bfloat16 matrix that tiles may read beyond its last row."""
    return torch.empty(n_rows + SPARE_ROWS, width, dtype=torch.bfloat16)[:n_rows]


def make_attention(config: BackboneConfig) -> TileAttention | None:
    """Return attention in tiles; None where they cannot be had or the heads do not fit them."""
    fits = config.head_size % _STEP == 0 and config.head_size <= MAX_HEAD
    library = load_tiles() if fits else None
    return None if library is None else TileAttention(library)


def make_layer(layer: Layer, config: BackboneConfig) -> TileLayer | None:
    """Return ``layer`` in tiles; None where these cannot be had, do not fit or would be slower."""
    fits = config.hidden % _STEP == config.ffn % _STEP == 0 and config.ffn <= _WIDEST_FFN
    library = load_tiles() if fits else None
    return None if library is None else TileLayer(library, layer, config)
