"""One ONNX graph in ONNX Runtime, bound to torch's memory on the CPU or a GPU: nothing is copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mp2.engine.onnx.library import load_onnxruntime
from mp2.engine.onnx.model_files import ModelFiles, load_session
from mp2.engine.onnx.providers import Provider
from mp2.engine.tensorrt.builder import input_shapes
from mp2.engine.tensorrt.profiles import Profile, sizes_of
from mp2.errors import Mp2Error

# an empty tensor (no prompt rows) has no address, but a binding needs one
_SOMEWHERE = torch.empty(1)
# onnx.TensorProto's numbers, without that package: a session needs no other part of it
_ELEMENTS = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16, torch.int64: 7, torch.bool: 9}
_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
    "tensor(bool)": torch.bool,
}


def _type_of(node: Any) -> torch.dtype:
    if node.type not in _TYPES:
        raise Mp2Error(f"'{node.name[:60]}' is {node.type}, expected one of {', '.join(_TYPES)}")
    return _TYPES[node.type]


class OnnxSession:
    """A loaded graph: feeds tensors by name, fills outputs of shapes that the caller knows.

    Inputs and outputs stay on the provider's device, so a chain of sessions hands its activations on in
    device memory. On CUDA the work is queued on a stream of its own, after torch's earlier work and before
    its later.
    """

    def __init__(
        self,
        model: Path | ModelFiles | bytes,
        *,
        threads: int | None = None,
        provider: Provider | None = None,
        profile: Profile | None = None,
    ) -> None:
        """Load ``model`` on ``provider`` (None: the CPU) with ``threads`` CPU threads (None: torch's number).

        ``profile`` is what the TensorRT provider is to accept (None: as the provider says); a model given as
        bytes alone has its weights inside. Raises MissingDependencyError if onnxruntime has no such
        provider, or cannot load its libraries.
        """
        provider = provider or Provider()
        provider.check()
        ort = load_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # one session a layer: threads that go on spinning after a call would slow down the next session's
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._device = torch.device(provider.device)
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        graph = "" if isinstance(model, bytes) else model.name
        self._declared = {}
        if provider.kind == "tensorrt":
            self._declared = input_shapes(model.graph if isinstance(model, ModelFiles) else model)
        self.profile = profile or provider.profile(graph)
        handle = None if self._stream is None else self._stream.cuda_stream
        chosen = provider.choose(options, graph, self._declared, handle, profile)
        self._session = load_session(model, options, chosen, in_memory=provider.kind != "tensorrt")
        provider.check_session(self._session.get_providers())
        # none on a CPU: looking into them at every call costs onnxruntime 0.1 ms
        self._run_options: Any = None
        if self._stream is not None:  # ordered by streams, not by waiting for the device
            self._run_options = ort.RunOptions()
            self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._inputs = {node.name: _type_of(node) for node in self._session.get_inputs()}
        self._outputs = {node.name: _type_of(node) for node in self._session.get_outputs()}
        self.input_names = list(self._inputs)

    def run(
        self, feeds: Mapping[str, torch.Tensor], outputs: Mapping[str, Sequence[int] | torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Return the outputs named in ``outputs`` for ``feeds`` (name -> tensor).

        ``outputs`` gives the shape of each, or the contiguous tensor to fill, of the graph's type and device.
        """
        binding = self._session.io_binding()
        device, index = self._device.type, self._device.index or 0
        kept = []  # tensors must outlive the run
        for name, tensor in feeds.items():
            tensor = tensor.to(self._device, self._inputs[name]).contiguous()
            kept.append(tensor)
            address = tensor.data_ptr() or _SOMEWHERE.data_ptr()
            binding.bind_input(name, device, index, _ELEMENTS[tensor.dtype], list(tensor.shape), address)
        results = []
        for name, wanted in outputs.items():
            result = wanted if isinstance(wanted, torch.Tensor) else self.empty(name, wanted)
            results.append(result)
            element, shape = _ELEMENTS[result.dtype], list(result.shape)
            binding.bind_output(name, device, index, element, shape, result.data_ptr())
        if self._stream is None:
            self._session.run_with_iobinding(binding, self._run_options)
        else:
            current = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(current)
            self._session.run_with_iobinding(binding, self._run_options)
            current.wait_stream(self._stream)
        return tuple(results)

    def sizes_beyond(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, int] | None:
        """Return the named sizes of ``feeds`` if the session's profile does not cover them."""
        if self.profile is None:
            return None
        sizes = sizes_of(self._declared, {name: tuple(x.shape) for name, x in feeds.items()})
        return None if self.profile.covers(sizes) else sizes

    def empty(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """Return an unfilled tensor for output ``name``."""
        return torch.empty(tuple(shape), dtype=self._outputs[name], device=self._device)
