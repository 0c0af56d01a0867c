"""How the command line is started: as a module, and without loading what a command does not need."""

from __future__ import annotations

import subprocess
import sys

import mp2

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "cma", "nevergrad", "matplotlib", "numpy")


def _python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, timeout=120)


def test_the_package_is_a_command() -> None:
    done = _python("-m", "mp2", "--version")
    assert (done.returncode, done.stdout) == (0, f"mp2, version {mp2.__version__}\n")
    usage = _python("-m", "mp2", "--help").stdout
    assert usage.startswith("Usage: python -m mp2 ")
    assert "predict" in usage


def test_the_module_exits_as_the_command_does() -> None:
    done = _python("-m", "mp2", "tasks", "show", "tnewz")
    assert done.returncode == 2
    assert done.stderr.startswith("mp2: unknown task 'tnewz'. Did you mean 'tnews'")


def test_help_loads_nothing_heavy() -> None:
    loaded = _python("-c", f"import mp2.cli, sys; print(*({{*{HEAVY!r}}} & set(sys.modules)))")
    assert loaded.stdout.strip() == "", loaded
