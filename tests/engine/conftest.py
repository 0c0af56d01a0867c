"""Few-shot inputs of mixed lengths, prompts that matter, and every runtime."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest

from mp2.backbone import Backbone, freeze
from mp2.engine import Objective
from mp2.engine.chain import ChainBackend
from mp2.engine.cpu.backend import CpuBackend
from mp2.engine.onnx.backend import OnnxBackend
from mp2.export import export_engine
from mp2.prompts import PromptSet, random_prompts
from mp2.tasks import MrcInput

from .slow_reference import D, M, SlowReference, make_inputs

LENGTHS = (9, 14, 9, 5, 11, 14, 13, 30)


@pytest.fixture(scope="session")
def tiny_backbone(tiny_backbone: Backbone) -> Backbone:
    """The tiny backbone with weights ten times as large, so that prompts move the losses."""
    encoder = deepcopy(tiny_backbone.encoder)
    state = encoder.state_dict()
    encoder.load_state_dict({name: x if "norm" in name else 10 * x for name, x in state.items()})
    return freeze(tiny_backbone.config, encoder, tiny_backbone.tokenizer)


@pytest.fixture(scope="session")
def train(tiny_backbone: Backbone) -> list[MrcInput]:
    return make_inputs(LENGTHS, tiny_backbone.config.vocab_size)


@pytest.fixture(scope="session")
def deep(tiny_backbone: Backbone) -> PromptSet:
    return random_prompts(tiny_backbone, "deep", prompt_tokens=M, intrinsic_dim=D, scale=20.0, seed=1)


@pytest.fixture(scope="session")
def shallow(tiny_backbone: Backbone) -> PromptSet:
    return random_prompts(tiny_backbone, "shallow", prompt_tokens=M, intrinsic_dim=D, scale=20.0, seed=2)


@pytest.fixture(scope="session")
def engine_dir(tiny_backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine folder of the backbone of these tests, which is not that of all others."""
    return export_engine(tiny_backbone, tmp_path_factory.mktemp("engine") / "tiny").path


@pytest.fixture(params=["torch", "torch without C", "onnxruntime"])
def runtime(
    request: pytest.FixtureRequest,
    tiny_backbone: Backbone,
    engine_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> ChainBackend:
    if request.param.startswith("torch"):
        if request.param == "torch without C":
            monkeypatch.setattr("mp2.engine.cpu.native.load", lambda: None)
        return CpuBackend(tiny_backbone)
    return OnnxBackend(tiny_backbone, engine_dir, threads=1)


@pytest.fixture
def make_objective(
    tiny_backbone: Backbone, train: list[MrcInput], runtime: ChainBackend
) -> Callable[..., Objective]:
    def make(prompts: PromptSet, **options: int) -> Objective:
        return Objective(runtime.forward(prompts, **options), train)

    return make


@pytest.fixture(scope="session")
def slow_deep(tiny_backbone: Backbone, deep: PromptSet) -> SlowReference:
    return SlowReference(tiny_backbone, deep)


@pytest.fixture(scope="session")
def slow_shallow(tiny_backbone: Backbone, shallow: PromptSet) -> SlowReference:
    return SlowReference(tiny_backbone, shallow)
