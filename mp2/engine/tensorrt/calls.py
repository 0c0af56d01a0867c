"""Calls of one TensorRT engine on torch-owned memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mp2.engine.tensorrt.library import make_logger
from mp2.engine.tensorrt.plans import Plan
from mp2.engine.tensorrt.profiles import Shape, best_profile, sizes_of
from mp2.errors import Mp2Error

if TYPE_CHECKING:
    import tensorrt as trt

_ALIGNMENT = 256  # of device memory given to TensorRT


class Device(Protocol):
    """Where tensors live and work is queued; the seam that lets tests run without a GPU."""

    name: str

    def current(self) -> AbstractContextManager[Any]:
        """Make it the thread's current device: TensorRT builds, loads and runs on that one."""
        ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return new memory on the device."""
        ...

    def run(self, work: Callable[[int], None]) -> None:
        """Call ``work`` with a stream handle; it queues after torch's earlier work, before later."""
        ...


class CudaDevice:
    """`Device` on a CUDA device, with a stream of its own (TensorRT is slower on the default stream)."""

    def __init__(self, name: str) -> None:
        """Use the CUDA device ``name``, "cuda" or "cuda:1"."""
        self.name = name
        self._stream = torch.cuda.Stream(name)  # type: ignore[no-untyped-call]

    def current(self) -> AbstractContextManager[Any]:
        """See `Device.current`."""
        return torch.cuda.device(self.name)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `Device.empty`."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.name)

    def run(self, work: Callable[[int], None]) -> None:
        """See `Device.run`."""
        current = torch.cuda.current_stream(self.name)
        self._stream.wait_stream(current)
        work(self._stream.cuda_stream)
        current.wait_stream(self._stream)


class EngineCalls:
    """A deserialized plan that can be called with tensors of any shape that one of its profiles covers.

    To be made and called while its device is the current one.
    """

    def __init__(
        self, module: ModuleType, plan: Plan, name: str, shapes: Mapping[str, Shape], device: Device
    ) -> None:
        """Load ``plan`` of graph ``name``, whose inputs have the declared ``shapes``."""
        self._module = module
        self._name = name
        self._shapes = shapes
        self._profiles = plan.profiles
        self._device = device
        self._errors: list[str] = []
        self._logger = make_logger(module, self._errors, lambda line: None)
        self._runtime: trt.Runtime = module.Runtime(self._logger)
        engine: trt.ICudaEngine | None = self._runtime.deserialize_cuda_engine(plan.data)
        if engine is None:
            raise self._error("TensorRT cannot load the plan")
        self._engine: trt.ICudaEngine = engine
        self._contexts: dict[int, trt.IExecutionContext] = {}
        self._block: torch.Tensor | None = None  # TensorRT's working memory, for all profiles
        self._check_inputs()

    def covers(self, sizes: Mapping[str, int]) -> bool:
        """Tell whether a profile covers the named ``sizes``."""
        return best_profile(self._profiles, sizes) is not None

    def __call__(self, feeds: Mapping[str, torch.Tensor], results: Mapping[str, torch.Tensor]) -> None:
        """Queue the engine on ``feeds`` (contiguous, on the device), writing all outputs into ``results``."""
        sizes = sizes_of(self._shapes, {name: tuple(x.shape) for name, x in feeds.items()})
        profile = best_profile(self._profiles, sizes)
        if profile is None:
            raise self._error(f"no profile covers {sizes}")
        context = self._contexts.get(profile)
        if context is None:
            context = self._contexts[profile] = self._new_context(profile)
        self._bind(context, feeds, results)
        self._device.run(lambda stream: self._queue(context, stream))

    def _new_context(self, profile: int) -> trt.IExecutionContext:
        strategy = self._module.ExecutionContextAllocationStrategy.USER_MANAGED
        context: trt.IExecutionContext | None = self._engine.create_execution_context(strategy)
        if context is None:
            raise self._error("TensorRT made no execution context")
        selected: list[bool] = []
        self._device.run(
            lambda stream: selected.append(context.set_optimization_profile_async(profile, stream))
        )
        if not selected[0]:
            raise self._error(f"profile {profile} cannot be selected")
        return context

    def _bind(
        self,
        context: trt.IExecutionContext,
        feeds: Mapping[str, torch.Tensor],
        results: Mapping[str, torch.Tensor],
    ) -> None:
        for name, tensor in feeds.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise self._error(f"input '{name}' cannot have shape {tuple(tensor.shape)}")
        for name, tensor in results.items():
            given, expected = tuple(tensor.shape), tuple(context.get_tensor_shape(name))
            if given != expected:
                raise self._error(f"output '{name}' has shape {expected}, expected {given}")
        n_bytes = self._engine.get_device_memory_size_for_profile_v2(context.active_optimization_profile)
        address, size = self._memory(n_bytes)
        context.set_device_memory(address, size)
        for name, tensor in {**feeds, **results}.items():
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise self._error(f"the memory of '{name}' was refused")

    def _memory(self, n_bytes: int) -> tuple[int, int]:
        """Return address and size of at least ``n_bytes`` of working memory."""
        if self._block is None or self._block.numel() - _ALIGNMENT < n_bytes:
            self._block = None  # given back before more is asked for
            self._block = self._device.empty((n_bytes + _ALIGNMENT,), torch.uint8)
        address = -(-self._block.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        return address, self._block.data_ptr() + self._block.numel() - address

    def _queue(self, context: trt.IExecutionContext, stream: int) -> None:
        if not context.execute_async_v3(stream):
            raise self._error("TensorRT did not run")

    def _check_inputs(self) -> None:
        """Raise Mp2Error if the plan's inputs are not the graph's, or one must lie in host memory."""
        names = [self._engine.get_tensor_name(k) for k in range(self._engine.num_io_tensors)]
        inputs = {
            name for name in names if self._engine.get_tensor_mode(name) == self._module.TensorIOMode.INPUT
        }
        on_host = [
            name
            for name in names
            if self._engine.get_tensor_location(name) != self._module.TensorLocation.DEVICE
        ]
        if inputs != set(self._shapes):
            raise self._error(f"the plan has inputs {sorted(inputs)}, expected {sorted(self._shapes)}")
        if on_host:
            raise self._error(f"{on_host} must lie in host memory, expected device memory")

    def _error(self, message: str) -> Exception:
        """Return the error with TensorRT's reason; a MemoryError, as a smaller batch helps, if it is that."""
        reason = " | ".join(self._errors[-3:])
        self._errors.clear()
        text = f"{self._name}: {message}" + (f" ({reason})" if reason else "")
        return MemoryError(text) if "out of memory" in reason.lower() else Mp2Error(text)
