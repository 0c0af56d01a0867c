"""Stage I, ours: Bayesian optimisation over routers that looks at the prompts which they fuse.

1. *First candidates*. The prompt file holds the router of every task it was pre-trained on; what was good for
   a related task is a good guess. The most different of them, and random routers, for none may be.
2. *Model*. Losses are free of noise and a smooth function of the fused prompts: a Gaussian process for the
   logarithm of the loss (:mod:`mp2.optimizers.router_model`). Losses far above the median count as not that
   far: where it is bad need not be known well.
3. *Suggestions*. Local search by single flips for the largest expected improvement (its logarithm, LogEI,
   Ament et al. 2023), from the best routers and from random ones. The next ones of a population take the
   model's expectation for the loss of those before; the last ones are mutants of the best router, the most
   promising of many by the model, with heavy-tailed numbers of flips (as in fast genetic algorithms, Doerr
   et al. 2017): they reach routers that the model, which has seen none like them, would not suggest.

The paper's Bayesian optimisation has the same ingredients on [-5,5]^(L'*K), of which only signs matter: its
points cluster at corners, its kernel sees distances that mean nothing, and it takes seconds a suggestion. No
router is evaluated twice while others are left.
"""

from __future__ import annotations

import numpy as np

from mp2.optimizers.router_model import Floats, RouterModel, coordinates, fit_relevance, relevance, scaled
from mp2.optimizers.router_search import Losses, Routers

POPULATION = 5  # small: what a population finds is used by the next; 5 x 32 sequences fill a device
N_WARM = 10  # at most, and a third of the iterations
N_RANDOM = 10  # beside the warm candidates
N_RANDOM_COLD = 15  # without any
N_MUTANTS = 2  # of a population
_WARM_SHARE = 1 / 3
_STARTS = 2  # best routers from which the local search sets out, and as many random ones
_CLIMB_STEPS = 20
_FIT_STEPS = 10  # of the model, each time from where it stood
_MANY = 64


class BitsSearch:
    """First candidates, then what a Gaussian process over fused prompts expects most of."""

    def __init__(
        self,
        shape: tuple[int, int],
        iterations: int,
        warm: Routers,
        rng: np.random.Generator,
        modules: Floats | None = None,
    ) -> None:
        """``modules``: the intrinsic prompts [L', K, d]; None: nothing is known of them."""
        self._shape, self._rng = shape, rng
        self._n_bits = shape[0] * shape[1]
        self._routers: list[Routers] = []
        self._losses: list[float] = []
        self._seen: set[bytes] = set()
        room = min(N_WARM, max(1, int(iterations * _WARM_SHARE)))
        self._first: Routers | None = distinct(warm.reshape(-1, self._n_bits), room)
        self._basis = coordinates(np.zeros((*shape, 1)) if modules is None else modules)
        self._fitted: Floats | None = None

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
        routers, losses = np.array(self._routers), _standardised(np.array(self._losses))
        points = np.einsum("nlk,lkj->nlj", routers.reshape(-1, *self._shape), self._basis)
        self._fitted = fit_relevance(points, losses, self._fitted, _FIT_STEPS)
        model = RouterModel(routers, losses, scaled(self._basis, relevance(self._fitted, self._shape[1])))
        best = routers[np.argsort(losses, kind="stable")[:_STARTS]]
        chosen: list[Routers] = []
        for i in range(n):
            if i < n - N_MUTANTS or n == 1:
                starts = [*best, *(self._rng.random((_STARTS, self._n_bits)) < 0.5)]
                found = max((self._climb(model, start) for start in starts), key=lambda pair: pair[0])[1]
            else:
                found = self._mutant(model, best[0])
            router = self._random() if found is None else found
            self._seen.add(router.tobytes())
            chosen.append(router)
            if i < n - 1:
                model = model.with_expected(router)
        return chosen

    def _climb(self, model: RouterModel, router: Routers) -> tuple[float, Routers | None]:
        """A local optimum of the expected improvement that was not seen, and its worth."""
        worth, found = -np.inf, None
        for _ in range(_CLIMB_STEPS):
            worths = model.worth_of_flips(router)
            for bit in np.argsort(-worths):
                if not worths[bit] > worth:
                    return worth, found
                neighbour = router.copy()
                neighbour[bit] ^= True
                if self._is_new(neighbour):
                    worth, found = float(worths[bit]), neighbour
                    break
            else:
                return worth, found
            router = found
        return worth, found

    def _mutant(self, model: RouterModel, best: Routers) -> Routers | None:
        """The most promising of many mutants of the best router; None if all were seen."""
        n_flips = np.minimum(self._rng.zipf(1.5, _MANY), max(1, self._n_bits // 2))
        order = self._rng.random((_MANY, self._n_bits)).argsort(1).argsort(1)
        new = [m for m in best ^ (order < n_flips[:, None]) if self._is_new(m)]
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


def distinct(routers: Routers, n: int) -> Routers:
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


def _standardised(losses: Floats) -> Floats:
    """Logarithms where losses are positive, high ones cut off, mean 0, deviation 1."""
    values = np.log(losses) if losses.min() > 0 else losses
    median = float(np.median(values))
    values = np.minimum(values, median + 2 * (median - values.min()))
    deviation = float(values.std())
    return np.asarray((values - values.mean()) / (deviation if deviation > 0 else 1.0))
