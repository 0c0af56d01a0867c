"""Timing of a few layers as `Objective` runs them, and what it says of all layers.

A model of k layers has everything that one of L layers has (embedding, a first layer on shared text, layers
above, the last one, losses), so

    T(L) = T(k) + (L - k) * slope,    slope = what a further layer adds,

holds for a full forward, for a visit of a layer (as many layers run as lie above it) and for
log-probabilities. Long workloads are timed on some of their batches and scaled by tokens. All works take
turns: what disturbs the machine for a moment then meets each of them once, and their medians do not see it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mp2.backbone import Backbone
from mp2.engine.batches import group_by_length
from mp2.engine.forward import usual_micro_batch_tokens
from mp2.engine.objective import Objective
from mp2.engine.runtime import Prefix, Runtime
from mp2.prompts import PromptSet

if TYPE_CHECKING:
    from mp2.tasks import MrcInput

DEPTH = 3  # layers that are timed; the slope is that between 1 and 3
_REPEATS = 3  # timed rounds after the first, fewer where they are long; medians count
_LONG_S = 1.0  # of a work, on average
_Works = dict[Hashable, Callable[[], object]]


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


class LastLayerAt:
    """A runtime whose layer ``index`` is the last of ``n_layers``.

    With inline prompts the last layer alone gets a prefix. TensorRT has a plan for each graph: a short model
    that ended in another layer would have plans built that no run uses.
    """

    def __init__(self, runtime: Runtime, index: int, n_layers: int) -> None:
        """Run everything on ``runtime``."""
        self.name, self.device = runtime.name, runtime.device
        self.precision, self.reason = runtime.precision, runtime.reason
        self.embed, self.embed_inline, self.head = runtime.embed, runtime.embed_inline, runtime.head
        self._runtime, self._index, self._last = runtime, index, n_layers - 1

    def layer(
        self, index: int, hidden: torch.Tensor, mask: torch.Tensor | None, prefix: Prefix | None
    ) -> torch.Tensor:
        """See `Runtime.layer`."""
        return self._runtime.layer(self._last if index == self._index else index, hidden, mask, prefix)


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
    """Median seconds of repeated pieces of work; ``extra_s`` adds up what first times cost beyond them."""

    def __init__(self, device: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._clock = torch.device(device), clock
        self.n_first = 2 if self._device.type == "cuda" else 1  # there, the second time records a graph
        self.extra_s = 0.0

    def medians(self, works: Mapping[Hashable, Callable[[], object]]) -> dict[Any, float]:
        """Median of each work's repetitions after the first; in every round all are done, in their order."""

        def one_round() -> dict[Hashable, float]:
            return {key: self.once(work) for key, work in works.items()}

        first = [one_round() for _ in range(self.n_first)]
        rounds = [one_round()]
        while len(rounds) < _REPEATS and sum(sum(r.values()) for r in rounds) < _LONG_S * len(works):
            rounds.append(one_round())
        steady = {key: median(r[key] for r in rounds) for key in works}
        self.extra_s += sum(max(0.0, sum(r[key] for r in first) - s) for key, s in steady.items())
        return steady

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
            moved = "tensorrt" in runtime.name and not self._prefixed
            on = LastLayerAt(runtime, k - 1, self.n_layers) if moved else runtime
            self._objectives[k] = make_objective(on, body, fewer, part)
            shape = (fewer.z.shape[0], fewer.z.shape[-1])
            self._z[k] = rng.standard_normal(shape).astype(np.float32)

    def seconds(
        self,
        populations: Sequence[int],
        popsize: int,
        dev: Sequence[MrcInput] = (),
        test: Sequence[MrcInput] = (),
    ) -> tuple[dict[int, float], tuple[float, ...], float, float]:
        """Seconds at the full depth, on all inputs, of:

        a population through all layers, by its size; a visit of each layer by ``popsize`` candidates, its
        commit and the cached inputs' step upwards (0: no visits; inline prompts have no cached inputs, a
        visit is a forward through all layers); log-probabilities of ``dev`` and of ``test`` under one prompt.
        """
        inline = popsize and not self._prefixed
        sizes = sorted({*populations, popsize} if inline else {*populations})
        scored = {name: inputs for name, inputs in (("dev", dev), ("test", test)) if inputs}
        parts = {n: sample_batches(x, 1, self._limit, self._target) for n, x in scored.items()}
        works: _Works = {}
        for p in sizes:
            works |= self._full(p)
        if popsize and not inline:
            works |= self._visits(popsize)
        for name, part in parts.items():
            works |= self._scored(name, part)
        found = self.watch.medians(works)

        def deep(name: Hashable) -> float:
            return extrapolate({k: found[name, k] for k in self.depths}, self.n_layers)

        full = {p: deep(p) / self.share for p in sizes}
        visits: tuple[float, ...] = (full[popsize],) if inline else ()
        if popsize and not inline:
            short = [found["visit", layer] for layer in range(self.depths[-1])]
            visits = tuple(s / self.share for s in extrapolate_visits(short, self.n_layers))
        times = {n: deep(n) * _n_tokens(x) / _n_tokens(parts[n]) for n, x in scored.items()}
        return {p: full[p] for p in populations}, visits, times.get("dev", 0.0), times.get("test", 0.0)

    def prepare(self) -> float:
        """Seconds that first runs cost beyond later ones (weights, sessions, projections), all layers."""
        return self.watch.extra_s * self.n_layers / sum(self.depths)

    def _full(self, population: int) -> _Works:
        works: _Works = {}
        for k, objective in self._objectives.items():
            z = np.repeat(self._z[k][None], population, 0)
            works[population, k] = lambda o=objective, z=z: o.full_losses(z)  # type: ignore[misc]
        return works

    def _visits(self, popsize: int) -> _Works:
        depth = self.depths[-1]
        objective, z = self._objectives[depth], self._z[depth]
        objective.set_incumbent(z)

        def visit(layer: int) -> None:
            objective.layer_losses(layer, np.repeat(z[layer][None], popsize, 0))
            objective.commit(layer, z[layer])

        return {("visit", layer): lambda layer=layer: visit(layer) for layer in range(depth)}  # type: ignore[misc]

    def _scored(self, name: str, part: Sequence[MrcInput]) -> _Works:
        return {
            (name, k): lambda o=o, z=self._z[k]: o.log_probs(z, part)  # type: ignore[misc]
            for k, o in self._objectives.items()
        }


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


def _n_tokens(inputs: Sequence[MrcInput]) -> int:
    return sum(len(item.input_ids) for item in inputs)
