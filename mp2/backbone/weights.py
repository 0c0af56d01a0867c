"""The tensors of a checkpoint folder: names, types and shapes at once, values when they are asked for.

So a configuration that does not fit is refused before memory is taken for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mp2.errors import FormatError, shown
from mp2.json_files import read_object
from mp2.tensor_files import FLOATS, open_safetensors
from mp2.text_files import check_file

_TORCH_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")
"""Parts of names that torch's wrappers (data parallel, compile, FSDP) put in."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file."""

    name: str  # in the file
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class Weights:
    """The tensors of a checkpoint by name; old and wrapped names are read as today's.

    ``LayerNorm.gamma`` and ``.beta`` (conversions from TensorFlow) are ``.weight`` and ``.bias``; the parts
    ``module``, ``_orig_mod`` and ``_fsdp_wrapped_module`` of names are left out.
    """

    def __init__(self, path: Path, stored: Mapping[str, StoredTensor]) -> None:
        """``path`` names the weights in errors: the file, or the index of its shards."""
        self.path = path
        plain = {name: _plain_name(name) for name in stored}
        count = Counter(plain.values())
        self._stored = {plain[n] if count[plain[n]] == 1 else n: tensor for n, tensor in stored.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor ``name``; raises ``FormatError`` where it is missing."""
        if name not in self._stored:
            raise FormatError(f"there is no tensor '{name}'", path=self.path)
        return self._stored[name].shape

    def prefixes(self, ending: str) -> list[str]:
        """All that stands before ``ending`` in names that end with it, as whole parts."""
        found = (name[: -len(ending)] for name in self._stored if name.endswith(ending))
        return sorted(prefix for prefix in found if not prefix or prefix.endswith("."))

    def n_layers(self, prefix: str) -> int:
        """Number of layers below ``prefix`` (``bert.encoder.layer.``): the largest index and one."""
        numbered = re.compile(re.escape(prefix) + r"(\d{1,6})\.")
        found = (match for name in self._stored if (match := numbered.match(name)))
        return max((int(match[1]) + 1 for match in found), default=0)

    def tensors(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The tensors of these names as float32, all compared with ``shapes`` before one is read.

        Raises:
            FormatError: one is missing, has another shape, is no float32, float16 or bfloat16, or holds NaN
                or infinity.
        """
        missing = [name for name in shapes if name not in self._stored]
        if missing:
            raise FormatError(
                f"{len(missing)} tensors are missing, the first is '{missing[0]}'", path=self.path
            )
        for name, shape in shapes.items():
            stored = self._stored[name]
            if stored.shape != shape:
                raise FormatError(
                    f"tensor '{stored.name}' has shape {stored.shape}, expected {shape} from config.json",
                    path=self.path,
                )
            if stored.dtype not in FLOATS:
                raise FormatError(
                    f"tensor '{stored.name}' is {stored.dtype}, expected one of {', '.join(FLOATS)}: "
                    "quantised checkpoints are not read",
                    path=self.path,
                )
        return {name: self._read(self._stored[name]) for name in shapes}

    def _read(self, stored: StoredTensor) -> Tensor:
        tensor = stored.read().to(torch.float32)
        smallest, largest = torch.aminmax(tensor)  # one pass, and NaN is kept by both
        if not (torch.isfinite(smallest) and torch.isfinite(largest)):
            what = "NaN" if smallest.isnan() else "infinity"
            raise FormatError(f"tensor '{stored.name}' holds {what}: damaged weights", path=self.path)
        return tensor


def _plain_name(name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    if parts[-2:-1] == ["LayerNorm"]:
        parts[-1] = {"gamma": "weight", "beta": "bias"}.get(parts[-1], parts[-1])
    return ".".join(parts)


def tensors_sha256(tensors: Mapping[str, Any], first: str = "") -> str:
    """Hash over ``first``, then names, shapes and float32 bytes of tensors in name order."""
    digest = hashlib.sha256(first.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().float().contiguous().cpu().numpy()).cast("B"))
    return digest.hexdigest()


def read_weights(folder: Path) -> Weights:
    """The weights of a checkpoint folder: safetensors (whole or sharded) or a ``weights_only`` bin.

    Raises:
        FormatError: no weights, a git-lfs pointer, a damaged file, an index that names files elsewhere.
    """
    for file_name in ("model.safetensors", "pytorch_model.bin"):
        whole, index = folder / file_name, folder / f"{file_name}.index.json"
        if whole.exists():
            return Weights(whole, _stored(whole))
        if index.exists():
            return Weights(index, _of_shards(index))
    raise FormatError("no weights found, expected model.safetensors or pytorch_model.bin", path=folder)


def _of_shards(index: Path) -> dict[str, StoredTensor]:
    """The tensors of all shards, each from the file that the index names for it.

    Raises:
        FormatError: a tensor is not where the index says, or stands in two files and in none by the index.
    """
    weight_map = _weight_map(index)
    stored: dict[str, StoredTensor] = {}
    for path in _shards(index, weight_map):
        for name, tensor in _stored(path).items():
            if weight_map.get(name, path.name) != path.name:
                continue
            if name in stored:
                raise FormatError(f"tensor '{name[:80]}' is in two files, and it names none", path=index)
            stored[name] = tensor
    for name, file in weight_map.items():
        if name not in stored:
            raise FormatError(f"tensor '{name[:80]}' is not in {shown(file)}", path=index, field="weight_map")
    return stored


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file: files in the index's own folder and nothing else."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(
            "is not there or empty, expected tensor names and the files that hold them",
            path=index,
            field="weight_map",
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or re.search(r"[/\\\0]", file):
            raise FormatError(
                f"tensor '{name[:80]}' is in {json.dumps(file)[:80]}, expected the name of a file in the "
                "same folder",
                path=index,
                field="weight_map",
            )
    return weight_map


def _shards(index: Path, weight_map: Mapping[str, str]) -> list[Path]:
    files = [index.parent / file for file in sorted(set(weight_map.values()))]
    for path in files:
        if not os.path.exists(path):
            name = shown(path.name)
            raise FormatError(f"there is no file {name}, which it names", path=index, field="weight_map")
    return files


def _stored(path: Path) -> dict[str, StoredTensor]:
    return _safetensors(path) if path.suffix == ".safetensors" else _torch_bin(path)


def _safetensors(path: Path) -> dict[str, StoredTensor]:
    stored = {}
    with _readable(path), open_safetensors(path, expected="readable weights file") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            part = file.get_slice(name)
            read = partial(_safetensor, path, name)
            stored[name] = StoredTensor(name, part.get_dtype(), tuple(part.get_shape()), read)
        metadata = file.metadata() or {}
    for name, kept in metadata.items():  # safetensors.torch.save_model: shared tensors are stored once
        if kept in stored and name not in stored:
            stored[name] = stored[kept]
    return stored


def _safetensor(path: Path, name: str) -> Tensor:
    with open_safetensors(path, expected="readable weights file") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def _torch_bin(path: Path) -> dict[str, StoredTensor]:
    check_file(path)
    with _readable(path):
        zipped = zipfile.is_zipfile(path)  # many published bins are older than torch's zip format
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    if not isinstance(loaded, Mapping):
        raise FormatError(f"holds a {type(loaded).__name__}, expected a dictionary of tensors", path=path)
    stored = {}
    for name, tensor in loaded.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "quantised" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        else:
            kind = _TORCH_TYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise FormatError(
                    f"tensor '{name}' has shape {tuple(tensor.shape)}, more than the file has numbers for",
                    path=path,
                )
        stored[str(name)] = StoredTensor(str(name), kind, tuple(tensor.shape), partial(_same, tensor))
    if not stored:
        names = ", ".join(map(str, list(loaded)[:5])) or "nothing"
        raise FormatError(f"has no tensors at its top, but {names}; expected a state dict alone", path=path)
    return stored


def _same(tensor: Tensor) -> Tensor:
    return tensor.detach()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Errors of torch's and pickle's readers as one line; code in a pickle is named, and was not run."""
    try:
        yield
    except FormatError:
        raise
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise FormatError(
                f"holds more than tensors and was not opened: it names the code {code[1].rstrip('.')}; where "
                "the model can be loaded, model.save_pretrained(FOLDER) writes safetensors",
                path=path,
            ) from None
        last = [line.strip() for line in str(error).splitlines() if line.strip()][-1:] or ["not a pickle"]
        raise FormatError(f"not a readable weights file: {last[0].rstrip('.')}", path=path) from error
    except Exception as error:  # of a damaged file the readers raise whatever comes, AssertionError too
        said = " ".join(str(error).split())[:200]
        raise FormatError(
            f"not a readable weights file: {type(error).__name__}: {said}", path=path
        ) from error
