"""What pip installs, and what the documents and messages tell people to type."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from mp2.engine.onnx.providers import Provider
from mp2.errors import MissingDependencyError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in requirements}


@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"]))
def test_no_extra_brings_a_second_package_with_onnxruntimes_files(extra: str) -> None:
    installed = names([*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]])
    assert {name for name in installed if name.startswith("onnxruntime")} == {"onnxruntime"}


def test_what_to_type_for_onnxruntime_on_a_gpu_is_the_same_everywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(MissingDependencyError, match="pip uninstall -y onnxruntime ") as raised:
        Provider(kind="tensorrt").check()
    line = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu tensorrt"
    assert str(raised.value).endswith(line)
    for page in ("README.md", "docs/tensorrt.md"):
        assert line in (ROOT / page).read_text("utf-8"), page
