"""What the head makes of any inputs under one prompt: dev, test and new text are answered from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mp2.engine.forward import Arrival, Batch, Evaluation, Forward, Pending

if TYPE_CHECKING:
    from mp2.tasks import MrcInput

_KEPT_SETS = 2  # whose batches are kept, and recorded where that pays: dev, and perhaps test


class Scorer:
    """Runs inputs under one prompt; needs no training set.

    A head that is fitted to one turns the outputs into scores all the same (`Objective.reader`).
    """

    def __init__(self, forward: Forward) -> None:
        """Run on ``forward``, which an objective may use as well."""
        self.forward = forward
        self._kept: list[tuple[list[MrcInput], Sequence[Batch]]] = []
        self._generation = forward.generation
        self._held: tuple[np.ndarray, Evaluation] | None = None  # a prompt, and what was made of it

    def prepare(self, z: np.ndarray) -> None:
        """Make what every output under ``z`` [L', d] needs, so that the first one does not wait for it."""
        self.forward.within_memory(lambda: self._under(z), longest=1)

    def outputs(self, z: np.ndarray, inputs: Sequence[MrcInput]) -> Pending[list[np.ndarray]]:
        """Begin `Head.scoring_outputs` [...] of each of ``inputs``, in their order, under ``z`` [L', d].

        Where an output has a row a token, rows may follow the last token's.
        """
        if not inputs:
            return Pending.of([])

        def attempt() -> list[tuple[Batch, Arrival]]:
            batches = self._batches_of(inputs)
            again = len(batches) == 1 and any(kept is batches for _, kept in self._kept)
            run = self._under(z)
            return [(batch, run(batch, slice(0, 1), again=again)) for batch in batches]

        sent = self.forward.within_memory(attempt, max(len(x.input_ids) for x in inputs))

        def fetch() -> list[np.ndarray]:
            found: list[np.ndarray] = [np.empty(0)] * len(inputs)
            for batch, arrive in sent:
                for index, output in zip(batch.indices, arrive()[0], strict=True):
                    found[index] = output
            return found

        return Pending(fetch) if self.forward.queues else Pending.of(fetch())

    def _under(self, z: np.ndarray) -> Evaluation:
        """Return the run under ``z``, the last one again for the same prompt: text is labelled under one."""
        if self._held is None or not np.array_equal(self._held[0], z):
            prompt = self.forward.intrinsic(z, "L' d").unsqueeze(0)
            self._held = z.copy(), self.forward.every_layer(prompt, scoring=True)
        return self._held[1]

    def _batches_of(self, inputs: Sequence[MrcInput]) -> Sequence[Batch]:
        if self._generation != self.forward.generation:
            self._generation = self.forward.generation
            self._kept.clear()
            self._held = None
        for known, batches in self._kept:
            if len(known) == len(inputs) and all(a is b for a, b in zip(known, inputs, strict=True)):
                return batches
        batches = self.forward.batches(inputs, 1)
        if len(self._kept) < _KEPT_SETS:
            self._kept.append((list(inputs), batches))
        return batches
