"""A Gaussian process over routers that knows the prompts which they fuse.

The loss is a smooth function of the fused prompts z^(l) = 1/K sum_k w_k z_k^(l) (eq. 1), not of bits: modules
of a layer may point the same way, be tiny or hardly matter. So the covariance of two routers is
``exp(-sum_l s_l |z^(l) - z'^(l)|^2)``: distances are measured between fused prompts, layer by layer, in units
in which a layer's modules have mean square length 1. The relevance s_l of every layer has the highest
marginal likelihood under the prior log s_l = log 2/D + c + u_l, c ~ N(0, 3^2), u_l ~ N(0, 1.5^2), D = L' * K:
where c and u are 0, random routers are at a distance of about 1 in sum. A twentieth of a distance is the
number of bits that differ, for what intrinsic prompts do not show.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr  # type: ignore[import-untyped]

Floats = NDArray[Any]

_BITS_SHARE = 0.05
_COMMON_DEVIATION, _LAYER_DEVIATION = 3.0, 1.5  # of c and u
_FIRST_STEP, _LONGEST_STEP = 0.5, 1.0
_NUGGET = 1e-3


def coordinates(modules: Floats) -> Floats:
    """Basis [L', K, K] for intrinsic prompts [L', K, d]: ``router @ basis`` has the distances of above."""
    z = np.asarray(modules, dtype=np.float64)
    n_modules = z.shape[1]
    gram = z @ z.transpose(0, 2, 1)
    trace = np.trace(gram, axis1=1, axis2=2)[:, None, None]
    gram = n_modules * np.divide(gram, trace, out=np.zeros_like(gram), where=trace > 0)
    gram = (1 - _BITS_SHARE) * gram + _BITS_SHARE * np.eye(n_modules)
    values, vectors = np.linalg.eigh(gram)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0))[:, None, :])


def fit_relevance(points: Floats, losses: Floats, start: Floats | None, steps: int) -> Floats:
    """c and u_l [1 + L'] for standardised losses [n] at points [n, L', K].

    Resilient gradient ascent (Rprop) on the likelihood, the variance at its optimum, from ``start`` (None:
    zeros).
    """
    n, n_layers, n_modules = points.shape
    now = np.zeros(1 + n_layers) if start is None else start
    precision = 1 / np.append(_COMMON_DEVIATION, np.full(n_layers, _LAYER_DEVIATION)) ** 2
    step, before = np.full(1 + n_layers, _FIRST_STEP), np.zeros(1 + n_layers)
    layers = points.transpose(1, 0, 2)
    squares = (layers**2).sum(-1)
    distances = squares[:, :, None] + squares[:, None] - 2 * layers @ layers.transpose(0, 2, 1)  # [L', n, n]
    distances = np.maximum(distances, 0)
    best, found = -np.inf, now
    for _ in range(steps):
        s = relevance(now, n_modules)
        kernel = np.exp(-np.tensordot(s, distances, 1))
        inverse, weights, variance = _solve(kernel, losses)
        likelihood = (np.linalg.slogdet(inverse)[1] - n * np.log(variance) - precision @ now**2) / 2
        if likelihood > best:
            best, found = likelihood, now
        pull = (inverse - np.outer(weights, weights) / variance) * kernel
        slopes = s * np.tensordot(distances, pull, 2) / 2  # d likelihood / d log s_l
        gradient = np.append(slopes.sum(), slopes) - precision * now
        step = np.where(gradient * before > 0, np.minimum(1.3 * step, _LONGEST_STEP), step / 2)
        now, before = now + np.sign(gradient) * step, gradient
    return found


def relevance(fitted: Floats, n_modules: int) -> Floats:
    """s_l [L'] from c and u_l [1 + L'] of layers of K modules."""
    n_layers = len(fitted) - 1
    return np.asarray(2 / (n_layers * n_modules) * np.exp(fitted[0] + fitted[1:]))


class RouterModel:
    """What losses and improvements are to be expected of routers, given as rows of D bits."""

    def __init__(self, routers: NDArray[np.bool_], losses: Floats, basis: Floats) -> None:
        """Standardised losses [n] of routers [n, D]; ``basis`` [D, D] is :func:`scaled`."""
        self._routers, self._losses, self._basis = routers, losses, basis
        self._places = routers @ basis
        self._squares = (self._places**2).sum(1)
        self._along = self._places @ basis.T  # [n, D]: a place's product with what a bit adds
        self._lengths = (basis**2).sum(1)  # [D]
        self._inverse, self._weights, self._variance = _solve(np.exp(-self._distances(self._places)), losses)

    def with_expected(self, router: NDArray[np.bool_]) -> RouterModel:
        """The model as if ``router`` [D] had the loss that is expected of it."""
        expected = np.exp(-self._distances((router @ self._basis)[None])) @ self._weights
        return RouterModel(np.vstack([self._routers, router]), np.append(self._losses, expected), self._basis)

    def worth(self, routers: NDArray[np.bool_]) -> Floats:
        """Logarithm of the expected improvement (LogEI, Ament et al. 2023) [c] at routers [c, D]."""
        return self._worth(np.exp(-self._distances(routers @ self._basis)))

    def worth_of_flips(self, router: NDArray[np.bool_]) -> Floats:
        """The same at the D neighbours of a router [D], for less: |a + e|^2 = |a|^2 + 2 a e + |e|^2."""
        place = router @ self._basis
        sign = np.where(router, -1.0, 1.0)[:, None]
        product = (self._basis @ place)[:, None] - self._along.T  # [D, n]
        squares = self._distances(place[None]) + 2 * sign * product + self._lengths[:, None]
        return self._worth(np.exp(-np.maximum(squares, 0)))

    def _distances(self, places: Floats) -> Floats:
        """Squared, [c, n], of places [c, D] from the model's."""
        squares = (places**2).sum(1)[:, None] + self._squares - 2 * (places @ self._places.T)
        return np.asarray(np.maximum(squares, 0))

    def _worth(self, kernel: Floats) -> Floats:
        mean = kernel @ self._weights
        variance = np.maximum(1 - ((kernel @ self._inverse) * kernel).sum(1), 1e-9)
        deviation = np.sqrt(variance * self._variance)
        return np.asarray(np.log(deviation) + _log_improvement((self._losses.min() - mean) / deviation))


def scaled(basis: Floats, s: Floats) -> Floats:
    """[D, D], a block a layer, from :func:`coordinates` [L', K, K] and s_l [L']: ``router @ scaled``."""
    n_layers, n_modules, _ = basis.shape
    found = np.zeros((n_layers, n_modules, n_layers, n_modules))
    found[np.arange(n_layers), :, np.arange(n_layers)] = np.sqrt(s)[:, None, None] * basis
    return found.reshape(n_layers * n_modules, -1)


def _solve(kernel: Floats, losses: Floats) -> tuple[Floats, Floats, float]:
    """Inverse of the kernel matrix with its nugget [n, n], its product with losses [n], their variance."""
    inverse = np.linalg.inv(kernel + _NUGGET * np.eye(len(kernel)))
    weights = inverse @ losses
    return inverse, weights, max(float(losses @ weights) / len(losses), 1e-12)


def _log_improvement(z: Floats) -> Floats:
    """log h(z), h(z) = z Phi(z) + phi(z), also where h underflows: far below 0 it is about log(phi(z) / z^2).

    Ament et al. (NeurIPS 2023), "Unexpected Improvements to Expected Improvement for Bayesian Optimization":
    the logarithm keeps candidates in order where the expected improvement itself is 0 in floating point.
    """
    z = np.minimum(z, 30.0)
    log_density = -z * z / 2 - np.log(2 * np.pi) / 2
    near = np.maximum(z, -25.0)
    ratio = 1 + near * np.exp(log_ndtr(near) + near * near / 2 + np.log(2 * np.pi) / 2)
    ratio = np.where(z < -25, 1 / (z * z + 1e-300), np.maximum(ratio, 1e-300))
    return np.asarray(log_density + np.log(ratio))
