"""Stage I: the search for the router, by name.

Only the sign of a router logit matters at inference, so the space is {0,1}^(L'*K) whatever box a method
moves in. Every method is asked for at most ``n`` candidates and told their losses (minimised); the caller
keeps the best. All of them are deterministic given their generator.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mp2.errors import UnknownNameError, UsageError
from mp2.optimizers.routers import Losses, Routers, RouterSearch

METHODS = ("bits", "flips", "exhaustive", "bo", "nevergrad:<optimizer>", "random", "none")
DEFAULT_METHOD = "bits"
DEFAULT_ITERATIONS = {"shallow": 200, "deep": 100}  # appendix A.2
MAX_EXHAUSTIVE_BITS = 20


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
        warm: hard routers of the pre-training tasks [n_tasks, L', K]; ``bits`` and ``flips`` use them.
        rng: the method's own generator.
        modules: intrinsic prompts [L', K, d], from which ``bits`` knows what routers have in common; None: a
            router is only its bits.
    """
    method = check_method(method)
    if method == "bits":
        from mp2.optimizers.router_bits import BitsSearch

        return BitsSearch(shape, iterations, warm, rng, modules)
    if method == "flips":
        from mp2.optimizers.router_flips import FlipSearch

        return FlipSearch(shape, iterations, warm, rng)
    if method == "exhaustive":
        from mp2.optimizers.router_exhaustive import ExhaustiveSearch

        return ExhaustiveSearch(shape)
    if method == "bo":
        from mp2.optimizers.router_bayes import BayesSearch

        return BayesSearch(shape, rng)
    if method.startswith("nevergrad:"):
        from mp2.optimizers.router_nevergrad import NevergradSearch

        return NevergradSearch(method.partition(":")[2], shape, iterations, rng)
    if method == "random":
        return RandomSearch(shape, rng)
    return NoSearch(shape)


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
