from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from mp2.heads.leave_one_out import (
    PENALTIES,
    TEMPERATURES,
    centred,
    cross_entropy,
    dual,
    each_penalty,
    model_weights,
)


def features(n: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, width)) + 3.0


def one_hot(labels: np.ndarray) -> np.ndarray:
    return np.eye(labels.max() + 1)[labels]


@pytest.mark.parametrize(("n", "width"), [(12, 5), (9, 40)])
@pytest.mark.parametrize("penalty", [0.01, 1.0, 30.0])
def test_leave_one_out_scores_equal_n_separate_fits(n: int, width: int, penalty: float) -> None:
    x, labels = features(n, width, seed=1), np.arange(n) % 3
    y = one_hot(labels)
    kernel = centred(torch.from_numpy(x @ x.T)[None])
    x = x - x.mean(0)
    x = x / math.sqrt((x * x).sum(1).mean())  # the scale that `centred` gives the kernel
    expected = np.empty_like(y)
    for i in range(n):
        rest = np.arange(n) != i
        fitted = Ridge(alpha=penalty, solver="svd").fit(x[rest], y[rest])
        expected[i] = fitted.predict(x[i : i + 1])[0]
    _, scores = dual(kernel, torch.from_numpy(y), penalty)
    np.testing.assert_allclose(scores[0].numpy(), expected, rtol=0, atol=1e-9)


def test_dual_weights_predict_like_ridge_regression() -> None:
    x, new = features(10, 6, seed=2), features(4, 6, seed=3)
    y = one_hot(np.arange(10) % 2)
    mean = x.mean(0)
    scale = math.sqrt(((x - mean) ** 2).sum(1).mean())
    weights, _ = dual(centred(torch.from_numpy(x @ x.T)[None]), torch.from_numpy(y), 0.5)
    rows = (new - mean) @ (x - mean).T / scale**2
    got = rows @ weights[0].numpy() + y.mean(0)
    expected = Ridge(alpha=0.5, solver="svd").fit((x - mean) / scale, y).predict((new - mean) / scale)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)


def test_populations_score_as_their_candidates_alone() -> None:
    kernels = torch.stack([torch.from_numpy(x @ x.T) for x in (features(8, 5, seed) for seed in range(4))])
    y = torch.from_numpy(one_hot(np.arange(8) % 2))
    _, together = dual(centred(kernels), y, 1.0)
    for i, kernel in enumerate(kernels):
        _, alone = dual(centred(kernel[None]), y, 1.0)
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-12)


def test_a_kernel_that_is_not_finite_spoils_no_other() -> None:
    good = torch.from_numpy(features(6, 4, 0) @ features(6, 4, 0).T)
    bad = good.clone()
    bad[0, 0] = math.nan
    y = torch.from_numpy(one_hot(np.arange(6) % 2))
    labels = torch.arange(6) % 2
    _, scores = dual(centred(torch.stack([good, bad])), y, 1.0)
    losses = cross_entropy(scores, labels, 4.0)
    assert torch.isfinite(losses[0])
    assert torch.isnan(losses[1])


def test_states_without_spread_score_the_mean_of_the_others() -> None:
    y = torch.from_numpy(one_hot(np.array([0, 0, 0, 1])))
    _, scores = dual(centred(torch.ones(1, 4, 4)), y, 1.0)
    torch.testing.assert_close(scores[0, 3], torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(scores[0, 0], torch.tensor([2 / 3, 1 / 3], dtype=torch.float64))


def test_each_penalty_has_the_temperature_of_the_lowest_loss() -> None:
    x = features(16, 5, 5)
    labels = torch.arange(16) % 4
    x[np.arange(16), labels.numpy()] += 4.0
    kernel = centred(torch.from_numpy(x @ x.T)[None])[0]
    found = each_penalty(kernel, labels, 4)
    assert [penalty for _, penalty, _ in found] == list(PENALTIES)
    assert min(found)[0] < math.log(4) / 2  # the classes lie apart
    y = torch.nn.functional.one_hot(labels, 4).double()
    for loss, penalty, temperature in found:
        scores = dual(kernel[None], y, penalty)[1]
        assert float(cross_entropy(scores, labels, temperature)) == loss
        assert loss == min(float(cross_entropy(scores, labels, t)) for t in TEMPERATURES)


def test_weights_are_likelihoods_and_a_certain_one_takes_all() -> None:
    weights, loss = model_weights([0.5, 0.6, 0.5], 10)
    likelihoods = np.exp([-5.0, -6.0, -5.0])
    np.testing.assert_allclose(weights, likelihoods / likelihoods.sum())
    assert abs(loss + math.log(likelihoods.mean()) / 10) < 1e-12
    weights, loss = model_weights([900.0, 1000.0], 100)
    assert list(weights) == [1.0, 0.0]
    assert abs(loss - 900.0 - math.log(2) / 100) < 1e-9
