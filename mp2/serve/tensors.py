"""Requests and answers of the Open Inference Protocol v2: tensors, checked against the graph.

Nothing reaches the runtime whose names, types, shapes and values the graph does not take: what would be an
error in the middle of a forward is a message about one input here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mp2.engine.endpoint.wire import DTYPES, NAMES, can_be_shape, message
from mp2.serve.errors import BadRequestError
from mp2.serve.request_body import read_json, shown

_INTEGERS = np.iinfo(np.int64)


@dataclass(frozen=True, kw_only=True)
class GraphLimits:
    """What inputs of a graph may be, beside their declared shapes."""

    vocab_size: int
    positions: int
    max_tokens: int  # of a request: rows x tokens of each


@dataclass(frozen=True)
class InferRequest:
    """A request that the graph takes."""

    id: str | None
    feeds: dict[str, np.ndarray]
    outputs: list[str]
    binary: frozenset[str]  # of the outputs, those that are sent as bytes


def read_infer(
    body: bytes, json_length: str | None, interface: Mapping[str, Any], limits: GraphLimits
) -> InferRequest:
    """Return the request in ``body``; BadRequestError names the input or field that is wrong."""
    size = len(body)
    if json_length is not None:
        if not json_length.isdecimal() or len(json_length) > 18 or int(json_length) > len(body):
            raise BadRequestError(f"Inference-Header-Content-Length is not a length within {size} bytes")
        size = int(json_length)
    header = read_json(body[:size])
    if not isinstance(header, dict):
        raise BadRequestError(f"the body is {shown(header)}, expected an object with 'inputs'")
    name = header.get("id")
    if name is not None and not isinstance(name, str):
        raise BadRequestError(f"got {shown(name)}, expected a string", "id")
    feeds = _feeds(header.get("inputs"), memoryview(body)[size:], interface["inputs"])
    _check_values(feeds, interface["inputs"], limits)
    everything = _flag(_parameters(header, "parameters"), "binary_data_output", False)
    outputs, binary = _outputs(header.get("outputs"), interface["outputs"], everything)
    return InferRequest(name, feeds, outputs, frozenset(binary))


def write_infer(
    request: InferRequest, model: str, found: Mapping[str, np.ndarray]
) -> tuple[bytes, int | None]:
    """Return the answer's body, and the length of the JSON in it where bytes follow.

    BadRequestError where a number that is not finite would have to be JSON.
    """
    header: dict[str, Any] = {"model_name": model, "model_version": "1"}
    if request.id is not None:
        header["id"] = request.id
    if request.binary.issuperset(request.outputs):
        return message(header, "outputs", {name: found[name] for name in request.outputs})
    described, parts = [], []
    for name in request.outputs:
        tensor = found[name]
        entry: dict[str, Any] = {
            "name": name,
            "shape": list(tensor.shape),
            "datatype": NAMES[str(tensor.dtype)],
        }
        if name in request.binary:
            parts.append(np.ascontiguousarray(tensor, DTYPES[entry["datatype"]]).tobytes())
            entry["parameters"] = {"binary_data_size": len(parts[-1])}
        elif not np.isfinite(tensor).all():
            raise BadRequestError(
                "has numbers that are not finite, which JSON cannot say: ask for bytes", name
            )
        else:
            entry["data"] = tensor.ravel().tolist()
        described.append(entry)
    head = json.dumps({**header, "outputs": described}, allow_nan=False).encode()
    return b"".join([head, *parts]), len(head) if parts else None


def _feeds(given: object, binary: memoryview, declared: Mapping[str, Any]) -> dict[str, np.ndarray]:
    if not isinstance(given, list):
        raise BadRequestError(f"got {shown(given)}, expected a list of tensors", "inputs")
    feeds: dict[str, np.ndarray] = {}
    at = 0
    for number, tensor in enumerate(given):
        name = tensor.get("name") if isinstance(tensor, dict) else None
        if not isinstance(tensor, dict) or not isinstance(name, str):
            raise BadRequestError("has no name", f"inputs[{number}]")
        if name not in declared or name in feeds:
            what = "given twice" if name in feeds else f"unknown; the graph has {', '.join(declared)}"
            raise BadRequestError(what, name[:60])
        shape = _shape(tensor.get("shape"), name)
        wanted = NAMES[declared[name]["dtype"]]
        if tensor.get("datatype") != wanted:
            raise BadRequestError(f"datatype is {shown(tensor.get('datatype'))}, expected {wanted}", name)
        n_bytes = _parameters(tensor, name).get("binary_data_size")
        if n_bytes is None:
            feeds[name] = _from_json(tensor.get("data"), shape, wanted, name)
            continue
        expected = math.prod(shape) * DTYPES[wanted].itemsize
        if n_bytes != expected or isinstance(n_bytes, bool):
            raise BadRequestError(
                f"binary_data_size is {shown(n_bytes)}, expected {expected} for shape {shape}", name
            )
        if at + expected > len(binary):
            raise BadRequestError(f"the body ends {at + expected - len(binary)} bytes before it does", name)
        feeds[name] = np.frombuffer(binary[at : at + expected], DTYPES[wanted]).reshape(shape)
        at += expected
    if missing := [name for name in declared if name not in feeds]:
        raise BadRequestError("missing", missing[0])
    if at != len(binary):
        raise BadRequestError(f"the body has {len(binary) - at} bytes more than its inputs")
    return feeds


def _shape(value: object, name: str) -> list[int]:
    if not isinstance(value, list) or not all(type(n) is int and 0 <= n < 2**31 for n in value):
        raise BadRequestError(f"shape is {shown(value)}, expected a list of sizes", name)
    if not can_be_shape(value):
        raise BadRequestError(f"shape has {len(value)} axes, or sizes that no tensor has", name)
    return value


def _from_json(data: object, shape: Sequence[int], datatype: str, name: str) -> np.ndarray:
    """Return a tensor of numbers that are given as one list or as lists in lists."""
    if not isinstance(data, list):
        raise BadRequestError(f"data is {shown(data)}, expected a list of numbers", name)
    flat: list[Any] = data
    while flat and isinstance(flat[0], list):
        if not all(isinstance(part, list) for part in flat):
            raise BadRequestError("data has lists and numbers side by side", name)
        flat = [number for part in flat for number in part]
    if len(flat) != math.prod(shape):
        raise BadRequestError(
            f"data has {len(flat)} numbers, expected {math.prod(shape)} for {list(shape)}", name
        )
    kinds = {int} if datatype == "INT64" else {int, float}
    for number in flat:
        if type(number) not in kinds:
            raise BadRequestError(f"data has {shown(number)}, expected {datatype}", name)
        if type(number) is int and not _INTEGERS.min <= number <= _INTEGERS.max:
            raise BadRequestError(f"data has {shown(number)}, which is outside of 64 bits", name)
    with np.errstate(over="ignore"):  # becomes infinite, which is refused
        wide = np.array(flat, np.float64 if datatype == "FP32" else np.int64).reshape(shape)
        return np.asarray(wide, DTYPES[datatype])


def _check_values(feeds: Mapping[str, np.ndarray], declared: Mapping[str, Any], limits: GraphLimits) -> None:
    sizes: dict[str, int] = {}
    for name, tensor in feeds.items():
        shape = declared[name]["shape"]
        same = len(shape) == tensor.ndim and all(
            size == (sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted)
            for size, wanted in zip(tensor.shape, shape, strict=True)
        )
        if not same:
            raise BadRequestError(f"shape is {list(tensor.shape)}, expected {shape} with {sizes}", name)
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise BadRequestError("has numbers that are not finite", name)
    n, t, m = sizes["N"], sizes["T"], sizes.get("m", 0)
    if n < 1 or t < 1:
        raise BadRequestError(f"shape is {[n, t]}, expected at least one row and one token", "input_ids")
    if sizes["P"] not in (1, n):
        raise BadRequestError(
            f"there are {sizes['P']} prompts, expected 1 for all rows or {n}, one for each", "prompt_length"
        )
    rows = t + (m if "prompt_rows" in feeds else 0)
    if rows > limits.positions:
        raise BadRequestError(
            f"a row has {rows} tokens with its prompt's rows, expected at most {limits.positions}",
            "input_ids",
        )
    if n * rows > limits.max_tokens:
        raise BadRequestError(
            f"{n} rows of {rows} tokens, expected at most {limits.max_tokens} tokens in all; send fewer rows",
            "input_ids",
        )
    _check_range(feeds["input_ids"], 0, limits.vocab_size - 1, "input_ids")
    _check_range(feeds["attention_mask"], 0, 1, "attention_mask")
    _check_range(feeds["prompt_length"], 0, m, "prompt_length")
    if "segments" in feeds:
        if sizes["S"] < 1:
            raise BadRequestError("has no segment; give [[0, 0]] where nothing is pooled", "segments")
        if sizes["S"] > t:  # outputs have a row of the vocabulary for each
            raise BadRequestError(
                f"a row has {sizes['S']} segments, expected at most its {t} tokens", "segments"
            )
        _check_range(feeds["segments"], 0, t - 1, "segments")
        if (feeds["segments"][..., 0] > feeds["segments"][..., 1]).any():
            raise BadRequestError("a segment's first token is behind its last", "segments")


def _check_range(tensor: np.ndarray, low: int, high: int, name: str) -> None:
    if tensor.size and not low <= int(tensor.min()) <= int(tensor.max()) <= high:
        odd = int(tensor.min()) if int(tensor.min()) < low else int(tensor.max())
        raise BadRequestError(f"has {odd}, expected {low} to {high}", name)


def _outputs(given: object, declared: Mapping[str, Any], everything: bool) -> tuple[list[str], list[str]]:
    """Return the outputs that are asked for (without any: all), and those wanted as bytes."""
    if given is None:
        return list(declared), list(declared) if everything else []
    if not isinstance(given, list):
        raise BadRequestError(f"got {shown(given)}, expected a list of outputs", "outputs")
    names, binary = [], []
    for number, output in enumerate(given):
        name = output.get("name") if isinstance(output, dict) else None
        if not isinstance(output, dict) or not isinstance(name, str):
            raise BadRequestError("has no name", f"outputs[{number}]")
        if name not in declared or name in names:
            what = "given twice" if name in names else f"unknown; the graph gives {', '.join(declared)}"
            raise BadRequestError(what, name[:60])
        names.append(name)
        if _flag(_parameters(output, name), "binary_data", everything):
            binary.append(name)
    return (names, binary) if names else (list(declared), list(declared) if everything else [])


def _parameters(of: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    found = of.get("parameters", {})
    if not isinstance(found, dict):
        raise BadRequestError(f"parameters are {shown(found)}, expected an object", field)
    return found


def _flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    found = parameters.get(name, default)
    if not isinstance(found, bool):
        raise BadRequestError(f"got {shown(found)}, expected true or false", name)
    return found
