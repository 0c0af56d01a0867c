"""One ONNX graph in ONNX Runtime, fed with torch tensors without copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

# an empty tensor (no prompt rows) has no address, but a binding needs one
_SOMEWHERE = torch.empty(1)
_NUMPY = {torch.float32: np.float32, torch.int64: np.int64, torch.bool: np.bool_}


class OnnxSession:
    """A loaded graph: feeds CPU tensors by name, fills float32 outputs of shapes that the caller knows."""

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        """Load ``path`` on the CPU with ``threads`` threads (None: torch's number)."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # one session a layer: threads that go on spinning after a call would slow down the next session's
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.input_names = [node.name for node in self._session.get_inputs()]

    def run(
        self, feeds: Mapping[str, torch.Tensor], outputs: Mapping[str, Sequence[int]]
    ) -> tuple[torch.Tensor, ...]:
        """Return the outputs named in ``outputs`` (name -> shape) for ``feeds`` (name -> CPU tensor)."""
        binding = self._session.io_binding()
        kept = []  # tensors must outlive the run
        for name, tensor in feeds.items():
            tensor = tensor.contiguous()
            kept.append(tensor)
            address = tensor.data_ptr() or _SOMEWHERE.data_ptr()
            binding.bind_input(name, "cpu", 0, _NUMPY[tensor.dtype], list(tensor.shape), address)
        results = []
        for name, shape in outputs.items():
            result = torch.empty(tuple(shape), dtype=torch.float32)
            results.append(result)
            binding.bind_output(name, "cpu", 0, np.float32, list(shape), result.data_ptr())
        self._session.run_with_iobinding(binding)
        return tuple(results)
