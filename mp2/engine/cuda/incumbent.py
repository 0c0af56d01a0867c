"""The incumbent prompt on the device: its keys and values, and the layer inputs that follow from it."""

from __future__ import annotations

import torch

from mp2.engine.cuda.graphs import Graphs
from mp2.engine.cuda.lanes import Lane
from mp2.engine.cuda.pack import Pack
from mp2.engine.cuda.projector import DeviceProjector
from mp2.engine.cuda.runtime import CudaRuntime
from mp2.engine.runtime import Prefix


class Incumbent:
    """``z`` [L', d] on the host, None at first; what follows from it comes to the device at the next launch.

    So `set` and `commit` may be called in a run's thread: they queue nothing. ``prefixes`` (layer -> keys and
    values [1, h, m, d_h]) stay at their addresses, where graphs read them; empty for shallow prompts.
    """

    def __init__(
        self, runtime: CudaRuntime, project: DeviceProjector, graphs: Graphs, n_prefixes: int
    ) -> None:
        """``n_prefixes``: layers that have keys and values, 0 for shallow prompts."""
        self.z: torch.Tensor | None = None
        self.prefixes: dict[int, Prefix] = {}
        self._runtime, self._project, self._graphs = runtime, project, graphs
        self._n_prefixes = n_prefixes
        self._stale: set[int] = set()  # layers whose prefix is not that of z any more
        self._text: dict[int, tuple[int, torch.Tensor]] = {}  # pack -> layer, its input [1, S, H]

    def set(self, z: torch.Tensor) -> None:
        """Take ``z`` [L', d]."""
        self.z = z
        self._text.clear()
        self._stale = set(range(self._n_prefixes))

    def commit(self, layer: int, z: torch.Tensor) -> None:
        """Take ``z`` [d] at ``layer``; inputs of the layers above are void."""
        assert self.z is not None
        self.z[layer] = z
        self._text = {n: (level, x) for n, (level, x) in self._text.items() if level <= layer}
        if layer < self._n_prefixes:
            self._stale.add(layer)

    def refresh(self, lane: Lane) -> None:
        """Bring the prefixes up to date."""
        for layer in sorted(self._stale):
            assert self.z is not None
            new = self._project(layer, lane.upload(self.z[layer : layer + 1]))
            if layer in self.prefixes:
                for old, x in zip(self.prefixes[layer], new, strict=True):
                    old.copy_(x)
            else:
                self.prefixes[layer] = new
            self._stale.discard(layer)

    def text_at(self, number: int, pack: Pack, layer: int) -> torch.Tensor:
        """Return the input of ``layer`` [1, S, H], of pack ``number``."""
        level, hidden = self._text.get(number, (layer + 1, torch.empty(0)))
        if level > layer:
            level, hidden = 0, self._runtime.embed_pack(pack)
        while level < layer:
            i = level
            hidden = self._graphs(
                ("advance", i, number),
                (hidden,),
                lambda held, i=i: self._runtime.packed_layer(i, held[0], pack, self.prefixes[i]),  # type: ignore[misc]
            ).clone()
            level += 1
        self._text[number] = (level, hidden)
        return hidden

    def drop_text(self) -> None:
        """Forget the inputs of layers."""
        self._text.clear()
