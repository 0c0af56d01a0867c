"""Engine folders and bundles: ONNX graphs of a backbone with prompts as inputs, compared with torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mp2.lazy import lazily

if TYPE_CHECKING:
    from mp2.export.bundle import write_bundle
    from mp2.export.by_name import bundle_command, export_command
    from mp2.export.engine_folder import export_engine, precision_cost
    from mp2.export.parity import Comparison, compare_stages

_MODULES = {
    "Comparison": "parity",
    "bundle_command": "by_name",
    "compare_stages": "parity",
    "export_command": "by_name",
    "export_engine": "engine_folder",
    "precision_cost": "engine_folder",
    "write_bundle": "bundle",
}
__all__ = [
    "Comparison",
    "bundle_command",
    "compare_stages",
    "export_command",
    "export_engine",
    "precision_cost",
    "write_bundle",
]


def __getattr__(name: str) -> Any:
    return lazily(__name__, _MODULES, name)
