"""Seconds that a router search takes for its own suggestions in stage I: a row of Table 4.

The paper searches with Bayesian optimisation, whose suggestions take longer than the forwards do; `mp2 bbt`
searches with ``bits``. A suggestion's time does not depend on the model or the task: losses are drawn here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mp2.optimizers.router_search import create_router_search

LAST = 5  # suggestions whose mean stands for those that were not made in time


def suggestion_cost(
    method: str,
    shape: tuple[int, int],
    iterations: int,
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Seconds for all suggestions of a stage I of ``iterations`` over routers of ``shape`` [L', K].

    ``how`` is ``measured``, or ``extrapolated`` where ``budget_s`` ended first: the last five suggestions'
    mean is then taken for all that are left, which is too little for a search that slows down.
    """
    rng = np.random.default_rng(0)
    warm = rng.random((38, *shape)) < 0.5
    search = create_router_search(method, shape, iterations, warm, np.random.default_rng(1))
    told = 0
    seconds: list[float] = []  # of a candidate
    begun = clock()
    while told < iterations and clock() - begun < budget_s:
        start = clock()
        routers = search.ask(iterations - told)
        if not len(routers):
            break
        search.tell(routers, rng.random(len(routers)))
        seconds += [(clock() - start) / len(routers)] * len(routers)
        told += len(routers)
    left = iterations - told if len(routers) else 0
    rest = left * float(np.mean(seconds[-LAST:]))
    return {
        "search": method,
        "dimensions": shape[0] * shape[1],
        "iterations": iterations,
        "made": told,
        "how": "extrapolated" if left else "measured",
        "suggest_s": round(sum(seconds) + rest, 2),
    }
