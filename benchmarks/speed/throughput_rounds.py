"""One round of `benchmarks.speed.throughput`: engines, plain loop and rivals by turns, layer by layer.

A round visits every layer in stage II's way with a population of its own, steps of the paper's first sizes
around the incumbent (5e-2 at layer 0, 1e-2 at the others), the same for every engine; so what is timed also
says how losses agree. Of a wide shape a round visits two layers, the k-th from below and from above with
another k each round, whose mean cost is that of all layers. Before each layer's visits the plain loop and
rival A evaluate one candidate (a call of theirs is one candidate, whatever the population), C the population
(`benchmarks.speed.rivals`), and before the first B, whose cost is the same wherever the visit is; stage I
comes last, for each engine beside a matrix product in its own precision. In every other round all turns are
in the opposite order. The first call of everything is left out (it packs weights and compiles).

On a CPU the plain loop and the rivals compute in float32; on a GPU in the first engine's precision, where B
and C are also timed with ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from benchmarks.speed.engine_work import (
    MINI_PAPER,
    SHAPES,
    Engine,
    make_backbone,
    make_prompts,
    matrix_dtype,
    matrix_rate,
    necessary_flops,
    peak_memory_mb,
    reset_peak_memory,
    seconds,
    task_inputs,
)
from benchmarks.speed.plain_loop import PlainLoop
from benchmarks.speed.rivals import RIVALS, Rival
from mp2.engine import Objective
from mp2.engine.chain import ChainForward
from mp2.engine.cpu.backend import CpuBackend
from mp2.engine.forward import Forward
from mp2.optimizers.config import LayerConfig

POPULATION = 20
Record = dict[str, Any]


class Subject:
    """One engine under measurement."""

    def __init__(self, objective: Objective, device: str) -> None:
        self.objective = objective
        self.device = device
        self.peak_mb = 0.0

    def visit(self, layer: int, candidates: np.ndarray, incumbent: np.ndarray) -> tuple[float, np.ndarray]:
        """Seconds of one population at ``layer`` and of committing its incumbent; losses [P]."""
        losses = np.empty(0)

        def work() -> None:
            nonlocal losses
            losses = self.objective.layer_losses(layer, candidates).fetch()
            self.objective.commit(layer, incumbent)

        reset_peak_memory(self.device)
        spent = seconds(work)
        self.peak_mb = max(self.peak_mb, peak_memory_mb(self.device))
        return spent, losses


def _share(forwards: Sequence[Forward]) -> None:
    """Have CPU engines of one backbone share what is the same in them: at 24 layers three copies fill 24 GB.

    These are the folded prompts and the layers prepared for float32.
    """
    alike = [x for x in forwards if isinstance(x, ChainForward) and isinstance(x.backend, CpuBackend)]
    for forward in alike[1:]:
        forward._projector = alike[0]._projector
        assert isinstance(forward.backend, CpuBackend)
        assert isinstance(alike[0].backend, CpuBackend)
        forward.backend._layers = alike[0].backend._layers


class Comparison:
    """Engines and the plain loop on one backbone shape and task."""

    def __init__(
        self,
        shape: str,
        task: str,
        engines: Sequence[Engine],
        device: str,
        data: Path | None,
        folder: Path,
        *,
        population: int = POPULATION,
    ) -> None:
        """Make all of them and run each once."""
        self.device, self.population = device, population
        backbone = make_backbone(shape)
        prompts = make_prompts(shape, backbone)
        own = None if shape in ("mini", MINI_PAPER) else SHAPES[shape]
        self._pairs = own is not None and own.pairs
        inputs = task_inputs(task, backbone, data, None if own is None else own.most_examples)
        config = LayerConfig()
        self.sigmas = [config.sigma(layer, "deep") for layer in range(backbone.config.n_layers)]
        self.z = prompts.fuse(torch.ones(prompts.z.shape[:2], dtype=torch.bool)).numpy()
        n_routers = population if own is None else min(population, own.routers)
        self.routers = np.random.default_rng(0).random((n_routers, *prompts.z.shape[:2])) < 0.5
        dtype = matrix_dtype(device, engines[0].precision)
        self.plain = PlainLoop(backbone, prompts, inputs, device, dtype)
        self.rivals: dict[str, Rival] = {}
        first: Rival | None = None  # whose copy of the weights all share
        for compiled in (False,) if device == "cpu" else (False, True):
            for kind in RIVALS[1:] if compiled else RIVALS:
                rival = Rival(kind, backbone, prompts, inputs, device, dtype, compiled=compiled, like=first)
                self.rivals[f"{kind} compiled" if compiled else kind] = rival
                first = first or rival
        self.subjects = {
            str(engine): Subject(engine.objective(backbone, prompts, inputs, device, folder), device)
            for engine in engines
        }
        _share([subject.objective.forward for subject in self.subjects.values()])
        lengths = [x.n_tokens for x in inputs]
        self.facts: Record = {
            "shape": shape,
            "layers": backbone.config.n_layers,
            "hidden": backbone.config.hidden,
            "prompt_tokens": prompts.meta.prompt_tokens,
            "intrinsic_dim": prompts.meta.intrinsic_dim,
            "task": task,
            "device": device,
            "population": population,
            "routers": n_routers,
            "lengths": lengths,
            "visit_flops": [
                necessary_flops(
                    backbone.config, lengths, backbone.config.n_layers - layer, prompts.meta.prompt_tokens
                )
                for layer in range(backbone.config.n_layers)
            ],
        }
        self._warm_up()

    def _warm_up(self) -> None:
        candidates = self.populations(0)
        self.plain.loss(self.z)
        for rival in self.rivals.values():
            rival.set_incumbent(self.z)
            for layer, population in enumerate(candidates[:2]):  # compiled for a population, and for others
                rival.layer_losses(layer, population[:1] if self.device == "cpu" else population)
            rival.set_incumbent(self.z)
        for subject in self.subjects.values():
            subject.objective.set_incumbent(self.z)
            if self.device == "cpu":  # from layer 0 every layer is prepared
                some = candidates[0][: 2 if self._pairs else None]
                subject.objective.layer_losses(0, some).fetch()
                continue
            for _ in range(2):  # the second time records CUDA graphs
                for layer, population in enumerate(candidates):
                    subject.visit(layer, population, self.z[layer])
                subject.objective.router_losses(self.routers).fetch()

    def visited(self, number: int) -> list[int]:
        """Layers that round ``number`` visits."""
        n_layers = len(self.z)
        if not self._pairs or n_layers < 4:
            return list(range(n_layers))
        low = (7 * number + 1) % (n_layers // 2)
        return [low, n_layers - 1 - low]

    def populations(self, number: int) -> np.ndarray:
        """Candidates [L, P, d] of round ``number``."""
        rng = np.random.default_rng([1, number])
        moves = rng.standard_normal((len(self.z), self.population, self.z.shape[1]))
        steps: np.ndarray = moves * np.array(self.sigmas)[:, None, None]
        return (self.z[:, None] + steps).astype(np.float32)

    def round(self, number: int) -> Record:
        """Measure once: seconds and losses by engine, JSON values."""
        found: dict[str, Record] = {
            name: {
                "precision": subject.objective.forward.backend.precision,
                "runtime": subject.objective.forward.backend.name,
                "stage2_s": [],
                "losses": [],
            }
            for name, subject in self.subjects.items()
        }
        plain_s: list[float] = []
        rivals_s: dict[str, list[float]] = {name: [] for name in self.rivals}
        turns = [None, *self.rivals, *self.subjects]
        if number % 2:
            turns.reverse()
        populations, visited = self.populations(number), self.visited(number)
        for layer in visited:
            population = populations[layer]
            if self._pairs and layer:
                self._approach(layer - 1, population[:1])
            for name in turns:
                if name is None:
                    plain_s.append(seconds(lambda: self.plain.loss(self.z)))
                    continue
                if name in self.rivals:
                    if self.rivals[name].kind == "B" and layer != visited[0]:
                        continue
                    rivals_s[name].append(self._rival_seconds(name, layer, population))
                    continue
                spent, losses = self.subjects[name].visit(layer, population, self.z[layer])
                found[name]["stage2_s"].append(spent)
                found[name]["losses"].append(losses.tolist())
        for name in turns:
            if name is None:
                plain_s.append(seconds(lambda: self.plain.loss(self.z)))
                continue
            if name in self.rivals:  # they have no stage I of their own: no layer is like another's there
                continue
            subject, own = self.subjects[name], found[name]
            own["matrix_dtype"] = str(matrix_dtype(self.device, own["precision"])).removeprefix("torch.")
            own["matrix_rate"] = matrix_rate(self.device, own["precision"])
            own["stage1_s"] = seconds(lambda s=subject: s.objective.router_losses(self.routers).fetch())  # type: ignore[misc]
            own["peak_mb"] = subject.peak_mb
        rivals = {name: mean(spent) for name, spent in rivals_s.items()}
        return {
            **self.facts,
            "visited": visited,
            "plain_s": mean(plain_s),
            "rivals_s": rivals,
            "engines": found,
        }

    def _approach(self, layer: int, one: np.ndarray) -> None:
        """Have inputs kept up to ``layer``, as they are where layers are visited in turn."""
        for rival in self.rivals.values():
            if rival.kind == "C":
                rival.layer_losses(layer, one)
        for subject in self.subjects.values():
            subject.objective.layer_losses(layer, one).fetch()

    def _rival_seconds(self, name: str, layer: int, population: np.ndarray) -> float:
        """Seconds a candidate of a visit of ``layer``, the incumbent's commit among them."""
        rival = self.rivals[name]
        some = population[:1] if rival.kind == "A" else population

        def work() -> None:
            rival.layer_losses(layer, some)
            rival.commit(layer, self.z[layer])

        return seconds(work) / len(some)
