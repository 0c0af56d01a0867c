"""Stage I, ours: a Bayesian linear model on the router's bits, started from the pre-training tasks' routers.

1. *Warm candidates*. The prompt file holds the router of every task it was pre-trained on; what was good for
   a related task is the best guess there is. They are evaluated first, in one population, the most different
   ones when they would take more than half of the iterations.
2. *Thompson sampling*. The loss is modelled as linear in the bits x in {-1,+1}^D, with a prior that can share
   a part of the effect within a layer (modules of a layer differ less than layers do, because a fused prompt
   is divided by K: its length is the number of modules that are on). A draw of the weights from the posterior
   says which bits of the best router to flip: the ones with most gain, within a trust region that grows while
   it succeeds and shrinks while it does not.
3. *Crossover*. The other part of a population takes each layer from one of two good routers, with a few
flips:
   it needs no model, and keeps the search alive where the loss is far from linear.

No router is evaluated twice while others are left. An ask costs about a millisecond at D = 192.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mp2.optimizers.router_search import Losses, Routers

Floats = NDArray[np.float64]

POPULATION = 5  # small: the model learns between asks; 5 x 32 sequences already fill a device
MODEL_SHARE = 0.6  # of the candidates; the others are crossovers
N_PARENTS = 8
_NOISES = (0.03, 0.1, 0.3, 1.0)
_LAYER_SHARES = (0.0, 0.5)
_ATTEMPTS = 50


class SurrogateSearch:
    """Warm candidates, then Thompson sampling and layer-wise crossover around the best router."""

    def __init__(
        self,
        shape: tuple[int, int],
        iterations: int,
        warm: Routers,
        rng: np.random.Generator,
        population: int = POPULATION,
    ) -> None:
        self._shape, self._rng, self._population = shape, rng, population
        self._n_bits = shape[0] * shape[1]
        self._bits: list[Routers] = []
        self._losses: list[float] = []
        self._seen: set[bytes] = set()
        self._warm: list[Routers] | None = list(
            _distinct(warm.reshape(-1, self._n_bits), max(1, iterations // 2))
        )
        self._radius = max(2.0, self._n_bits / 8)
        self._last_best = np.inf

    def ask(self, n: int) -> Routers:
        """The warm candidates, then populations of 5 [p, L', K]; none when every router has been seen."""
        if self._warm is not None:
            candidates = [c for c in self._warm[:n] if c.tobytes() not in self._seen]
            self._warm = None
            if candidates:
                return self._hand_out(candidates)
        room = 2**self._n_bits - len(self._seen) if self._n_bits <= 20 else n
        n = min(n, self._population, room)
        model = (
            _Posterior.fit(self._shape, np.array(self._bits), np.array(self._losses)) if self._bits else None
        )
        candidates = []
        for _ in range(n):
            candidate = self._unseen(model)
            self._seen.add(candidate.tobytes())
            candidates.append(candidate)
        return self._hand_out(candidates)

    def tell(self, routers: Routers, losses: Losses) -> None:
        """Learn; the trust region grows when this population brought a new best, else it shrinks."""
        first = not self._bits
        for router, loss in zip(routers.reshape(len(routers), -1), losses, strict=True):
            self._bits.append(router.copy())
            self._losses.append(float(loss))
            self._seen.add(router.tobytes())
        best = min(self._losses, default=np.inf)
        if not first and len(losses) <= self._population:
            self._radius *= 1.5 if best < self._last_best else 0.75
            self._radius = float(np.clip(self._radius, 2.0, self._n_bits / 3 + 1))
        self._last_best = best

    def _hand_out(self, candidates: list[Routers]) -> Routers:
        return np.array(candidates, dtype=bool).reshape(len(candidates), *self._shape)

    def _unseen(self, model: _Posterior | None) -> Routers:
        """A candidate that was never asked for; at last a random one, or the first in counting order."""
        for attempt in range(_ATTEMPTS):
            if model is None or attempt >= _ATTEMPTS // 2:
                candidate = self._rng.random(self._n_bits) < 0.5
            elif self._rng.random() < MODEL_SHARE:
                candidate = self._thompson(model)
            else:
                candidate = self._crossover()
            if candidate.tobytes() not in self._seen:
                return candidate
        for code in range(2**self._n_bits):
            candidate = (code >> np.arange(self._n_bits) & 1).astype(bool)
            if candidate.tobytes() not in self._seen:
                return candidate
        raise AssertionError("asked for more routers than there are")

    def _thompson(self, model: _Posterior) -> Routers:
        """The best router, with the flips that one draw of the model likes most."""
        best = self._bits[int(np.argmin(self._losses))].copy()
        gain = np.where(best, 1.0, -1.0) * model.draw(self._rng)
        n_flips = round(self._radius * self._rng.uniform(0.3, 1.2))
        flips = np.argsort(-gain, kind="stable")[: int(np.clip(n_flips, 1, self._n_bits))]
        flips = flips[gain[flips] > 0]
        if not len(flips):
            flips = self._rng.integers(self._n_bits, size=1)
        best[flips] ^= True
        return best

    def _crossover(self) -> Routers:
        """Each layer from one of two good routers, then two flips on average."""
        order = np.argsort(self._losses, kind="stable")[:N_PARENTS]
        first, second = self._rng.choice(order, 2, replace=len(order) < 2)
        if self._rng.random() < 0.5:
            first = order[0]
        mine = self._rng.random((self._shape[0], 1)) < 0.5
        child = np.where(
            mine, self._bits[first].reshape(self._shape), self._bits[second].reshape(self._shape)
        )
        return np.asarray(child.reshape(-1) ^ (self._rng.random(self._n_bits) < 2 / self._n_bits))


@dataclass(frozen=True)
class _Posterior:
    """Posterior of w in y = x w + noise, x in {-1,+1}^D, in its n x n (dual) form; n is a few hundred."""

    shape: tuple[int, int]
    bits: Floats  # [n, D], +-1
    targets: Floats  # [n], standardised
    cholesky: Floats  # [n, n] of the targets' covariance, without the scale
    layer_share: float
    noise: float
    scale: float

    @classmethod
    def fit(cls, shape: tuple[int, int], bits: Routers, losses: Losses) -> _Posterior:
        """Noise and layer share of the highest marginal likelihood on a grid; the scale in closed form."""
        x = np.where(bits, 1.0, -1.0)
        y = (losses - losses.mean()) / (losses.std() + 1e-12)
        separate = x @ x.T / x.shape[1]
        counts = x.reshape(len(x), *shape).sum(-1)
        shared = counts @ counts.T / (shape[0] * shape[1])
        best: tuple[float, _Posterior] | None = None
        for share in _LAYER_SHARES:
            for noise in _NOISES:
                covariance = (1 - share) * separate + share * shared + noise * np.eye(len(y))
                root = np.linalg.cholesky(covariance)
                white = np.linalg.solve(root, y)
                scale = float(white @ white) / len(y) + 1e-12
                score = -0.5 * len(y) * np.log(scale) - float(np.log(np.diag(root)).sum())
                if best is None or score > best[0]:
                    best = score, cls(shape, x, y, root, share, noise, scale)
        assert best is not None
        return best[1]

    def draw(self, rng: np.random.Generator) -> Floats:
        """One sample of the weights [D] (Matheron's rule: a prior draw corrected by the data)."""
        n_layers, n_modules = self.shape
        n_bits = n_layers * n_modules
        own = rng.normal(size=n_bits) * np.sqrt((1 - self.layer_share) / n_bits)
        layer = rng.normal(size=n_layers) * np.sqrt(self.layer_share / n_bits)
        prior = np.sqrt(self.scale) * (own + np.repeat(layer, n_modules))
        noise = rng.normal(size=len(self.targets)) * np.sqrt(self.noise * self.scale)
        residual = self.targets - (self.bits @ prior + noise)
        back = self.bits.T @ np.linalg.solve(self.cholesky.T, np.linalg.solve(self.cholesky, residual))
        layer_back = np.repeat(back.reshape(self.shape).sum(-1), n_modules)
        return np.asarray(prior + ((1 - self.layer_share) * back + self.layer_share * layer_back) / n_bits)


def _distinct(routers: Routers, n: int) -> Routers:
    """At most ``n`` different rows; when there are more, each next one is the farthest from those taken."""
    _, first = np.unique(routers, axis=0, return_index=True)
    rows = routers[np.sort(first)]
    if len(rows) <= n:
        return rows
    taken = [0]
    distance = (rows != rows[0]).sum(-1)
    while len(taken) < n:
        farthest = int(np.argmax(distance))
        taken.append(farthest)
        distance = np.minimum(distance, (rows != rows[farthest]).sum(-1))
    return np.asarray(rows[np.sort(taken)])
