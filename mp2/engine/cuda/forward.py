"""Forwards of populations over packs, replayed as CUDA graphs.

Nothing is padded; a batch is as many candidates as the free memory and the device's appetite allow
(`CudaBackend.most_tokens`); a forward through all the layers of a batch is one graph, from intrinsic prompts
to the head's outputs. The incumbent's keys and values and the folded projections stay on the device.

Work is queued on this forward's lane (`mp2.engine.cuda.lanes`) and not waited for. All of it is queued in one
thread, for all forwards of a backend; what arrives may be fetched in any. `set_incumbent` and `commit` touch
nothing on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from mp2.backbone.encoder import Prefix
from mp2.engine.cuda.lanes import Lane
from mp2.engine.cuda.pack import Pack, PackedStates, make_packs
from mp2.engine.cuda.replays import Graphs
from mp2.engine.forward import Arrival, Batch, Evaluation, Forward
from mp2.heads import Head
from mp2.prompts import PromptSet

if TYPE_CHECKING:
    from mp2.engine.cuda.backend import CudaBackend
    from mp2.tasks import MrcInput


T = TypeVar("T")


class _Overflow(Exception):
    """The first evaluation gives NaN for candidates that are numbers."""


class PackedForward(Forward):
    """`Forward` over packs. ``graphs`` says what was recorded."""

    queues = True

    def __init__(
        self,
        backend: CudaBackend,
        prompts: PromptSet,
        head: Head | None,
        micro_batch_tokens: int,
        cache_bytes: int,
    ) -> None:
        super().__init__(backend, prompts, head, micro_batch_tokens, cache_bytes)
        self.graphs = Graphs(None)
        self.project = backend.projector(prompts)
        self._placeholders: torch.Tensor | None = None  # word embeddings [1, m, H] that prompts are added to
        if prompts.meta.on_placeholders:
            words = backend.backbone.encoder.placeholders(prompts.meta.prompt_tokens).detach()
            self._placeholders = words.to(backend.device, torch.float32)
        self._packed = backend
        self._lane: Lane | None = None  # taken with the first work
        self._proven = False  # an evaluation has been looked at
        # layer -> keys and values [1, h, m, d_h] of the incumbent, at the addresses where graphs read them
        self._incumbent: dict[int, Prefix] = {}
        backend.settle()

    def queue(self) -> AbstractContextManager[Any]:
        """See `Forward.queue`."""
        if self._lane is None:
            self._lane = self._packed.lanes.take(self)
            self.graphs.restart(self._lane.record)
        return self._lane.queue()

    def every_layer(self, z: torch.Tensor, *, scoring: bool = False) -> Evaluation:
        """See `Forward.every_layer`."""
        placed, finite = self._on_lane.upload(z), z.isfinite().flatten(1).all(1)

        def work(pack: Pack, z: torch.Tensor) -> torch.Tensor:
            inline = None if self.prefixed else self.project.inline(z[:, 0])
            hidden = self._packed.embed_pack(pack, inline, self._placeholders)
            for i in range(self.n_layers):
                own = self.project.keys_values(i, z[:, i]) if self.prefixed else None
                hidden = self._packed.packed_layer(i, hidden, pack, own)
            return self._read(hidden, pack, scoring)

        def run(batch: Batch, candidates: slice, *, again: bool = True) -> Arrival:
            part, pack = placed[candidates], _pack(batch)
            if not again:
                return self._send(work(pack, part), finite[candidates])
            key = ("scored" if scoring else "full", batch, len(part))
            return self._send(self.graphs(key, (part,), lambda held: work(pack, *held)), finite[candidates])

        return run

    def visit(self, layer: int, z: torch.Tensor) -> Evaluation:
        """See `Forward.visit`."""
        placed, finite = self._on_lane.upload(z), z.isfinite().all(1)

        def run(batch: Batch, candidates: slice, *, again: bool = True) -> Arrival:
            part, pack = placed[candidates], _pack(batch)

            def work(held: tuple[torch.Tensor, ...]) -> torch.Tensor:
                text, own = held
                hidden = self._packed.packed_layer(layer, text, pack, self.project.keys_values(layer, own))
                for i in range(layer + 1, self.n_layers):
                    hidden = self._packed.packed_layer(i, hidden, pack, self._incumbent[i])
                return self._read(hidden, pack, scoring=False)

            text = self.cache.at(batch, layer)
            found = self.graphs(("visit", layer, batch, len(part)), (text, part), work)
            return self._send(found, finite[candidates])

        return run

    def embed(self, batch: Batch) -> torch.Tensor:
        """See `Forward.embed`."""
        return self._packed.embed_pack(_pack(batch))

    def advance(self, batch: Batch, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """See `Forward.advance`."""
        pack = _pack(batch)

        def work(held: tuple[torch.Tensor, ...]) -> torch.Tensor:
            return self._packed.packed_layer(layer, held[0], pack, self._incumbent[layer])

        return self.graphs(("advance", layer, batch), (hidden,), work).clone()

    def within_memory(self, attempt: Callable[[], T], longest: int) -> T:
        """See `Forward.within_memory`; the first evaluation may change the backend's precision.

        An infinity inside a layer is NaN after its norm, and in all that follows.
        """
        try:
            found = super().within_memory(attempt, longest)
        except _Overflow:
            self._packed.widen()
            found = super().within_memory(attempt, longest)
        self._proven = True
        return found

    def begin_again(self) -> None:
        """Drop all that was computed in another precision."""
        self.forget()
        self.project = self._packed.projector(self.prompts)
        self._incumbent.clear()
        self._stale = set(range(self.n_layers)) if self.prefixed and self.incumbent is not None else set()

    def leave_lane(self) -> None:
        """See `Member.leave_lane`."""
        self._lane = None
        self.forget()

    def forget(self) -> None:
        """See `Forward.forget`."""
        super().forget()
        self.graphs.restart(None if self._lane is None else self._lane.record)

    def _send(self, output: torch.Tensor, finite: torch.Tensor) -> Arrival:
        """Send ``output`` [p or 1, ...] of candidates of which ``finite`` [p] (on the host) are numbers."""
        if not self._proven and self._packed.wider is not None:
            overflowed = output.isnan().flatten(1).any(1).cpu()
            if bool((overflowed & finite).any()):
                raise _Overflow
        return self._on_lane.send(output)

    @property
    def _on_lane(self) -> Lane:
        assert self._lane is not None
        return self._lane

    def _batches(self, inputs: Sequence[MrcInput], n_candidates: int) -> list[Pack]:
        return make_packs(
            inputs,
            self.head.targets(inputs),
            limit_tokens=self.micro_batch_tokens,
            n_inline=self.n_inline,
            device=torch.device(self.backend.device),
        )

    def _hold(self, layer: int, z: torch.Tensor) -> None:
        new = self.project.keys_values(layer, self._on_lane.upload(z))
        if layer not in self._incumbent:
            self._incumbent[layer] = new
            return
        for old, x in zip(self._incumbent[layer], new, strict=True):
            old.copy_(x)

    def _read(self, hidden: torch.Tensor, pack: Pack, scoring: bool) -> torch.Tensor:
        states = PackedStates(hidden, pack)
        return self.head.scoring_outputs(states) if scoring else self.head.training_outputs(states)

    def _shares(self) -> bool:
        return self._packed.lanes.n_lanes > 1

    def _stop_sharing(self) -> bool:
        return self._packed.lanes.merge()  # no more than that: alone, batches would be as large

    def _free_memory(self) -> None:
        self._packed.lanes.free_memory()


def _pack(batch: Batch) -> Pack:
    assert isinstance(batch, Pack)
    return batch
