"""Stage II: CMA-ES on the fused intrinsic prompt of each layer, divide and conquer (paper 3.4, A.2).

A layer has one CMA-ES (library ``cma``) on the *offset* from its fused intrinsic prompt z^(l): mean 0,
population 20. Layers are visited in turn, a visit is one generation, and the layer then keeps the best
offset it has found.

Where this differs from BBTv2 (Sun et al. 2022), which it follows otherwise: there, a layer keeps the best
of *all* its generations, though a loss measured while other layers held older prompts says nothing about
now. Here a generation's best is taken only if it beats the incumbent, whose loss in the present context is
known exactly. The training loss therefore never rises. The CMA-ES update itself needs no such care: it uses
ranks within one generation, which share one context. Its stopping rules are ignored: the budget stops it.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mp2.runs.config import LayerConfig
from mp2.runs.quiet import quiet

Floats = NDArray[np.float64]


def import_cma() -> Any:
    """The library ``cma``; it imports scipy.stats and matplotlib: a second or two the first time."""
    import cma

    return cma


class LayerCma:
    """One layer's CMA-ES over offsets [d]; a pure function of its generator and of what it is told."""

    def __init__(self, n_dims: int, sigma: float, config: LayerConfig, rng: np.random.Generator) -> None:
        options: dict[str, Any] = {
            "popsize": config.popsize,
            "randn": lambda *shape: rng.standard_normal(shape),
            "seed": np.nan,  # "do nothing": numpy's global generator is neither seeded nor read
            "verbose": -9,
            "verb_log": 0,
            "verb_disp": 0,
            "signals_filename": None,
            "CMA_diagonal": config.cma == "diagonal",
        }
        with quiet():
            self._es = import_cma().CMAEvolutionStrategy(np.zeros(n_dims), sigma, options)

    def ask(self) -> Floats:
        """The next population of offsets [popsize, d]."""
        with quiet():
            return np.asarray(self._es.ask(), dtype=np.float64)

    def tell(self, offsets: Floats, losses: Floats) -> None:
        """Update from the whole population's losses [popsize]."""
        with quiet():
            self._es.tell(list(offsets), [float(loss) for loss in losses])


class LayerSearches:
    """The CMA-ES of every layer; a layer's update and next ask are computed while others are evaluated.

    Of the last ask, with the tell before it: ``waited_s`` is what the caller waited for it, ``hidden_s``
    what was computed while the caller did something else.
    """

    def __init__(
        self, sigmas: list[float], n_dims: int, config: LayerConfig, seed: np.random.SeedSequence
    ) -> None:
        self.waited_s = 0.0
        self.hidden_s = 0.0
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mp2-cma")
        rngs = [np.random.default_rng(child) for child in seed.spawn(len(sigmas))]
        self._layers = [LayerCma(n_dims, s, config, r) for s, r in zip(sigmas, rngs, strict=True)]
        self._next: list[Future[tuple[Floats, float]] | None] = [None] * len(sigmas)

    def ask(self, layer: int) -> Floats:
        """The layer's next population of offsets [popsize, d]."""
        start = time.perf_counter()
        future = self._next[layer] or self._pool.submit(_step, self._layers[layer], None)
        population, spent = future.result()
        self.waited_s = time.perf_counter() - start
        self.hidden_s = max(0.0, spent - self.waited_s)
        return population

    def tell(self, layer: int, offsets: Floats, losses: Floats) -> None:
        """Start the layer's update and its next ask in the background."""
        self._next[layer] = self._pool.submit(_step, self._layers[layer], (offsets, losses))

    def close(self) -> None:
        """Stop the background thread; what it has not begun is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _step(search: LayerCma, told: tuple[Floats, Floats] | None) -> tuple[Floats, float]:
    start = time.perf_counter()
    if told is not None:
        search.tell(*told)
    return search.ask(), time.perf_counter() - start
