"""The few-shot objective on CUDA: whole populations over packs, replayed as CUDA graphs.

Same losses and same methods as `Objective`. What differs is the layout: nothing is padded, a batch is as
many candidates as the free memory and the device's appetite allow (`CudaRuntime.most_tokens`), and a forward
through all the layers of a batch is one graph, from intrinsic prompts to losses. The incumbent's keys and
values and the folded projections stay on the device; candidates go in as [P, d] and P losses come out.

Every evaluation is launched first and fetched afterwards: ``launch_...`` queues it on the objective's lane
(`mp2.engine.cuda.lanes`) and returns at once. Launches belong in one thread, for all objectives of a runtime;
fetching may be done in any. `commit` and `set_incumbent` touch nothing on the device.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from mp2.backbone import Backbone
from mp2.engine.cuda.forward import PackedForward
from mp2.engine.cuda.graphs import Graphs
from mp2.engine.cuda.incumbent import Incumbent
from mp2.engine.cuda.lanes import Lane
from mp2.engine.cuda.pack import Pack, make_packs
from mp2.engine.cuda.runtime import CudaRuntime
from mp2.engine.objective import fused, incumbent_for, intrinsic
from mp2.engine.pending import Pending
from mp2.engine.runtime import check_positions, is_out_of_memory
from mp2.errors import OutOfMemoryError, UsageError
from mp2.prompts import PromptSet

if TYPE_CHECKING:
    from mp2.tasks import MrcInput

LogProbs = tuple[list[np.ndarray], list[np.ndarray]]
T = TypeVar("T")

_POPULATION = 20  # of the memory that a lane is thought to need; another one only changes the number of lanes
_KEPT_SETS = 2  # sets whose log-probabilities are recorded: dev, and perhaps test


class CudaObjective:
    """Losses of candidates on the few-shot training set, and log-probabilities under one prompt.

    See `Objective`, whose public methods and attributes it has. ``graphs`` says what was recorded.
    """

    def __init__(
        self,
        runtime: CudaRuntime,
        backbone: Backbone,
        prompts: PromptSet,
        train: Sequence[MrcInput],
        *,
        micro_batch_tokens: int | None = None,
    ) -> None:
        """Get ready for ``train``; a batch holds at most ``micro_batch_tokens`` (None: as memory allows).

        Raises UsageError without examples, MismatchError for prompts of another backbone, UsageError for
        deep inline prompts.
        """
        if not train:
            raise UsageError("no training examples, expected at least 1; check the task's data and --shots")
        prompts.check_fits(backbone)
        if prompts.kind == "deep" and prompts.meta.injection != "prefix":
            raise UsageError(
                "these deep prompts were trained with inline injection, the CUDA engine has prefixes only: "
                "run them with --device cpu, or give prompts trained with --injection prefix"
            )
        self.runtime = runtime
        self.n_evaluations = 0
        self.seconds = 0.0
        self.micro_batch_tokens = micro_batch_tokens or runtime.most_tokens()
        self.graphs = Graphs(None)
        self._place = torch.device(runtime.device)
        self._lane: Lane | None = None  # taken with the first launch
        self._prompts = prompts
        self._deep = prompts.kind == "deep"
        self._n_inline = prompts.meta.n_inline
        self._max_positions = backbone.config.max_positions
        self._shape = (prompts.z.shape[0], prompts.z.shape[-1])  # L', d
        self._forward = PackedForward(runtime, backbone, prompts)
        self._train = list(train)
        self._packs: list[Pack] = []
        n_prefixes = backbone.config.n_layers if self._deep else 0
        self._incumbent = Incumbent(runtime, self._forward.prefix, self.graphs, n_prefixes)
        self._scored: list[tuple[list[MrcInput], list[Pack]]] = []  # sets of one pack, seen before

    def router_losses(self, routers: np.ndarray) -> np.ndarray:
        """See `Objective.router_losses`."""
        return self.launch_router_losses(routers).fetch()

    def launch_router_losses(self, routers: np.ndarray) -> Pending[np.ndarray]:
        """Begin `router_losses`."""
        return self.launch_full_losses(fused(self._prompts, routers))

    def full_losses(self, z: np.ndarray) -> np.ndarray:
        """See `Objective.full_losses`."""
        return self.launch_full_losses(z).fetch()

    def launch_full_losses(self, z: np.ndarray) -> Pending[np.ndarray]:
        """Begin `full_losses`."""

        def batch(number: int, pack: Pack, part: torch.Tensor) -> torch.Tensor:
            return self.graphs(
                ("full", number, len(part)), (part,), lambda held: self._forward.losses(pack, *held)
            )

        return self._launch(intrinsic(z, ("P", *self._shape)), batch)

    def set_incumbent(self, z: np.ndarray) -> None:
        """See `Objective.set_incumbent`."""
        self._incumbent.set(intrinsic(z, self._shape).clone())

    def layer_losses(self, layer: int, z: np.ndarray) -> np.ndarray:
        """See `Objective.layer_losses`."""
        return self.launch_layer_losses(layer, z).fetch()

    def launch_layer_losses(self, layer: int, z: np.ndarray) -> Pending[np.ndarray]:
        """Begin `layer_losses`."""
        incumbent_for(self._incumbent.z, layer, self._prompts.kind)
        candidates = intrinsic(z, ("P", self._shape[1]))
        if not self._deep:
            return self.launch_full_losses(candidates.unsqueeze(1).numpy())

        def batch(number: int, pack: Pack, part: torch.Tensor) -> torch.Tensor:
            return self.graphs(
                ("visit", layer, number, len(part)),
                (self._incumbent.text_at(number, pack, layer), part),
                lambda held: self._forward.visit(layer, pack, held[0], held[1], self._incumbent.prefixes),
            )

        return self._launch(candidates, batch)

    def commit(self, layer: int, z: np.ndarray) -> None:
        """See `Objective.commit`."""
        incumbent_for(self._incumbent.z, layer, self._prompts.kind)
        self._incumbent.commit(layer, intrinsic(z, (self._shape[1],)))

    def log_probs(self, z: np.ndarray, inputs: Sequence[MrcInput]) -> LogProbs:
        """See `Objective.log_probs`."""
        return self.launch_log_probs(z, inputs).fetch()

    @torch.inference_mode()
    def launch_log_probs(self, z: np.ndarray, inputs: Sequence[MrcInput]) -> Pending[LogProbs]:
        """Begin `log_probs`."""
        prompt = intrinsic(z, self._shape).unsqueeze(0)
        if not inputs:
            return Pending(lambda: ([], []))

        def attempt(lane: Lane) -> list[Any]:
            held = lane.upload(prompt)
            number, packs = self._scored_packs(inputs)
            if number is None:
                return [(pack, lane.send(self._forward.log_probs(pack, held)[0])) for pack in packs]
            (pack,) = packs
            logp = self.graphs(("scored", number), (held,), lambda own: self._forward.log_probs(pack, *own))
            return [(pack, lane.send(logp[0]))]

        sent = self._within_memory(attempt, inputs)

        def fetch() -> LogProbs:
            logps: list[np.ndarray] = [np.empty((0, 2))] * len(inputs)
            for pack, arrive in sent:
                for row, index, length in zip(arrive(), pack.indices, pack.lengths, strict=True):
                    logps[index] = row[:length]
            return [logp[:, 0] for logp in logps], [logp[:, 1] for logp in logps]

        return Pending(fetch)

    def batches(self, population: int) -> dict[str, Any]:
        """How a population is cut up, for people."""
        packs = self._make_packs(self._train)
        return {
            "population": population,
            "groups": len(packs),
            "batches": sum(len(self._chunks(population, pack)) for pack in packs),
            "batch_tokens": self.micro_batch_tokens,
            "padding": 0.0,
        }

    def most_lanes(self) -> int:
        """Return how many runs like this one the device's free memory holds side by side."""
        tokens = sum(len(x.input_ids) + self._n_inline for x in self._train)
        return self.runtime.most_lanes(min(self.micro_batch_tokens, _POPULATION * tokens))

    def leave_lane(self) -> None:
        """See `Member.leave_lane`."""
        self._lane = None
        self._forget()

    @torch.inference_mode()
    def _launch(
        self, candidates: torch.Tensor, batch: Callable[[int, Pack, torch.Tensor], torch.Tensor]
    ) -> Pending[np.ndarray]:
        """Begin the mean losses [P] of ``batch`` over all packs and chunks of candidates."""
        started = time.perf_counter()
        if not len(candidates):
            return Pending(lambda: np.empty(0))

        def attempt(lane: Lane) -> list[Any]:
            placed = lane.upload(candidates)
            self._packs = self._packs or self._make_packs(self._train)
            return [
                (chunk, pack, lane.send(batch(number, pack, placed[chunk])))
                for number, pack in enumerate(self._packs)
                for chunk in self._chunks(len(candidates), pack)
            ]

        sent = self._within_memory(attempt, self._train)

        def fetch() -> np.ndarray:
            ce = np.empty((len(candidates), len(self._train)))
            for chunk, pack, arrive in sent:
                ce[chunk, pack.indices] = arrive()
            losses: np.ndarray = ce.mean(axis=1)
            self.seconds += time.perf_counter() - started
            self.n_evaluations += len(losses)
            return losses

        return Pending(fetch)

    def _scored_packs(self, inputs: Sequence[MrcInput]) -> tuple[int | None, list[Pack]]:
        """Return the packs of ``inputs``, and a number if they are one pack that may come again."""
        for number, (known, packs) in enumerate(self._scored):
            if len(known) == len(inputs) and all(a is b for a, b in zip(known, inputs, strict=True)):
                return number, packs
        packs = self._make_packs(inputs)
        if len(packs) > 1 or len(self._scored) >= _KEPT_SETS:
            return None, packs
        self._scored.append((list(inputs), packs))
        return len(self._scored) - 1, packs

    def _make_packs(self, inputs: Sequence[MrcInput]) -> list[Pack]:
        check_positions(max(len(x.input_ids) for x in inputs), self._n_inline, self._max_positions)
        return make_packs(
            inputs, limit_tokens=self.micro_batch_tokens, n_inline=self._n_inline, device=self._place
        )

    def _chunks(self, n_candidates: int, pack: Pack) -> list[slice]:
        """Return even slices of the candidates, each within the tokens of a batch."""
        at_most = max(1, self.micro_batch_tokens // pack.n_slots)
        n_parts = -(-n_candidates // at_most)
        edges = [n_candidates * k // n_parts for k in range(n_parts + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(edges)]

    def _forget(self) -> None:
        """Drop what can be made again."""
        self._packs, self._scored = [], []
        self._incumbent.drop_text()
        self.graphs.restart(None if self._lane is None else self._lane.record)

    def _within_memory(self, attempt: Callable[[Lane], T], inputs: Sequence[MrcInput]) -> T:
        """Return ``attempt(lane)``, on one lane for all, then with halved batches, once memory runs out."""
        longest = max(len(x.input_ids) for x in inputs) + self._n_inline
        while True:
            if self._lane is None:
                self._lane = self.runtime.lanes.take(self)
                self.graphs.restart(self._lane.record)
            try:
                with self._lane.queue():
                    self._incumbent.refresh(self._lane)
                    return attempt(self._lane)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self.micro_batch_tokens <= longest and self.runtime.lanes.n_lanes < 2:
                    raise OutOfMemoryError(
                        f"one example of {longest} tokens does not fit the memory of {self.runtime.device} "
                        f"with runtime '{self.runtime.name}'; shorten the examples (--max-tokens) or use "
                        "another device"
                    ) from error
            if self.runtime.lanes.merge():  # no more than that: alone, batches would be as large
                continue
            self.micro_batch_tokens = max(longest, self.micro_batch_tokens // 2)
            self._forget()
            self.runtime.lanes.free_memory()
