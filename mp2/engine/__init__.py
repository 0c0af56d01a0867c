"""Runtimes that run the encoder stage by stage, and the few-shot objective on top of them."""

from mp2.engine.cpu.runtime import TorchRuntime
from mp2.engine.objective import Objective
from mp2.engine.onnx.runtime import OnnxRuntime
from mp2.engine.runtime import Prefix, Runtime
from mp2.engine.select import RUNTIMES, create_objective, create_runtime

__all__ = [
    "RUNTIMES",
    "Objective",
    "OnnxRuntime",
    "Prefix",
    "Runtime",
    "TorchRuntime",
    "create_objective",
    "create_runtime",
]
