"""Tensors in the Open Inference Protocol v2 over HTTP, with its binary extension; for client and server.

A message is a JSON object and, behind it, the bytes of the tensors that are sent as binary; the header
``Inference-Header-Content-Length`` says where the JSON ends (absent: all of it is JSON).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from mp2.json_files import parse_json

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
    """Return what `message` wrote, for a peer that is trusted to follow it; ValueError, KeyError if not."""
    size = len(body) if json_length is None else json_length
    found, at = {}, size
    for tensor in parse_json(body[:size].decode("utf-8"))[side]:
        dtype = DTYPES[tensor["datatype"]]
        n_bytes = tensor.get("parameters", {}).get("binary_data_size")
        if n_bytes is None:
            values = np.array(tensor["data"], dtype)
        else:
            values = np.frombuffer(memoryview(body)[at : at + n_bytes], dtype).copy()
            at += n_bytes
        found[tensor["name"]] = values.reshape(tensor["shape"])
    return found
