"""A graph and its weights as they were read: hashed in memory, so that nothing can change in between.

Where the numbers of a graph lie (ONNX external data) is part of the graph, which may be a stranger's: only
files that the manifest lists are followed, within their sizes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mp2.engine.onnx.library import load_onnxruntime
from mp2.errors import FormatError, shown

if TYPE_CHECKING:
    import onnx

    from mp2.engine.bundle import Bundle
    from mp2.engine.folder import EngineFolder


@dataclass(frozen=True)
class ModelFiles:
    """A graph as bytes, and by name the files that hold its weights."""

    name: str  # the graph's
    graph: bytes
    weights: Mapping[str, bytes]

    @contextmanager
    def on_disk(self) -> Iterator[Path]:
        """Give the path of a copy, for libraries that open files, in a folder that nobody else can enter."""
        with tempfile.TemporaryDirectory(prefix="mp2-graph-") as name:  # mode 700
            for file, data in {self.name: self.graph, **self.weights}.items():
                target = Path(name) / file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
            yield Path(name) / self.name


def read_model(folder: EngineFolder | Bundle, graph: str) -> ModelFiles:
    """Read ``graph`` and its weights; FormatError for a file that is not as the manifest says."""
    data, path = folder.read(graph), folder.path / graph
    weights: dict[str, bytes] = {}
    for tensor in _tensors(_parsed(data, path)):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        name = entries.get("location", "")
        if name not in folder.files:
            raise FormatError(
                f"weight '{tensor.name[:60]}' is in {shown(name)}, expected a file that the manifest lists",
                path=path,
            )
        if name not in weights:
            weights[name] = folder.read(name)
        try:
            first = int(entries.get("offset", "0"))
            n_bytes = int(entries["length"]) if "length" in entries else len(weights[name]) - first
        except ValueError:
            first = n_bytes = -1
        if first < 0 or n_bytes < 0 or first + n_bytes > len(weights[name]):
            raise FormatError(
                f"weight '{tensor.name[:60]}' is at {shown(entries.get('offset'))} with "
                f"{shown(entries.get('length'))} bytes, and {name} has {len(weights[name]):,}",
                path=path,
            )
    return ModelFiles(graph, data, weights)


def load_session(
    model: Path | ModelFiles | bytes, options: Any, chosen: Mapping[str, Any], *, in_memory: bool = True
) -> Any:
    """Return an ``InferenceSession`` of ``model``, with ``chosen`` arguments that say on which provider.

    Of `ModelFiles`, the bytes that were read and checked are what is loaded: ``in_memory`` where the release
    and the provider take weights so, else from a private copy.
    """
    ort = load_onnxruntime()
    if not isinstance(model, ModelFiles):
        return ort.InferenceSession(model, options, **chosen)
    names, data = list(model.weights), list(model.weights.values())
    if names and not (in_memory and hasattr(options, "add_external_initializers_from_files_in_memory")):
        with model.on_disk() as path:
            return ort.InferenceSession(path, options, **chosen)
    if names:
        options.add_external_initializers_from_files_in_memory(names, data, [len(x) for x in data])
    return ort.InferenceSession(model.graph, options, **chosen)


def weight_files(folder: EngineFolder | Bundle, graph: str) -> set[str]:
    """Return the names of the files that hold the weights of ``graph``."""
    tensors = _tensors(_parsed(folder.read(graph), folder.path / graph))
    return {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}


def _parsed(data: bytes, path: Any) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return onnx.load_from_string(data)
    except DecodeError as error:
        raise FormatError(f"not an ONNX graph: {error}; export the engine again", path=path) from error


def _tensors(part: Any) -> Iterator[onnx.TensorProto]:
    """Yield every tensor that lies outside, of whatever part of a model."""
    import onnx

    for field, value in part.ListFields():
        if field.message_type is None:
            continue
        for inner in [value] if hasattr(value, "ListFields") else value:
            if not isinstance(inner, onnx.TensorProto):
                yield from _tensors(inner) if hasattr(inner, "ListFields") else ()
            elif inner.data_location == onnx.TensorProto.EXTERNAL:
                yield inner
