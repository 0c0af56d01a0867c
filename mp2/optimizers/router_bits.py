"""Stage I, ours: a Gaussian process over bits instead of logits.

1. *Warm candidates*. The prompt file holds the router of every task it was pre-trained on; what was good for
   a related task is the best guess there is. They are evaluated first, in one population with a few random
   routers; the most different ones when they would take more than a third of the iterations.
2. *Model*. Losses are free of noise and a smooth function of the fused prompts, which are sums over bits. So
   the logarithm of the loss is modelled by a Gaussian process whose kernel sees only in how many bits two
   routers differ: a linear part (each bit has an effect of its own) and ``exp(-g * share of bits that
   differ)`` (bits act together, nearby routers are alike); their shares and g have the highest likelihood of
   a small grid. Losses far above the median count as not that far: where it is bad need not be known well.
3. *Suggestions*. Local search by single flips for the largest expected improvement, from the best routers
   and from random ones. The next ones of a population take the model's expectation for the loss of those
   before; the last ones are mutants of the best router, the most promising of many by the model, with
   heavy-tailed numbers of flips (as in fast genetic algorithms, Doerr et al. 2017): they find what the
   model has no idea of.

The paper's Bayesian optimisation has the same ingredients on [-5,5]^(L'*K), of which only signs matter: its
points cluster at corners, its kernel sees distances that mean nothing, and it takes seconds a suggestion. No
router is evaluated twice while others are left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr  # type: ignore[import-untyped]

from mp2.optimizers.routers import Losses, Routers, distinct

Floats = NDArray[np.float64]

POPULATION = 5  # small: what a population finds is used by the next; 5 x 32 sequences fill a device
N_RANDOM = 6  # beside the warm candidates
N_RANDOM_COLD = 15  # without any
N_MUTANTS = 2  # of a population
_WARM_SHARE = 1 / 3
_STARTS = 2  # best routers from which the local search sets out, and as many random ones
_STEPS = 20
_SHARES = (0.0, 0.3, 0.7)  # of the linear part
_RATES = (1.0, 2.0, 4.0, 8.0)
_NUGGET = 1e-4
_MANY = 64


@dataclass(frozen=True)
class _Model:
    """A Gaussian process: mean and deviation of standardised losses at signs x [D] in {-1,1}."""

    signs: Floats  # [n, D]
    losses: Floats  # [n], standardised
    share: float
    rate: float
    inverse: NDArray[Any]  # [n, n], of the kernel matrix
    weights: NDArray[Any]  # [n]
    variance: float

    @classmethod
    def of(cls, signs: Floats, losses: Floats, share: float, rate: float) -> _Model:
        """The model of losses [n] at signs [n, D]."""
        matrix = _kernel(signs @ signs.T / signs.shape[1], share, rate)
        matrix[np.diag_indices(len(matrix))] += _NUGGET
        inverse = np.linalg.inv(matrix)
        weights = inverse @ losses
        return cls(
            signs, losses, share, rate, inverse, weights, max(float(losses @ weights) / len(losses), 1e-12)
        )

    def expect(self, x: Floats) -> float:
        """Expected loss at x [D]."""
        return float(_kernel(self.signs @ x / len(x), self.share, self.rate) @ self.weights)

    def worth(self, candidates: Floats) -> Floats:
        """Logarithm of the expected improvement at candidates [c, D]."""
        return self._worth(_kernel(candidates @ self.signs.T / self.signs.shape[1], self.share, self.rate))

    def worth_of_flips(self, x: Floats) -> Floats:
        """The same at the D neighbours of x [D], for less: a flip turns exp(c s) into exp(-c s)."""
        n_bits = len(x)
        near = self.signs @ x / n_bits  # [n]
        agree = x[:, None] * self.signs.T  # [D, n]
        c = self.rate / n_bits
        smooth = np.exp(-self.rate * (1 - near) / 2) * (np.cosh(c) - np.sinh(c) * agree)
        linear = (near - 2 / n_bits * agree + 1) / 2
        return self._worth(self.share * linear + (1 - self.share) * smooth)

    def _worth(self, kernel: Floats) -> Floats:
        mean = kernel @ self.weights
        variance = np.maximum(1 - np.einsum("cn,cn->c", kernel @ self.inverse, kernel), 1e-9)
        deviation = np.sqrt(variance * self.variance)
        return np.asarray(np.log(deviation) + _log_improvement((self.losses.min() - mean) / deviation))


class BitsSearch:
    """Warm candidates, then what a Gaussian process over bits expects most of."""

    def __init__(
        self, shape: tuple[int, int], iterations: int, warm: Routers, rng: np.random.Generator
    ) -> None:
        self._shape, self._rng = shape, rng
        self._n_bits = shape[0] * shape[1]
        self._routers: list[Routers] = []
        self._losses: list[float] = []
        self._seen: set[bytes] = set()
        room = max(1, int(iterations * _WARM_SHARE))
        self._first: Routers | None = distinct(warm.reshape(-1, self._n_bits), room)

    def ask(self, n: int) -> Routers:
        """The warm and random candidates, then populations of 5 [p, L', K]; none when all have been seen."""
        if self._n_bits <= 20:
            n = min(n, 2**self._n_bits - len(self._seen))
        chosen: list[Routers] = []
        if self._first is not None:
            first, self._first = self._first, None
            chosen += [r for r in first if self._is_new(r)][:n]
            self._seen.update(r.tobytes() for r in chosen)
            for _ in range(min(n - len(chosen), N_RANDOM if len(first) else N_RANDOM_COLD)):
                chosen.append(self._random())
        elif n:
            chosen = self._suggest(min(n, POPULATION))
        return np.array(chosen, dtype=bool).reshape(len(chosen), *self._shape)

    def tell(self, routers: Routers, losses: Losses) -> None:
        """Learn the losses; the model is fitted when it is asked."""
        for router, loss in zip(routers.reshape(len(routers), -1), losses, strict=True):
            self._seen.add(router.tobytes())
            self._routers.append(router.copy())
            self._losses.append(float(loss))

    def _suggest(self, n: int) -> list[Routers]:
        signs = np.where(np.array(self._routers), 1.0, -1.0)
        losses = _standardised(np.array(self._losses))
        share, rate = _most_likely(signs @ signs.T / self._n_bits, losses)
        best = np.argsort(losses, kind="stable")[:_STARTS]
        model = _Model.of(signs, losses, share, rate)
        chosen: list[Routers] = []
        for i in range(n):
            if i < n - N_MUTANTS or n == 1:
                starts = [*signs[best], *self._rng.choice([-1.0, 1.0], (_STARTS, self._n_bits))]
                found = max((self._climb(model, start) for start in starts), key=lambda pair: pair[0])[1]
            else:
                found = self._mutant(model, signs[best[0]])
            router = self._random() if found is None else found > 0
            self._seen.add(router.tobytes())
            chosen.append(router)
            if i < n - 1:
                x = np.where(router, 1.0, -1.0)
                expected = np.append(model.losses, model.expect(x))
                model = _Model.of(np.vstack([model.signs, x]), expected, share, rate)
        return chosen

    def _climb(self, model: _Model, x: Floats) -> tuple[float, Floats | None]:
        """A local optimum of the expected improvement that was not seen, and its worth."""
        worth, found = -np.inf, None
        for _ in range(_STEPS):
            worths = model.worth_of_flips(x)
            for bit in np.argsort(-worths):
                if not worths[bit] > worth:
                    return worth, found
                neighbour = x.copy()
                neighbour[bit] *= -1
                if self._is_new(neighbour > 0):
                    worth, found = float(worths[bit]), neighbour
                    break
            else:
                return worth, found
            x = found
        return worth, found

    def _mutant(self, model: _Model, best: Floats) -> Floats | None:
        """The most promising of many mutants of the best router; None if all were seen."""
        n_flips = np.minimum(self._rng.zipf(1.5, _MANY), max(1, self._n_bits // 2))
        order = self._rng.random((_MANY, self._n_bits)).argsort(1).argsort(1)
        mutants = np.where(order < n_flips[:, None], -best, best)
        new = [m for m in mutants if self._is_new(m > 0)]
        return new[int(np.argmax(model.worth(np.array(new))))] if new else None

    def _random(self) -> Routers:
        """A router that was not seen, with any number of modules on; it counts as seen."""
        for _ in range(100):
            router = self._rng.random(self._n_bits) < self._rng.random()
            if self._is_new(router):
                self._seen.add(router.tobytes())
                return router
        for code in self._rng.permutation(2**self._n_bits):  # few are left, so there are few bits
            router = ((int(code) >> np.arange(self._n_bits)) & 1).astype(bool)
            if self._is_new(router):
                self._seen.add(router.tobytes())
                return router
        raise AssertionError("asked for more routers than there are")

    def _is_new(self, router: Routers) -> bool:
        return router.tobytes() not in self._seen


def _kernel(near: Floats, share: float, rate: float) -> Floats:
    """Covariance from ``near`` = mean of products of signs, which is 1 - 2 * (share of bits that differ)."""
    return share * (near + 1) / 2 + (1 - share) * np.exp(-rate * (1 - near) / 2)


def _most_likely(near: Floats, losses: Floats) -> tuple[float, float]:
    """Share of the linear part and rate with the highest marginal likelihood (variance at its optimum)."""
    best, found = -np.inf, (_SHARES[0], _RATES[0])
    for share in _SHARES:
        for rate in _RATES:
            matrix = _kernel(near, share, rate)
            matrix[np.diag_indices(len(matrix))] += _NUGGET
            root = np.linalg.cholesky(matrix)
            white = np.linalg.solve(root, losses)
            variance = max(float(white @ white) / len(losses), 1e-12)
            likelihood = -len(losses) / 2 * np.log(variance) - np.log(np.diag(root)).sum()
            if likelihood > best:
                best, found = float(likelihood), (share, rate)
    return found


def _standardised(losses: Floats) -> Floats:
    """Logarithms where losses are positive, high ones cut off, mean 0, deviation 1."""
    values = np.log(losses) if losses.min() > 0 else losses
    median = float(np.median(values))
    values = np.minimum(values, median + 2 * (median - values.min()))
    deviation = float(values.std())
    return np.asarray((values - values.mean()) / (deviation if deviation > 0 else 1.0))


def _log_improvement(z: Floats) -> Floats:
    """log(z Phi(z) + phi(z)), also where both are tiny: far below 0 it is about log(phi(z) / z^2)."""
    z = np.minimum(z, 30.0)
    log_density = -z * z / 2 - np.log(2 * np.pi) / 2
    near = np.maximum(z, -25.0)
    ratio = 1 + near * np.exp(log_ndtr(near) + near * near / 2 + np.log(2 * np.pi) / 2)
    ratio = np.where(z < -25, 1 / (z * z + 1e-300), np.maximum(ratio, 1e-300))
    return np.asarray(log_density + np.log(ratio))
