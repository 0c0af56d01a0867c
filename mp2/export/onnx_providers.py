"""ONNX Runtime's execution providers for a GPU: which are there, and the options they get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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

    ``tensorrt`` keeps engines and timings in ``cache``, tuned for ``shapes`` (None: it grows its own profile,
    and rebuilds, as shapes come); ``precision`` fp16 or bf16 lets it choose that type for a float32 graph
    (TensorRT 10 only; typed graphs need no flag).
    """

    kind: str = "cpu"
    device: str = "cpu"
    cache: Path | None = None
    precision: str = "fp32"
    shapes: TaskShapes | None = None

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
        }
        if self.shapes is not None:
            options |= _profile(self.shapes, graph, inputs)
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


def _profile(shapes: TaskShapes, graph: str, inputs: Mapping[str, Shape]) -> Options:
    """Return one explicit profile that holds all of the task's."""
    profiles = shapes.profiles(graph)
    options = {}
    for key, which, pick in (("min", 0, min), ("opt", 1, max), ("max", 2, max)):
        given = []
        for name, declared in inputs.items():
            sizes = [profile.shapes(declared)[which] for profile in profiles]
            if any(isinstance(size, str) for size in declared):
                given.append(f"{name}:{'x'.join(str(pick(column)) for column in zip(*sizes, strict=True))}")
        options[f"trt_profile_{key}_shapes"] = ",".join(given)
    return options
