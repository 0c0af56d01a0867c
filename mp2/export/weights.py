"""Weights of an engine folder: written once, pointed into by every graph (ONNX external data).

Graphs are small; the numbers lie in ``embed.bin`` and one ``layer_XX.bin`` a layer. Each array is written
as it is read, so an export never holds more than one layer beside the backbone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch

_ALIGNMENT = 4096  # runtimes map the files into memory; a page-aligned array needs no copy
_DATA_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.float8_e4m3fn: onnx.TensorProto.FLOAT8E4M3FN,
}


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

    def add(self, file: str, name: str, array: np.ndarray) -> None:
        """Append ``array`` (stored as float32) to ``file`` under a ``name`` that is new in this folder."""
        data = np.ascontiguousarray(array, dtype="<f4")
        self._append(file, name, data, data.shape, onnx.TensorProto.FLOAT)

    def add_tensor(self, file: str, name: str, tensor: torch.Tensor) -> None:
        """Append ``tensor`` as it is: float32, float16, bfloat16 or float8 (e4m3fn)."""
        data = tensor.detach().cpu().contiguous()
        raw = data.view(-1).view(torch.uint8).numpy() if data.numel() else np.empty(0, np.uint8)
        self._append(file, name, raw, tuple(data.shape), _DATA_TYPES[data.dtype])

    def _append(self, file: str, name: str, data: np.ndarray, shape: tuple[int, ...], data_type: int) -> None:
        if name in self._arrays:
            raise ValueError(f"array '{name}' is already stored")
        with (self._folder / file).open("ab") as out:
            offset = -(-out.tell() // _ALIGNMENT) * _ALIGNMENT
            out.write(b"\0" * (offset - out.tell()))
            data.tofile(out)
        self._arrays[name] = StoredArray(name, file, offset, data.nbytes, shape, data_type)
