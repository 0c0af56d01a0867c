"""What pip installs, and what the documents and messages tell people to type."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mp2.engine.onnx.providers import Provider
from mp2.errors import MissingDependencyError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


REQUIREMENTS = PROJECT["dependencies"]
EXTRAS = PROJECT["optional-dependencies"]
OF_MODULE = {
    "bayes_opt": "bayesian-optimization",
    "sklearn": "scikit-learn",
    "mlflow": "mlflow-skinny",
    "google": "protobuf",  # nothing else of that name is imported
}  # where the names differ
OF_TORCH = {"triton"}  # its CUDA builds bring it; elsewhere nothing asks for it


def names(requirements: Iterable[str]) -> set[str]:
    return {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in requirements}


def imported(folder: str) -> dict[str, str]:
    """Other people's packages that are imported under ``folder``, with a file that imports each."""
    own = {"mp2", "benchmarks", "tests", "training"} | {path.stem for path in (ROOT / "tests").rglob("*.py")}
    own |= {path.name for path in (ROOT / "tests").iterdir()}
    own |= {"reading", "pytriton"}  # beside a run.py; of another interpreter
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            for module in (m.split(".")[0] for m in modules):
                if module not in sys.stdlib_module_names | own:
                    name = OF_MODULE.get(module, module.replace("_", "-")).lower()
                    found.setdefault(name, str(path.relative_to(ROOT)))
    return found


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("mp2", {"gpu", "hub", "train", "serve", "mlflow", "wandb"}),
        ("benchmarks", {"gpu", "ray"}),
        ("tests", {"dev"}),
    ],
)
def test_what_is_imported_is_declared(folder: str, extras: set[str]) -> None:
    declared = names([*REQUIREMENTS, *(one for extra in extras for one in EXTRAS[extra])])
    assert {name: file for name, file in imported(folder).items() if name not in declared | OF_TORCH} == {}


def test_nothing_is_declared_twice() -> None:
    for declared in (REQUIREMENTS, *EXTRAS.values()):
        assert len(names(declared)) == len(declared)


def test_the_constraints_have_a_tested_version_of_all_that_is_declared() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    version = {}
    for pin in pins:
        (exact,) = pin.specifier
        assert exact.operator == "==", pin
        assert "+" not in exact.version, f"{pin}: only one build has this version"
        version[pin.name.lower().replace("_", "-")] = exact.version
    for requirement in map(Requirement, [*REQUIREMENTS, *EXTRAS["dev"], *EXTRAS["train"]]):
        assert version[requirement.name] in requirement.specifier, requirement


def test_the_stamp_is_older_than_what_it_stands_for() -> None:
    """Make installs again when the ranges or the tested versions change."""
    assert re.search(
        r"^\$\(STAMP\): pyproject.toml constraints.txt$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE
    )


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_no_extra_brings_a_second_package_with_onnxruntimes_files(extra: str) -> None:
    installed = names([*REQUIREMENTS, *EXTRAS[extra]])
    assert {name for name in installed if name.startswith("onnxruntime")} == {"onnxruntime"}


def test_what_to_type_for_onnxruntime_on_a_gpu_is_the_same_everywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingDependencyError, match="pip uninstall -y onnxruntime ") as raised:
        Provider(kind="tensorrt").check()
    line = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu tensorrt"
    assert str(raised.value).endswith(line)
    for page in ("docs/engines.md",):
        assert line in (ROOT / page).read_text("utf-8"), page
