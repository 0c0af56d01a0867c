"""What a precision costs the search, as it is reported."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from mp2.backbone import Backbone
from mp2.engine import Objective, create_backend
from mp2.engine.agreement import Agreement, agreement, spearman
from mp2.engine.backend import Backend
from mp2.engine.cpu.backend import CpuBackend
from mp2.engine.cpu.difference_steps import int8_unfit
from mp2.engine.cuda.backend import CudaBackend
from mp2.engine.select import exact_backend
from mp2.prompts import PromptSet
from mp2.tasks import MrcInput


def test_rank_agreement_equals_scipys() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        a, b = rng.integers(0, 6, 12).astype(float), rng.standard_normal(12)
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)


@pytest.mark.parametrize(("kind", "layer"), [("deep", 1), ("shallow", 0)])
def test_float32_agrees_with_itself(
    request: pytest.FixtureRequest, tiny_backbone: Backbone, train: list[MrcInput], kind: str, layer: int
) -> None:
    prompts: PromptSet = request.getfixturevalue(kind)
    for runtime in (CpuBackend(tiny_backbone), CudaBackend(tiny_backbone, device="cpu", precision="fp32")):
        found = agreement(runtime, prompts, train, layer, n_candidates=6)
        assert (found.layer, found.n_candidates, found.n_examples) == (layer, 6, len(train))
        assert found.spearman > 0.99
        assert found.max_error < 1e-5 < found.spread


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_low_precisions_error_is_that_of_the_losses(
    tiny_backbone: Backbone, deep: PromptSet, train: list[MrcInput], precision: str
) -> None:
    if precision == "int8" and int8_unfit():
        pytest.skip("no int8 products on this CPU")
    runtime = create_backend("torch", tiny_backbone, precision=precision)
    found = agreement(runtime, deep, train, 2, sigma=0.1, n_candidates=8)
    z = deep.fuse(torch.ones(deep.z.shape[:2])).numpy()
    trial = z[2] + 0.1 * np.random.default_rng(8).standard_normal((8, z.shape[1]))
    losses = []
    for each in (CpuBackend(tiny_backbone), runtime):
        objective = Objective(each.forward(deep), train)
        objective.set_incumbent(z)
        losses.append(objective.layer_losses(2, trial).fetch())
    assert found.max_error == pytest.approx(np.abs(losses[1] - losses[0]).max())
    assert found.max_error > 0
    assert found.spearman == pytest.approx(spearmanr(*losses).statistic)


def test_a_reference_that_does_not_fit_the_device_is_computed_on_the_cpu(
    tiny_backbone: Backbone, deep: PromptSet, train: list[MrcInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def exact(backbone: Backbone, device: str) -> Backend:
        asked.append(device)
        if device != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return exact_backend(backbone, device)

    backend = CpuBackend(tiny_backbone)
    expected = agreement(backend, deep, train, 1, n_candidates=4)
    monkeypatch.setattr("mp2.engine.agreement.exact_backend", exact)
    backend.device = "cpu:0"  # another device by its name
    assert agreement(backend, deep, train, 1, n_candidates=4) == expected
    assert asked == ["cpu:0", "cpu"]


def test_what_is_not_finite_is_null_in_json() -> None:
    values = Agreement(1, 20, 4, 0.5, float("nan"), float("inf")).as_dict()
    assert json.loads(json.dumps(values, allow_nan=False))["max_error"] is None
    assert (values["spread"], values["spearman"]) == (None, 0.5)
