"""A Triton model repository of a bundle: each graph on ONNX Runtime and, where a plan was built, TensorRT.

Checked against Triton's protocol buffers and documentation; not run on a Triton server.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mp2.engine.bundle import Bundle
from mp2.engine.tensorrt.plans import read_shapes

TRITON = "triton"
_TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32"}
_QUEUE_DELAY_US = 2000  # how long a request may wait for others; a forward of 32 rows takes longer


def write_triton(bundle: Bundle, plans: Mapping[str, bytes]) -> list[Path]:
    """Write ``triton/`` in ``bundle`` and return the models' folders.

    Files are hard links to the bundle's where the file system has these. ``plans`` is graph -> TensorRT plan;
    each becomes a second model.
    """
    root = bundle.path / TRITON
    shutil.rmtree(root, ignore_errors=True)
    made = []
    weights = [name for name in bundle.files if name.endswith(".bin")]
    for graph, sides in bundle.manifest["graphs"].items():
        name = Path(graph).stem
        models = {name: ("onnxruntime", {"model.onnx": graph, **{file: file for file in weights}})}
        if graph in plans:
            models[f"{name}_tensorrt"] = ("tensorrt", {})
        for model, (backend, files) in models.items():
            folder = root / model
            (folder / "1").mkdir(parents=True)
            for target, source in files.items():
                _link(bundle.path / source, folder / "1" / target)
            if backend == "tensorrt":
                (folder / "1" / "model.plan").write_bytes(plans[graph])
            (folder / "config.pbtxt").write_text(_config(bundle, model, backend, sides), encoding="utf-8")
            made.append(folder)
    return made


def _config(bundle: Bundle, model: str, backend: str, sides: Mapping[str, Any]) -> str:
    shapes = read_shapes(bundle)
    lines = [f'name: "{model}"', f'backend: "{backend}"', f"max_batch_size: {shapes.examples}"]
    for side, tensors in sides.items():
        entries = [_tensor(name, tensor["dtype"], tensor["shape"][1:]) for name, tensor in tensors.items()]
        lines.append(f"{side[:-1]} [\n" + ",\n".join(entries) + "\n]")
    lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {_QUEUE_DELAY_US} }}")
    if backend == "tensorrt":
        profiles = ", ".join(f'"{k}"' for k in range(len(shapes.lengths)))
        lines.append(f"instance_group [ {{ kind: KIND_GPU profile: [ {profiles} ] }} ]")
    return "\n".join(lines) + "\n"


def _tensor(name: str, dtype: str, sizes: list[int | str]) -> str:
    dims = ", ".join("-1" if isinstance(size, str) else str(size) for size in sizes)
    if not sizes:  # a number a row: Triton's own shapes have at least one axis beside the batch's
        return f'  {{ name: "{name}" data_type: {_TYPES[dtype]} dims: [ 1 ] reshape {{ shape: [ ] }} }}'
    return f'  {{ name: "{name}" data_type: {_TYPES[dtype]} dims: [ {dims} ] }}'


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
