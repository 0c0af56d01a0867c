"""Cached layer inputs of the training set under the incumbent prompt."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

B = TypeVar("B", bound=Hashable)  # a batch


class ActivationCache(Generic[B]):
    """Inputs of layers, by batch, grown upwards one layer at a time.

    The text's hidden states at layer l depend only on prompts of layers below l, so changing layer l's
    prompt leaves the inputs of layers 0..l valid. As many layers' inputs are kept as ``limit_bytes``
    allows for all batches together, of each the highest first; a visit further down starts again from the
    nearest one kept, or from the embedding.
    """

    def __init__(
        self,
        advance: Callable[[B, int, torch.Tensor], torch.Tensor],
        embed: Callable[[B], torch.Tensor],
        limit_bytes: int,
    ) -> None:
        """``advance(batch, layer, input)`` runs one layer, ``embed(batch)`` is the input of layer 0."""
        self._advance = advance
        self._embed = embed
        self._limit_bytes = limit_bytes
        self._inputs: dict[B, dict[int, torch.Tensor]] = {}  # batch -> layer -> [1, ..., H]
        self._n_bytes = 0

    @property
    def n_bytes(self) -> int:
        """Bytes that are held."""
        return self._n_bytes

    def at(self, batch: B, layer: int) -> torch.Tensor:
        """Return the input of ``layer`` [1, ..., H]."""
        kept = self._inputs.setdefault(batch, {})
        below = [level for level in kept if level <= layer]
        level = max(below, default=0)
        hidden = kept[level] if below else self._keep(batch, 0, self._embed(batch))
        while level < layer:
            hidden = self._advance(batch, level, hidden)
            level += 1
            self._keep(batch, level, hidden)
        return hidden

    def give_back(self) -> bool:
        """Forget everything, as memory ran out, and hold half as much from now on; False: it was nothing."""
        if not self._n_bytes:
            return False
        self._limit_bytes = min(self._limit_bytes, self._n_bytes // 2)
        self.clear()
        return True

    def drop_above(self, layer: int) -> None:
        """Forget the inputs of the layers above ``layer``, whose prompt has changed."""
        for kept in self._inputs.values():
            for level in [x for x in kept if x > layer]:
                self._n_bytes -= kept.pop(level).nbytes

    def clear(self) -> None:
        """Forget everything."""
        self._inputs.clear()
        self._n_bytes = 0

    def _keep(self, batch: B, level: int, hidden: torch.Tensor) -> torch.Tensor:
        self._inputs.setdefault(batch, {})[level] = hidden
        self._n_bytes += hidden.nbytes
        while self._n_bytes > self._limit_bytes:
            held = [
                (len(kept) == 1, x, n, b) for n, (b, kept) in enumerate(self._inputs.items()) for x in kept
            ]
            # a batch's only input last, what was kept just now after all others
            *_, low, _, other = min(held, key=lambda e: ((e[3], e[1]) == (batch, level), *e[:3]))
            self._n_bytes -= self._inputs[other].pop(low).nbytes
        return hidden
