"""Engine folders and bundles: ONNX graphs of a backbone with prompts as inputs, compared with torch."""

from mp2.export.bundle import write_bundle
from mp2.export.by_name import bundle_command, export_command
from mp2.export.engine_folder import build_plans, export_engine, precision_cost
from mp2.export.parity import Comparison, compare_stages

__all__ = [
    "Comparison",
    "build_plans",
    "bundle_command",
    "compare_stages",
    "export_command",
    "export_engine",
    "precision_cost",
    "write_bundle",
]
