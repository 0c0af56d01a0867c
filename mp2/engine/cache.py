"""Cached layer inputs of the training set under the incumbent prompt."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mp2.engine.runtime import is_out_of_memory


class ActivationCache:
    """Inputs of layers, by bucket, grown upwards one layer at a time.

    The text's hidden states at layer l depend only on prompts of layers below l, so changing layer l's
    prompt leaves the inputs of layers 0..l valid. As many layers' inputs are kept as ``limit_bytes``
    allows for all buckets together, of each the highest first; a visit further down starts again from the
    nearest one kept, or from the embedding.
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

    @property
    def n_bytes(self) -> int:
        """Bytes that are held."""
        return self._n_bytes

    def at(self, bucket: int, layer: int) -> torch.Tensor:
        """Return the input of ``layer`` [1, N, T, H]."""
        try:
            return self._climb(bucket, layer)
        except Exception as error:
            if not is_out_of_memory(error) or not self.give_back():
                raise
        return self._climb(bucket, layer)

    def _climb(self, bucket: int, layer: int) -> torch.Tensor:
        kept = self._inputs.setdefault(bucket, {})
        below = [level for level in kept if level <= layer]
        level = max(below, default=0)
        hidden = kept[level] if below else self._keep(bucket, 0, self._embed(bucket))
        while level < layer:
            hidden = self._advance(bucket, level, hidden)
            level += 1
            self._keep(bucket, level, hidden)
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

    def _keep(self, bucket: int, level: int, hidden: torch.Tensor) -> torch.Tensor:
        self._inputs.setdefault(bucket, {})[level] = hidden
        self._n_bytes += hidden.nbytes
        while self._n_bytes > self._limit_bytes:
            held = [(len(kept) == 1, x, b) for b, kept in self._inputs.items() for x in kept]
            # a bucket's only input last, what was kept just now after all others
            _, low, other = min(held, key=lambda entry: ((entry[2], entry[1]) == (bucket, level), *entry))
            self._n_bytes -= self._inputs[other].pop(low).nbytes
        return hidden
