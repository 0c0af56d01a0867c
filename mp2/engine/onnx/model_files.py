"""A graph and its weights as they were read: hashed in memory, so that nothing can change in between.

Where the numbers of a graph lie (ONNX external data) is part of the graph, which may be a stranger's: only
files that the manifest lists are followed, within their sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mp2.engine.folder import EngineFolder
from mp2.errors import FormatError, shown

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class ModelFiles:
    """A graph as bytes, and by name the files that hold its weights."""

    graph: bytes
    weights: Mapping[str, bytes]


def read_model(folder: EngineFolder, graph: str) -> ModelFiles:
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
    return ModelFiles(data, weights)


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
