"""Make a runtime by name, or the fastest one that works here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mp2.backbone import Backbone, resolve_device
from mp2.engine.cuda_objective import CudaObjective
from mp2.engine.cuda_runtime import CUDA_PRECISIONS, CudaRuntime
from mp2.engine.int8_runtime import Int8Runtime
from mp2.engine.objective import Objective
from mp2.engine.onnx_runtime import OnnxRuntime
from mp2.engine.runtime import PRECISIONS, Runtime
from mp2.engine.torch_runtime import TorchRuntime
from mp2.errors import Mp2Error, UnknownNameError, UsageError
from mp2.export.folder import MANIFEST, read_manifest
from mp2.prompts import PromptSet

if TYPE_CHECKING:
    from mp2.tasks import MrcInput

AnyObjective = Objective | CudaObjective

RUNTIMES = ("auto", "torch", "onnxruntime", "onnxruntime-tensorrt", "tensorrt")
_FOLDER_PRECISIONS = ("fp32", "fp16", "bf16", "fp8")  # onnxruntime's: what the engine folder was exported in


def create_runtime(
    name: str,
    backbone: Backbone,
    *,
    engine_dir: str | Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    precision: str = "fp32",
) -> Runtime:
    """Return runtime ``name``; ``auto`` times one layer on each that works here and takes the fastest.

    ``device`` ``auto`` is the GPU if torch sees one, for ``onnxruntime`` the CPU. ``precision`` ``auto`` is
    fp32 on a CPU, where losses then are exact, and bf16 on a GPU (fp16 on one without bf16); for the
    runtimes that need an engine folder, what the folder was exported in.
    ``engine_dir`` is an engine folder (`mp2 export`), which ``onnxruntime`` needs. ``threads`` sets torch's
    threads for the whole process, too. ``.reason`` of the result says why it was chosen.

    Raises UnknownNameError (runtime or precision), MissingDependencyError (tensorrt, CUDA), UsageError (no
    engine folder), FormatError or MismatchError (an engine folder that is damaged or another backbone's).
    """
    if name not in RUNTIMES:
        raise UnknownNameError("runtime", name, RUNTIMES)
    why = []
    if device == "auto":
        device = "cuda" if name != "onnxruntime" and torch.cuda.is_available() else "cpu"
        why = ["there is a GPU"] if device == "cuda" else []
    on_onnxruntime = name.startswith("onnxruntime")
    if precision == "auto" and engine_dir is not None and (on_onnxruntime or name == "tensorrt"):
        precision = read_manifest(Path(engine_dir) / MANIFEST).precision
    elif precision == "auto":
        precision = _usual_precision(name, device)
        why += [f"{precision} is usual there"] if device != "cpu" else []
    if name == "tensorrt":
        return _tensorrt(backbone, engine_dir, device, precision)
    on_gpu = not on_onnxruntime and device != "cpu" and resolve_device(device).type == "cuda"
    known = _FOLDER_PRECISIONS if on_onnxruntime else CUDA_PRECISIONS if on_gpu else PRECISIONS
    if precision not in known:
        raise UnknownNameError("precision", precision, known, f"These are for device {device}.")
    if threads is not None:
        if threads < 1:
            raise UsageError(f"threads is {threads}, expected at least 1")
        torch.set_num_threads(threads)

    def on_torch(reason: str = "") -> Runtime:
        if on_gpu:
            return CudaRuntime(backbone, device=device, precision=precision, reason=reason)
        if precision == "int8":
            return Int8Runtime(backbone, reason=reason)
        return TorchRuntime(backbone, device=device, precision=precision, reason=reason)

    def on_onnx(reason: str = "") -> Runtime:
        if engine_dir is None:
            raise UsageError(
                f"runtime '{'onnxruntime' if name == 'auto' else name}' needs an engine folder; "
                f"run 'mp2 export --backbone {backbone.config.name} --out DIR' and pass --engine DIR"
            )
        provider = "tensorrt" if name == "onnxruntime-tensorrt" else None
        return OnnxRuntime(
            backbone,
            Path(engine_dir),
            device="cuda" if provider and device == "cpu" else device,
            provider=provider,
            threads=threads,
            precision=precision,
            reason=reason,
        )

    if name == "torch":
        return on_torch(f"asked for; {', '.join(why)}" if why else "")
    if on_onnxruntime:
        return on_onnx()
    if on_gpu:
        return on_torch(f"auto: torch on CUDA, {', '.join(why) or 'the device asked for'}")
    if engine_dir is None:
        return on_torch("auto: torch, the only runtime without an engine folder")
    return _fastest(backbone, {"torch": on_torch, "onnxruntime": on_onnx})


def _usual_precision(name: str, device: str) -> str:
    if name == "tensorrt":
        return "fp16"
    if device == "cpu" or resolve_device(device).type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def create_objective(
    runtime: Runtime, backbone: Backbone, prompts: PromptSet, train: Sequence[MrcInput]
) -> AnyObjective:
    """Return the few-shot objective that suits ``runtime``; see `Objective` for the errors."""
    if isinstance(runtime, CudaRuntime):
        return CudaObjective(runtime, backbone, prompts, train)
    return Objective(runtime, backbone, prompts, train)


def _tensorrt(backbone: Backbone, engine_dir: str | Path | None, device: str, precision: str) -> Runtime:
    from mp2.engine.tensorrt_runtime import TensorRTRuntime
    from mp2.export.tensorrt.graphs import PRECISIONS as TYPED
    from mp2.export.tensorrt.library import load_tensorrt

    load_tensorrt()
    if precision not in TYPED:
        raise UnknownNameError("precision", precision, TYPED, "runtime 'tensorrt' has fp16, bf16 and fp8")
    if engine_dir is None:
        raise UsageError(
            f"runtime 'tensorrt' needs an engine folder of its own; run 'mp2 export --runtime tensorrt "
            f"--backbone {backbone.config.name} --precision {precision} --out DIR' and pass --engine DIR"
        )
    on = "cuda" if device == "cpu" else device
    return TensorRTRuntime(backbone, Path(engine_dir), device=on, precision=precision)


def _fastest(backbone: Backbone, makers: dict[str, Callable[[str], Runtime]]) -> Runtime:
    seconds: dict[str, float] = {}
    runtimes: dict[str, Runtime] = {}
    unusable: dict[str, str] = {}
    first: Mp2Error | None = None
    for name, make in makers.items():
        try:
            runtimes[name] = make("")
            seconds[name] = layer_seconds(runtimes[name], backbone)
        except Mp2Error as error:
            first = first or error
            unusable[name] = str(error).split(";")[0]
    if not seconds:
        assert first is not None
        raise first
    best = min(seconds, key=lambda name: seconds[name])
    measured = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in seconds.items())
    reason = f"auto: {best}, the fastest for one layer of 8 x 64 tokens ({measured})"
    for name, why in unusable.items():
        reason += f"; not {name}: {why}"
    limits = runtimes[best].reason.removeprefix("asked for")  # what a runtime could not do here
    runtimes[best].reason = reason + limits
    return runtimes[best]


def layer_seconds(runtime: Runtime, backbone: Backbone, *, n_runs: int = 3) -> float:
    """Return the shortest of ``n_runs`` times of one layer: 8 sequences of 64 tokens, 16 prefix rows."""
    config = backbone.config
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (8, min(64, config.max_positions)), generator=rng)
    prefix = torch.randn(1, 1, config.n_heads, 16, config.head_size, generator=rng).to(runtime.device)
    hidden = runtime.embed(ids.to(runtime.device))
    middle = config.n_layers // 2
    times = []
    for _ in range(n_runs + 1):  # the first prepares
        started = time.perf_counter()
        runtime.layer(middle, hidden, None, (prefix, prefix))
        if torch.device(runtime.device).type == "cuda":
            torch.cuda.synchronize(runtime.device)
        times.append(time.perf_counter() - started)
    return min(times[1:])
