"""Stage I, ours: the pre-training tasks' routers, then flips of disjoint groups of bits, many kept at once.

1. *Warm candidates*. The prompt file holds the router of every task it was pre-trained on; what was good for
   a related task is the best guess there is. They are evaluated first, in one population; the most different
   ones when they would take more than half of the iterations.
2. *Group flips*. From the best router so far, disjoint groups of bits are flipped, a candidate each. Losses
   are free of noise (the same 32 examples, deterministic forwards), so a group that lowers the loss is
   certainly an improvement, alone. All groups of a population that are get flipped together: the union is
   the next base on trust, is evaluated first in the next population, and is dropped for the best router
   measured if it is worse than the base before. Groups are as large as they must be for every bit to be tried
   about once within the budget, then single bits; after a pass over all bits that improved nothing they grow
   by one bit.

Every evaluation decides about a group, where a sample from a model (linear surrogate with Thompson sampling,
cross-entropy) or a random mutant mostly repeats what is known. No router is evaluated twice while others are
left. An ask costs microseconds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mp2.optimizers.routers import Losses, Routers, distinct

POPULATION = 5  # small: what a population finds is used by the next; 5 x 32 sequences fill a device
_COVER_SHARE = 0.8  # of the iterations after the warm ones go to the first pass over all bits
_ATTEMPTS = 100


class FlipSearch:
    """Warm candidates, then disjoint group flips around a base router."""

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
        self._seen: set[bytes] = set()
        self._warm: Routers | None = distinct(warm.reshape(-1, self._n_bits), max(1, iterations // 2))
        self._left = iterations  # before any candidate is told of
        self._best: Routers = np.ones(self._n_bits, dtype=bool)  # the best that was measured
        self._best_loss = np.inf
        self._base = self._best
        self._trusted = False  # the base is a union of flips that was not measured yet
        self._group_size = 0  # 0: not begun
        self._queue: list[int] = []  # bits that this pass has not tried
        self._n_passes = 0
        self._improved = True  # in this pass
        self._groups: list[NDArray[np.int64]] = []  # of the population that was handed out, without the base

    def ask(self, n: int) -> Routers:
        """The warm candidates, then populations of 5 [p, L', K]; none when every router has been seen."""
        if self._warm is not None:
            warm, self._warm = self._warm, None
            fresh = [c for c in warm[:n] if c.tobytes() not in self._seen]
            if fresh:
                return self._hand_out(fresh)
        if self._group_size == 0:
            self._begin()
        if self._n_bits <= 20:
            n = min(n, 2**self._n_bits - len(self._seen))
        n = min(n, self._population)
        candidates: list[Routers] = []
        self._groups = []
        if self._trusted and n:
            if self._base.tobytes() in self._seen:  # measured before: there is nothing to find out
                self._base, self._trusted = self._best, False
            else:
                candidates.append(self._base)
                self._seen.add(self._base.tobytes())
        while len(candidates) < n:
            group = self._next_group()
            candidate = self._base.copy()
            candidate[group] ^= True
            self._seen.add(candidate.tobytes())
            self._groups.append(group)
            candidates.append(candidate)
        return self._hand_out(candidates)

    def tell(self, routers: Routers, losses: Losses) -> None:
        """Learn; all groups that lowered the base's loss become part of the next base."""
        bits = routers.reshape(len(routers), -1)
        self._left -= len(bits)
        self._seen.update(b.tobytes() for b in bits)
        before, base_loss = self._best_loss, self._best_loss
        groups, flipped = self._groups, losses
        if self._trusted and len(bits) == len(groups) + 1:
            base_loss, flipped = float(losses[0]), losses[1:]
        best = int(np.argmin(losses))
        if losses[best] < self._best_loss:
            self._best, self._best_loss = bits[best].copy(), float(losses[best])
        good = base_loss <= before and len(flipped) == len(groups)
        kept = [g for g, loss in zip(groups, flipped, strict=True) if loss < base_loss] if good else []
        self._improved = self._improved or self._best_loss < before
        if len(kept) > 1:
            self._base = self._base.copy()
            self._base[np.concatenate(kept)] ^= True
            self._trusted = True
        else:
            self._base, self._trusted = self._best, False
        self._groups = []

    def _begin(self) -> None:
        budget = max(1.0, _COVER_SHARE * self._left)
        self._group_size = int(np.ceil(self._n_bits / budget))

    def _next_group(self) -> NDArray[np.int64]:
        """Bits whose flip gives a router that was never asked for."""
        for _ in range(_ATTEMPTS):
            if len(self._queue) < self._group_size:
                self._next_pass()
            group = np.array(self._queue[: self._group_size], dtype=np.int64)
            del self._queue[: self._group_size]
            if self._is_new(group):
                return group
        for _ in range(_ATTEMPTS):
            group = np.flatnonzero(self._rng.random(self._n_bits) < 0.5)
            if self._is_new(group):
                return group
        for code in range(2**self._n_bits):  # few are left, so there are few bits
            group = np.flatnonzero((code >> np.arange(self._n_bits)) & 1)
            if self._is_new(group):
                return group
        raise AssertionError("asked for more routers than there are")

    def _next_pass(self) -> None:
        """All bits in a new random order: single ones, or a bit more each after a pass that found nothing."""
        if self._n_passes:
            self._group_size = 1 if self._improved else min(self._group_size + 1, self._n_bits)
        self._n_passes += 1
        self._improved = False
        self._queue = [int(i) for i in self._rng.permutation(self._n_bits)]

    def _is_new(self, group: NDArray[np.int64]) -> bool:
        candidate = self._base.copy()
        candidate[group] ^= True
        return candidate.tobytes() not in self._seen

    def _hand_out(self, candidates: list[Routers]) -> Routers:
        return np.array(candidates, dtype=bool).reshape(len(candidates), *self._shape)
