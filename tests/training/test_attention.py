"""Attention for training on CPUs: the same numbers, nothing left changed."""

from __future__ import annotations

import pytest
import torch

from mp2.backbone import BackboneConfig
from mp2.training.mlm import MaskedLanguageModel, trainable_attention

SHAPE = BackboneConfig(name="x", n_layers=2, hidden=16, n_heads=2, ffn=24, vocab_size=50, max_positions=20)


def gradient(precision: torch.dtype, plain: bool) -> torch.Tensor:
    """Of all parameters of a small model, one after the other."""
    model = MaskedLanguageModel(SHAPE)
    model.initialise(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    ids, targets = (torch.randint(5, 50, shape, generator=generator) for shape in ((4, 12), (8,)))
    batch = ids, torch.arange(1, 48, 6), targets, torch.zeros(4, dtype=torch.long)
    cpu = torch.device("cpu")
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        if plain:
            with trainable_attention(cpu):
                [loss] = model(*batch)
        else:
            [loss] = model(*batch)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_float32_gradients_are_those_of_the_fused_kernel() -> None:
    expected = gradient(torch.float32, plain=False)
    assert (gradient(torch.float32, plain=True) - expected).norm() <= 1e-5 * expected.norm()


def test_bf16_gradients_are_as_near_to_float32_as_the_fused_kernels() -> None:
    exact = gradient(torch.float32, plain=False)
    ours, theirs = ((gradient(torch.bfloat16, plain) - exact).norm() for plain in (True, False))
    assert 0 < ours <= 1.5 * theirs


def test_the_switches_are_as_before_after_the_block_and_after_an_error() -> None:
    def switches() -> tuple[bool, bool]:
        return (
            torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed(),
            torch.backends.cuda.flash_sdp_enabled(),
        )

    before = switches()

    def fails() -> None:
        with trainable_attention(torch.device("cpu")):
            assert switches() != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert switches() == before
