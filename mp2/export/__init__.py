"""Engine folders: ONNX graphs of a backbone with prompts as inputs, manifest and parity report."""

from mp2.engine.folder import EngineFolder, Manifest, read_manifest
from mp2.export.export import export_engine
from mp2.export.export_run import export_command
from mp2.export.parity import Comparison

__all__ = ["Comparison", "EngineFolder", "Manifest", "export_command", "export_engine", "read_manifest"]
