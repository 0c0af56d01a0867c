"""The C kernel of what follows attention, against float64 and against itself in other batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_words import tiny_vocab
from torch.nn import functional as F

from mp2.backbone import Backbone, BackboneConfig, Layer, random_backbone
from mp2.backbone.encoder import activate
from mp2.engine import Objective
from mp2.engine.cpu import native
from mp2.engine.cpu.backend import CpuBackend
from mp2.engine.cpu.linear import SecondHalf, make_second_half
from mp2.prompts import random_prompts

from ..slow_reference import D, M, SlowReference, make_inputs

pytestmark = pytest.mark.skipif(native.load() is None, reason="no C compiler here")

HIDDEN, FFN, ROWS = 64, 96, 61
EPS = 1e-12


@pytest.fixture(scope="module")
def config(tiny_config: BackboneConfig) -> BackboneConfig:
    return replace(tiny_config, hidden=HIDDEN, ffn=FFN)


@pytest.fixture(scope="module")
def backbone(config: BackboneConfig) -> Backbone:
    made = random_backbone(config, tiny_vocab(), seed=3)
    with torch.no_grad():
        for name, x in made.encoder.named_parameters():
            x.mul_(1.0 if "norm" in name else 8.0)
    return made


def rows(seed: int, n: int = ROWS) -> torch.Tensor:
    return torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(seed))


def made(layer: Layer, activation: str) -> SecondHalf:
    half = make_second_half(layer, activation, EPS)
    assert half is not None
    return half


def exact(layer: Layer, activation: str, context: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    def linear(x: torch.Tensor, module: torch.nn.Linear) -> torch.Tensor:
        return F.linear(x, module.weight.double(), module.bias.double())

    def norm(x: torch.Tensor, module: torch.nn.LayerNorm) -> torch.Tensor:
        return F.layer_norm(x, (HIDDEN,), module.weight.double(), module.bias.double(), EPS)

    y = norm(linear(context.double(), layer.attention_output) + residual.double(), layer.attention_norm)
    wide = activate(activation, linear(y, layer.intermediate))
    return norm(linear(wide, layer.output) + y, layer.output_norm)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_equals_float64(backbone: Backbone, activation: str) -> None:
    layer = backbone.encoder.body(1)
    context, residual = rows(1), rows(2)
    got = made(layer, activation)(context, residual)
    expected = exact(layer, activation, context, residual)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=3e-6)


def test_gelu_is_exact_for_any_size_of_its_argument(backbone: Backbone) -> None:
    layer = backbone.encoder.body(0)
    for scale in (1e-3, 1.0, 30.0):
        layer_norm = torch.nn.LayerNorm(HIDDEN, eps=EPS)
        with torch.no_grad():
            layer_norm.weight.fill_(scale)
        original, layer.attention_norm = layer.attention_norm, layer_norm
        try:
            got = made(layer, "gelu")(rows(1), rows(2)).double()
            expected = exact(layer, "gelu", rows(1), rows(2))
        finally:
            layer.attention_norm = original
        torch.testing.assert_close(got, expected, rtol=0, atol=3e-6)


def test_a_residual_of_fewer_rows_is_repeated(backbone: Backbone) -> None:
    half = made(backbone.encoder.body(0), "gelu")
    residual = rows(2, 20)
    assert torch.equal(half(rows(1, 60), residual), half(rows(1, 60), residual.repeat(3, 1)))


def test_a_row_is_the_same_bits_in_any_batch_and_on_any_number_of_threads(backbone: Backbone) -> None:
    half = made(backbone.encoder.body(0), "gelu")
    context, residual = rows(1), rows(2)
    whole = half(context, residual)
    for part in (slice(0, 1), slice(5, 18), slice(3, 28), slice(60, 61)):
        assert torch.equal(half(context[part], residual[part]), whole[part])
    torch.set_num_threads(2)
    try:
        assert torch.equal(half(context, residual), whole)
    finally:
        torch.set_num_threads(1)


def test_nan_spoils_its_row_only(backbone: Backbone) -> None:
    context = rows(1)
    context[7, 3] = float("nan")
    got = made(backbone.encoder.body(0), "gelu")(context, rows(2))
    assert got[7].isnan().all()
    assert got[:7].isfinite().all()
    assert got[8:].isfinite().all()


def test_layers_of_other_widths_and_wide_ones_go_without(
    tiny_backbone: Backbone, config: BackboneConfig
) -> None:
    assert make_second_half(tiny_backbone.encoder.body(0), "gelu", EPS) is None
    wide = Layer(replace(config, ffn=2048))
    assert make_second_half(wide, "gelu", EPS) is None


def test_losses_of_populations_equal_slow_float64(backbone: Backbone) -> None:
    prompts = random_prompts(backbone, "deep", prompt_tokens=M, intrinsic_dim=D, scale=20.0, seed=1)
    train = make_inputs((9, 14, 9, 5, 30), backbone.config.vocab_size)
    z = (4 * np.random.default_rng(3).standard_normal((4, len(prompts.z), D))).astype(np.float32)
    objective = Objective(CpuBackend(backbone).forward(prompts), train)
    losses = objective.full_losses(z).fetch()
    np.testing.assert_allclose(losses, SlowReference(backbone, prompts).losses(z, train), rtol=1e-5, atol=0)
    objective.set_incumbent(z[0])
    at_one = objective.layer_losses(1, z[:, 1]).fetch()
    np.testing.assert_allclose(at_one[0], losses[0], rtol=1e-5)
