"""Stage I by any optimizer of the library nevergrad, on the box [-5,5]^(L'*K); the sign decides."""

from __future__ import annotations

from typing import Any

import numpy as np

from mp2.errors import UnknownNameError, UsageError
from mp2.optimizers.quiet import quiet
from mp2.optimizers.routers import Losses, Routers

BOX = 5.0


def check_optimizer(name: str) -> None:
    """Raise ``UnknownNameError``, with the nearest names, if nevergrad has no optimizer ``name``."""
    with quiet():
        import nevergrad

    if name not in nevergrad.optimizers.registry:
        raise UnknownNameError("nevergrad optimizer", name, list(nevergrad.optimizers.registry))


class NevergradSearch:
    """One nevergrad optimizer, asked for one candidate at a time, as a sequential optimizer expects."""

    def __init__(self, name: str, shape: tuple[int, int], iterations: int, rng: np.random.Generator) -> None:
        check_optimizer(name)
        self._shape = shape
        self._asked: dict[bytes, Any] = {}
        seed = int(rng.integers(2**31))
        with quiet():
            import nevergrad

            space = nevergrad.p.Array(init=np.zeros(shape[0] * shape[1])).set_bounds(-BOX, BOX)
            space.random_state = np.random.RandomState(seed)
            try:
                self._optimizer = nevergrad.optimizers.registry[name](space, budget=max(1, iterations))
            except Exception as error:
                raise UsageError(f"nevergrad's {name} cannot search this space: {error}") from error

    def ask(self, n: int) -> Routers:
        """One router [1, L', K]."""
        with quiet():
            candidate = self._optimizer.ask()
        router = np.asarray(candidate.value > 0).reshape(1, *self._shape)
        self._asked = {router[0].tobytes(): candidate}
        return np.asarray(router, dtype=bool)

    def tell(self, routers: Routers, losses: Losses) -> None:
        """Tell the asked candidate's loss; others are ignored, for many optimizers refuse them."""
        for router, loss in zip(routers, losses, strict=True):
            candidate = self._asked.pop(router.tobytes(), None)
            if candidate is not None:
                with quiet():
                    self._optimizer.tell(candidate, float(loss))
