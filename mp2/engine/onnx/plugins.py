"""ONNX Runtime's plugin providers: libraries of their own, beside the plain package ``onnxruntime``.

Such a package has ``get_ep_name()`` and ``get_library_path()``. Its library is registered once a process; the
devices that it then offers are added to a session's options.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mp2.engine.onnx.library import load_onnxruntime
from mp2.errors import MissingDependencyError


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A provider that comes as a package."""

    package: str
    module: str
    needs: str  # of the machine
    settings: Callable[[int], dict[str, str]] = lambda threads: {}  # of a session of so many threads


def _of_openvino(threads: int) -> dict[str, str]:
    """Return OpenVINO's settings: float32, and ``threads`` (0: as it likes).

    Without the hint it computes float32 graphs in bfloat16 where the processor has that. Its option
    ``num_of_threads`` changes nothing (1.8.1), nor do a session's own threads.
    """
    own: dict[str, object] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        own["INFERENCE_NUM_THREADS"] = threads
    return {"load_config": json.dumps({"CPU": own})}


PLUGINS = {
    "tensorrt-rtx": Plugin(
        package="onnxruntime-ep-nv-tensorrt-rtx",
        module="onnxruntime_ep_nv_tensorrt_rtx",
        needs="an RTX card of compute capability 8.6, 8.9 or 12.0 and its driver",
    ),
    "openvino": Plugin(
        package="onnxruntime-ep-openvino",
        module="onnxruntime_ep_openvino",
        needs="an Intel processor",
        settings=_of_openvino,
    ),
}
_registered: dict[str, str] = {}  # kind -> the provider's name


def installed(kind: str) -> bool:
    """Tell whether the package of a plugin is there; loads nothing."""
    return importlib.util.find_spec(PLUGINS[kind].module) is not None


def plugin_devices(kind: str) -> list[Any]:
    """Return the devices (``OrtEpDevice``) that a plugin offers on this machine; registers it if need be.

    Raises MissingDependencyError where the package, a library of it or a device is missing.
    """
    plugin, ort = PLUGINS[kind], load_onnxruntime()
    if kind not in _registered:
        try:
            module = importlib.import_module(plugin.module)
        except ModuleNotFoundError:
            raise MissingDependencyError(
                f"provider '{kind}' needs the package {plugin.package} beside onnxruntime: "
                f"pip install {plugin.package}"
            ) from None
        try:
            ort.register_execution_provider_library(module.get_ep_name(), module.get_library_path())
        except Exception as error:  # onnxruntime's have no common base; a package without its library
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise MissingDependencyError(
                f"onnxruntime {ort.__version__} cannot load {plugin.package}: {why}; it needs {plugin.needs}"
            ) from error
        _registered[kind] = module.get_ep_name()
    found = [device for device in ort.get_ep_devices() if device.ep_name == _registered[kind]]
    if not found:
        raise MissingDependencyError(f"{plugin.package} finds no device here: it needs {plugin.needs}")
    return found


def add_plugin(options: Any, kind: str, settings: dict[str, str] | None = None) -> str:
    """Add a plugin's first device to a session's ``options``, and return the provider's name.

    ``settings`` take the place of the plugin's own, which have the threads that ``options`` have. Raises as
    `plugin_devices` does.
    """
    own = PLUGINS[kind].settings(options.intra_op_num_threads) if settings is None else settings
    options.add_provider_for_devices(plugin_devices(kind)[:1], own)
    return _registered[kind]
