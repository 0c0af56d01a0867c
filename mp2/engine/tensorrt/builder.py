"""From an ONNX file to a TensorRT plan: one strongly typed network, its profiles, the timing cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mp2.engine.tensorrt.library import make_logger
from mp2.engine.tensorrt.profiles import Profile, Shape
from mp2.errors import Mp2Error

if TYPE_CHECKING:
    import tensorrt as trt


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """What decides how good a plan is; part of its key."""

    optimization_level: int = 4  # TensorRT's scale ends at 5; 3 is its default
    workspace_bytes: int = 4 << 30


@dataclass(frozen=True)
class BuiltPlan:
    """A serialized engine, and the timing cache that now knows its kernels."""

    plan: bytes
    timing_cache: bytes


def input_shapes(graph: Path | bytes) -> dict[str, Shape]:
    """Return name -> shape (numbers and size names) of the graph's inputs, in their order."""
    import onnx

    model = (
        onnx.load(graph, load_external_data=False)
        if isinstance(graph, Path)
        else onnx.load_from_string(graph)
    )
    return {
        info.name: [dim.dim_param or int(dim.dim_value) for dim in info.type.tensor_type.shape.dim]
        for info in model.graph.input
    }


def build_plan(
    module: ModuleType,
    graph: Path,
    profiles: Sequence[Profile],
    *,
    settings: BuildSettings,
    timing_cache: bytes = b"",
    note: Callable[[str], None] = lambda line: None,
) -> BuiltPlan:
    """Build ``graph`` with the TensorRT ``module``; all types are the graph's own.

    ``timing_cache`` of another device or release is dropped with a ``note``. Raises Mp2Error with TensorRT's
    own messages where the parser or the builder refuses.
    """
    errors: list[str] = []
    logger = make_logger(module, errors, note)
    builder: trt.Builder = module.Builder(logger)
    # a bit of TensorRT 10; in 11 every network is strongly typed and the flag is its bit 0
    network: trt.INetworkDefinition = builder.create_network(
        1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    _parse(module, network, logger, graph, errors)
    config: trt.IBuilderConfig = builder.create_builder_config()
    config.clear_flag(module.BuilderFlag.TF32)  # what the graph calls float32 stays float32
    config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    config.builder_optimization_level = settings.optimization_level
    cache: trt.ITimingCache = config.create_timing_cache(timing_cache)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        note("the timing cache is of another device or TensorRT release: starting a new one")
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    _add_profiles(builder, config, graph, profiles, errors)
    plan: trt.IHostMemory | None = builder.build_serialized_network(network, config)
    if plan is None:
        raise Mp2Error(f"TensorRT built no plan of {graph.name}: {_last(errors)}")
    return BuiltPlan(bytes(plan), bytes(cache.serialize()))


def _parse(
    module: ModuleType,
    network: trt.INetworkDefinition,
    logger: trt.ILogger,
    graph: Path,
    errors: list[str],
) -> None:
    parser: trt.OnnxParser = module.OnnxParser(network, logger)
    if parser.parse_from_file(str(graph)):
        return
    for index in range(parser.num_errors):
        error: trt.ParserError = parser.get_error(index)
        errors.append(f"{error.desc()} (node {error.node_name()}, {error.node_operator()})")
    raise Mp2Error(f"TensorRT cannot parse {graph.name}: {_last(errors)}")


def _add_profiles(
    builder: trt.Builder,
    config: trt.IBuilderConfig,
    graph: Path,
    profiles: Sequence[Profile],
    errors: list[str],
) -> None:
    shapes = input_shapes(graph)
    for profile in profiles:
        added: trt.IOptimizationProfile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            if any(isinstance(size, str) for size in shape):
                low, best, high = profile.shapes(shape)
                added.set_shape(name, low, best, high)
        if config.add_optimization_profile(added) < 0:
            raise Mp2Error(
                f"TensorRT refused profile {dict(profile.ranges)} of {graph.name}: {_last(errors)}"
            )


def _last(errors: Sequence[str]) -> str:
    return " | ".join(errors[-3:]) or "it gave no reason"
