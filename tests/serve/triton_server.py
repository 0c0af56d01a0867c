"""A bundle's graph in NVIDIA's Triton server, by its Python backend: python triton_server.py BUNDLE PORT.

The package nvidia-pytriton brings the server; it has no ONNX Runtime backend, so that the graph is run by
onnxruntime in a Python model. It needs the interpreter's libpython where the loader finds it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

TYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32}


def main(bundle: Path, port: int) -> None:
    """Serve until the process is ended."""
    session = onnxruntime.InferenceSession(bundle / "backbone.onnx")

    def answered(requests: list[Any]) -> list[dict[str, np.ndarray]]:
        names = [output.name for output in session.get_outputs()]
        found = []
        for request in requests:
            feeds = dict(request.data)
            feeds["prompt_length"] = feeds["prompt_length"][:, 0]  # [rows, 1], as Triton has it
            found.append(dict(zip(names, session.run(names, feeds), strict=True)))
        return found

    def tensor(node: Any) -> Tensor:
        sizes = tuple(-1 if isinstance(size, str) else size for size in node.shape[1:])
        return Tensor(name=node.name, dtype=TYPES[node.type], shape=sizes or (1,))

    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=port,
        grpc_port=port + 1,
        metrics_port=port + 2,
        exit_timeout_secs=1,
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="backbone",
            infer_func=answered,
            inputs=[tensor(node) for node in session.get_inputs()],
            outputs=[tensor(node) for node in session.get_outputs()],
            config=ModelConfig(max_batch_size=64, batcher=DynamicBatcher(max_queue_delay_microseconds=2000)),
        )
        triton.serve()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
