"""What this machine has for mp2: runtimes, devices, embedded weights, data."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mp2.limits import memory_bytes, usable_cores

_PACKAGES = (
    "mp2",
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "cma",
    "nevergrad",
    "bayesian-optimization",
)
_INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
)
_NEEDS = "a TensorRT plan needs "


def examine() -> dict[str, Any]:
    """Everything that ``mp2 doctor`` shows, as JSON values; never raises for something that is missing."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": _cpu(),
        "memory_gib": _memory_gib(),
        "runtimes": {"torch": _torch(), "onnxruntime": _onnxruntime(), "tensorrt": _tensorrt()},
        "embedded": _embedded(),
        "data": _data(),
    }


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The findings for people: names and words."""
    cpu, torch, ort, trt = (
        found["cpu"],
        *(found["runtimes"][n] for n in ("torch", "onnxruntime", "tensorrt")),
    )
    lines = [
        ("python", f"{found['python']} on {found['platform']}"),
        ("packages", ", ".join(f"{n} {v or 'MISSING'}" for n, v in found["packages"].items())),
        (
            "cpu",
            f"{cpu['model']}, {cpu['cores']} cores usable; {', '.join(cpu['instructions']) or 'unknown'}",
        ),
        ("memory", f"{found['memory_gib']:.1f} GiB" if found["memory_gib"] else "unknown"),
    ]
    if torch["available"]:
        devices = [f"{d['name']} ({d['memory_gib']:.0f} GiB)" for d in torch["cuda"]] or ["no CUDA device"]
        lines.append(("torch", f"{torch['version']}, {torch['threads']} threads, {', '.join(devices)}"))
        lines.append(("C kernels", torch["no_kernels"] or "compiled for this processor"))
    else:
        lines.append(("torch", f"missing: {torch['install']}"))
    if ort["available"]:
        lines.append(("onnxruntime", f"{ort['version']}: {', '.join(ort['providers'])}"))
        lines += [(f"plugin {kind}", what) for kind, what in ort["plugins"].items()]
    else:
        lines.append(("onnxruntime", f"missing: {ort['install']}"))
    state = trt["version"] if trt["available"] else f"missing: {trt['install']}"
    lines.append(("tensorrt", f"{state} ({trt['note']})"))
    for name, there in found["embedded"].items():
        lines.append((name, there or "not in this installation"))
    data = found["data"]
    lines.append(("data", data["folder"] if data["exists"] else data["hint"]))
    return lines


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags.update(value.split())
                break
    return {"model": model, "cores": usable_cores(), "instructions": [n for n in _INSTRUCTIONS if n in flags]}


def _memory_gib() -> float | None:
    n_bytes = memory_bytes()
    return None if n_bytes is None else n_bytes / 2**30


def _torch() -> dict[str, Any]:
    if importlib.util.find_spec("torch") is None:
        return {"available": False, "install": "pip install 'torch>=2.11'"}
    import torch

    cuda = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        cuda.append({"name": properties.name, "memory_gib": properties.total_memory / 2**30})
    return {
        "available": True,
        "version": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "cuda_build": torch.version.cuda,
        "cuda": cuda,
        "no_kernels": _no_kernels(),
    }


def _no_kernels() -> str | None:
    """Why forwards on CPUs do without the C kernels; None where these work."""
    try:
        from mp2.engine.cpu import native
    except ImportError as error:
        return f"not tried ({error})"
    return f"none: {unfit}; CPUs are slower without" if (unfit := native.unfit()) else None


def _onnxruntime() -> dict[str, Any]:
    if importlib.util.find_spec("onnxruntime") is None:
        return {
            "available": False,
            "install": "pip install onnxruntime (for CUDA onnxruntime-gpu; never both)",
        }
    from mp2.engine.onnx.library import load_onnxruntime
    from mp2.engine.onnx.plugins import PLUGINS

    onnxruntime = load_onnxruntime()
    providers = [p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers()]
    return {
        "available": True,
        "version": onnxruntime.__version__,
        "providers": providers,
        "plugins": {kind: _plugin(kind) for kind in PLUGINS},
    }


def _plugin(kind: str) -> str:
    """What a plugin provider has here, in words."""
    from mp2.engine.onnx.plugins import PLUGINS, installed, plugin_devices
    from mp2.errors import MissingDependencyError

    if not installed(kind):
        return f"missing: pip install {PLUGINS[kind].package}"
    try:
        return f"{len(plugin_devices(kind))} device(s)"
    except MissingDependencyError as error:
        return str(error)


def _tensorrt() -> dict[str, Any]:
    from mp2.engine.tensorrt.library import NOT_RUN, load_tensorrt
    from mp2.errors import MissingDependencyError

    try:
        module = load_tensorrt()
    except MissingDependencyError as error:
        return {"available": False, "install": str(error).removeprefix(_NEEDS), "note": NOT_RUN}
    return {"available": True, "version": str(module.__version__), "note": NOT_RUN}


def _embedded() -> dict[str, str | None]:
    package = Path(__file__).parent
    found: dict[str, str | None] = {}
    for what, folder in (("backbone mini", "backbone/mini"), ("prompts mini", "prompts/mini")):
        files = [
            f for f in sorted((package / folder).glob("*")) if f.is_file() and not f.name.startswith("_")
        ]
        size = sum(f.stat().st_size for f in files) / 1e6
        found[what] = f"{len(files)} files, {size:.1f} MB" if files else None
    return found


def _data() -> dict[str, Any]:
    from mp2.environment import data_folder

    folder = data_folder()
    exists = bool(folder) and Path(str(folder)).is_dir()
    hint = (
        f"MP2_DATA names {folder}, which is no folder" if folder else "MP2_DATA is not set; give --data DIR"
    )
    return {"folder": folder, "exists": exists, "hint": None if exists else hint}
