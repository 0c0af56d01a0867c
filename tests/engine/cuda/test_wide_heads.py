"""Heads of 64 and texts of 3 to 200 tokens, which is where flash attention and fp8's products run on a GPU.

The same tests run on a CPU, where attention is plain and the steps eager; on a GPU they fail where the
kernels are not the fast ones.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lanes_double import Device
from tiny_words import tiny_vocab

from mp2.backbone import Backbone, BackboneConfig, random_backbone
from mp2.engine import Objective, Scorer
from mp2.engine.agreement import spearman
from mp2.engine.cuda.backend import CudaBackend
from mp2.engine.cuda.forward import PackedForward
from mp2.engine.cuda.linear import Fp8Linear
from mp2.prompts import PromptSet, random_prompts
from mp2.tasks import MrcInput

from ..slow_reference import D, M, SlowReference, make_inputs

LENGTHS = (3, 17, 64, 65, 130, 200)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_cuda])]
)


def has_fp8(device: str) -> bool:
    """Tell whether the device has products with a scale a row; torch 2.11's CPU has a scale a tensor."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 9)
    try:
        Fp8Linear(torch.eye(16), torch.zeros(16))(torch.ones(2, 16))
    except RuntimeError:
        return False
    return True


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """Two heads of 64 in each of three layers, with weights that matter."""
    config = BackboneConfig(
        name="wide-heads",
        n_layers=3,
        hidden=128,
        n_heads=2,
        ffn=256,
        vocab_size=len(tiny_vocab()),
        max_positions=256,
    )
    made = random_backbone(config, tiny_vocab(), seed=3)
    with torch.no_grad():
        for name, parameter in made.encoder.named_parameters():
            if "norm" not in name:
                parameter.mul_(6)
    return made


@pytest.fixture(scope="module")
def prompts(backbone: Backbone) -> PromptSet:
    return random_prompts(backbone, "deep", prompt_tokens=M, intrinsic_dim=D, scale=20.0, seed=1)


@pytest.fixture(scope="module")
def train(backbone: Backbone) -> list[MrcInput]:
    return make_inputs(LENGTHS, backbone.config.vocab_size)


@pytest.fixture(scope="module")
def z(prompts: PromptSet) -> np.ndarray:
    """Candidates [8, L, d]."""
    drawn = np.random.default_rng(0).standard_normal((8, *prompts.z.shape[::2]))
    return (20 * drawn).astype(np.float32)


@pytest.fixture(scope="module")
def exact(
    backbone: Backbone, prompts: PromptSet, train: list[MrcInput], z: np.ndarray
) -> dict[str, np.ndarray]:
    """Losses in slow float64: of ``z``, and of the first candidate with those of ``z`` at layer 1."""
    visited = np.repeat(z[:1], len(z), 0)
    visited[:, 1] = z[:, 1]
    slow = SlowReference(backbone, prompts)
    return {"full": slow.losses(z, train), "visit": slow.losses(visited, train)}


def engine_on(device: str, backbone: Backbone, precision: str, **flags: bool) -> CudaBackend:
    """The engine; on a GPU with the fast kernels, on a CPU with lanes that replay what they recorded."""
    if precision == "fp8" and not has_fp8(device):
        pytest.skip(f"no fp8 products with a scale a row on this {device}")
    engine = CudaBackend(backbone, device=device, precision=precision, **flags)
    if device == "cpu":
        engine.lanes = Device().make_lanes()
        assert (engine.kernels.name, engine.steps.name) == ("plain", "eager")
    else:
        assert engine.kernels.name == ("plain" if precision == "fp32" else "flash"), engine.notes
        assert engine.steps.name == "triton", engine.notes
    return engine


def check(got: np.ndarray, expected: np.ndarray, share: float, ranks: float) -> None:
    """``share``: of the spread of the losses, that the largest error may be."""
    assert np.abs(got - expected).max() < share * np.ptp(expected)
    assert spearman(got, expected) >= ranks


@devices
@pytest.mark.parametrize("limit", [None, 500])
@pytest.mark.parametrize(
    ("precision", "share", "ranks"),
    [("fp32", 1e-4, 0.97), ("fp16", 5e-3, 0.97), ("bf16", 4e-2, 0.95), ("fp8", 0.6, 0.8)],
)
def test_losses_run_recorded_and_replayed_are_those_of_slow_float64(
    backbone: Backbone,
    prompts: PromptSet,
    train: list[MrcInput],
    z: np.ndarray,
    exact: dict[str, np.ndarray],
    device: str,
    precision: str,
    share: float,
    ranks: float,
    limit: int | None,
) -> None:
    """``limit``: tokens of a batch, which is then a part of the candidates."""
    engine = engine_on(device, backbone, precision)
    objective = Objective(engine.forward(prompts, micro_batch_tokens=limit), train)
    assert isinstance(objective.forward, PackedForward)
    seen: dict[str, np.ndarray] = {}
    for turn in range(3):
        objective.set_incumbent(z[0])
        found = {
            "full": objective.full_losses(z).fetch(),
            "visit": objective.layer_losses(1, z[:, 1]).fetch(),
        }
        for name, losses in found.items():
            check(losses, exact[name], share, ranks)
            if turn:  # the same kernels on the same numbers
                np.testing.assert_array_equal(losses, seen[name])
        seen = found
    assert objective.forward.graphs.n_recorded >= 2
    assert not objective.forward.graphs._refused


@devices
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "fp8"])
def test_an_examples_loss_does_not_depend_on_what_lies_beside_it(
    backbone: Backbone, prompts: PromptSet, train: list[MrcInput], z: np.ndarray, device: str, precision: str
) -> None:
    """As every row of a pack has scales, norms and a softmax of its own."""
    engine = engine_on(device, backbone, precision)
    scorer = Scorer(engine.forward(prompts))
    together = scorer.outputs(z[0], train).fetch()
    near = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 8e-2, "fp8": 8e-2}[precision]  # sums in another order
    for item, expected in zip(train, together, strict=True):
        (alone,) = scorer.outputs(z[0], [item]).fetch()
        n = len(item.input_ids)
        np.testing.assert_allclose(alone[:n], expected[:n], rtol=near, atol=near)


@devices
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8"])
@pytest.mark.parametrize("flag", ["one_kernel", "fused_activation"])
def test_what_is_behind_a_flag_computes_the_same_losses(
    backbone: Backbone,
    prompts: PromptSet,
    train: list[MrcInput],
    z: np.ndarray,
    exact: dict[str, np.ndarray],
    device: str,
    precision: str,
    flag: str,
) -> None:
    if device == "cpu" and (flag == "one_kernel" or precision == "fp8"):
        pytest.skip(
            "Triton's interpreter takes minutes for texts of this length; test_triton.py has short ones"
        )
    objective = Objective(engine_on(device, backbone, precision, **{flag: True}).forward(prompts), train)
    for _ in range(3):  # run, recorded, replayed
        share = {"fp16": 2e-2, "bf16": 6e-2, "fp8": 0.4}[precision]  # GELU by tanh on CUDA
        check(objective.full_losses(z).fetch(), exact["full"], share, 0.9)
