"""The relaxed Bernoulli against eqs. 2-5 of the paper as they stand there."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mp2.prompts import hard_router, relaxed_bernoulli


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_the_paper(w: float, u: float, temperature: float) -> float:
    alpha = sigmoid(w) / (1 - sigmoid(w))  # eq. 5
    v = math.log(alpha) + math.log(u) - math.log(1 - u)  # eq. 3
    return sigmoid(v / temperature)  # eq. 4


@given(
    w=st.lists(st.floats(-8, 8), min_size=1, max_size=6),
    temperature=st.floats(0.2, 5),
    seed=st.integers(0, 2**31),
)
def test_samples_equal_the_closed_form_of_eqs_2_to_5(w: list[float], temperature: float, seed: int) -> None:
    logits = torch.tensor(w, dtype=torch.float64)
    got = relaxed_bernoulli(logits, temperature, torch.Generator().manual_seed(seed))
    uniform = torch.rand(len(w), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)  # eq. 2
    for value, logit, u in zip(got.tolist(), w, uniform.tolist(), strict=True):
        assert value == pytest.approx(by_the_paper(logit, u, temperature), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_a_sample_exceeds_one_half_with_probability_sigma_w(temperature: float) -> None:
    n = 40_000
    logits = torch.tensor([-2.0, -0.5, 0.0, 0.7, 3.0])
    samples = relaxed_bernoulli(logits.expand(n, -1), temperature, torch.Generator().manual_seed(1))
    share = (samples > 0.5).double().mean(0).numpy()
    expected = np.array([sigmoid(w) for w in logits.tolist()])
    deviation = np.sqrt(expected * (1 - expected) / n)
    assert np.all(np.abs(share - expected) < 4.5 * deviation)


def test_at_temperature_one_and_logit_zero_samples_are_uniform() -> None:
    samples = relaxed_bernoulli(torch.zeros(20_000), 1.0, torch.Generator().manual_seed(2)).sort().values
    distance = (samples - (torch.arange(20_000) + 0.5) / 20_000).abs().max()  # Kolmogorov-Smirnov
    assert distance < 1.63 / math.sqrt(20_000)  # 1 % level


def test_a_low_temperature_gives_bernoulli_draws_and_a_high_one_gives_halves() -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(3))
    cold = relaxed_bernoulli(logits, 1e-4, torch.Generator().manual_seed(4))
    assert ((cold < 1e-6) | (cold > 1 - 1e-6)).double().mean() > 0.995
    hot = relaxed_bernoulli(logits, 1e4, torch.Generator().manual_seed(4))
    assert (hot - 0.5).abs().max() < 1e-2


def test_the_gradient_equals_finite_differences() -> None:
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    target = torch.randn(2, 5, generator=torch.Generator().manual_seed(6), dtype=torch.float64)

    def value(w: torch.Tensor) -> torch.Tensor:
        sample = relaxed_bernoulli(w, 0.7, torch.Generator().manual_seed(7))  # the same noise each time
        return (sample * target).sum()

    w = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(w), w)
    step = 1e-6
    for index in np.ndindex(2, 5):
        moved = torch.zeros_like(logits)
        moved[index] = step
        slope = (value(logits + moved) - value(logits - moved)) / (2 * step)
        assert gradient[index].item() == pytest.approx(slope.item(), rel=1e-6, abs=1e-9)


def test_samples_stay_finite_and_differentiable_for_extreme_logits() -> None:
    logits = torch.tensor([-200.0, -40.0, 40.0, 200.0], requires_grad=True)
    samples = relaxed_bernoulli(logits, 0.1, torch.Generator().manual_seed(8))
    samples.sum().backward()
    assert samples.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_sampling_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    relaxed_bernoulli(torch.zeros(9), 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_hard_router_is_on_where_the_logit_is_above_zero() -> None:
    assert hard_router(torch.tensor([-1.0, -1e-9, 0.0, 1e-9, 2.0])).tolist() == [False] * 3 + [True] * 2
