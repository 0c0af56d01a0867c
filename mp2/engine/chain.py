"""Backends that run the encoder as a chain of stages: on CPUs, ONNX Runtime and TensorRT.

Such a backend is only its stages: embed, embed_inline and a layer, each callable alone. Every tensor between
them carries a candidate axis and an example axis, and either may be 1 where nothing differs along it: text
that no candidate has touched yet is ``[1, N, T, H]``, a prefix that all examples share is ``[P, 1, h, m,
d_h]``. A stage computes what is shared once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from mp2.backbone import Backbone, add_to_rows
from mp2.engine.backend import CACHE_BYTES, PopulationPrefix, Probe, is_out_of_memory
from mp2.engine.forward import Arrival, Batch, Evaluation, Forward
from mp2.heads import Head
from mp2.prompts import PrefixProjector, PromptSet

if TYPE_CHECKING:
    from mp2.tasks import MrcInput

_GPU_TOKENS = 65536  # enough to hide launches
_CPU_TOKENS = 2048  # enough to fill the cores, few enough that a feed-forward stays in the last-level cache
_NARROW_FFN = 1024  # up to here twice as many do, and calls are short enough for their overhead to show
_PREFIX_BYTES = 512 << 20  # keys and values of all layers held at once; more candidates take turns
# A group is padded only while it has fewer tokens than this share of the micro-batch, and never to more than
# 1 / _MIN_FILL of an example's own length: below that, two calls are cheaper than the padding.
_SMALL_SHARE = 0.25
_MIN_FILL = 0.75
_ALMOST_FULL = 0.97  # padding that costs less than a call of its own


class Candidates:
    """Intrinsic prompts of a population, as a backend wants them."""

    def __init__(self, z: torch.Tensor) -> None:
        """Take ``z`` [P, ...]."""
        self.z = z

    def part(self, x: torch.Tensor, candidates: slice) -> torch.Tensor:
        """Return the rows of ``x``, made from `z`, that some candidates are computed with."""
        return x[candidates]

    def own(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the candidates' own rows of what was computed with `part`."""
        return hidden


class ChainBackend(ABC):
    """`Backend` over stages; all tensors live on ``device``."""

    name: str
    device: str
    precision: str
    reason: str
    backbone: Backbone
    deep_inline = True

    @abstractmethod
    def embed(self, input_ids: torch.Tensor, n_inline: int = 0) -> torch.Tensor:
        """Return ``[1, N, T, H]`` for ``input_ids`` [N, T] int64.

        Tokens after [CLS] sit ``n_inline`` positions further on.
        """

    @abstractmethod
    def embed_inline(self, prompts: torch.Tensor) -> torch.Tensor:
        """Return ``[P, 1, m, H]`` for inline prompt rows ``prompts`` [P, m, H] at positions 1..m."""

    @abstractmethod
    def layer(
        self, index: int, hidden: torch.Tensor, mask: torch.Tensor | None, prefix: PopulationPrefix | None
    ) -> torch.Tensor:
        """Return layer ``index``'s output ``[P, N, T, H]``.

        ``hidden`` is [P or 1, N, T, H], ``mask`` [N, T] bool (True = real token; None: all are).
        """

    def candidates(self, z: torch.Tensor) -> Candidates:
        """Return candidates ``z`` [P, ...] as the stages want them."""
        return Candidates(z)

    def usual_tokens(self) -> int:
        """Return the tokens of a micro-batch, before memory says otherwise."""
        if torch.device(self.device).type != "cpu":
            return _GPU_TOKENS
        return _CPU_TOKENS * (2 if self.backbone.config.ffn <= _NARROW_FFN else 1)

    def forward(
        self,
        prompts: PromptSet,
        head: Head | None = None,
        *,
        micro_batch_tokens: int | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> ChainForward:
        """See `Backend.forward`."""
        return ChainForward(self, prompts, head, micro_batch_tokens or self.usual_tokens(), cache_bytes)

    def side_by_side(self, batch_tokens: int) -> int:
        """Return 1: an evaluation has all cores to itself, or queues everything on one stream."""
        return 1

    def share(self, n_runs: int) -> None:  # noqa: B027 - there is nothing to prepare
        """See `Backend.share`."""

    def probe(self, probe: Probe) -> Callable[[], object]:
        """See `Backend.probe`."""
        config, p = self.backbone.config, probe.n_candidates
        rng = torch.Generator().manual_seed(0)
        ids = torch.randint(0, config.vocab_size, (probe.n_examples, probe.n_tokens), generator=rng)
        shape = (1, 1, config.n_heads, probe.prompt_tokens, config.head_size)
        rows = torch.randn(shape, generator=rng).to(self.device)
        prefix = None if probe.inline else (rows, rows)
        hidden = self.embed(ids.to(self.device))
        hidden = hidden.expand(p, -1, -1, -1).contiguous() if p > 1 else hidden

        def run() -> None:
            self.layer(config.n_layers // 2, hidden, None, prefix)
            if torch.device(self.device).type == "cuda":
                torch.cuda.synchronize(self.device)

        return run


@dataclass(frozen=True, eq=False, kw_only=True)
class Bucket(Batch):
    """Sequences of nearly one length, trimmed to the longest of them (``T`` tokens)."""

    input_ids: torch.Tensor  # [n, T] int64
    mask: torch.Tensor | None  # [n, T] bool, True = real token; None when nothing is padded


class GridStates:
    """`States` of a bucket."""

    def __init__(self, hidden: torch.Tensor, bucket: Bucket) -> None:
        """Take ``hidden`` [p, n, T, H]."""
        self._hidden, self._mask = hidden, bucket.mask
        self.targets = bucket.targets

    def each(self, change: Callable[[torch.Tensor], torch.Tensor], empty: float) -> torch.Tensor:
        """See `States.each`."""
        made = change(self._hidden)
        return made if self._mask is None else made.masked_fill(~self._mask[None, :, :, None], empty)

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """See `States.at`."""
        return self._hidden[:, torch.arange(len(positions), device=positions.device), positions]


class ChainForward(Forward):
    """Runs candidates through the stages; each result is there when it is returned."""

    def __init__(
        self,
        backend: ChainBackend,
        prompts: PromptSet,
        head: Head | None,
        micro_batch_tokens: int,
        cache_bytes: int,
    ) -> None:
        super().__init__(backend, prompts, head, micro_batch_tokens, cache_bytes)
        self._stages = backend
        self._added = prompts.meta.on_placeholders
        self._config = backend.backbone.config
        self._encoder = backend.backbone.encoder
        self._projector = PrefixProjector(self._encoder, prompts, backend.device)
        self._incumbent: dict[int, PopulationPrefix] = {}
        self._rows_weights: list[tuple[torch.Tensor, torch.Tensor]] = []  # keys', values' of the last layer

    def chunk_of_candidates(self) -> int:
        """See `Forward.chunk_of_candidates`; here by the memory of their keys and values."""
        return most_candidates(self.prompts)

    def prefix(self, layer: int, z: torch.Tensor) -> PopulationPrefix:
        """Return the keys and values [P, 1, h, m, d_h] of intrinsic prompts ``z`` [P, d] at ``layer``."""
        try:
            keys, values = self._projector.keys_values(layer, z)
        except Exception as error:
            if not is_out_of_memory(error) or self.backend.device == "cpu":
                raise
            # all layers' folded projections do not fit beside the rest
            self._projector = PrefixProjector(self._encoder, self.prompts)
            keys, values = (x.to(self.backend.device) for x in self._projector.keys_values(layer, z))
        place = self.backend.device
        return keys.unsqueeze(1).to(place), values.unsqueeze(1).to(place)

    def every_layer(self, z: torch.Tensor, *, scoring: bool = False) -> Evaluation:
        """See `Forward.every_layer`."""
        population = self._stages.candidates(z)
        states = self._prefixed(population) if self.prefixed else self._inlined(population)

        def run(batch: Batch, candidates: slice, *, again: bool = True) -> Arrival:
            assert isinstance(batch, Bucket)
            return self._read(population.own(states(batch, candidates)), batch, scoring)

        return run

    def visit(self, layer: int, z: torch.Tensor) -> Evaluation:
        """See `Forward.visit`."""
        population = self._stages.candidates(z)
        prefix = self.prefix(layer, population.z)

        def run(batch: Batch, candidates: slice, *, again: bool = True) -> Arrival:
            assert isinstance(batch, Bucket)
            own = population.part(prefix[0], candidates), population.part(prefix[1], candidates)
            hidden = self._stages.layer(layer, self.cache.at(batch, layer), batch.mask, own)
            for i in range(layer + 1, self.n_layers):
                hidden = self._stages.layer(i, hidden, batch.mask, self._incumbent[i])
            return self._read(population.own(hidden), batch, scoring=False)

        return run

    def embed(self, batch: Batch) -> torch.Tensor:
        """See `Forward.embed`."""
        assert isinstance(batch, Bucket)
        return self._stages.embed(batch.input_ids)

    def advance(self, batch: Batch, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """See `Forward.advance`."""
        assert isinstance(batch, Bucket)
        return self._stages.layer(layer, hidden, batch.mask, self._incumbent[layer])

    def _hold(self, layer: int, z: torch.Tensor) -> None:
        self._incumbent[layer] = self.prefix(layer, z)

    def _free_memory(self) -> None:
        if torch.device(self.backend.device).type == "cuda":
            torch.cuda.empty_cache()  # not every backend allocates through torch

    def _batches(self, inputs: Sequence[MrcInput], n_candidates: int) -> list[Bucket]:
        return buckets_of(self, inputs, n_candidates)

    def _read(self, hidden: torch.Tensor, batch: Bucket, scoring: bool) -> Arrival:
        states = GridStates(hidden, batch)
        outputs = self.head.scoring_outputs(states) if scoring else self.head.training_outputs(states)
        found: np.ndarray = outputs.cpu().numpy()
        return lambda: found

    def _prefixed(self, population: Candidates) -> Callable[[Bucket, slice], torch.Tensor]:
        prefixes = [self.prefix(i, population.z[:, i]) for i in range(self.n_layers)]

        def states(batch: Bucket, candidates: slice) -> torch.Tensor:
            hidden = self._stages.embed(batch.input_ids)
            for i, prefix in enumerate(prefixes):
                keys, values = (population.part(x, candidates) for x in prefix)
                hidden = self._stages.layer(i, hidden, batch.mask, (keys, values))
            return hidden

        return states

    def _inlined(self, population: Candidates) -> Callable[[Bucket, slice], torch.Tensor]:
        m, last = self.n_inline, self.n_layers - 1
        place = self.backend.device
        prompts = [self._projector.inline(z, i).to(place) for i, z in enumerate(population.z.unbind(1))]
        words, n_alike = prompts[0], 0
        if self._added:
            words = self._encoder.placeholders(m).expand(len(population.z), -1, -1).to(place)
            n_alike = leading_alike(population.z)
        # [P, 1, m, H]; without rows there is nothing to embed, and not every backend can
        rows = self._stages.embed_inline(words) if m else words.new_empty(len(words), 1, 0, words.shape[-1])

        def states(batch: Bucket, candidates: slice) -> torch.Tensor:
            text = self._stages.embed(batch.input_ids, m)
            own, n_candidates = (
                population.part(rows, candidates),
                len(population.part(population.z, candidates)),
            )
            own = own[:1] if self._added else own  # placeholders: one computation until the prompts differ
            p, (_, n, t, width) = own.shape[0], text.shape
            hidden = text.new_empty(p, n, m + t, width)
            hidden[:, :, :1], hidden[:, :, m + 1 :] = text[:, :, :1], text[:, :, 1:]
            hidden[:, :, 1 : m + 1] = own
            # [CLS] and the rows are always real, so that their order in the mask is moot
            seen = None if batch.mask is None else torch.cat([batch.mask.new_ones(n, m), batch.mask], 1)
            for i in range(last + 1):
                if self._added and i < len(prompts):
                    added = population.part(prompts[i], candidates).to(hidden.dtype)
                    hidden = add_to_rows(hidden, added[: 1 if i < n_alike else None].unsqueeze(1))
                if i < last:
                    hidden = self._stages.layer(i, hidden, seen, None)
            hidden = hidden.expand(n_candidates, -1, -1, -1)  # of candidates that are all alike
            text = torch.cat([hidden[:, :, :1], hidden[:, :, m + 1 :]], 2)
            if last < 0:
                return text
            if not m:
                return self._stages.layer(last, text, batch.mask, None)
            # nothing reads the rows' last hidden states: only their keys and values count, which is a prefix
            return self._stages.layer(last, text, batch.mask, self._rows_prefix(hidden[:, :, 1 : m + 1]))

        return states

    def _rows_prefix(self, rows: torch.Tensor) -> PopulationPrefix:
        """Return the last layer's keys and values [P, N, h, m, d_h] of hidden rows [P, N, m, H]."""
        if not self._rows_weights:
            body = self._encoder.body(self.n_layers - 1)
            parts = ((x.weight, x.bias) for x in (body.key, body.value))
            self._rows_weights = [
                (w.to(rows.device, rows.dtype), b.to(rows.device, rows.dtype)) for w, b in parts
            ]
        heads = (*rows.shape[:-1], self._config.n_heads, self._config.head_size)
        keys, values = (F.linear(rows, w, b).view(heads).transpose(2, 3) for w, b in self._rows_weights)
        return keys, values


def leading_alike(z: torch.Tensor) -> int:
    """How many of the first layers have the same prompt in all candidates ``z`` [P, L', d]."""
    same = (z == z[:1]).flatten(2).all(-1).all(0)  # [L']
    return int(same.int().cumprod(0).sum())


def most_candidates(prompts: PromptSet) -> int:
    """Return how many candidates' keys and values are held at once."""
    meta = prompts.meta
    return max(1, _PREFIX_BYTES // (8 * meta.n_layers * max(1, meta.prompt_tokens) * meta.hidden))


def buckets_of(forward: Forward, inputs: Sequence[MrcInput], n_candidates: int) -> list[Bucket]:
    """Return batches of nearly one length that hold every input once, for ``n_candidates`` at a time."""
    lengths = [len(item.input_ids) for item in inputs]
    rows = [length + forward.n_inline for length in lengths]
    targets = torch.from_numpy(forward.head.targets(inputs))
    buckets = []
    for group in group_by_length(rows, n_candidates, forward.micro_batch_tokens):
        sizes = np.array([lengths[i] for i in group], dtype=np.int64)
        longest = int(sizes.max())
        ids = np.full((len(group), longest), forward.backend.backbone.tokenizer.pad_id, dtype=np.int64)
        for row, i in enumerate(group):
            ids[row, : sizes[row]] = inputs[i].input_ids
        mask = None
        if int(sizes.min()) != longest:
            real = torch.from_numpy(np.arange(longest)[None, :] < sizes[:, None])
            mask = real.to(forward.backend.device)
        buckets.append(
            Bucket(
                indices=np.array(group, dtype=np.int64),
                lengths=sizes,
                n_tokens=len(group) * (longest + forward.n_inline),
                targets=targets[group].to(forward.backend.device),
                input_ids=torch.from_numpy(ids).to(forward.backend.device),
                mask=mask,
            )
        )
    return buckets


def group_by_length(lengths: Sequence[int], n_candidates: int, limit_tokens: int) -> list[list[int]]:
    """Return groups of indices into ``lengths``, longest first, each meant for one batch.

    With a population of P candidates an example already is P sequences of one length, so that examples of
    *equal* length are grouped and nothing is padded, or next to nothing. Only when a group would be too small
    to keep the device busy (P small) are neighbours in length put together, padded to the longest of them.

    ``n_candidates`` (P) sequences are run for every example; a group holds at most ``limit_tokens`` tokens
    over all candidates, unless it is a single example. Every index occurs exactly once; the result depends
    on nothing else.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    for index in order:
        length = lengths[index]
        if groups:
            group = groups[-1]
            longest = lengths[group[0]]
            tokens = n_candidates * len(group) * longest
            fits = tokens + n_candidates * longest <= limit_tokens
            small = tokens < _SMALL_SHARE * limit_tokens and length >= _MIN_FILL * longest
            if fits and (length >= _ALMOST_FULL * longest or small):
                group.append(index)
                continue
        groups.append([index])
    return groups
