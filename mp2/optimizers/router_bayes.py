"""Stage I as the paper does it (section 3.4, appendix A.2): Gaussian process, UCB with kappa = 2.

The paper does not name the box; [-5, 5]^(L'*K) and the 20 random first points are those of the authors' code.

Works with bayes_opt 1.4 and 2 to 3, whose interfaces differ. Slow by nature: seconds a suggestion at 192
dimensions. One candidate an ask, after a first population of random ones.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mp2.optimizers.router_search import Losses, Routers

BOX = 5.0  # the authors' code
KAPPA = 2.0  # appendix A.2
N_RANDOM = 20  # the authors' code


class BayesSearch:
    """Bayesian optimisation of the router's logits; their signs are evaluated, the logits registered."""

    def __init__(self, shape: tuple[int, int], rng: np.random.Generator) -> None:
        self._shape, self._rng = shape, rng
        self._names = [f"w{i:04d}" for i in range(shape[0] * shape[1])]
        self._pending: dict[bytes, NDArray[np.float64]] = {}
        self._asked = 0
        seed = int(rng.integers(2**31))
        bounds = dict.fromkeys(self._names, (-BOX, BOX))
        self._optimizer, self._utility = _create(bounds, seed)

    def ask(self, n: int) -> Routers:
        """At first up to 20 random routers, then one suggestion at a time [p, L', K]."""
        if self._asked < N_RANDOM:
            count = min(n, N_RANDOM - self._asked)
            logits = self._rng.uniform(-BOX, BOX, (count, len(self._names)))
        else:
            suggestion = self._suggest()
            logits = np.array([[float(suggestion[name]) for name in self._names]])
        self._asked += len(logits)
        routers = (logits > 0).reshape(len(logits), *self._shape)
        self._pending = {router.tobytes(): row for router, row in zip(routers, logits, strict=True)}
        return np.asarray(routers, dtype=bool)

    def tell(self, routers: Routers, losses: Losses) -> None:
        """Register the losses at the logits that were asked for (at +-2.5 for routers that were not)."""
        for router, loss in zip(routers, losses, strict=True):
            centre = np.where(router.reshape(-1), BOX / 2, -BOX / 2)
            logits = self._pending.get(router.tobytes(), centre)
            params = dict(zip(self._names, map(float, logits), strict=True))
            self._optimizer.register(params=params, target=-float(loss))

    def _suggest(self) -> Any:
        return self._optimizer.suggest(*self._utility)


def _create(bounds: dict[str, tuple[float, float]], seed: int) -> tuple[Any, tuple[Any, ...]]:
    """The library's optimizer, and the arguments that its ``suggest`` wants."""
    import bayes_opt
    from bayes_opt import target_space

    # It prints about duplicates, and stdout is the result's; swapping sys.stdout would silence other threads.
    vars(target_space)["print"] = lambda *args, **kwargs: None
    options: dict[str, Any] = {"f": None, "pbounds": bounds, "random_state": seed, "verbose": 0}
    options["allow_duplicate_points"] = True
    if hasattr(bayes_opt, "UtilityFunction"):  # 1.4
        return bayes_opt.BayesianOptimization(**options), (
            bayes_opt.UtilityFunction("ucb", kappa=KAPPA, xi=0.0),
        )
    from bayes_opt import acquisition

    # 2.x draws from a generator of its own that must be seeded here; 3.x from the optimizer's.
    own = "random_state" not in inspect.signature(acquisition.AcquisitionFunction.suggest).parameters
    seeds = {"random_state": seed} if own else {}
    ucb = acquisition.UpperConfidenceBound(kappa=KAPPA, **seeds)
    return bayes_opt.BayesianOptimization(acquisition_function=ucb, **options), ()
