"""Forwards of populations of prompts through the layers, in micro-batches that fit the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from mp2.backbone import Backbone, BackboneConfig, Layer, add_to_rows
from mp2.engine.batches import Bucket, pieces
from mp2.engine.cpu.int8_runtime import Int8Runtime
from mp2.engine.cuda.projector import DeviceProjector
from mp2.engine.runtime import Prefix, Runtime, is_out_of_memory
from mp2.errors import OutOfMemoryError
from mp2.prompts import PrefixProjector, PromptSet

Run = Callable[[slice, slice, "torch.Tensor | None", Bucket], torch.Tensor]
"""(candidates, examples, mask of these examples, bucket) -> last hidden states [p, n, T, H]."""

_GPU_TOKENS = 65536  # enough to hide launches
_CPU_TOKENS = 2048  # enough to fill the cores, few enough that a feed-forward stays in the last-level cache
_NARROW_FFN = 1024  # up to here twice as many do, and calls are short enough for their overhead to show


def usual_micro_batch_tokens(runtime: Runtime, config: BackboneConfig) -> int:
    """Return the tokens of a micro-batch, before memory says otherwise."""
    if torch.device(runtime.device).type != "cpu":
        return _GPU_TOKENS
    tokens = _CPU_TOKENS * (2 if config.ffn <= _NARROW_FFN else 1)
    # more of int8's calls are short, and its reference, which is not int8, should be a small share
    return tokens * (2 if isinstance(runtime, Int8Runtime) else 1)


@dataclass(frozen=True)
class Population:
    """P candidates' intrinsic prompts, behind the reference that precision int8 computes them against."""

    z: torch.Tensor  # [P or 1 + P, ...]
    n_references: int  # 0 or 1

    @property
    def n_candidates(self) -> int:
        """P."""
        return len(self.z) - self.n_references

    def part(self, x: torch.Tensor, candidates: slice) -> torch.Tensor:
        """Return the rows of ``x`` [P or 1 + P, ...] of the reference, if any, and some candidates."""
        own = x[self.n_references :][candidates]
        return torch.cat([x[: self.n_references], own]) if self.n_references else own


class PopulationForward:
    """Runs candidates over buckets.

    When memory runs out, what ``give_back`` can is given back first; then ``micro_batch_tokens`` is halved,
    and kept so.
    """

    def __init__(
        self,
        runtime: Runtime,
        backbone: Backbone,
        prompts: PromptSet,
        micro_batch_tokens: int | None,
        give_back: Callable[[], bool] = lambda: False,
    ) -> None:
        """Run ``prompts``' kind of candidates on ``runtime``; None: the device's usual micro-batch.

        ``give_back`` frees memory that its owner can do without, and says whether there was any.
        """
        self.runtime = runtime
        self._give_back = give_back
        self.micro_batch_tokens = micro_batch_tokens or usual_micro_batch_tokens(runtime, backbone.config)
        self.prefixed = prompts.meta.injection == "prefix"
        self.n_inline = prompts.meta.n_inline
        self._added = prompts.kind == "deep" and not self.prefixed
        self._config = backbone.config
        self._encoder = backbone.encoder
        self._projector = PrefixProjector(backbone.encoder, prompts)
        self._on_device: DeviceProjector | None = None
        place = torch.device(runtime.device)
        if place.type != "cpu":  # where the host would take longer than the device takes for its layers
            self._on_device = DeviceProjector(backbone, prompts, place, torch.float32, lambda: None)
        self._last: list[tuple[torch.Tensor, torch.Tensor]] = []  # the last layer's key and value weights
        self._span = (prompts.span_weight.detach().float(), prompts.span_bias.detach().float())

    def population(self, z: torch.Tensor) -> Population:
        """Return candidates ``z`` [P, ...] as this runtime wants them.

        The reference is the mean of the finite ones. A single candidate needs none: it runs in float32.
        """
        if len(z) == 1 or not isinstance(self.runtime, Int8Runtime):
            return Population(z, 0)
        finite = z[torch.isfinite(z).flatten(1).all(1)]
        reference = finite.mean(0) if len(finite) else torch.zeros_like(z[0])
        return Population(torch.cat([reference.unsqueeze(0), z]), 1)

    def prefix(self, layer: int, z: torch.Tensor) -> Prefix:
        """Return the keys and values [P, 1, h, m, d_h] of intrinsic prompts ``z`` [P, d] at ``layer``."""
        if self._on_device is not None:
            try:
                keys, values = self._on_device(layer, z)
                return keys.unsqueeze(1), values.unsqueeze(1)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._on_device = None  # all layers' folded projections do not fit beside the rest
        keys, values = (x.detach().to(self.runtime.device) for x in self._projector.keys_values(layer, z))
        return keys.unsqueeze(1), values.unsqueeze(1)

    def every_layer(self, z: torch.Tensor) -> Run:
        """Return the forward of candidates ``z`` [P, L', d] through all layers."""
        population = self.population(z)
        return self._prefix_run(population) if self.prefixed else self._inline_run(population)

    def layers_above(
        self,
        layer: int,
        text: torch.Tensor,
        population: Population,
        prefix: Prefix,
        prefixes_above: Callable[[int], Prefix],
    ) -> Run:
        """Return the forward from ``layer``, whose input is ``text`` [1, N, T, H], to the last.

        ``prefix`` is the ``population``'s at ``layer``; layers above have ``prefixes_above(layer)``.
        """

        def run(
            candidates: slice, examples: slice, mask: torch.Tensor | None, bucket: Bucket
        ) -> torch.Tensor:
            own = population.part(prefix[0], candidates), population.part(prefix[1], candidates)
            hidden = self.runtime.layer(layer, text[:, examples], mask, own)
            for i in range(layer + 1, self._config.n_layers):
                hidden = self.runtime.layer(i, hidden, mask, prefixes_above(i))
            return hidden[population.n_references :]

        return run

    def _prefix_run(self, population: Population) -> Run:
        z = population.z
        prefixes = [self.prefix(i, z[:, i]) for i in range(self._config.n_layers)]

        def run(
            candidates: slice, examples: slice, mask: torch.Tensor | None, bucket: Bucket
        ) -> torch.Tensor:
            hidden = self.runtime.embed(bucket.input_ids[examples])
            for i, prefix in enumerate(prefixes):
                keys, values = (population.part(x, candidates) for x in prefix)
                hidden = self.runtime.layer(i, hidden, mask, (keys, values))
            return hidden[population.n_references :]

        return run

    def _inline_run(self, population: Population) -> Run:
        m, last = self.n_inline, self._config.n_layers - 1
        prompts = [
            self._projector.inline(z, i).detach().to(self.runtime.device)
            for i, z in enumerate(population.z.unbind(1))
        ]
        words = self._placeholders(len(population.z)) if self._added else prompts[0]
        rows = self.runtime.embed_inline(words)  # [P, 1, m, H]

        def run(
            candidates: slice, examples: slice, mask: torch.Tensor | None, bucket: Bucket
        ) -> torch.Tensor:
            text = self.runtime.embed(bucket.input_ids[examples], m)
            own = population.part(rows, candidates)
            p, (_, n, t, width) = own.shape[0], text.shape
            hidden = text.new_empty(p, n, m + t, width)
            hidden[:, :, :1], hidden[:, :, m + 1 :] = text[:, :, :1], text[:, :, 1:]
            hidden[:, :, 1 : m + 1] = own
            # [CLS] and the rows are always real, so that their order in the mask is moot
            seen = None if mask is None else torch.cat([mask.new_ones(n, m), mask], 1)
            for i in range(last + 1):
                if self._added:
                    hidden = self._add(hidden, population.part(prompts[i], candidates))
                if i < last:
                    hidden = self.runtime.layer(i, hidden, seen, None)
            # nothing reads the rows' last hidden states: only their keys and values count, which is a prefix
            prefix = self._rows_prefix(hidden[:, :, 1 : m + 1])
            hidden = torch.cat([hidden[:, :, :1], hidden[:, :, m + 1 :]], 2)
            return self.runtime.layer(last, hidden, mask, prefix)[population.n_references :]

        return run

    @torch.inference_mode()
    def _placeholders(self, n: int) -> torch.Tensor:
        return self._encoder.placeholders(self.n_inline).expand(n, -1, -1).to(self.runtime.device)

    @torch.inference_mode()
    def _add(self, hidden: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Add soft prompts [P, m, H] to the rows of hidden states [P, N, m + T, H]."""
        return add_to_rows(hidden, prompts.to(hidden.dtype).unsqueeze(1))

    @torch.inference_mode()
    def _rows_prefix(self, rows: torch.Tensor) -> Prefix:
        """Return the last layer's keys and values [P, N, h, m, d_h] of hidden rows [P, N, m, H]."""
        if not self._last:
            module = self._encoder.layers[self._config.n_layers - 1]
            assert isinstance(module, Layer)
            parts = ((x.weight, x.bias) for x in (module.key, module.value))
            self._last = [(w.to(rows.device, rows.dtype), b.to(rows.device, rows.dtype)) for w, b in parts]
        heads = (*rows.shape[:-1], self._config.n_heads, self._config.head_size)
        keys, values = (F.linear(rows, w, b).view(heads).transpose(2, 3) for w, b in self._last)
        return keys, values

    def cross_entropy(self, run: Run, bucket: Bucket, n_candidates: int) -> np.ndarray:
        """Return [P, N] float64: (CE of the start + CE of the end) / 2 of every candidate and example."""
        result = np.empty((n_candidates, bucket.n_examples))
        for candidates, examples, logp in self.log_probs(run, bucket, n_candidates):
            rows = torch.arange(logp.shape[1], device=logp.device)
            start = logp[:, rows, bucket.start[examples], 0]
            end = logp[:, rows, bucket.end[examples], 1]
            result[candidates, examples] = (-(start + end) / 2).cpu().numpy()
        return result

    def log_probs(
        self, run: Run, bucket: Bucket, n_candidates: int
    ) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Yield (candidates, examples, float64 log-probabilities [p, n, T, 2]) for pieces of the bucket.

        Raises OutOfMemoryError if one candidate on one example does not fit.
        """
        length = bucket.n_tokens + self.n_inline
        todo = list(pieces(n_candidates, bucket.n_examples, length, self.micro_batch_tokens))[::-1]
        while todo:
            candidates, examples = todo.pop()
            mask = None if bucket.mask is None else bucket.mask[examples]
            try:
                logp = self._log_softmax(run(candidates, examples, mask, bucket), mask)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self._give_back():
                    todo.append((candidates, examples))
                    continue
                p, n = candidates.stop - candidates.start, examples.stop - examples.start
                if p * n == 1:
                    raise OutOfMemoryError(
                        f"one example of {bucket.n_tokens} tokens does not fit the memory of "
                        f"{self.runtime.device} with runtime '{self.runtime.name}'; "
                        "shorten the examples (--max-tokens) or use another device"
                    ) from error
                self.micro_batch_tokens = p * n * length // 2
                smaller = list(pieces(p, n, length, self.micro_batch_tokens))[::-1]
                todo += [(_shift(c, candidates.start), _shift(e, examples.start)) for c, e in smaller]
                continue
            yield candidates, examples, logp

    def _log_softmax(self, hidden: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        logits = self.runtime.head(hidden, *self._span).double()
        if mask is not None:
            logits = logits.masked_fill(~mask[None, :, :, None], float("-inf"))
        return torch.log_softmax(logits, 2)


def _shift(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)
