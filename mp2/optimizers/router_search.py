"""Stage I: the search for the router, by name.

Only the sign of a router logit matters at inference, so the space is {0,1}^(L'*K) whatever box a method
moves in. Every method is asked for at most ``n`` candidates and told their losses (minimised); the caller
keeps the best. All of them are deterministic given their generator.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mp2.errors import UnknownNameError, UsageError

Routers = NDArray[np.bool_]
Losses = NDArray[np.float64]

METHODS = ("bits", "exhaustive", "bo", "nevergrad:<optimizer>", "random", "none")
DEFAULT_METHOD = "bits"
DEFAULT_ITERATIONS = {"shallow": 200, "deep": 100}  # appendix A.2
MAX_EXHAUSTIVE_BITS = 20


class RouterSearch(Protocol):
    """A stage-I method."""

    def ask(self, n: int) -> Routers:
        """Between 1 and ``n`` candidates [p, L', K]; none at all when the space is used up."""
        ...

    def tell(self, routers: Routers, losses: Losses) -> None:
        """Learn the losses [p] of evaluated candidates, asked for or not."""
        ...


def stage_one_iterations(
    method: str, requested: int | None, kind: str, shape: tuple[int, int], iters: int
) -> int:
    """Iterations of stage I out of ``iters``; the untuned router (all on) is the first of them.

    Raises:
        UsageError: the method needs more than there are.
    """
    n_bits = shape[0] * shape[1]
    if method == "none":
        return 1
    if method == "exhaustive":
        budget = iters if requested is None else min(requested, iters)
        if n_bits > MAX_EXHAUSTIVE_BITS or 2**n_bits > budget:
            raise UsageError(
                f"exhaustive search needs 2^{n_bits} iterations for {shape[0]} layers of {shape[1]} modules, "
                f"got {budget}; use another --router-search (such as {DEFAULT_METHOD})"
                + (f" or --iters {2**n_bits}" if n_bits <= MAX_EXHAUSTIVE_BITS else "")
            )
        return int(2**n_bits)
    return min(iters, DEFAULT_ITERATIONS[kind] if requested is None else requested)


def check_method(method: str) -> str:
    """The method's full name (``default`` is ours).

    Raises:
        UnknownNameError: no such method or nevergrad optimizer, with the nearest names.
    """
    if method == "default":
        return DEFAULT_METHOD
    if method.startswith("nevergrad:"):
        from mp2.optimizers.router_nevergrad import check_optimizer

        check_optimizer(method.partition(":")[2])
        return method
    if method not in METHODS:
        raise UnknownNameError(
            "router search method",
            method,
            METHODS,
            "Any nevergrad optimizer can be named as nevergrad:<optimizer>.",
        )
    return method


def create_router_search(
    method: str,
    shape: tuple[int, int],
    iterations: int,
    warm: Routers,
    rng: np.random.Generator,
    modules: NDArray[Any] | None = None,
) -> RouterSearch:
    """The named search.

    Args:
        method: one of ``METHODS``.
        shape: (L', K).
        iterations: how many candidates it will be asked for in all.
        warm: hard routers of the pre-training tasks [n_tasks, L', K]; ``bits`` uses them.
        rng: the method's own generator.
        modules: intrinsic prompts [L', K, d], from which ``bits`` knows what routers have in common; None: a
            router is only its bits.
    """
    method = check_method(method)
    if method == "bits":
        from mp2.optimizers.router_bits import BitsSearch

        return BitsSearch(shape, iterations, warm, rng, modules)
    if method == "bo":
        from mp2.optimizers.router_bayes import BayesSearch

        return BayesSearch(shape, rng)
    if method.startswith("nevergrad:"):
        from mp2.optimizers.router_nevergrad import NevergradSearch

        return NevergradSearch(method.partition(":")[2], shape, iterations, rng)
    if method == "exhaustive":
        return ExhaustiveSearch(shape)
    return RandomSearch(shape, rng) if method == "random" else NoSearch(shape)


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


class RandomSearch:
    """Independent fair coins: what every method must beat."""

    def __init__(self, shape: tuple[int, int], rng: np.random.Generator, population: int = 20) -> None:
        self._shape, self._rng, self._population = shape, rng, population

    def ask(self, n: int) -> Routers:
        """Up to ``population`` random routers [p, L', K]."""
        return self._rng.random((min(n, self._population), *self._shape)) < 0.5

    def tell(self, routers: Routers, losses: Losses) -> None:
        """Learn nothing."""


class NoSearch:
    """No stage I: the router with every module on is kept."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape

    def ask(self, n: int) -> Routers:
        """No candidates."""
        return np.zeros((0, *self._shape), dtype=bool)

    def tell(self, routers: Routers, losses: Losses) -> None:
        """Learn nothing."""
