"""Fusing, z -> keys and values, and prompted forwards, each against its definition in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_encoder import slow_hidden, weights_of

from mp2.backbone import Backbone
from mp2.prompts import ModularPrompts, PrefixProjector, PromptSet, fuse, new_meta, prefix_of, random_prompts

Kind = Literal["deep", "shallow"]


def prompts_for(backbone: Backbone, kind: Kind, **settings: int) -> PromptSet:
    sizes = {"n_modules": 4, "prompt_tokens": 3, "intrinsic_dim": 5, "seed": 1, **settings}
    return random_prompts(backbone, kind, scale=1.0, tasks=("one", "two"), **sizes)


@pytest.mark.parametrize("normalisation", ["count", "sum"])
def test_fusing_equals_brute_force_for_every_router(normalisation: str) -> None:
    z = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    routers = torch.tensor(list(itertools.product([False, True], repeat=6))).view(-1, 2, 3)  # all 64
    got = fuse(z, routers, normalisation)
    assert got.shape == (64, 2, 5)
    for p, router in enumerate(routers):
        for layer in range(2):
            total = sum(z[layer, k].numpy() for k in range(3) if router[layer, k]) + np.zeros(5)
            n_on = int(router[layer].sum())
            expected = total / 3 if normalisation == "count" else total / n_on if n_on else total
            assert np.abs(got[p, layer].numpy() - expected).max() < 1e-11


@given(
    weights=st.lists(st.floats(0, 1), min_size=4, max_size=4), normalisation=st.sampled_from(["count", "sum"])
)
def test_fusing_soft_weights_is_their_weighted_mean(weights: list[float], normalisation: str) -> None:
    z = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    divisor = 4 if normalisation == "count" else sum(weights) + 1e-12
    expected = sum(w * row for w, row in zip(weights, z[0].numpy(), strict=True)) / divisor
    got = fuse(z, torch.tensor([weights], dtype=torch.float64), normalisation)[0].numpy()
    assert np.abs(got - expected).max() < 1e-9


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_folded_keys_and_values_equal_the_two_steps_in_float64(tiny_backbone: Backbone, layer: int) -> None:
    """z -> A -> key and value projections, unfused; float32 rounding allows 1e-5 of the largest entry."""
    prompts = prompts_for(tiny_backbone, "deep")
    z = torch.randn(6, 5, generator=torch.Generator().manual_seed(2)) * 3
    keys, values = PrefixProjector(tiny_backbone.encoder, prompts).keys_values(layer, z)
    w = weights_of(tiny_backbone)
    for p in range(6):
        soft = (z[p].double().numpy() @ prompts.projection[layer].double().numpy()).reshape(3, 24)
        for got, name in ((keys[p], "key"), (values[p], "value")):
            rows = soft @ w[f"layers.{layer}.{name}.weight"].T + w[f"layers.{layer}.{name}.bias"]  # [m, H]
            expected = rows.reshape(3, 4, 6).transpose(1, 0, 2)  # [h, m, d_h]
            assert np.abs(got.numpy() - expected).max() <= 1e-5 * np.abs(expected).max()
    assert keys.is_contiguous()
    assert values.is_contiguous()


def test_inline_prompts_are_z_times_the_projection(tiny_backbone: Backbone) -> None:
    prompts = prompts_for(tiny_backbone, "shallow")
    z = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))
    got = PrefixProjector(tiny_backbone.encoder, prompts).inline(z)
    expected = (z.double().numpy() @ prompts.projection[0].double().numpy()).reshape(4, 3, 24)
    assert np.abs(got.numpy() - expected).max() <= 1e-6


def test_shallow_prompts_have_no_prefix(tiny_backbone: Backbone) -> None:
    projector = PrefixProjector(tiny_backbone.encoder, prompts_for(tiny_backbone, "shallow"))
    with pytest.raises(ValueError, match="shallow inline prompts have no prefix"):
        projector.keys_values(0, torch.zeros(1, 5))


def trainable(backbone: Backbone, kind: Kind, **settings: object) -> ModularPrompts:
    meta = new_meta(
        backbone.name,
        backbone.sha256,
        backbone.encoder,
        kind,
        n_modules=4,
        prompt_tokens=3,
        intrinsic_dim=5,
        tasks=("one", "two"),
        **settings,
    )
    prompts = ModularPrompts(meta, torch.Generator().manual_seed(4))
    with torch.no_grad():  # far enough from the start that prompts matter
        prompts.z.mul_(100_000)
    return prompts


IDS = torch.tensor([[2, 9, 10, 30, 3], [2, 50, 7, 3, 0]])
MASK = torch.tensor([[True] * 5, [True] * 4 + [False]])


@pytest.mark.parametrize("kind", ["deep", "shallow"])
@pytest.mark.parametrize("normalisation", ["count", "sum"])
def test_training_forward_equals_float64_loops_over_fused_prompts(
    tiny_backbone: Backbone, kind: Kind, normalisation: str
) -> None:
    prompts = trainable(tiny_backbone, kind, router_normalisation=normalisation)
    weights = torch.rand(prompts.z.shape[:2], generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        start, end = prompts(tiny_backbone.encoder, IDS, MASK, weights)
    z, projection, w = (x.detach().double().numpy() for x in (prompts.z, prompts.projection, weights))
    soft = []
    for i in range(len(z)):
        divisor = 4 if normalisation == "count" else w[i].sum()
        soft.append((sum(w[i, k] * z[i, k] for k in range(4)) / divisor @ projection[i]).reshape(3, 24))
    head, bias = (x.detach().double().numpy() for x in (prompts.span_weight, prompts.span_bias))
    for row, length in enumerate((5, 4)):
        hidden = slow_hidden(
            tiny_backbone,
            IDS[row, :length].tolist(),
            prefix_prompts=soft if kind == "deep" else None,
            inline=soft[0] if kind == "shallow" else None,
        )
        logits = hidden @ head.T + bias
        assert np.abs(start[row, :length].numpy() - logits[:, 0]).max() <= 1e-5
        assert np.abs(end[row, :length].numpy() - logits[:, 1]).max() <= 1e-5
    with torch.no_grad():
        other, _ = prompts(tiny_backbone.encoder, IDS, MASK, torch.zeros_like(weights))
    assert (other - start)[MASK].abs().max() > 1e-3  # prompts do matter here


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_training_forward_equals_the_encoder_under_the_projectors_prefixes(
    tiny_backbone: Backbone, seed: int
) -> None:
    prompts = trainable(tiny_backbone, "deep")
    weights = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed)).round()
    frozen = prompts.to_set()
    projector = PrefixProjector(tiny_backbone.encoder, frozen)
    z = frozen.fuse(weights)
    prefixes = [projector.keys_values(i, z[i : i + 1]) for i in range(3)]
    hidden = tiny_backbone.encoder(IDS, MASK, prefixes)
    expected = hidden @ frozen.span_weight.T + frozen.span_bias
    with torch.no_grad():
        start, end = prompts(tiny_backbone.encoder, IDS, MASK, weights)
    assert (torch.stack([start, end], -1) - expected)[MASK].abs().max() <= 1e-5


def test_prefix_of_gives_each_prompt_its_own_keys(tiny_backbone: Backbone) -> None:
    soft = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0))
    keys, values = prefix_of(tiny_backbone.encoder, 1, soft)
    assert keys.shape == values.shape == (2, 4, 3, 6)
    assert (prefix_of(tiny_backbone.encoder, 1, soft[1:])[0] - keys[1:]).abs().max() < 1e-6


def test_initial_values_are_those_of_the_design(tiny_backbone: Backbone) -> None:
    meta = new_meta(
        tiny_backbone.name, tiny_backbone.sha256, tiny_backbone.encoder, "deep", tasks=("a",) * 40
    )
    prompts = ModularPrompts(meta, torch.Generator().manual_seed(0))
    bounds = {"z": 1e-3, "routers": 1e-3, "projection": (50 * 24) ** -0.5, "span_weight": 24**-0.5}
    for name, bound in bounds.items():
        values = getattr(prompts, name).detach()
        assert values.abs().max() <= bound
        if values.numel() > 500:  # uniform: the deviation is bound / sqrt(3)
            assert values.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    same = ModularPrompts(meta, torch.Generator().manual_seed(0))
    assert torch.equal(prompts.projection, same.projection)


@pytest.mark.parametrize("inference", ["hard", "soft"])
def test_router_weights_at_inference_are_the_stored_convention(
    tiny_backbone: Backbone, inference: str
) -> None:
    prompts = trainable(tiny_backbone, "deep", router_inference=inference)
    logits = prompts.routers[1].detach()
    expected = (logits > 0).float() if inference == "hard" else 1 / (1 + (-logits).exp())
    assert torch.allclose(prompts.router_weights(1), expected, atol=1e-7)
    assert torch.allclose(prompts.to_set().router("two"), expected, atol=1e-7)
    sampled = prompts.router_weights(1, generator=torch.Generator().manual_seed(0))
    assert sampled.requires_grad
    assert not torch.equal(sampled, prompts.router_weights(1, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_under_autocast_prompts_and_span_head_stay_float32(tiny_backbone: Backbone, kind: Kind) -> None:
    meta = new_meta(
        "tiny",
        tiny_backbone.sha256,
        tiny_backbone.encoder,
        kind,
        n_modules=4,
        prompt_tokens=3,
        tasks=("one",),
    )
    model = ModularPrompts(meta, torch.Generator().manual_seed(0))
    weights = model.router_weights(0, generator=torch.Generator().manual_seed(1))
    seen: list[torch.Tensor] = []

    def encoder(ids: torch.Tensor, mask: torch.Tensor, **prompts: object) -> torch.Tensor:
        with torch.no_grad():
            seen.append(tiny_backbone.encoder(ids, mask, **prompts))  # type: ignore[arg-type]
        return seen[-1]

    encoder.body = tiny_backbone.encoder.body  # type: ignore[attr-defined]
    ids = torch.arange(5, 15).view(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        prompts = model.prompts(weights)
        logits = model(encoder, ids, torch.ones(2, 5, dtype=torch.bool), weights)  # type: ignore[arg-type]
        assert torch.mm(weights, weights.T).dtype == torch.bfloat16  # it is on, and on again behind the head
    assert torch.equal(prompts, model.prompts(weights))
    head = model.span_weight.double()
    for got, row in zip(logits, head, strict=True):
        expected = seen[0].double() @ row + 0.0
        assert (got.double() - expected).abs().max() < 1e-6
        assert expected.abs().max() > 0.1


def test_soft_inference_weights_are_sigmoids_and_hard_ones_zero_or_one(tiny_backbone: Backbone) -> None:
    prompts = prompts_for(tiny_backbone, "deep")
    soft = replace(prompts, meta=replace(prompts.meta, router_inference="soft"))
    logits = prompts.routers[1].double().numpy()
    assert np.array_equal(prompts.router("two").numpy(), np.where(logits > 0, 1.0, 0.0))
    assert np.allclose(soft.router("two").numpy(), 1 / (1 + np.exp(-logits)), atol=1e-6)
    module = ModularPrompts(soft.meta, torch.Generator().manual_seed(0))
    with torch.no_grad():
        module.routers.copy_(soft.routers)
    assert torch.equal(module.router_weights(1), soft.router("two"))
