"""onnxruntime is imported in one place, without telemetry, and only by what uses it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
_VARIABLES = ("CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "TF_BUILD", "GITHUB_ACTIONS")


def run(code: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, with an empty home folder and no sign of a test machine."""
    kept = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    paths = {"HOME": str(home), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=kept | paths, cwd=home, capture_output=True, text=True, check=True
    )


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_onnxruntime_is_imported_in_one_place() -> None:
    files = {*(ROOT / "mp2").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")}
    files.remove(ROOT / "mp2" / "export" / "bundle_files" / "run.py")  # which bundles bring, without mp2
    importers = {path for path in files if "onnxruntime" in imported(path)}
    assert importers == {ROOT / "mp2" / "engine" / "onnx" / "library.py"}


def written(home: Path) -> list[str]:
    return [str(path.relative_to(home)) for path in home.rglob("*") if "onnxruntime" in str(path).lower()]


@pytest.mark.parametrize(
    "code",
    [
        "from mp2.engine.onnx.library import load_onnxruntime; load_onnxruntime().InferenceSession",
        "from mp2.cli import main; main(['doctor'], standalone_mode=False)",
    ],
    ids=["library", "doctor"],
)
def test_nothing_is_written_into_a_fresh_home(tmp_path: Path, code: str) -> None:
    run(code, tmp_path)
    assert written(tmp_path) == []


def test_a_run_on_torch_does_not_import_it(tmp_path: Path) -> None:
    """Nor torch's compiler, which takes two seconds to load."""
    code = (
        "import sys; from mp2.cli import main\n"
        "main('bbt --task demo_sentiment --iters 20 --router-iters 10 --no-test --out runs'.split(), "
        "standalone_mode=False)\n"
        "print(sorted(name for name in ('onnx', 'onnxruntime', 'torch._dynamo') if name in sys.modules))"
    )
    assert run(code, tmp_path).stdout.splitlines()[-1] == "[]"
    assert written(tmp_path) == []
    assert list((tmp_path / "runs").glob("*/result.json"))
