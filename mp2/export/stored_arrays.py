"""Weights of a backbone for its graphs: written once, pointed into by every graph (ONNX external data).

Graphs are small; the numbers lie in ``embed.bin`` and one ``layer_XX.bin`` a layer. Each array is written
as it is read, so an export never holds more than one layer beside the backbone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch

from mp2.backbone import Backbone
from mp2.engine.folder import layer_file
from mp2.engine.onnx.stages import HIDDEN_TYPES

if TYPE_CHECKING:
    from mp2.backbone.mlm_head import MlmHead

FP8_MAX = 448.0  # largest finite float8 e4m3fn
LINEARS = ("qkv", "attention_output", "intermediate", "output")
_SMALLEST_SCALE = 2.0**-14  # smallest normal float16: scales are stored in the graph's half type
_ALIGNMENT = 4096  # runtimes map the files into memory; a page-aligned array needs no copy
_DATA_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.float8_e4m3fn: onnx.TensorProto.FLOAT8E4M3FN,
}
ELEMENTS: dict[str, int] = {precision: _DATA_TYPES[dtype] for precision, dtype in HIDDEN_TYPES.items()}

InputMaxima = Mapping[str, float]
"""``layers.<i>.<linear>`` -> largest magnitude of that layer's input over the calibration texts."""


@dataclass(frozen=True)
class StoredArray:
    """Where an array lies; `tensor` turns it into a graph's initializer."""

    name: str
    file: str
    offset: int
    n_bytes: int
    shape: tuple[int, ...]
    data_type: int  # of onnx.TensorProto

    def tensor(self) -> onnx.TensorProto:
        """Return the initializer that points at the stored numbers."""
        tensor = onnx.TensorProto(name=self.name, data_type=self.data_type, dims=self.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", self.file), ("offset", self.offset), ("length", self.n_bytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


class WeightStore:
    """Writes arrays into files of one folder and remembers where each one is."""

    def __init__(self, folder: Path) -> None:
        """Write below ``folder``, which must exist."""
        self._folder = folder
        self._arrays: dict[str, StoredArray] = {}

    def __getitem__(self, name: str) -> StoredArray:
        """Return where array ``name`` lies."""
        return self._arrays[name]

    def add(self, file: str, name: str, tensor: torch.Tensor) -> None:
        """Append ``tensor`` (float32, float16, bfloat16, float8 e4m3fn) under a ``name`` that is new here."""
        if name in self._arrays:
            raise ValueError(f"array '{name}' is already stored")
        data = tensor.detach().cpu().contiguous()
        raw = data.view(-1).view(torch.uint8).numpy() if data.numel() else np.empty(0, np.uint8)
        with (self._folder / file).open("ab") as out:
            offset = -(-out.tell() // _ALIGNMENT) * _ALIGNMENT
            out.write(b"\0" * (offset - out.tell()))
            out.write(raw.data)
        place = (file, offset, raw.nbytes)
        self._arrays[name] = StoredArray(name, *place, tuple(data.shape), _DATA_TYPES[data.dtype])


def store_backbone(
    backbone: Backbone, folder: Path, precision: str, maxima: InputMaxima | None
) -> WeightStore:
    """Write all of ``backbone`` for graphs in ``precision``; ``fp8`` needs the ``maxima`` of its inputs."""
    store, encoder = WeightStore(folder), backbone.encoder
    for name, tensor in (
        ("word_embeddings", encoder.word_embeddings.weight),
        ("position_embeddings", encoder.position_embeddings.weight),
        ("token_type_embedding", encoder.token_type_row),
        ("embedding_norm.weight", encoder.embedding_norm.weight),
        ("embedding_norm.bias", encoder.embedding_norm.bias),
    ):
        store.add("embed.bin", name, tensor)
    for index in range(backbone.config.n_layers):
        _store_layer(backbone, store, index, precision, maxima)
    return store


def store_mlm(mlm: MlmHead, store: WeightStore) -> None:
    """Write a masked-language-model head, in float32 for every precision; tied words are there already."""
    tensors = {"mlm.bias": mlm.bias} | ({} if mlm.tied else {"mlm.decoder": mlm.decoder})
    if mlm.transform is not None:
        t = mlm.transform
        tensors |= {"mlm.dense.weight": t.dense_weight, "mlm.dense.bias": t.dense_bias}
        tensors |= {"mlm.norm.weight": t.norm_weight, "mlm.norm.bias": t.norm_bias}
    for name, tensor in tensors.items():
        store.add("label_words.bin", name, tensor.float())


@torch.no_grad()
def _store_layer(
    backbone: Backbone, store: WeightStore, index: int, precision: str, maxima: InputMaxima | None
) -> None:
    layer, file, name = backbone.encoder.body(index), layer_file(index, "bin"), f"layers.{index}"
    half = HIDDEN_TYPES[precision]
    scale = backbone.config.head_size**-0.5  # folded into the query's weights: one pass over the scores less
    parts = ((layer.query, scale), (layer.key, 1.0), (layer.value, 1.0))
    weights = {
        "qkv": (
            torch.cat([part.weight * factor for part, factor in parts]),
            torch.cat([part.bias * factor for part, factor in parts]),
        ),
        **{part: (getattr(layer, part).weight, getattr(layer, part).bias) for part in LINEARS[1:]},
    }
    for part, (weight, bias) in weights.items():
        at = f"{name}.{part}"
        transposed = weight.T.contiguous()
        if precision == "fp8":
            assert maxima is not None
            weight_scale = fp8_scale(float(weight.abs().max()))
            transposed = quantize(transposed, weight_scale)
            store.add(file, f"{at}.weight_scale", weight_scale)
            store.add(file, f"{at}.input_scale", fp8_scale(maxima[at]))
        else:
            transposed = transposed.to(half)
        store.add(file, f"{at}.weight", transposed)
        store.add(file, f"{at}.bias", bias.to(half))
    for part in ("attention_norm", "output_norm"):
        module = getattr(layer, part)
        store.add(file, f"{name}.{part}.weight", module.weight)
        store.add(file, f"{name}.{part}.bias", module.bias)


def fp8_scale(largest: float) -> torch.Tensor:
    """Return the float16 scale that puts ``largest`` at the end of float8's range."""
    return torch.tensor(max(largest / FP8_MAX, _SMALLEST_SCALE), dtype=torch.float16)


def quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return ``x / scale``, clamped to float8's range, as float8 e4m3fn (round to nearest even)."""
    return (x.float() / scale.float()).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
