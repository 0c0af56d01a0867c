"""ONNX Runtime's execution providers: which are there, and the options they get."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mp2.engine.onnx.library import load_onnxruntime
from mp2.engine.onnx.plugins import PLUGINS, add_plugin, plugin_devices
from mp2.engine.tensorrt.profiles import Profile, Shape, TaskShapes
from mp2.errors import MissingDependencyError
from mp2.files import own_folder

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_WORKSPACE_BYTES = 4 << 30
Options = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Provider:
    """Where a session runs and how: ``cpu``, ``cuda``, ``tensorrt`` or a plugin; on a torch ``device``.

    A plugin (`PLUGINS`) finds its device itself and takes tensors from the host's memory, ``device`` "cpu".

    ``tensorrt`` keeps engines and timings in ``cache``, tuned for ``shapes`` (None: it grows its own profile,
    and rebuilds, as shapes come; a profile that it was given never grows); ``precision`` fp16 or bf16 lets it
    choose that type for a float32 graph (TensorRT 10 only; typed graphs need no flag).
    """

    kind: str = "cpu"
    device: str = "cpu"
    cache: Path | None = None
    precision: str = "fp32"
    shapes: TaskShapes | None = None

    def check(self) -> None:
        """Raise MissingDependencyError if the installed onnxruntime does not have the provider."""
        if self.kind in PLUGINS:
            plugin_devices(self.kind)
            return
        ort = load_onnxruntime()
        wanted, there = PROVIDERS[self.kind], ort.get_available_providers()
        if wanted not in there:
            raise MissingDependencyError(
                f"onnxruntime {ort.__version__} has no {wanted} (it has {', '.join(there)}); "
                "both packages of ONNX Runtime have the same files, so take out what is there first: "
                "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
                + (" tensorrt" if self.kind == "tensorrt" else "")
            )

    def check_session(self, providers: Sequence[str]) -> None:
        """Raise MissingDependencyError if a session has ``providers`` and the one asked for is not the first.

        onnxruntime-gpu offers providers whose libraries are not there, and goes on without them.
        """
        if self.kind in PLUGINS:  # a session names its devices, or is not made
            return
        wanted = PROVIDERS[self.kind]
        if not providers or providers[0] != wanted:
            libraries = "CUDA, cuDNN and TensorRT" if self.kind == "tensorrt" else "CUDA and cuDNN"
            raise MissingDependencyError(
                f"onnxruntime {load_onnxruntime().__version__} left {wanted} out (the session has "
                f"{', '.join(providers) or 'none'}): install the releases of {libraries} that it was built "
                "for where the loader finds them, or use --runtime torch"
            )

    def profile(self, graph: str) -> Profile | None:
        """Return the explicit profile of ``graph``'s session. None: it has none."""
        if self.kind != "tensorrt" or self.shapes is None:
            return None
        return self.shapes.chain_profile(graph)

    def choose(
        self,
        options: Any,
        graph: str,
        inputs: Mapping[str, Shape],
        stream: int | None,
        profile: Profile | None = None,
    ) -> dict[str, Any]:
        """Return what a session of ``graph`` with ``options`` is to be made with, see `arguments`."""
        if self.kind in PLUGINS:
            add_plugin(options, self.kind)
            return {}
        # without its own fallback, which tries again with other providers, without these options
        return {"providers": self.arguments(graph, inputs, stream, profile), "enable_fallback": 0}

    def arguments(
        self,
        graph: str,
        inputs: Mapping[str, Shape],
        stream: int | None,
        profile: Profile | None = None,
    ) -> list[tuple[str, Options]]:
        """Return ``providers=`` of a session for ``graph``; work is queued on CUDA ``stream``.

        ``profile`` is another one than `profile` gives, with engines of its own.
        """
        if self.kind == "cpu":
            return [(PROVIDERS["cpu"], {})]
        common = {"device_id": self.device.partition(":")[2] or "0"}
        if stream is not None:
            common["user_compute_stream"] = str(stream)
        cuda = (
            PROVIDERS["cuda"],
            {**common, "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"},
        )
        rest = [cuda, (PROVIDERS["cpu"], {})]
        if self.kind == "cuda":
            return rest
        return [(PROVIDERS["tensorrt"], {**common, **self._tensorrt(graph, inputs, profile)}), *rest]

    def _tensorrt(self, graph: str, inputs: Mapping[str, Shape], other: Profile | None) -> Options:
        options = {
            "trt_max_workspace_size": str(_WORKSPACE_BYTES),
            "trt_layer_norm_fp32_fallback": "True",
            "trt_fp16_enable": str(self.precision == "fp16"),
            "trt_bf16_enable": str(self.precision == "bf16"),
        }
        profile = other or self.profile(graph)
        if profile is not None:
            options |= _profile(profile, inputs)
        if self.cache is not None:
            own_folder(self.cache)
            options |= {
                "trt_engine_cache_enable": "True",
                "trt_engine_cache_path": str(self.cache),
                "trt_engine_cache_prefix": f"{Path(graph).stem}-{self.precision}{_mark(other)}",
                "trt_timing_cache_enable": "True",
                "trt_timing_cache_path": str(self.cache),
            }
        return options


def _profile(profile: Profile, inputs: Mapping[str, Shape]) -> Options:
    """Return the options that say ``profile``."""
    options = {}
    for which, key in enumerate(("min", "opt", "max")):
        options[f"trt_profile_{key}_shapes"] = ",".join(
            f"{name}:{'x'.join(map(str, profile.shapes(declared)[which]))}"
            for name, declared in inputs.items()
            if any(isinstance(size, str) for size in declared)
        )
    return options


def _mark(profile: Profile | None) -> str:
    """Return what tells the engines of a grown ``profile`` from those of the folder's own (None)."""
    if profile is None:
        return ""
    ranges = sorted((name, *sizes) for name, sizes in profile.ranges.items())
    return "-" + hashlib.sha256(repr(ranges).encode()).hexdigest()[:8]
