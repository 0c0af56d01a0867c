"""How long a run will take, from a few layers timed on the machine, runtime and data that it will use.

What is timed is the few-shot objective itself, on the first few layers of the backbone and some of the
batches (see `mp2.engine.layer_timer`); a prediction adds up how often a run does each kind of work.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mp2.engine.layer_timer import LayerTimer

if TYPE_CHECKING:
    from mp2.tasks import MrcInput

_UNITS = 60.0  # layer runs over the sample that all timings need together


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a run evaluates, in sizes."""

    populations: tuple[int, ...]  # stage I, in order; the untuned router is the first
    layer_iterations: int  # stage II
    popsize: int
    n_dev: int  # evaluations of the few-shot dev set
    n_test: int  # of the test set


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of each kind of work at the full depth."""

    prepare_s: float  # weights, sessions, folded projections; once
    full_s: dict[int, float]  # population -> a forward through all layers (stage I)
    visit_s: tuple[float, ...]  # layer -> a population of ``popsize`` at that layer (stage II)
    dev_s: float  # one evaluation
    test_s: float
    n_timed_layers: int
    timed_share: float  # of the training tokens
    spent_s: float  # what the timing took


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of each part of a run."""

    prepare_s: float
    stage1_s: float
    stage2_s: float
    dev_s: float
    test_s: float

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.prepare_s + self.stage1_s + self.stage2_s + self.dev_s + self.test_s


def predict(work: Workload, costs: Costs) -> Prediction:
    """Add up the forwards of ``work``; suggestions are the optimizer's and not in it."""
    stage1 = sum(_of_population(p, costs.full_s) for p in work.populations)
    stage2 = 0.0
    if work.layer_iterations:
        n_visits, rest = divmod(work.layer_iterations, work.popsize)
        rounds, layer = divmod(n_visits, len(costs.visit_s))
        stage2 = rounds * sum(costs.visit_s) + sum(costs.visit_s[:layer])
        stage2 += costs.visit_s[layer] * rest / work.popsize
    return Prediction(
        prepare_s=costs.prepare_s,
        stage1_s=stage1,
        stage2_s=stage2,
        dev_s=work.n_dev * costs.dev_s,
        test_s=work.n_test * costs.test_s,
    )


def _of_population(p: int, full_s: dict[int, float]) -> float:
    """Seconds of a population of ``p``: between timed sizes on the line, outside in proportion."""
    sizes = sorted(full_s)
    nearest = min(max(p, sizes[0]), sizes[-1])
    return float(np.interp(nearest, sizes, [full_s[size] for size in sizes])) * p / nearest


def measure(
    timer: LayerTimer,
    *,
    populations: Sequence[int],
    popsize: int,
    dev: Sequence[MrcInput] = (),
    test: Sequence[MrcInput] = (),
) -> Costs:
    """Time each kind of work: stage I at ``populations``, stage II at ``popsize``, dev and test."""
    full_s, visit_s, dev_s, test_s = timer.seconds(populations, popsize, dev, test)
    return Costs(
        prepare_s=timer.prepare(),
        full_s=full_s,
        visit_s=visit_s,
        dev_s=dev_s,
        test_s=test_s,
        n_timed_layers=timer.depths[-1],
        timed_share=timer.share,
        spent_s=time.perf_counter() - timer.started,
    )


def target_tokens(budget_s: float, layer_token_s: float) -> float:
    """Tokens to time so that all timings together take about ``budget_s`` at ``layer_token_s`` a token."""
    return budget_s / (_UNITS * layer_token_s)
