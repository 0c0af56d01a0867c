"""The few-shot objective: losses of whole populations of prompts, by the shortest exact way.

A loss is what the head makes of the training examples; for the paper's span head the mean of (CE of the
start + CE of the end) / 2, each over the example's real token positions. What makes it fast changes no loss:
deep prompts enter as prefixes; while one layer is under visit only it and the layers above run, from cached
inputs; all candidates run at once over batches of equal length; what is the same for all candidates (the
text's projections and attention at the layer under visit) or for all examples (the prefixes) is computed
once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from mp2.engine.forward import Arrival, Batch, Evaluation, Forward, Pending
from mp2.errors import UsageError
from mp2.heads import Head
from mp2.prompts import PromptSet

if TYPE_CHECKING:
    from mp2.tasks import MrcInput

_POPULATION = 20  # the cached inputs' batches suit the paper's population; another one only changes the time


class Objective:
    """Losses of candidates on the few-shot training set.

    Every evaluation returns a `Pending`: on a GPU it is only launched, and whoever fetches it waits for it.
    Launches belong in one thread, for all objectives of a backend. ``n_evaluations`` counts candidates, each
    on the whole training set (the paper's forward computes); ``seconds`` is the time spent on them.
    Deterministic: the same call returns the same bits. NaN and infinite losses are returned as they are.
    """

    def __init__(self, forward: Forward, train: Sequence[MrcInput]) -> None:
        """Get ready for ``train``; UsageError without examples."""
        if not train:
            raise UsageError("no training examples, expected at least 1; check the task's data and --shots")
        self.forward = forward
        self.n_evaluations = 0
        self.seconds = 0.0
        self._prompts = forward.prompts
        self._train = list(train)
        self._longest = max(len(x.input_ids) for x in train)
        self._batches: dict[int, Sequence[Batch]] = {}
        self._generation = -1

    def router_losses(self, routers: np.ndarray) -> Pending[np.ndarray]:
        """Return float64 [P] losses of the prompts fused by ``routers`` [P, L', K] bool (stage I, eq. 1).

        Raises UsageError for routers of another shape.
        """
        return self.full_losses(fused(self._prompts, routers))

    def full_losses(self, z: np.ndarray) -> Pending[np.ndarray]:
        """Return float64 [P] losses of intrinsic prompts ``z`` [P, L', d], with every layer run."""
        return self._losses(self.forward.intrinsic(z, "P L' d"), self.forward.every_layer, None)

    def set_incumbent(self, z: np.ndarray) -> None:
        """Take ``z`` [L', d] as the prompt that `layer_losses` varies one layer of; computes nothing."""
        self.forward.set_incumbent(self.forward.intrinsic(z, "L' d").clone())

    def layer_losses(self, layer: int, z: np.ndarray) -> Pending[np.ndarray]:
        """Return float64 [P] losses when ``layer`` takes ``z[p]`` [P, d] and all others keep the incumbent.

        Shallow prompts have one layer, 0. For inline prompts, deep or shallow, the whole encoder runs; so it
        does for a layer whose output the head does not read. Raises UsageError without an incumbent.
        """
        incumbent = self._incumbent(layer)
        candidates = self.forward.intrinsic(z, "P d")
        if not self.forward.prefixed or layer >= self.forward.n_layers:
            whole = incumbent.repeat(len(candidates), 1, 1)
            whole[:, layer] = candidates
            return self._losses(whole, self.forward.every_layer, None)
        return self._losses(candidates, lambda part: self.forward.visit(layer, part), _POPULATION)

    def commit(self, layer: int, z: np.ndarray) -> None:
        """Make ``z`` [d] the incumbent's prompt of ``layer``; computes nothing."""
        self._incumbent(layer)
        self.forward.commit(layer, self.forward.intrinsic(z, "d"))

    def training_outputs(self, z: np.ndarray) -> np.ndarray:
        """Return the head's training outputs [N, ...] under the prompt ``z`` [L', d]; waits for them."""
        candidate = self.forward.intrinsic(z, "L' d").unsqueeze(0)
        found: np.ndarray = self._outputs(candidate, self.forward.every_layer, None).fetch()[0]
        return found

    def reader(self, z: np.ndarray) -> Head:
        """Return the head that scores under the prompt ``z`` [L', d], fitted to the training set if it must.

        Waits for what it needs.
        """
        return self.forward.head.fit(lambda: self.training_outputs(z))

    def cut(self, population: int) -> dict[str, int | float]:
        """Return how a population is cut up, for people: groups of examples, batches, share of padding."""
        batches = self.forward.batches(self._train, population)
        rows = sum(batch.n_tokens for batch in batches)
        real = sum(len(x.input_ids) + self.forward.n_inline for x in self._train)
        return {
            "population": population,
            "groups": len(batches),
            "batches": sum(len(self.forward.pieces(population, batch)) for batch in batches),
            "batch_tokens": self.forward.micro_batch_tokens,
            "padding": 1 - real / rows,
        }

    def side_by_side(self) -> int:
        """Return how many runs like this one the device computes at a time."""
        tokens = sum(len(x.input_ids) + self.forward.n_inline for x in self._train)
        return self.forward.backend.side_by_side(min(self.forward.micro_batch_tokens, _POPULATION * tokens))

    def _losses(
        self, candidates: torch.Tensor, begin: Callable[[torch.Tensor], Evaluation], population: int | None
    ) -> Pending[np.ndarray]:
        started = time.perf_counter()

        def losses(outputs: np.ndarray) -> np.ndarray:
            found = self.forward.head.losses(outputs)
            self.seconds += time.perf_counter() - started
            self.n_evaluations += len(found)
            return found

        if not len(candidates):
            return Pending.of(np.empty(0))
        return self._outputs(candidates, begin, population).then(losses)

    def _outputs(
        self, candidates: torch.Tensor, begin: Callable[[torch.Tensor], Evaluation], population: int | None
    ) -> Pending[np.ndarray]:
        """Begin the head's outputs [P, N, ...] of ``candidates`` [P, ...], examples in their own order.

        ``population`` is what the batches are meant for (None: as many candidates as there are).
        """
        n = len(candidates)

        def attempt() -> list[tuple[slice, Batch, Arrival]]:
            sent = []
            step = self.forward.chunk_of_candidates() or n
            for first in range(0, n, step):
                part = candidates[first : first + step]
                run = begin(part)
                for batch in self._batches_for(population or len(part)):
                    for piece in self.forward.pieces(len(part), batch):
                        where = slice(first + piece.start, first + piece.stop)
                        sent.append((where, batch, run(batch, piece)))
            return sent

        sent = self.forward.within_memory(attempt, self._longest)

        def fetch() -> np.ndarray:
            found: np.ndarray | None = None
            for where, batch, arrive in sent:
                output = arrive()
                if found is None:
                    found = np.empty((n, len(self._train), *output.shape[2:]), output.dtype)
                found[where, batch.indices] = output
            assert found is not None
            return found

        return Pending(fetch) if self.forward.queues else Pending.of(fetch())

    def _batches_for(self, population: int) -> Sequence[Batch]:
        if self._generation != self.forward.generation:
            self._generation = self.forward.generation
            self._batches.clear()
        if population not in self._batches:
            self._batches[population] = self.forward.batches(self._train, population)
        return self._batches[population]

    def _incumbent(self, layer: int) -> torch.Tensor:
        z = self.forward.incumbent
        if z is None:
            raise UsageError("no incumbent prompt yet; call set_incumbent(z) first")
        if not 0 <= layer < len(z):
            raise UsageError(f"layer {layer}, expected 0 to {len(z) - 1} for {self._prompts.kind} prompts")
        return z


def fused(prompts: PromptSet, routers: np.ndarray) -> np.ndarray:
    """Return intrinsic prompts [P, L', d] fused by ``routers`` [P, L', K]; UsageError for other shapes."""
    weights = torch.from_numpy(np.asarray(routers))
    if weights.dim() != 3:
        raise UsageError(f"routers have shape {tuple(weights.shape)}, expected (P, L', K)")
    z: np.ndarray = prompts.fuse(weights).detach().numpy()
    return z
