"""A recording double of the TensorRT library, specified from the recorded bindings.

Every call is bound to a recorded signature (an unknown member is an AttributeError, a wrong argument a
TypeError), written down, and then done on the CPU: a "plan" has its graph and profiles inside, and running it
runs the emulated graph on the memory that was given by address. Shapes outside the profile and missing memory
are refused, as the library does.
"""

from __future__ import annotations

import base64
import ctypes
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from mp2.export.emulated import emulated

from .api import parse_signature

RECORD = Path(__file__).with_name("tensorrt_bindings.json")
_TYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.BOOL: torch.bool,
}
_SCRATCH = 1000  # bytes that every engine says it needs, per profile
Call = tuple[str, tuple[Any, ...]]


def recorded(major: int) -> dict[str, Any]:
    """Return the recorded classes of TensorRT ``major``."""
    return next(r for r in json.loads(RECORD.read_text()) if r["version"].startswith(f"{major}."))


class FakeObject:
    """An object of class ``kind``; members that were not recorded do not exist."""

    def __init__(self, library: FakeLibrary, kind: str, behaviour: object = None) -> None:
        self.__dict__.update(_library=library, _kind=kind, _behaviour=behaviour)

    def __getattr__(self, name: str) -> Any:
        entry = self._library.member(self._kind, name)
        behaviour = getattr(self._behaviour, name, None)
        if entry["kind"] != "method":
            return behaviour

        def call(*args: Any, **kwargs: Any) -> Any:
            self._library.check(self._kind, name, args, kwargs)
            if self._library.device is None:
                self._library.elsewhere.append(f"{self._kind}.{name}")
            self._library.calls.append((f"{self._kind}.{name}", (*args, *kwargs.values())))
            return None if behaviour is None else behaviour(*args, **kwargs)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        entry = self._library.member(self._kind, name)
        if not entry.get("set"):
            raise AttributeError(f"{self._kind}.{name} cannot be set")
        self._library.calls.append((f"{self._kind}.{name}=", (value,)))

    def __bytes__(self) -> bytes:
        data = self._behaviour
        assert isinstance(data, bytes)
        return data


class FakeEnum:
    """An enumeration; its members are (class, name), comparable, with the recorded numbers."""

    def __init__(self, library: FakeLibrary, kind: str) -> None:
        self._library, self._kind = library, kind

    def __getattr__(self, name: str) -> Any:
        return FakeValue(self._kind, name, self._library.member(self._kind, name).get("value", 0))


class FakeValue(tuple):  # type: ignore[type-arg]
    """A member of an enumeration."""

    def __new__(cls, kind: str, name: str, number: int) -> FakeValue:
        return super().__new__(cls, (kind, name, number))

    def __int__(self) -> int:
        return int(self[2])


class FakeLibrary:
    """What ``import tensorrt`` gives: classes that can be constructed, enumerations, and the calls made."""

    def __init__(self, major: int, *, capability_mismatch: bool = False) -> None:
        found = recorded(major)
        self.__version__ = found["version"]
        self._classes = found["classes"]
        self.calls: list[Call] = []
        self.reject_timing_cache = capability_mismatch
        self.refuse: dict[str, str] = {}  # step -> message of the logger
        self.logger: Any = None
        self.device: str | None = None  # the current one
        self.elsewhere: list[str] = []  # calls made while no device was

        class ILogger:
            """The base that loggers derive from."""

            INTERNAL_ERROR, ERROR, WARNING, INFO = 0, 1, 2, 3

            def __init__(self) -> None:
                pass

        self.ILogger = ILogger

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self._classes.get(name) is None:
            raise AttributeError(f"tensorrt has no {name}")
        if name in ("Builder", "OnnxParser", "Runtime"):
            return lambda *args, **kwargs: self._construct(name, args, kwargs)
        return FakeEnum(self, name)

    def member(self, kind: str, name: str) -> dict[str, Any]:
        entry = self._classes[kind]["touched"].get(name)
        if entry is None:
            raise AttributeError(f"{kind} has no recorded member '{name}'")
        found: dict[str, Any] = entry
        return found

    def check(self, kind: str, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        texts = self.member(kind, name)["signatures"]
        if not any(parse_signature(text).accepts(len(args), tuple(kwargs)) for text in texts):
            raise TypeError(f"{kind}.{name}: {len(args)} arguments and {list(kwargs)}, expected {texts}")

    def _construct(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FakeObject:
        self.check(name, "__init__", args, kwargs)
        self.calls.append((f"{name}.__init__", args))
        self.logger = args[-1]
        behaviours = {"Builder": _Builder, "OnnxParser": _Parser, "Runtime": _Runtime}
        return FakeObject(self, name, behaviours[name](self, *args))

    def fails(self, step: str) -> bool:
        """Tell whether ``step`` is to be refused, after telling the logger why."""
        if step in self.refuse:
            self.logger.log(self.ILogger.ERROR, self.refuse[step])
        return step in self.refuse

    def named(self, name: str) -> list[tuple[Any, ...]]:
        """Return the arguments of every call of ``name`` (``Builder.create_network``) in order."""
        return [args for called, args in self.calls if called == name]


class _Builder:
    def __init__(self, library: FakeLibrary, logger: object) -> None:
        self._library = library

    def create_network(self, flags: int) -> FakeObject:
        return FakeObject(self._library, "INetworkDefinition", _Network())

    def create_builder_config(self) -> FakeObject:
        return FakeObject(self._library, "IBuilderConfig", _Config(self._library))

    def create_optimization_profile(self) -> FakeObject:
        return FakeObject(self._library, "IOptimizationProfile", _Profile())

    def build_serialized_network(self, network: FakeObject, config: FakeObject) -> FakeObject | None:
        if self._library.fails("build"):
            return None
        graph = network._behaviour.graph
        kept = {"typed": onnx.load(graph, load_external_data=False), "emulated": emulated(graph)}
        plan = {"graph": str(graph), "profiles": config._behaviour.profiles} | {
            name: base64.b64encode(model.SerializeToString()).decode() for name, model in kept.items()
        }
        return FakeObject(self._library, "IHostMemory", json.dumps(plan).encode())


class _Network:
    graph: Path


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, low: Sequence[int], best: Sequence[int], high: Sequence[int]) -> None:
        self.shapes[name] = [list(low), list(best), list(high)]


class _Config:
    def __init__(self, library: FakeLibrary) -> None:
        self._library = library
        self.profiles: list[dict[str, list[list[int]]]] = []

    def create_timing_cache(self, data: bytes) -> FakeObject:
        cache = type("Cache", (), {"data": data})()
        cache.serialize = lambda: FakeObject(self._library, "IHostMemory", b"timings:" + data)
        return FakeObject(self._library, "ITimingCache", cache)

    def set_timing_cache(self, cache: FakeObject, ignore_mismatch: bool) -> bool:
        return not (self._library.reject_timing_cache and cache._behaviour.data)

    def add_optimization_profile(self, profile: FakeObject) -> int:
        self.profiles.append(profile._behaviour.shapes)
        return -1 if self._library.fails("profile") else len(self.profiles) - 1


class _Parser:
    def __init__(self, library: FakeLibrary, network: FakeObject, logger: object) -> None:
        self._library, self._network = library, network
        self.num_errors = 0

    def parse_from_file(self, path: str) -> bool:
        onnx.checker.check_model(path, full_check=True)
        self._network._behaviour.graph = path
        self.num_errors = int(self._library.fails("parse"))
        return self.num_errors == 0

    def get_error(self, index: int) -> FakeObject:
        words = {"desc": "no such operator", "node_name": "Foo_3", "node_operator": "Foo"}
        behaviour = type("Error", (), {name: staticmethod(lambda w=w: w) for name, w in words.items()})
        return FakeObject(self._library, "ParserError", behaviour)


class _Runtime:
    def __init__(self, library: FakeLibrary, logger: object) -> None:
        self._library = library

    def deserialize_cuda_engine(self, data: bytes) -> FakeObject | None:
        if self._library.fails("load"):
            return None
        return FakeObject(self._library, "ICudaEngine", _Engine(self._library, json.loads(data)))


class _Engine:
    def __init__(self, library: FakeLibrary, plan: dict[str, Any]) -> None:
        self.library, self.profiles = library, plan["profiles"]
        typed = onnx.load_from_string(base64.b64decode(plan["typed"])).graph
        self.inputs = [info.name for info in typed.input]
        self.outputs = [info.name for info in typed.output]
        self.declared = {
            i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]
            for i in (*typed.input, *typed.output)
        }
        self.types = {i.name: i.type.tensor_type.elem_type for i in (*typed.input, *typed.output)}
        self.num_io_tensors = len(self.types)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(
            base64.b64decode(plan["emulated"]), options, providers=["CPUExecutionProvider"]
        )

    def get_tensor_name(self, index: int) -> str:
        return list(self.types)[index]

    def get_tensor_mode(self, name: str) -> FakeValue:
        return FakeEnum(self.library, "TensorIOMode").INPUT if name in self.inputs else FakeValue("", "", 2)

    def get_tensor_location(self, name: str) -> FakeValue:
        found: FakeValue = FakeEnum(self.library, "TensorLocation").DEVICE
        return found

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return _SCRATCH * (index + 1)

    def create_execution_context(self, strategy: FakeValue) -> FakeObject:
        assert strategy[1] == "USER_MANAGED"
        return FakeObject(self.library, "IExecutionContext", _Context(self))


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self.active_optimization_profile = -1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = 0

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.active_optimization_profile = index
        return index < len(self._engine.profiles)

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        ranges = self._engine.profiles[self.active_optimization_profile].get(name)
        if ranges is not None:
            low, _, high = ranges
            fits = len(shape) == len(low) and all(
                a <= s <= b for a, s, b in zip(low, shape, high, strict=True)
            )
            if not fits:
                return False
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = self._shapes
        declared = self._engine.declared
        sizes = {d: s for given in shape for d, s in zip(declared[given], shape[given], strict=True)}
        return tuple(sizes.get(d, d) for d in declared[name])

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0
        self._scratch = size

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        engine = self._engine
        if engine.library.fails("run"):
            return False
        assert self._scratch >= engine.get_device_memory_size_for_profile_v2(self.active_optimization_profile)
        assert set(self._addresses) == set(engine.types), "memory of every tensor"
        self._work(self._addresses, self._shapes)
        return True

    def _work(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        engine = self._engine
        feeds = {}
        for name in engine.inputs:
            tensor = memory(addresses[name], shapes[name], _TYPES[engine.types[name]])
            feeds[name] = (tensor.float() if tensor.dtype.itemsize == 2 else tensor).numpy()
        for name, found in zip(engine.outputs, engine.session.run(engine.outputs, feeds), strict=True):
            target = memory(addresses[name], found.shape, _TYPES[engine.types[name]])
            target.copy_(torch.from_numpy(np.ascontiguousarray(found)))


def memory(address: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor that lies at ``address``."""
    n_bytes = prod(shape) * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * n_bytes).from_address(address), dtype=dtype).view(tuple(shape))


class FakeDevice:
    """`mp2.engine.tensorrt.calls.Device` on the CPU; 7 is its stream."""

    def __init__(self, name: str, library: FakeLibrary) -> None:
        self.name, self._library = name, library

    @contextmanager
    def current(self) -> Iterator[None]:
        before, self._library.device = self._library.device, self.name
        try:
            yield
        finally:
            self._library.device = before

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def run(self, work: Callable[[int], None]) -> None:
        work(7)
