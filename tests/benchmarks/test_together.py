"""Seeds as one against seeds one after another: same results, launched before they are fetched."""

from __future__ import annotations

import pytest
from lanes_double import Device

from benchmarks.speed import together
from mp2.backbone import load_backbone
from mp2.engine.cpu.backend import CpuBackend
from mp2.engine.cuda.backend import CudaBackend
from mp2.optimizers.config import LayerConfig, RouterConfig
from mp2.prompts import random_prompts
from mp2.runs.config import BbtConfig
from mp2.runs.frozen_model import FrozenModel


@pytest.mark.parametrize("launches", [True, False])
def test_two_seeds_are_the_same_together_and_alone(launches: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "POPULATION", 2)
    mini = load_backbone("mini")
    prompts = random_prompts(mini, "deep", prompt_tokens=2, intrinsic_dim=5)
    runtime = CudaBackend(mini, device="cpu", precision="fp32") if launches else CpuBackend(mini)
    device = Device()
    if isinstance(runtime, CudaBackend):
        runtime.lanes = device.make_lanes()
        runtime.side_by_side = lambda tokens: 8  # type: ignore[method-assign]
    configs = [
        BbtConfig(
            task="demo_sentiment",
            head="span",
            backbone="mini",
            prompts="random",
            iters=8,
            router=RouterConfig(iterations=4),
            layers=LayerConfig(popsize=4),
            seed=seed,
            shots=2,
            max_tokens=48,
            test=False,
        )
        for seed in (8, 13)
    ]
    row = together.compare(FrozenModel(mini, prompts, runtime), configs, rounds=1)
    engine, runs = row["engine"], row["runs"]
    assert (engine["same"], runs["same"]) == (2, 2)
    assert engine["lanes"] == (2 if launches else 1)
    assert min(engine["alone_ms"], engine["together_ms"], runs["alone_s"], runs["together_s"]) > 0
    assert "2 seeds" in together.line(row)
    if launches:  # in the engine's last round, both were sent before one arrived
        sends = "".join(event[0] for event, _ in device.events)
        assert "ssaa" in sends
        assert "sasa" in sends


def test_a_shape_comes_with_prompts_of_the_kind() -> None:
    model = together.load("mini", "shallow", "cpu", "auto")
    assert (model.kind, model.backend.precision, model.space().n_layers) == ("shallow", "fp32", 1)
