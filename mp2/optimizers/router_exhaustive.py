"""Stage I by trying every router: 2^K of them when prompts are shallow (256 at K = 8)."""

from __future__ import annotations

import numpy as np

from mp2.optimizers.routers import Losses, Routers


class ExhaustiveSearch:
    """All routers once, in counting order from all on to all off, without those it has been told of."""

    def __init__(self, shape: tuple[int, int], population: int = 64) -> None:
        self._shape, self._population = shape, population
        self._n_bits = shape[0] * shape[1]
        self._next = 2**self._n_bits - 1
        self._known: set[int] = set()

    def ask(self, n: int) -> Routers:
        """The next up to ``population`` routers [p, L', K]; none when all have been asked for."""
        codes: list[int] = []
        while len(codes) < min(n, self._population) and self._next >= 0:
            if self._next not in self._known:
                codes.append(self._next)
            self._next -= 1
        bits = (np.array(codes, dtype=np.int64)[:, None] >> np.arange(self._n_bits)) & 1
        return bits.astype(bool).reshape(len(codes), *self._shape)

    def tell(self, routers: Routers, losses: Losses) -> None:
        """Remember which routers need not be asked for again."""
        weights = 1 << np.arange(self._n_bits)
        self._known.update(int(c) for c in routers.reshape(len(routers), -1) @ weights)
