"""Cached layer inputs of the training set under the incumbent prompt."""

from __future__ import annotations

from collections.abc import Callable

import torch


class ActivationCache:
    """Inputs of layers, by bucket, grown upwards one layer at a time.

    The text's hidden states at layer l depend only on prompts of layers below l, so changing layer l's
    prompt leaves the inputs of layers 0..l valid. As many layers' inputs are kept as ``limit_bytes``
    allows, the highest ones first; a visit further down starts again from the nearest one kept, or from the
    embedding.
    """

    def __init__(
        self,
        advance: Callable[[int, int, torch.Tensor], torch.Tensor],
        embed: Callable[[int], torch.Tensor],
        limit_bytes: int,
    ) -> None:
        """``advance(bucket, layer, input)`` runs one layer, ``embed(bucket)`` is the input of layer 0."""
        self._advance = advance
        self._embed = embed
        self._limit_bytes = limit_bytes
        self._inputs: dict[int, dict[int, torch.Tensor]] = {}  # bucket -> layer -> [1, N, T, H]
        self._n_bytes = 0

    def at(self, bucket: int, layer: int) -> torch.Tensor:
        """Return the input of ``layer`` [1, N, T, H]."""
        kept = self._inputs.setdefault(bucket, {})
        below = [level for level in kept if level <= layer]
        level = max(below, default=0)
        hidden = kept[level] if below else self._keep(bucket, 0, self._embed(bucket))
        while level < layer:
            hidden = self._advance(bucket, level, hidden)
            level += 1
            self._keep(bucket, level, hidden)
        return hidden

    def drop_above(self, layer: int) -> None:
        """Forget the inputs of the layers above ``layer``, whose prompt has changed."""
        for kept in self._inputs.values():
            for level in [x for x in kept if x > layer]:
                self._n_bytes -= kept.pop(level).nbytes

    def clear(self) -> None:
        """Forget everything."""
        self._inputs.clear()
        self._n_bytes = 0

    def _keep(self, bucket: int, level: int, hidden: torch.Tensor) -> torch.Tensor:
        kept = self._inputs[bucket]
        kept[level] = hidden
        self._n_bytes += hidden.nbytes
        while self._n_bytes > self._limit_bytes and len(kept) > 1:
            self._n_bytes -= kept.pop(min(kept)).nbytes
        return hidden
