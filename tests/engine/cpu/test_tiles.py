"""Layers of bf16 differences in AMX's tiles: against float64, and against the same steps without tiles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_words import tiny_vocab
from torch.nn import functional as F

from mp2.backbone import Backbone, BackboneConfig, Layer, random_backbone
from mp2.backbone.encoder import activate
from mp2.engine import Objective, create_backend
from mp2.engine.backend import PopulationPrefix
from mp2.engine.cpu import attention, native, tiles
from mp2.engine.cpu.difference_steps import bf16_unfit
from mp2.engine.cpu.differences import DifferenceBackend
from mp2.prompts import random_prompts

from ..slow_reference import D, M, SlowReference, make_inputs

pytestmark = pytest.mark.skipif(
    tiles.load_tiles() is None or bool(bf16_unfit()), reason="no compiler, or a processor without AMX"
)

P, N, T = 5, 2, 37
HIDDEN, HEADS = 64, 2
# Weights, differences and what lies between products are rounded by at most 2^-9 each, independently: a
# difference passes through four products.
SHARE = 6 * 2**-9


def made(tiny_config: BackboneConfig, ffn: int = 96, activation: str = "gelu") -> Backbone:
    config = replace(tiny_config, hidden=HIDDEN, n_heads=HEADS, ffn=ffn, activation=activation)
    backbone = random_backbone(config, tiny_vocab(), seed=3)
    with torch.no_grad():
        for name, x in backbone.encoder.named_parameters():
            x.mul_(1.0 if "norm" in name else 8.0)
    return backbone


def exact(
    layer: Layer,
    config: BackboneConfig,
    x: torch.Tensor,
    mask: torch.Tensor | None,
    prefix: PopulationPrefix | None,
) -> torch.Tensor:
    """The layer's output in float64 for ``x`` [1 + P or 1, N, T, H]."""

    def linear(of: torch.Tensor, module: torch.nn.Linear) -> torch.Tensor:
        return F.linear(of, module.weight.double(), module.bias.double())

    def norm(of: torch.Tensor, module: torch.nn.LayerNorm) -> torch.Tensor:
        return F.layer_norm(
            of, (HIDDEN,), module.weight.double(), module.bias.double(), config.layer_norm_eps
        )

    wide = None if prefix is None else (prefix[0].double(), prefix[1].double())
    x = x.double().expand(len(x) if prefix is None else max(len(x), len(prefix[0])), -1, -1, -1)
    qkv = torch.cat([linear(x, part) for part in (layer.query, layer.key, layer.value)], -1)
    context = attention.attend(qkv.view(*x.shape[:3], 3, HEADS, -1).contiguous(), mask, wide)
    y = norm(linear(context.reshape(x.shape), layer.attention_output) + x, layer.attention_norm)
    return norm(
        linear(activate(config.activation, linear(y, layer.intermediate)), layer.output) + y,
        layer.output_norm,
    )


def near(spread: float, *shape: int, seed: int) -> torch.Tensor:
    """Return [1 + P, *shape]: a reference, and P that differ from it by about ``spread``."""
    rng = torch.Generator().manual_seed(seed)
    reference = torch.randn(1, *shape, generator=rng)
    return torch.cat([reference, reference + spread * torch.randn(P, *shape, generator=rng)])


def check(
    backend: DifferenceBackend, x: torch.Tensor, mask: torch.Tensor | None, prefix: PopulationPrefix | None
) -> None:
    layer, config = backend.backbone.encoder.body(1), backend.backbone.config
    expected = exact(layer, config, x, mask, prefix)
    got = backend.layer(1, x, mask, prefix)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=0, atol=1e-5)
    change, wanted = got[1:].double() - got[:1], expected[1:] - expected[:1]
    if mask is not None:
        change, wanted = change[:, mask], wanted[:, mask]
    assert float((change - wanted).norm() / wanted.norm()) < SHARE


@pytest.mark.parametrize("ffn", [96, 2048])
@pytest.mark.parametrize("spread", [0.01, 1.0])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("prefixes", ["none", "shared", "own", "of each example", "shared text"])
def test_a_layer_equals_float64(
    tiny_config: BackboneConfig, ffn: int, spread: float, padded: bool, prefixes: str
) -> None:
    backend = DifferenceBackend(made(tiny_config, ffn), precision="bf16")
    assert backend._tile_attention is not None
    assert (backend._rough(1).tiles is None) == (ffn > 1024)
    x = near(spread, N, T, HIDDEN, seed=0)
    mask = torch.arange(T)[None] < torch.tensor([[T], [T - 6]]) if padded else None
    prefix = None
    if prefixes != "none":
        n = N if prefixes == "of each example" else 1
        both = near(spread, 2, n, HEADS, 19, HIDDEN // HEADS, seed=1)
        both = both[:1] if prefixes == "shared" else both
        prefix = both[:, 0].contiguous(), both[:, 1].contiguous()
    check(backend, x[:1] if prefixes == "shared text" else x, mask, prefix)


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu"])
@pytest.mark.parametrize("spread", [0.01, 1.0])
def test_other_activations(tiny_config: BackboneConfig, activation: str, spread: float) -> None:
    backend = DifferenceBackend(made(tiny_config, activation=activation), precision="bf16")
    check(backend, near(spread, N, T, HIDDEN, seed=0), None, None)


@pytest.mark.parametrize("t", [1, 15, 16, 17, 33, 65, 130])
def test_any_length(tiny_config: BackboneConfig, t: int) -> None:
    backend = DifferenceBackend(made(tiny_config), precision="bf16")
    check(backend, near(0.05, 3, t, HIDDEN, seed=0), None, None)
    both = near(0.05, 2, 1, HEADS, 50, HIDDEN // HEADS, seed=1)
    check(
        backend,
        near(0.05, 3, t, HIDDEN, seed=0)[:1],
        None,
        (both[:, 0].contiguous(), both[:, 1].contiguous()),
    )


def test_large_scores_are_relative_to_the_candidates_own(tiny_config: BackboneConfig) -> None:
    """Where a candidate's largest score is far from the reference's, either way, nothing overflows."""
    library = tiles.load_tiles()
    assert library is not None
    attend = tiles.TileAttention(library)
    rng = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, T, 3, HEADS, 32, generator=rng)
    moved = torch.randn(2, 1, T, 3, HEADS, 32, generator=rng)
    moved[:, :, :, 1] *= torch.tensor([300.0, 0.0]).view(2, 1, 1, 1, 1)
    # keys of one direction: all scores of the second candidate are 400 lower than the reference's
    qkv[:, :, 0], qkv[:, :, 1] = 8.0, 9.0 + torch.rand(1, T, HEADS, 32, generator=rng)
    moved[1, :, :, 0], moved[1, :, :, 1] = 0.0, -9.0
    moved = moved.bfloat16()
    context, change = attend(qkv, moved, None, None)
    whole = qkv.double() + torch.cat([torch.zeros_like(moved[:1]), moved]).double()
    expected = attention.attend(whole, None, None)
    # scores of 400 are rounded to 3e-5
    torch.testing.assert_close(context.double(), expected[0], rtol=1e-4, atol=1e-4)
    assert change.isfinite().all()
    got = (context.double() + change.view(2, *context.shape).double()) - expected[1:]
    assert float(got[1].norm() / (expected[2] - expected[0]).norm()) < SHARE


def test_without_a_difference_there_is_none_afterwards(tiny_config: BackboneConfig) -> None:
    backend = DifferenceBackend(made(tiny_config), precision="bf16")
    x = near(0.0, N, T, HIDDEN, seed=0)
    got = backend.layer(1, x, None, None)
    torch.testing.assert_close(got[1:], got[:1].expand(P, -1, -1, -1), rtol=0, atol=3e-6)
    library = tiles.load_tiles()
    assert library is not None
    qkv = torch.randn(N, T, 3, HEADS, 32, generator=torch.Generator().manual_seed(0))
    _, change = tiles.TileAttention(library)(qkv, torch.zeros(P, *qkv.shape).bfloat16(), None, None)
    assert not change.count_nonzero()


def test_nan_spoils_its_own_candidate(tiny_config: BackboneConfig) -> None:
    backend = DifferenceBackend(made(tiny_config), precision="bf16")
    x = near(0.05, N, T, HIDDEN, seed=0)
    good = backend.layer(1, x, None, None)
    for bad in (float("nan"), float("inf")):
        x[3, 1, 4, 7] = bad
        got = backend.layer(1, x, None, None)
        assert not got[3, 1].isfinite().any()
        others = [0, 1, 2, 4, 5]
        assert torch.equal(got[others], good[others])
        assert torch.equal(got[3, 0], good[3, 0])


def test_a_candidate_is_the_same_bits_in_any_population_and_on_any_number_of_threads(
    tiny_config: BackboneConfig,
) -> None:
    backend = DifferenceBackend(made(tiny_config), precision="bf16")
    x = near(0.05, N, T, HIDDEN, seed=0)
    whole = backend.layer(1, x, None, None)
    assert torch.equal(backend.layer(1, x[[0, 3]], None, None)[1], whole[3])
    torch.set_num_threads(2)
    try:
        assert torch.equal(backend.layer(1, x, None, None)[1:], whole[1:])
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("ffn", [96, 2048])
def test_losses_of_populations_are_near_slow_float64(tiny_config: BackboneConfig, ffn: int) -> None:
    backbone = made(tiny_config, ffn)
    prompts = random_prompts(backbone, "deep", prompt_tokens=M, intrinsic_dim=D, scale=20.0, seed=1)
    train = make_inputs((9, 14, 9, 5, 30), backbone.config.vocab_size)
    rng = np.random.default_rng(3)
    z = rng.standard_normal((1, len(prompts.z), D)) * 4 + 0.1 * rng.standard_normal((12, len(prompts.z), D))
    z = z.astype(np.float32)
    objective = Objective(DifferenceBackend(backbone, precision="bf16").forward(prompts), train)
    expected = SlowReference(backbone, prompts).losses(z, train)
    assert np.abs(objective.full_losses(z).fetch() - expected).max() < SHARE * np.ptp(expected)
    objective.set_incumbent(z[0])
    one = np.repeat(z[:1], len(z), 0)
    one[:, 1] = z[:, 1]
    expected = SlowReference(backbone, prompts).losses(one, train)
    assert np.abs(objective.layer_losses(1, z[:, 1]).fetch() - expected).max() < SHARE * np.ptp(expected)


def test_auto_is_float32_and_says_what_is_faster(
    tiny_config: BackboneConfig, tiny_backbone: Backbone
) -> None:
    told = "; --precision bf16 is faster on this processor"
    backend = create_backend("auto", made(tiny_config), precision="auto")
    assert backend.precision == "fp32"
    assert backend.reason == f"auto: torch, the only runtime without an engine folder{told}"
    assert told not in create_backend("auto", made(tiny_config), precision="fp32").reason
    assert told not in create_backend("auto", tiny_backbone, precision="auto").reason


def test_heads_that_do_not_fill_tiles_go_without(tiny_backbone: Backbone) -> None:
    assert DifferenceBackend(tiny_backbone, precision="bf16")._tile_attention is None


@pytest.mark.parametrize(("h", "f"), [(48, 96), (64, 80)])
def test_c_refuses_widths_that_do_not_fill_tiles(h: int, f: int) -> None:
    library = native.load()
    assert library is not None
    with pytest.raises(ValueError, match="mp2_tiles_second_half: sizes"):
        library.mp2_tiles_second_half(None, None, 1, *[None] * 11, 1e-12, 0, None, 1, 1, h, f, 1)
    with pytest.raises(ValueError, match="mp2_tiles_pack: sizes"):
        library.mp2_tiles_pack(None, None, f, h)


def test_weights_are_packed_as_torch_rounds_them() -> None:
    library = native.load()
    assert library is not None
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    packed = torch.empty(32 * 64, dtype=torch.bfloat16)
    library.mp2_tiles_pack(weight.data_ptr(), packed.data_ptr(), 32, 64)
    steps = packed.view(2, 2, 16, 16, 2)  # panel, step, pair, output, of the pair
    assert torch.equal(steps.permute(0, 3, 1, 2, 4).reshape(32, 64), weight.bfloat16())
