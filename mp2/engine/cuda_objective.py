"""The few-shot objective on CUDA: whole populations over packs, replayed as CUDA graphs.

Same losses and same methods as `Objective`. What differs is the layout: nothing is padded, a batch is as
many candidates as the free memory and the device's appetite allow (`CudaRuntime.most_tokens`), and a forward
through all the layers of a batch is one graph. The incumbent's keys and values and the folded projections
stay on the device; candidates go in as [P, d] and P losses come out.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mp2.backbone import Backbone
from mp2.engine.cuda_graphs import CudaRecorder, Graphs, Recorder, Tensors
from mp2.engine.cuda_pack import Pack, make_packs
from mp2.engine.cuda_projector import DeviceProjector
from mp2.engine.cuda_runtime import CudaRuntime
from mp2.engine.objective import incumbent_for, intrinsic
from mp2.engine.runtime import Prefix, is_out_of_memory
from mp2.errors import OutOfMemoryError, UsageError
from mp2.prompts import PromptSet

if TYPE_CHECKING:
    from mp2.tasks import MrcInput


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
        record: Recorder | None = None,
    ) -> None:
        """Get ready for ``train``; a batch holds at most ``micro_batch_tokens`` (None: as memory allows).

        ``record`` None: CUDA graphs on CUDA, none elsewhere. Raises UsageError without examples,
        MismatchError for prompts of another backbone, UsageError
        for deep inline prompts.
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
        self._place = torch.device(runtime.device)
        if record is None and self._place.type == "cuda":
            record = CudaRecorder(self._place)
        self.graphs = Graphs(record)
        self.micro_batch_tokens = micro_batch_tokens or runtime.most_tokens()
        self._prompts = prompts
        self._n_layers = backbone.config.n_layers
        self._deep = prompts.kind == "deep"
        self._n_inline = prompts.meta.n_inline
        self._shape = (prompts.z.shape[0], prompts.z.shape[-1])  # L', d
        self._projector = DeviceProjector(backbone, prompts, self._place, runtime.dtype)
        self._span = tuple(
            x.detach().to(self._place, torch.float32) for x in (prompts.span_weight, prompts.span_bias)
        )
        self._train = list(train)
        self._packs: list[Pack] = []
        self._z: torch.Tensor | None = None  # the incumbent, [L', d]
        self._incumbent: dict[int, Prefix] = {}  # at fixed addresses: graphs read them
        self._text: dict[int, tuple[int, torch.Tensor]] = {}  # pack -> layer, its input [1, S, H]

    def router_losses(self, routers: np.ndarray) -> np.ndarray:
        """See `Objective.router_losses`."""
        fused = self._prompts.fuse(torch.from_numpy(np.asarray(routers)))
        return self.full_losses(fused.detach().numpy())

    def full_losses(self, z: np.ndarray) -> np.ndarray:
        """See `Objective.full_losses`."""
        candidates = intrinsic(z, ("P", *self._shape))

        def batch(number: int, pack: Pack, part: torch.Tensor) -> torch.Tensor:
            inputs = self._prompt_inputs(part)
            return self.graphs(
                ("full", number, len(part)), inputs, lambda held: self._every_layer(pack, held)
            )

        return self._losses(candidates, batch)

    def set_incumbent(self, z: np.ndarray) -> None:
        """See `Objective.set_incumbent`."""
        self._z = intrinsic(z, self._shape).clone()
        self._text.clear()
        if self._deep:
            for layer in range(self._n_layers):
                self._hold(layer)

    def layer_losses(self, layer: int, z: np.ndarray) -> np.ndarray:
        """See `Objective.layer_losses`."""
        incumbent_for(self._z, layer, self._prompts.kind)
        candidates = intrinsic(z, ("P", self._shape[1]))
        if not self._deep:
            return self.full_losses(candidates.unsqueeze(1).numpy())

        def batch(number: int, pack: Pack, part: torch.Tensor) -> torch.Tensor:
            inputs = (self._text_at(number, pack, layer), *self._projector(layer, part))
            return self.graphs(
                ("visit", layer, number, len(part)),
                inputs,
                lambda held: self._layers_above(layer, pack, held),
            )

        return self._losses(candidates, batch)

    def commit(self, layer: int, z: np.ndarray) -> None:
        """See `Objective.commit`."""
        incumbent = incumbent_for(self._z, layer, self._prompts.kind)
        incumbent[layer] = intrinsic(z, (self._shape[1],))
        self._text = {n: (level, x) for n, (level, x) in self._text.items() if level <= layer}
        if self._deep:
            self._hold(layer)

    @torch.inference_mode()
    def log_probs(
        self, z: np.ndarray, inputs: Sequence[MrcInput]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """See `Objective.log_probs`."""
        held = self._prompt_inputs(intrinsic(z, self._shape).unsqueeze(0))

        def attempt() -> list[np.ndarray]:
            logps: list[np.ndarray] = [np.empty((0, 2))] * len(inputs)
            for pack in self._make_packs(inputs):
                found = self._log_probs(pack, self._forward(pack, held))[0].cpu().numpy()
                for row, index, length in zip(found, pack.indices, pack.lengths, strict=True):
                    logps[index] = row[:length]
            return logps

        logps = self._within_memory(attempt, inputs)
        return [logp[:, 0] for logp in logps], [logp[:, 1] for logp in logps]

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

    # What a batch computes; everything here can be recorded.

    def _every_layer(self, pack: Pack, held: Tensors) -> torch.Tensor:
        return self._cross_entropy(pack, self._forward(pack, held))

    def _forward(self, pack: Pack, held: Tensors) -> torch.Tensor:
        """Return the last hidden states [P, S, H] under prompt inputs (see `_prompt_inputs`)."""
        runtime = self.runtime
        if self._deep:
            keys, values = held  # [L, P, h, m, d_h]
            hidden = runtime.embed_pack(pack)
            for i in range(self._n_layers):
                hidden = runtime.packed_layer(i, hidden, pack, (keys[i], values[i]))
            return hidden
        hidden = runtime.embed_pack(pack, held[0])
        for i in range(self._n_layers):
            hidden = runtime.packed_layer(i, hidden, pack, None)
        return hidden

    def _layers_above(self, layer: int, pack: Pack, held: Tensors) -> torch.Tensor:
        text, keys, values = held
        hidden = self.runtime.packed_layer(layer, text, pack, (keys, values))
        for i in range(layer + 1, self._n_layers):
            hidden = self.runtime.packed_layer(i, hidden, pack, self._incumbent[i])
        return self._cross_entropy(pack, hidden)

    def _log_probs(self, pack: Pack, hidden: torch.Tensor) -> torch.Tensor:
        return self.runtime.packed_log_probs(hidden, pack, self._span[0], self._span[1])

    @torch.inference_mode()
    def _cross_entropy(self, pack: Pack, hidden: torch.Tensor) -> torch.Tensor:
        """Return [P, n] float64: (CE of the start + CE of the end) / 2."""
        logp = self._log_probs(pack, hidden)
        gold = torch.stack([pack.start, pack.end], -1).view(1, -1, 1, 2).expand(len(logp), -1, -1, -1)
        return -logp.gather(2, gold).squeeze(2).mean(-1)

    # Cutting up, and what is kept on the device.

    @torch.inference_mode()
    def _losses(
        self, candidates: torch.Tensor, batch: Callable[[int, Pack, torch.Tensor], torch.Tensor]
    ) -> np.ndarray:
        """Return the mean losses [P] of ``batch`` over all packs and chunks of candidates."""
        started = time.perf_counter()

        def attempt() -> np.ndarray:
            self._packs = self._packs or self._make_packs(self._train)
            ce = np.empty((len(candidates), len(self._train)))
            for number, pack in enumerate(self._packs):
                for chunk in self._chunks(len(candidates), pack):
                    ce[chunk, pack.indices] = batch(number, pack, candidates[chunk]).cpu().numpy()
            return ce

        losses: np.ndarray = self._within_memory(attempt, self._train).mean(axis=1)
        self.seconds += time.perf_counter() - started
        self.n_evaluations += len(losses)
        return losses

    def _prompt_inputs(self, z: torch.Tensor) -> Tensors:
        """Return what a forward through all layers takes in for ``z`` [P, L', d]."""
        if not self._deep:
            return (self._projector.inline(z[:, 0]),)
        pairs = [self._projector(i, z[:, i]) for i in range(self._n_layers)]
        return torch.stack([keys for keys, _ in pairs]), torch.stack([values for _, values in pairs])

    def _text_at(self, number: int, pack: Pack, layer: int) -> torch.Tensor:
        """Return the input of ``layer`` under the incumbent, [1, S, H]."""
        level, hidden = self._text.get(number, (layer + 1, torch.empty(0)))
        if level > layer:
            level, hidden = 0, self.runtime.embed_pack(pack)
        while level < layer:
            i = level
            hidden = self.graphs(
                ("advance", i, number),
                (hidden,),
                lambda held, i=i: self.runtime.packed_layer(i, held[0], pack, self._incumbent[i]),  # type: ignore[misc]
            ).clone()
            level += 1
        self._text[number] = (level, hidden)
        return hidden

    @torch.inference_mode()
    def _hold(self, layer: int) -> None:
        assert self._z is not None
        new = self._projector(layer, self._z[layer : layer + 1])
        if layer in self._incumbent:
            for old, x in zip(self._incumbent[layer], new, strict=True):
                old.copy_(x)
        else:
            self._incumbent[layer] = new

    def _make_packs(self, inputs: Sequence[MrcInput]) -> list[Pack]:
        return make_packs(
            inputs, limit_tokens=self.micro_batch_tokens, n_inline=self._n_inline, device=self._place
        )

    def _chunks(self, n_candidates: int, pack: Pack) -> list[slice]:
        """Return even slices of the candidates, each within the tokens of a batch."""
        at_most = max(1, self.micro_batch_tokens // pack.n_slots)
        n_parts = -(-n_candidates // at_most)
        edges = [n_candidates * k // n_parts for k in range(n_parts + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(edges)]

    def _within_memory(self, attempt: Callable[[], Any], inputs: Sequence[MrcInput]) -> Any:
        """Return ``attempt()``, with batches halved, and kept so, whenever memory runs out."""
        longest = max(len(x.input_ids) for x in inputs) + self._n_inline
        while True:
            try:
                return attempt()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self.micro_batch_tokens <= longest:
                    raise OutOfMemoryError(
                        f"one example of {longest} tokens does not fit the memory of {self.runtime.device} "
                        f"with runtime '{self.runtime.name}'; shorten the examples (--max-tokens) or use "
                        "another device"
                    ) from error
            self.micro_batch_tokens = max(longest, self.micro_batch_tokens // 2)
            self._packs, self._text = [], {}
            self.graphs.clear()
            if self._place.type == "cuda":
                torch.cuda.empty_cache()
