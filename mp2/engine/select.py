"""Make a backend by the name of its runtime, or the fastest one that works here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mp2.backbone import Backbone, resolve_device
from mp2.engine.backend import PRECISIONS, Backend, Probe
from mp2.engine.cpu.backend import CpuBackend
from mp2.engine.cpu.differences import DifferenceBackend, tiles_fit
from mp2.engine.cuda.backend import CUDA_PRECISIONS, CudaBackend
from mp2.engine.folder import (
    FOLDER_PRECISIONS,
    MANIFEST,
    EngineFolder,
    read_manifest,
)
from mp2.engine.onnx.backend import OnnxBackend
from mp2.engine.onnx.plugins import PLUGINS
from mp2.engine.tensorrt.plans import SHAPES, read_shapes
from mp2.errors import FormatError, MismatchError, Mp2Error, UnknownNameError, UsageError
from mp2.limits import check_threads

_PROVIDERS = {  # of ONNX Runtime, beside those of --device, by runtime
    f"onnxruntime-{kind}": kind for kind in ("tensorrt", *PLUGINS)
}
RUNTIMES = ("auto", "torch", "onnxruntime", *_PROVIDERS, "endpoint")
_PROBE_TOKENS = 512  # of a candidate: enough to show a layer's rate
_CANDIDATES = 20  # that runtimes are compared on where there is a GPU, which one alone would not fill


def create_backend(
    name: str,
    backbone: Backbone,
    *,
    engine_dir: str | Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    precision: str = "fp32",
    endpoint: str | None = None,
    endpoint_patience_s: float = 60.0,
) -> Backend:
    """Return the backend of runtime ``name``; ``auto`` takes the one that runs a layer the fastest here.

    ``device`` ``auto`` is the GPU if torch sees one, for ``onnxruntime`` the CPU. ``precision`` ``auto`` is
    fp32 on a CPU, where losses then are exact, and fp16 on a GPU, which orders candidates better than bf16;
    where the first evaluation overflows, bf16 (fp32 on one without bf16). For the runtimes that need an
    engine folder it is what the folder was exported in.
    ``engine_dir`` is an engine folder (`mp2 export`), which ONNX Runtime's need; without one, ``auto`` is
    torch. ``auto`` tries neither TensorRT, which would build engines only to compare, nor plugins.
    ``threads`` sets torch's threads for the whole process, too. ``.reason`` of the result says why it was
    chosen.

    ``endpoint`` names servers (URLs, with commas) that compute instead of this machine.

    Raises UnknownNameError (runtime or precision), MissingDependencyError (a provider, CUDA), UsageError (no
    engine folder), FormatError or MismatchError (an engine folder that is damaged or another backbone's).
    """
    if name not in RUNTIMES:
        raise UnknownNameError("runtime", name, RUNTIMES)
    if endpoint is not None or name == "endpoint":
        return _of_servers(name, backbone, endpoint, endpoint_patience_s, engine_dir, device, precision)
    folder = None if engine_dir is None else Path(engine_dir)
    if folder is not None and not folder.is_dir():
        raise UsageError(
            f"there is no engine folder {folder}; make one with "
            f"'mp2 export --backbone {backbone.config.name} --out {folder}'"
        )
    check_threads(threads)
    if _PROVIDERS.get(name) in PLUGINS and device not in ("auto", "cpu"):
        raise UsageError(f"runtime '{name}' finds its device itself: drop --device {device}")
    why = []
    if device == "auto":
        device = "cuda" if name != "onnxruntime" and torch.cuda.is_available() else "cpu"
        why = ["there is a GPU"] if device == "cuda" else []
    asked = _Asked(backbone, folder, device, threads, precision)
    if name in ("auto", "torch"):  # before anything is timed
        own = asked.torch_precision()
        why += [f"{own} is usual there"] if precision == "auto" and device != "cpu" else []
    if threads is not None:
        torch.set_num_threads(threads)
    if name == "torch":
        return asked.on_torch(f"asked for; {', '.join(why)}" if why else "")
    if name != "auto":
        return asked.on_onnxruntime(name)
    if folder is not None:
        return _fastest(asked, folder)
    if _is_gpu(device):
        return asked.on_torch(f"auto: torch on CUDA, {', '.join(why) or 'the device asked for'}")
    return asked.on_torch("auto: torch, the only runtime without an engine folder")


def _of_servers(
    name: str,
    backbone: Backbone,
    endpoint: str | None,
    patience_s: float,
    engine_dir: str | Path | None,
    device: str,
    precision: str,
) -> Backend:
    """Return the backend of servers; UsageError beside what only another runtime has."""
    from mp2.engine.endpoint.backend import EndpointBackend

    if endpoint is None:
        raise UsageError("runtime 'endpoint' needs a server: start one with 'mp2 serve', give --endpoint URL")
    if name not in ("auto", "endpoint") or engine_dir is not None or device not in ("auto", "cpu"):
        raise UsageError("--endpoint has servers compute: drop --runtime, --engine and --device")
    backend = EndpointBackend(backbone, endpoint, patience_s=patience_s)
    if precision not in ("auto", backend.precision):
        raise MismatchError(
            f"{endpoint} computes in {backend.precision}, expected {precision}; drop --precision, or serve a "
            f"folder exported with --precision {precision}"
        )
    return backend


@dataclass(frozen=True)
class _Asked:
    """What `create_backend` was asked for, and the backends made from it."""

    backbone: Backbone
    folder: Path | None
    device: str
    threads: int | None
    precision: str

    def torch_precision(self) -> str:
        """The precision on torch; UnknownNameError if it has no such."""
        gpu = _is_gpu(self.device)
        if self.precision == "auto":
            return "fp16" if gpu else "fp32"
        known = CUDA_PRECISIONS if gpu else PRECISIONS
        if self.precision not in known:
            raise UnknownNameError("precision", self.precision, known, f"These are for device {self.device}.")
        return self.precision

    def on_torch(self, reason: str = "") -> Backend:
        precision = self.torch_precision()
        if _is_gpu(self.device):
            wider = None
            if self.precision == "auto":
                wider = "bf16" if torch.cuda.get_device_capability(self.device) >= (8, 0) else "fp32"
            return CudaBackend(
                self.backbone, device=self.device, precision=precision, reason=reason, wider=wider
            )
        if precision == "fp32":
            if self.precision == "auto" and tiles_fit(self.backbone.config):
                reason = f"{reason or 'asked for'}; --precision bf16 is faster on this processor"
            return CpuBackend(self.backbone, reason=reason)
        return DifferenceBackend(self.backbone, precision=precision, reason=reason)

    def on_onnxruntime(self, name: str = "onnxruntime") -> Backend:
        if self.precision not in (*FOLDER_PRECISIONS, "auto"):
            raise UnknownNameError(
                "precision", self.precision, FOLDER_PRECISIONS, f"These are for device {self.device}."
            )
        if self.folder is None:
            raise UsageError(
                f"runtime '{name}' needs an engine folder; "
                f"run 'mp2 export --backbone {self.backbone.config.name} --out DIR' and pass --engine DIR"
            )
        provider, device = _PROVIDERS.get(name), self.device
        if provider is not None:  # a plugin takes tensors from the host's memory and finds its device itself
            device = "cpu" if provider in PLUGINS else "cuda" if device == "cpu" else device
        return OnnxBackend(
            self.backbone,
            self.folder,
            device=device,
            provider=provider,
            threads=self.threads,
            precision=self._folder_precision(self.folder),
        )

    def _folder_precision(self, folder: Path) -> str:
        return self.precision if self.precision != "auto" else read_manifest(folder / MANIFEST).precision


def exact_backend(backbone: Backbone, device: str) -> Backend:
    """Return what computes in float32 on ``device``, to compare others with."""
    return CudaBackend(backbone, device=device, precision="fp32") if _is_gpu(device) else CpuBackend(backbone)


def layer_seconds(backend: Backend, probe: Probe, n_runs: int = 3) -> float:
    """Return the shortest of ``n_runs`` times of one layer of ``backend`` on ``probe``."""
    run = backend.probe(probe)
    times = []
    for _ in range(n_runs + 1):  # the first prepares
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _is_gpu(device: str) -> bool:
    return device != "cpu" and resolve_device(device).type == "cuda"


def _fastest(asked: _Asked, folder: Path) -> Backend:
    """Return the fastest of torch and what runs ``folder``; torch where the folder cannot be used."""
    gpu = _is_gpu(asked.device)
    probe = _probe(asked.backbone, folder, gpu)
    makers: dict[str, Callable[[], Backend]] = {"torch": asked.on_torch, "onnxruntime": asked.on_onnxruntime}
    seconds: dict[str, float] = {}
    made: dict[str, Backend] = {}
    unusable: dict[str, str] = {}
    for name, make in makers.items():
        try:
            backend = make()
            seconds[name] = layer_seconds(backend, probe)
            made[name] = backend
        except Mp2Error as error:
            if name == "torch":
                raise
            unusable[name] = str(error).split(";")[0]
    best = min(seconds, key=lambda name: seconds[name])
    measured = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in seconds.items())
    reason = f"auto: {best}, the fastest for one layer of {probe} ({measured})"
    for name, why in unusable.items():
        reason += f"; not {name}: {why}"
    chosen = made[best]
    chosen.reason = reason + chosen.reason.removeprefix("asked for")  # what a backend could not do here
    del made, backend
    if gpu:
        torch.cuda.empty_cache()  # what the others held
    return chosen


def _probe(backbone: Backbone, folder: Path, gpu: bool) -> Probe:
    """Return the batch to compare on; for a folder with profiles, one that these cover."""
    candidates = _CANDIDATES if gpu else 1
    tokens = min(Probe.n_tokens, backbone.config.max_positions)
    try:
        manifest = read_manifest(folder / MANIFEST)
        shapes = read_shapes(EngineFolder(folder, manifest)) if SHAPES in manifest.files else None
    except FormatError:  # which the runtimes that want the folder say
        shapes = None
    if shapes is None:
        return Probe(n_candidates=candidates, n_tokens=tokens)
    tokens = min(tokens, shapes.lengths[-1])
    return Probe(
        n_candidates=min(candidates, shapes.candidates),
        n_examples=max(1, min(Probe.n_examples, shapes.examples, _PROBE_TOKENS // tokens)),
        n_tokens=tokens,
        prompt_tokens=min(Probe.prompt_tokens, shapes.prompt_tokens),
        inline=shapes.shallow,
    )
