"""Weights of an engine folder: written once, pointed into by every graph (ONNX external data).

Graphs are small; the numbers lie in ``embed.bin`` and one ``layer_XX.bin`` a layer. Each array is written
as it is read, so an export never holds more than one layer beside the backbone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

_ALIGNMENT = 4096  # runtimes map the files into memory; a page-aligned array needs no copy


@dataclass(frozen=True)
class StoredArray:
    """Where an array lies; `tensor` turns it into a graph's initializer."""

    name: str
    file: str
    offset: int
    n_bytes: int
    shape: tuple[int, ...]

    def tensor(self) -> onnx.TensorProto:
        """Return the float32 initializer that points at the stored numbers."""
        tensor = onnx.TensorProto(name=self.name, data_type=onnx.TensorProto.FLOAT, dims=self.shape)
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
        if name in self._arrays:
            raise ValueError(f"array '{name}' is already stored")
        data = np.ascontiguousarray(array, dtype="<f4")
        with (self._folder / file).open("ab") as out:
            offset = -(-out.tell() // _ALIGNMENT) * _ALIGNMENT
            out.write(b"\0" * (offset - out.tell()))
            data.tofile(out)
        self._arrays[name] = StoredArray(name, file, offset, data.nbytes, data.shape)
