"""Engine folders: ONNX graphs of a backbone with prompts as inputs, manifest and parity report."""

from mp2.export.by_name import export_command
from mp2.export.engine_folder import build_plans, export_engine, precision_cost
from mp2.export.parity import Comparison, compare_stages

__all__ = [
    "Comparison",
    "build_plans",
    "compare_stages",
    "export_command",
    "export_engine",
    "precision_cost",
]
