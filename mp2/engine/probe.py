"""The time of one layer on a runtime: what `auto` compares, and what a plan's first guess is made from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from mp2.backbone import Backbone
from mp2.engine.cuda.pack import make_packs
from mp2.engine.cuda.runtime import CudaRuntime
from mp2.engine.runtime import Runtime

_TOKENS = 512  # of a candidate: enough to show a layer's rate


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The batch that a layer is timed on: ``n_candidates`` texts under one prompt of ``prompt_tokens`` rows.

    ``inline``: no rows before the layer's keys and values, as below the last layer of shallow prompts.
    """

    n_candidates: int = 1
    n_examples: int = 8
    n_tokens: int = 64
    prompt_tokens: int = 16
    inline: bool = False

    @classmethod
    def within(
        cls, *, candidates: int, examples: int, tokens: int, prompt_tokens: int, inline: bool
    ) -> Probe:
        """Return a probe in which nothing is more than given, of about 512 tokens a candidate."""
        return cls(
            n_candidates=candidates,
            n_examples=max(1, min(cls.n_examples, examples, _TOKENS // tokens)),
            n_tokens=tokens,
            prompt_tokens=prompt_tokens,
            inline=inline,
        )

    @property
    def n_layer_tokens(self) -> int:
        """Tokens that the layer computes."""
        return self.n_candidates * self.n_examples * self.n_tokens

    def __str__(self) -> str:
        """Return it for people."""
        candidates = f"{self.n_candidates} candidates x " if self.n_candidates > 1 else ""
        return f"{candidates}{self.n_examples} x {self.n_tokens} tokens"


def middle_layer(backbone: Backbone) -> int:
    """Return the layer that is timed."""
    return backbone.config.n_layers // 2


def layer_seconds(runtime: Runtime, backbone: Backbone, probe: Probe | None = None, n_runs: int = 3) -> float:
    """Return the shortest of ``n_runs`` times of one layer on ``probe`` (None: 8 sequences of 64 tokens)."""
    run = _layer(runtime, backbone, probe or Probe(n_tokens=min(64, backbone.config.max_positions)))
    times = []
    for _ in range(n_runs + 1):  # the first prepares
        started = time.perf_counter()
        run()
        if torch.device(runtime.device).type == "cuda":
            torch.cuda.synchronize(runtime.device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _layer(runtime: Runtime, backbone: Backbone, probe: Probe) -> Callable[[], object]:
    config, index, p = backbone.config, middle_layer(backbone), probe.n_candidates
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (probe.n_examples, probe.n_tokens), generator=rng)
    shape = (1, 1, config.n_heads, probe.prompt_tokens, config.head_size)
    rows = torch.randn(shape, generator=rng).to(runtime.device)
    prefix = None if probe.inline else (rows, rows)
    if isinstance(runtime, CudaRuntime):  # its objective runs packs
        from mp2.tasks import MrcInput

        no_options = np.empty((0, 2), dtype=np.int64)
        inputs = [MrcInput(i, row, 0, 0, no_options) for i, row in enumerate(ids.numpy())]
        (pack,) = make_packs(inputs, limit_tokens=ids.numel(), n_inline=0, device=runtime.device)
        packed = runtime.embed_pack(pack).expand(p, -1, -1).contiguous()
        flat = None if prefix is None else (rows[0].to(runtime.dtype), rows[0].to(runtime.dtype))
        return lambda: runtime.packed_layer(index, packed, pack, flat)
    hidden = runtime.embed(ids.to(runtime.device))
    hidden = hidden.expand(p, -1, -1, -1).contiguous() if p > 1 else hidden
    return lambda: runtime.layer(index, hidden, None, prefix)
