"""How long a run will take, from a few layers timed on the machine, runtime and data that it will use.

What is timed is the few-shot objective itself, on the first few layers of the backbone: a model of k layers
has everything that one of L layers has (embedding, a first layer on shared text, layers above, the last
one, losses), so

    T(L) = T(k) + (L - k) * slope,    slope = what a further layer adds,

holds for a full forward, for a visit of a layer (as many layers run as lie above it) and for
log-probabilities. Long workloads are timed on some of their batches and scaled by tokens.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mp2.backbone import Backbone
from mp2.engine.batches import group_by_length
from mp2.engine.forward import usual_micro_batch_tokens
from mp2.engine.objective import Objective
from mp2.engine.runtime import Runtime
from mp2.prompts import PromptSet

if TYPE_CHECKING:
    from mp2.tasks import MrcInput

DEPTH = 3  # layers that are timed; the slope is that between 1 and 3
_REPEATS = 3  # timed repetitions after the first, fewer where they are long; their median counts
_LONG_S = 1.0
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


def first_layers(backbone: Backbone, prompts: PromptSet, n_layers: int) -> tuple[Backbone, PromptSet]:
    """The backbone's first ``n_layers`` layers and their prompts, sharing the weights."""
    config = replace(backbone.config, n_layers=n_layers)
    encoder = copy.copy(backbone.encoder)
    encoder.__dict__["_modules"] = dict(backbone.encoder._modules)
    encoder.config = config
    encoder.layers = torch.nn.ModuleList(list(backbone.encoder.layers)[:n_layers])
    cut = slice(n_layers) if prompts.kind == "deep" else slice(None)
    fewer = replace(
        prompts,
        meta=replace(prompts.meta, n_layers=n_layers),
        z=prompts.z[cut],
        projection=prompts.projection[cut],
        routers=prompts.routers[:, cut],
    )
    return replace(backbone, config=config, encoder=encoder), fewer


def sample_batches(
    inputs: Sequence[MrcInput], n_candidates: int, limit_tokens: int, target_tokens: float
) -> list[MrcInput]:
    """Return the inputs of some batches, spread evenly over the lengths, of about ``target_tokens``.

    ``target_tokens`` counts the tokens of all ``n_candidates``; at least one batch is returned, and all
    inputs when they are not more.
    """
    lengths = [len(item.input_ids) for item in inputs]
    if n_candidates * sum(lengths) <= target_tokens:
        return list(inputs)
    groups = group_by_length(lengths, n_candidates, limit_tokens)
    edges = np.cumsum([n_candidates * sum(lengths[i] for i in group) for group in groups])
    n_wanted = max(1, round(len(groups) * target_tokens / edges[-1]))
    middles = (np.arange(n_wanted) + 0.5) / n_wanted * edges[-1]
    chosen = sorted(set(np.searchsorted(edges, middles, side="right").tolist()))
    return [inputs[i] for k in chosen for i in groups[k]]


class Stopwatch:
    """Median seconds of a repeated piece of work; ``extra_s`` adds up what first times cost beyond it."""

    def __init__(self, device: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._clock = torch.device(device), clock
        self.n_first = 2 if self._device.type == "cuda" else 1  # there, the second time records a graph
        self.extra_s = 0.0

    def __call__(self, work: Callable[[], object]) -> float:
        """Median of the repetitions after the first."""
        first = sum(self.once(work) for _ in range(self.n_first))
        times = [self.once(work)]
        while len(times) < _REPEATS and sum(times) < _LONG_S:
            times.append(self.once(work))
        self.extra_s += max(0.0, first - median(times))
        return median(times)

    def once(self, work: Callable[[], object]) -> float:
        """Seconds of one run, the device's queue drained."""
        start = self._clock()
        work()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock() - start


class LayerTimer:
    """Times the first layers of a backbone as `Objective` runs them, and extrapolates to all layers."""

    def __init__(
        self,
        runtime: Runtime,
        backbone: Backbone,
        prompts: PromptSet,
        train: Sequence[MrcInput],
        *,
        population: int,
        target_tokens: float,
        make_objective: Callable[..., Any] = Objective,
    ) -> None:
        """Take about ``target_tokens`` of ``train`` as a population of ``population`` runs them."""
        self.started = time.perf_counter()
        self.watch = Stopwatch(runtime.device)
        self.n_layers = backbone.config.n_layers
        self.depths = sorted({1, min(DEPTH, self.n_layers)})
        self._target = target_tokens
        self._limit = usual_micro_batch_tokens(runtime, backbone.config)
        part = sample_batches(train, population, self._limit, target_tokens)
        self.share = _n_tokens(part) / _n_tokens(train)
        self._prefixed = prompts.meta.injection == "prefix"
        rng = np.random.default_rng(0)
        self._objectives: dict[int, Any] = {}
        self._z: dict[int, np.ndarray] = {}
        for k in self.depths:
            body, fewer = first_layers(backbone, prompts, k)
            self._objectives[k] = make_objective(runtime, body, fewer, part)
            shape = (fewer.z.shape[0], fewer.z.shape[-1])
            self._z[k] = rng.standard_normal(shape).astype(np.float32)

    def full(self, population: int) -> float:
        """Seconds of a population through all layers, on the whole training set."""
        seconds = {}
        for k, objective in self._objectives.items():
            z = np.repeat(self._z[k][None], population, 0)
            seconds[k] = self.watch(lambda o=objective, z=z: o.full_losses(z))  # type: ignore[misc]
        return extrapolate(seconds, self.n_layers) / self.share

    def visits(self, popsize: int) -> tuple[float, ...]:
        """Seconds of a visit of each layer with a prompt, its commit and the cached inputs' step upwards.

        Inline prompts have no cached inputs: a visit is a forward through all layers.
        """
        if not self._prefixed:
            return (self.full(popsize),)
        depth = self.depths[-1]
        objective, z = self._objectives[depth], self._z[depth]
        objective.set_incumbent(z)

        def visit(layer: int) -> None:
            objective.layer_losses(layer, np.repeat(z[layer][None], popsize, 0))
            objective.commit(layer, z[layer])

        def one_round() -> list[float]:
            return [self.watch.once(lambda layer=layer: visit(layer)) for layer in range(depth)]  # type: ignore[misc]

        first = [sum(one_round()) for _ in range(self.watch.n_first)]
        rounds = [one_round()]
        while len(rounds) < _REPEATS and float(np.sum(rounds)) < _LONG_S:
            rounds.append(one_round())
        steady = np.median(rounds, 0).tolist()
        self.watch.extra_s += max(0.0, sum(first) - sum(steady))
        return tuple(s / self.share for s in extrapolate_visits(steady, self.n_layers))

    def scored(self, inputs: Sequence[MrcInput]) -> float:
        """Seconds of log-probabilities of ``inputs`` under one prompt."""
        if not inputs:
            return 0.0
        part = sample_batches(inputs, 1, self._limit, self._target)
        seconds = {
            k: self.watch(lambda o=o, z=self._z[k]: o.log_probs(z, part))  # type: ignore[misc]
            for k, o in self._objectives.items()
        }
        return extrapolate(seconds, self.n_layers) * _n_tokens(inputs) / _n_tokens(part)

    def prepare(self) -> float:
        """Seconds that first runs cost beyond later ones (weights, sessions, projections), all layers."""
        return self.watch.extra_s * self.n_layers / sum(self.depths)


def extrapolate(seconds: dict[int, float], n_layers: int) -> float:
    """Seconds at ``n_layers`` from those at two depths, along the line through them."""
    low, high = min(seconds), max(seconds)
    if n_layers == high:
        return seconds[high]
    slope = max(0.0, seconds[high] - seconds[low]) / (high - low)
    return seconds[high] + (n_layers - high) * slope


def extrapolate_visits(visits: Sequence[float], n_layers: int) -> list[float]:
    """Seconds of the visits of ``n_layers`` layers from those of a shorter model, top layer last.

    A visit runs its own layer and those above. The top layers are alike at any depth; each layer further
    down adds the slope.
    """
    k = len(visits)
    if n_layers == k:
        return list(visits)
    above = np.arange(k)[::-1]
    slope = max(0.0, float(np.dot(above, np.array(visits) - visits[-1]) / np.dot(above, above)))
    lower = [visits[-1] + (n_layers - 1 - layer) * slope for layer in range(n_layers - k)]
    return [*lower, *visits]


def measure(
    timer: LayerTimer,
    *,
    populations: Sequence[int],
    popsize: int,
    dev: Sequence[MrcInput] = (),
    test: Sequence[MrcInput] = (),
) -> Costs:
    """Time each kind of work: stage I at ``populations``, stage II at ``popsize``, dev and test."""
    full = {p: timer.full(p) for p in sorted(set(populations))}
    visits = timer.visits(popsize) if popsize else ()
    dev_s, test_s = timer.scored(dev), timer.scored(test)
    return Costs(
        prepare_s=timer.prepare(),
        full_s=full,
        visit_s=visits,
        dev_s=dev_s,
        test_s=test_s,
        n_timed_layers=timer.depths[-1],
        timed_share=timer.share,
        spent_s=time.perf_counter() - timer.started,
    )


def target_tokens(budget_s: float, layer_token_s: float) -> float:
    """Tokens to time so that all timings together take about ``budget_s`` at ``layer_token_s`` a token."""
    return budget_s / (_UNITS * layer_token_s)


def _n_tokens(inputs: Sequence[MrcInput]) -> int:
    return sum(len(item.input_ids) for item in inputs)
