"""Kernel ridge regression and its leave-one-out scores in closed form, for populations of kernels.

A ridge regression with an intercept is a linear smoother, Y^ = S Y, so the prediction for example i by a
model that was fitted without it follows from the fit to all: y_i - (y_i - y^_i) / (1 - S_ii) (Allen 1974, the
PRESS statistic; Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, eq. 7.64). Nothing is
fitted N times.

Shapes: P candidates, N examples, C classes. Everything is float64: kernels of few examples are small, and the
losses of neighbouring candidates differ little.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PENALTIES = tuple(10.0 ** (k / 2) for k in range(-6, 5))
"""Ridge penalties that are tried, for kernels of mean diagonal 1."""
TEMPERATURES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Factors from regression scores (targets 0 and 1) to logits that are tried."""


def centred(kernel: Tensor) -> Tensor:
    """Kernel [P, N, N] of features whose mean over the examples is taken away, scaled to mean diagonal 1.

    The intercept of the regression is not penalised, which is the same as centring. The scale makes a
    penalty mean the same for every candidate. A kernel without any spread stays zero.
    """
    kernel = kernel.double()
    rows = kernel.mean(-1, keepdim=True)
    kernel = kernel - rows - rows.transpose(-1, -2) + rows.mean(-2, keepdim=True)
    scale = kernel.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return torch.where(scale == 0, torch.zeros_like(kernel), kernel / scale)


def dual(kernel: Tensor, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Dual weights [P, N, C] and leave-one-out scores [P, N, C] of ``kernel`` (see `centred`).

    ``targets`` [N, C]; ``penalty`` > 0. A new example with centred kernel row k scores k @ weights plus the
    targets' mean. Where the kernel is not finite, neither are the results.
    """
    n = kernel.shape[-1]
    finite = torch.isfinite(kernel).flatten(-2).all(-1)[..., None, None]
    eye = torch.eye(n, dtype=kernel.dtype, device=kernel.device)
    inverse = torch.linalg.inv(torch.where(finite, kernel, 0.0) + penalty * eye)
    residual = penalty * (inverse @ (targets - targets.mean(0)))  # targets less fitted values
    leverage = 1 - penalty * inverse.diagonal(dim1=-2, dim2=-1) + 1 / n  # S_ii, 1/N of it the intercept's
    scores = targets - residual / (1 - leverage)[..., None]  # y - (y - y^) / (1 - S_ii)
    bad = torch.where(finite, 0.0, torch.nan)
    return residual / penalty + bad, scores + bad


def cross_entropy(scores: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy [P] of softmax(``temperature`` x ``scores`` [P, N, C]) for ``labels`` [N] int64."""
    log_probs = torch.log_softmax(temperature * scores, -1)
    return -log_probs[..., torch.arange(len(labels), device=labels.device), labels].mean(-1)


def each_penalty(kernel: Tensor, labels: Tensor, n_classes: int) -> list[tuple[float, float, float]]:
    """(leave-one-out loss, penalty, temperature) of one ``kernel`` [N, N] for every penalty of the grid.

    The temperature is the one of its grid that gives the lowest loss.
    """
    targets = torch.nn.functional.one_hot(labels, n_classes).double()
    found = []
    for penalty in PENALTIES:
        _, scores = dual(kernel[None], targets, penalty)
        loss, temperature = min((float(cross_entropy(scores, labels, t)), t) for t in TEMPERATURES)
        found.append((loss, penalty, temperature))
    return found


def model_weights(losses: Sequence[float], n_examples: int) -> tuple[NDArray[np.float64], float]:
    """Weights of models by their leave-one-out losses, and what an average by them is worth as a loss.

    Pseudo-Bayesian model averaging (Geisser and Eddy 1979; Yao et al. 2018, "Using stacking to average
    Bayesian predictive distributions", section 3.4): a weight is the model's leave-one-out likelihood,
    exp(-N x loss), divided by their sum. The second is -1/N of the logarithm of the mean likelihood. With few
    examples the lowest of many losses is often so by chance; where the examples do not tell models apart, all
    have a say.
    """
    logs = -n_examples * np.asarray(losses, dtype=np.float64)
    top = logs.max()
    likelihoods = np.exp(logs - top)
    loss = -(top + np.log(likelihoods.mean())) / n_examples
    return likelihoods / likelihoods.sum(), float(loss)
