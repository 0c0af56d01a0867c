"""Optimizers know losses, and nothing of engines, runs or tasks."""

from __future__ import annotations

import ast
from pathlib import Path

import mp2.optimizers

MAY_IMPORT = ("mp2.optimizers", "mp2.errors", "mp2.limits", "mp2.options", "mp2.lazy")


def test_optimizers_import_no_package_but_their_own() -> None:
    folder = Path(mp2.optimizers.__file__).parent
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mp2"):
                assert node.module.startswith(MAY_IMPORT), f"{file.name} imports {node.module}"
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("mp2") for name in node.names), file.name
