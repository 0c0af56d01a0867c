"""ONNX Runtime's execution providers for a GPU: which are there, and the options they get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime as ort
import torch

from mp2.errors import MissingDependencyError
from mp2.export.tensorrt.profiles import Shape, TaskShapes

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_WORKSPACE_BYTES = 4 << 30
Options = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Provider:
    """Where a session runs and how: ``cpu``, ``cuda`` or ``tensorrt`` on a torch ``device``.

    ``tensorrt`` keeps engines and timings in ``cache``, tuned for ``shapes``; ``precision`` fp16 or bf16 lets
    it choose that type for a float32 graph (TensorRT 10 only; typed graphs need no flag).
    """

    kind: str = "cpu"
    device: str = "cpu"
    cache: Path | None = None
    precision: str = "fp32"
    shapes: TaskShapes = field(default_factory=TaskShapes)

    def check(self) -> None:
        """Raise MissingDependencyError if the installed onnxruntime does not have the provider."""
        wanted, there = PROVIDERS[self.kind], ort.get_available_providers()
        if wanted not in there:
            raise MissingDependencyError(
                f"onnxruntime {ort.__version__} has no {wanted} (it has {', '.join(there)}); "
                "pip uninstall onnxruntime && pip install onnxruntime-gpu"
                + (" tensorrt" if self.kind == "tensorrt" else "")
            )

    def arguments(
        self, graph: str, inputs: Mapping[str, Shape], stream: int | None
    ) -> list[tuple[str, Options]]:
        """Return ``providers=`` of a session for ``graph``; work is queued on CUDA ``stream``."""
        if self.kind == "cpu":
            return [(PROVIDERS["cpu"], {})]
        common = {"device_id": str(torch.device(self.device).index or 0)}
        if stream is not None:
            common["user_compute_stream"] = str(stream)
        cuda = (
            PROVIDERS["cuda"],
            {**common, "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"},
        )
        rest = [cuda, (PROVIDERS["cpu"], {})]
        if self.kind == "cuda":
            return rest
        return [(PROVIDERS["tensorrt"], {**common, **self._tensorrt(graph, inputs)}), *rest]

    def _tensorrt(self, graph: str, inputs: Mapping[str, Shape]) -> Options:
        options = {
            "trt_max_workspace_size": str(_WORKSPACE_BYTES),
            "trt_layer_norm_fp32_fallback": "True",
            "trt_fp16_enable": str(self.precision == "fp16"),
            "trt_bf16_enable": str(self.precision == "bf16"),
            **self._profile(graph, inputs),
        }
        if self.cache is not None:
            self.cache.mkdir(parents=True, exist_ok=True)
            options |= {
                "trt_engine_cache_enable": "True",
                "trt_engine_cache_path": str(self.cache),
                "trt_engine_cache_prefix": f"{Path(graph).stem}-{self.precision}",
                "trt_timing_cache_enable": "True",
                "trt_timing_cache_path": str(self.cache),
            }
        return options

    def _profile(self, graph: str, inputs: Mapping[str, Shape]) -> Options:
        """Return one explicit profile that covers all of the task's; without it every new shape rebuilds."""
        profiles = self.shapes.profiles(graph)
        ranges = [p.shapes(shape) for shape in inputs.values() for p in profiles]
        names = [name for name in inputs for _ in profiles]
        options = {}
        for key, which, pick in (("min", 0, min), ("opt", 1, max), ("max", 2, max)):
            sizes: dict[str, tuple[int, ...]] = {}
            for name, shapes in zip(names, ranges, strict=True):
                shape = shapes[which]
                sizes[name] = tuple(map(pick, sizes[name], shape)) if name in sizes else shape
            options[f"trt_profile_{key}_shapes"] = ",".join(
                f"{name}:{'x'.join(map(str, shape))}" for name, shape in sizes.items() if shape
            )
        return options
