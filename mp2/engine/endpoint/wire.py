"""Tensors in the Open Inference Protocol v2 over HTTP, with its binary extension; for client and server.

A message is a JSON object and, behind it, the bytes of the tensors that are sent as binary; the header
``Inference-Header-Content-Length`` says where the JSON ends (absent: all of it is JSON).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mp2.errors import FormatError, shown
from mp2.json_files import Fields, check, list_of, number, one_line, one_of, parse_json, whole

JSON_LENGTH = "Inference-Header-Content-Length"
DTYPES: dict[str, np.dtype[Any]] = {"INT64": np.dtype("<i8"), "FP32": np.dtype("<f4")}
NAMES = {"int64": "INT64", "float32": "FP32"}  # of a bundle's manifest


def message(header: dict[str, Any], side: str, tensors: Mapping[str, np.ndarray]) -> tuple[bytes, int]:
    """Return ``header`` with ``tensors`` as its ``side`` (``inputs``, ``outputs``) in binary.

    The second is the length of the JSON in it.
    """
    described, parts = [], []
    for name, tensor in tensors.items():
        datatype = NAMES[str(tensor.dtype)]
        parts.append(np.ascontiguousarray(tensor, DTYPES[datatype]).tobytes())
        described.append(
            {
                "name": name,
                "shape": list(tensor.shape),
                "datatype": datatype,
                "parameters": {"binary_data_size": len(parts[-1])},
            }
        )
    head = json.dumps({**header, side: described}).encode()
    return b"".join([head, *parts]), len(head)


def tensors(body: bytes, json_length: int | None, side: str) -> dict[str, np.ndarray]:
    """Return what `message` wrote; FormatError, which names the field, where a peer wrote something else."""
    size = len(body) if json_length is None else json_length
    if not 0 <= size <= len(body):
        raise FormatError(f"{JSON_LENGTH} is {size}, expected at most the {len(body)} bytes of the answer")
    try:
        header = parse_json(body[:size].decode("utf-8"))
    except ValueError as error:
        raise FormatError(f"the answer: {error}") from error
    found: dict[str, np.ndarray] = {}
    at = size
    for k, tensor in enumerate(check(header, Fields({side: list_of(_TENSOR)}), _ANSWER)[side]):
        name, dtype, shape = tensor["name"], DTYPES[tensor["datatype"]], tensor["shape"]
        if not can_be_shape(shape):
            raise FormatError(
                f"is {shown(shape)}, which no tensor has", path=_ANSWER, field=f"{side}[{k}].shape"
            )
        n_bytes, where = tensor.get("parameters", {}).get("binary_data_size"), f"{side}[{k}]"
        if n_bytes is None:
            rule = list_of(whole(-(2**63)) if dtype.kind == "i" else number(), math.prod(shape))
            values = np.array(check(tensor.get("data"), rule, _ANSWER, where=f"{where}.data"), dtype)
        else:
            part = memoryview(body)[at : at + n_bytes]
            if not len(part) == n_bytes == math.prod(shape) * dtype.itemsize:
                what = f"has {len(part)} bytes, said {n_bytes}, for shape {shape} of {tensor['datatype']}"
                raise FormatError(what, path=_ANSWER, field=where)
            values, at = np.frombuffer(part, dtype).copy(), at + n_bytes
        if name in found:
            raise FormatError(f"{shown(name)} stands twice", path=_ANSWER, field=where)
        found[name] = values.reshape(shape)
    return found


def can_be_shape(sizes: Sequence[int]) -> bool:
    """Tell whether NumPy can have an array of these sizes, which are not below 0; an empty one counts too."""
    return len(sizes) <= _MOST_AXES and math.prod(size or 1 for size in sizes) < _MOST_VALUES


_ANSWER = "the answer"
_MOST_AXES = 8  # the graphs' have 5
_MOST_VALUES = 2**40
_TENSOR = Fields(
    {"name": one_line, "datatype": one_of(*DTYPES), "shape": list_of(whole(0, 2**31))},
    {"parameters": Fields({}, {"binary_data_size": whole(0, 2**40)})},
)
