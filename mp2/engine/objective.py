"""The few-shot objective: losses of whole populations of prompts, by the shortest exact way.

A loss is the mean over the training examples of (CE of the start + CE of the end) / 2, each over the
example's real token positions. What makes it fast changes no loss: deep prompts enter as prefixes; while
one layer is under visit only it and the layers above run, from cached inputs; all candidates run at once
over buckets of equal length; what is the same for all candidates (the text's projections and attention at
the layer under visit) or for all examples (the prefixes) is computed once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from mp2.backbone import Backbone
from mp2.engine.batches import Bucket, make_buckets
from mp2.engine.cache import ActivationCache
from mp2.engine.forward import PopulationForward
from mp2.engine.runtime import Prefix, Runtime
from mp2.errors import UsageError
from mp2.prompts import PromptSet

if TYPE_CHECKING:
    from mp2.tasks import MrcInput

CACHE_BYTES = 2 << 30
_PREFIX_BYTES = 512 << 20  # keys and values of all layers held at once; more candidates take turns
_POPULATION = 20  # the cache's buckets suit the paper's population; another one only changes the time


class Objective:
    """Losses of candidates on the few-shot training set, and log-probabilities under one prompt.

    ``n_evaluations`` counts candidates, each on the whole training set (the paper's forward computes);
    ``seconds`` is the time spent on them. Deterministic: the same call returns the same bits. NaN and
    infinite losses are returned as they are.
    """

    def __init__(
        self,
        runtime: Runtime,
        backbone: Backbone,
        prompts: PromptSet,
        train: Sequence[MrcInput],
        *,
        micro_batch_tokens: int | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Get ready for ``train``; a batch holds at most ``micro_batch_tokens`` (None: as suits the device).

        Raises UsageError without examples or for deep inline prompts on TensorRT, MismatchError for prompts
        of another backbone.
        """
        if not train:
            raise UsageError("no training examples, expected at least 1; check the task's data and --shots")
        prompts.check_fits(backbone)
        if prompts.kind == "deep" and prompts.meta.injection != "prefix" and runtime.name == "tensorrt":
            raise UsageError(
                "these deep prompts were trained with inline injection, TensorRT plans have prefixes only: "
                "run them with --runtime torch, or give prompts trained with --injection prefix"
            )
        self.runtime = runtime
        self.n_evaluations = 0
        self.seconds = 0.0
        self._backbone = backbone
        self._prompts = prompts
        self._shape = (prompts.z.shape[0], prompts.z.shape[-1])  # L', d
        self._forward = PopulationForward(runtime, backbone, prompts, micro_batch_tokens, self._give_back)
        self._train = list(train)
        self._buckets: dict[int, list[Bucket]] = {}
        self._z: torch.Tensor | None = None  # the incumbent, [L', d]
        self._incumbent: dict[int, Prefix] = {}
        self._cached_buckets = self._make_buckets(self._train, _POPULATION)
        self._cache = ActivationCache(self._advance, self._embed, cache_bytes)

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens a batch may hold now."""
        return self._forward.micro_batch_tokens

    def router_losses(self, routers: np.ndarray) -> np.ndarray:
        """Return float64 [P] losses of the prompts fused by ``routers`` [P, L', K] bool (stage I, eq. 1).

        Raises UsageError for routers of another shape.
        """
        return self.full_losses(fused(self._prompts, routers))

    def full_losses(self, z: np.ndarray) -> np.ndarray:
        """Return float64 [P] losses of intrinsic prompts ``z`` [P, L', d], with every layer run."""
        candidates = intrinsic(z, ("P", *self._shape))
        started = time.perf_counter()
        ce = np.empty((len(candidates), len(self._train)))
        for chunk in self._chunks(len(candidates)):
            part = candidates[chunk]
            run = self._forward.every_layer(part)
            for bucket in self._buckets_for(len(part)):
                ce[chunk, bucket.indices] = self._forward.cross_entropy(run, bucket, len(part))
        return self._finish(ce, started)

    def set_incumbent(self, z: np.ndarray) -> None:
        """Take ``z`` [L', d] as the prompt that `layer_losses` varies one layer of; drops the cache."""
        self._z = intrinsic(z, self._shape).clone()
        self._incumbent.clear()
        self._cache.clear()

    def layer_losses(self, layer: int, z: np.ndarray) -> np.ndarray:
        """Return float64 [P] losses when ``layer`` takes ``z[p]`` [P, d] and all others keep the incumbent.

        Shallow prompts have one layer, 0. For inline prompts, deep or shallow, the whole encoder runs. Raises
        UsageError without an incumbent.
        """
        incumbent = incumbent_for(self._z, layer, self._prompts.kind)
        candidates = intrinsic(z, ("P", self._shape[1]))
        if not self._forward.prefixed:
            whole = incumbent.repeat(len(candidates), 1, 1)
            whole[:, layer] = candidates
            return self.full_losses(whole.numpy())
        started = time.perf_counter()
        ce = np.empty((len(candidates), len(self._train)))
        for chunk in self._chunks(len(candidates)):
            population = self._forward.population(candidates[chunk])
            prefix = self._forward.prefix(layer, population.z)
            for number, bucket in enumerate(self._cached_buckets):
                text = self._cache.at(number, layer)
                run = self._forward.layers_above(layer, text, population, prefix, self._incumbent_prefix)
                ce[chunk, bucket.indices] = self._forward.cross_entropy(run, bucket, population.n_candidates)
        return self._finish(ce, started)

    def commit(self, layer: int, z: np.ndarray) -> None:
        """Make ``z`` [d] the incumbent's prompt of ``layer``; drops the cached inputs of the layers above."""
        incumbent = incumbent_for(self._z, layer, self._prompts.kind)
        incumbent[layer] = intrinsic(z, (self._shape[1],))
        self._incumbent.pop(layer, None)
        self._cache.drop_above(layer)

    def log_probs(
        self, z: np.ndarray, inputs: Sequence[MrcInput]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return float64 start and end log-probabilities, [T] each, of ``inputs`` in their order under ``z``.

        ``z`` is [L', d]. Not counted in ``n_evaluations`` and ``seconds``.
        """
        run = self._forward.every_layer(intrinsic(z, self._shape).unsqueeze(0))
        logps: list[np.ndarray] = [np.empty((0, 2))] * len(inputs)
        for bucket in self._make_buckets(inputs, 1):
            for _, examples, logp in self._forward.log_probs(run, bucket, 1):
                for row, k in zip(logp[0].cpu().numpy(), range(examples.start, examples.stop), strict=True):
                    logps[bucket.indices[k]] = row[: bucket.lengths[k]]
        return [logp[:, 0] for logp in logps], [logp[:, 1] for logp in logps]

    def _incumbent_prefix(self, layer: int) -> Prefix:
        if layer not in self._incumbent:
            z = incumbent_for(self._z, layer, self._prompts.kind)
            self._incumbent[layer] = self._forward.prefix(layer, z[layer : layer + 1])
        return self._incumbent[layer]

    def _give_back(self) -> bool:
        given = self._cache.give_back()
        if given and torch.device(self.runtime.device).type == "cuda":
            torch.cuda.empty_cache()  # not every runtime allocates through torch
        return given

    def _embed(self, number: int) -> torch.Tensor:
        return self.runtime.embed(self._cached_buckets[number].input_ids)

    def _advance(self, number: int, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        return self.runtime.layer(
            layer, hidden, self._cached_buckets[number].mask, self._incumbent_prefix(layer)
        )

    def _make_buckets(self, inputs: Sequence[MrcInput], n_candidates: int) -> list[Bucket]:
        return make_buckets(
            inputs,
            n_candidates=n_candidates,
            limit_tokens=self.micro_batch_tokens,
            pad_id=self._backbone.tokenizer.pad_id,
            device=self.runtime.device,
        )

    def _buckets_for(self, n_candidates: int) -> list[Bucket]:
        if n_candidates not in self._buckets:
            self._buckets[n_candidates] = self._make_buckets(self._train, n_candidates)
        return self._buckets[n_candidates]

    def _chunks(self, n_candidates: int) -> list[slice]:
        meta = self._prompts.meta
        floats = 2 * meta.n_layers * meta.prompt_tokens * meta.hidden
        step = max(1, _PREFIX_BYTES // (4 * floats))
        return [slice(a, min(a + step, n_candidates)) for a in range(0, n_candidates, step)]

    def _finish(self, ce: np.ndarray, started: float) -> np.ndarray:
        losses: np.ndarray = ce.mean(axis=1)  # float64, examples in their own order, whatever the buckets
        self.seconds += time.perf_counter() - started
        self.n_evaluations += len(ce)
        return losses


def fused(prompts: PromptSet, routers: np.ndarray) -> np.ndarray:
    """Return intrinsic prompts [P, L', d] fused by ``routers`` [P, L', K]; UsageError for other shapes."""
    weights = torch.from_numpy(np.asarray(routers))
    if weights.dim() != 3:
        raise UsageError(f"routers have shape {tuple(weights.shape)}, expected (P, L', K)")
    z: np.ndarray = prompts.fuse(weights).detach().numpy()
    return z


def incumbent_for(z: torch.Tensor | None, layer: int, kind: str) -> torch.Tensor:
    """Return the incumbent ``z`` [L', d]; ``UsageError`` where there is none, or no such layer."""
    if z is None:
        raise UsageError("no incumbent prompt yet; call set_incumbent(z) first")
    if not 0 <= layer < len(z):
        raise UsageError(f"layer {layer}, expected 0 to {len(z) - 1} for {kind} prompts")
    return z


def intrinsic(z: np.ndarray, shape: tuple[int | str, ...]) -> torch.Tensor:
    """Return intrinsic prompts as float32; ``UsageError`` unless of ``shape``, in which "P" is any number."""
    got = tuple(np.shape(z))
    if len(got) != len(shape) or any(s != g for s, g in zip(shape, got, strict=True) if s != "P"):
        expected = ", ".join(map(str, shape))
        raise UsageError(f"intrinsic prompts z have shape {got}, expected ({expected})")
    return torch.from_numpy(np.ascontiguousarray(z, dtype=np.float32))
