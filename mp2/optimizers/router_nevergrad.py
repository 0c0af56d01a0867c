"""Stage I by any optimizer of the library nevergrad, on the box [-5,5]^(L'*K); the sign decides.

Many points of the box are one router. A router that was evaluated before is not evaluated, or counted, again:
the optimizer is told the loss that is known, and asked for another; where it suggests nothing new 20 times in
a row, one random bit of its last suggestion is flipped, until the router is new. (Its ``TransitionChoice`` of
0 and 1 in place of the box was tried: NGOpt left more bits wrong, dev/log.md.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mp2.errors import MissingDependencyError, UnknownNameError, UsageError
from mp2.optimizers.router_search import Losses, Routers

BOX = 5.0
_TRIALS = 3
_REPEATS = 20  # suggestions in a row that are known already


def _import_nevergrad() -> Any:
    """The library; it warns about settings and budgets, of which the person at the terminal chose neither."""
    for module in (r"nevergrad(\..*)?$", r"scipy\._lib\.pyprima\."):  # the same one again changes nothing
        warnings.filterwarnings("ignore", module=module)
    import nevergrad

    return nevergrad


def check_optimizer(name: str) -> None:
    """Let nevergrad's optimizer ``name`` suggest a few times on a space of its own: many import only then.

    Raises:
        UnknownNameError: there is none of that name; with the nearest ones.
        MissingDependencyError: it needs a package that is not installed.
        UsageError: it fails otherwise.
    """
    nevergrad = _import_nevergrad()

    if name not in nevergrad.optimizers.registry:
        raise UnknownNameError("nevergrad optimizer", name, list(nevergrad.optimizers.registry))
    search = NevergradSearch(name, (1, 2), 10, np.random.default_rng(0))
    for loss in range(_TRIALS):
        search.tell(search.ask(1), np.array([float(loss)]))


class NevergradSearch:
    """One nevergrad optimizer, asked for one candidate at a time, as a sequential optimizer expects."""

    def __init__(self, name: str, shape: tuple[int, int], iterations: int, rng: np.random.Generator) -> None:
        """``name`` is one that `check_optimizer` has let pass."""
        self._name, self._shape, self._rng = name, shape, rng
        self._asked: dict[bytes, Any] = {}
        self._known: dict[bytes, float] = {}
        seed = int(rng.integers(2**31))
        nevergrad = _import_nevergrad()
        with self._refusals():
            space = nevergrad.p.Array(init=np.zeros(shape[0] * shape[1])).set_bounds(-BOX, BOX)
            space.random_state = np.random.RandomState(seed)
            self._optimizer = nevergrad.optimizers.registry[name](space, budget=max(1, iterations))

    def ask(self, n: int) -> Routers:
        """One router [1, L', K] that was not told before; none where there is no other."""
        if len(self._known) == 2 ** (self._shape[0] * self._shape[1]):
            return np.zeros((0, *self._shape), dtype=bool)
        for _ in range(_REPEATS):
            with self._refusals():
                candidate = self._optimizer.ask()
                router = np.array(candidate.value > 0).reshape(1, *self._shape)
                key = router[0].tobytes()
                if key not in self._known:
                    self._asked = {key: candidate}
                    return router
                self._optimizer.tell(candidate, self._known[key])
        while router[0].tobytes() in self._known:
            router.ravel()[self._rng.integers(router.size)] ^= True
        return router

    def tell(self, routers: Routers, losses: Losses) -> None:
        """Tell the asked candidate's loss; others are remembered only, for many optimizers refuse them."""
        for router, loss in zip(routers, losses, strict=True):
            self._known[router.tobytes()] = float(loss)
            candidate = self._asked.pop(router.tobytes(), None)
            if candidate is not None:
                self._optimizer.tell(candidate, float(loss))

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """The library's own errors, said in one line."""
        try:
            yield
        except Exception as error:
            missing = error if isinstance(error, ImportError) else error.__cause__  # of a library in a thread
            if isinstance(missing, ImportError):
                package = missing.name or str(missing)
                raise MissingDependencyError(
                    f"nevergrad's {self._name} needs the package {package}: pip install {package}, or give "
                    "another --router-search"
                ) from error
            said = " ".join(str(error).split())
            raise UsageError(
                f"nevergrad's {self._name} cannot search this space ({said}); give another --router-search"
            ) from error
