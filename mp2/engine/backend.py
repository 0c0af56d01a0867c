"""The one seam of the engine: what computes hidden states for whole populations of prompts.

A `Backend` is a frozen encoder on a device. Its `Forward` makes batches of inputs, runs all layers for a
population, visits one layer from cached inputs, moves the cached inputs up a layer, and reads the hidden
states through a head. Everything above it (losses, scores, searches) is the same for every device.

Shapes: P candidates, N examples, T tokens, H hidden, h heads, d_h head size, m prompt tokens, L' layers that
have prompts, d their intrinsic size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from mp2.errors import Mp2Error

if TYPE_CHECKING:
    from mp2.backbone import Backbone
    from mp2.engine.forward import Forward
    from mp2.heads import Head
    from mp2.prompts import PromptSet

PopulationPrefix = tuple[torch.Tensor, torch.Tensor]
"""Keys and values ``[P or 1, N or 1, h, m, d_h]``, put before a layer's own."""

PRECISIONS = ("fp32", "bf16", "int8")
CACHE_BYTES = 2 << 30  # of cached layer inputs


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

    def __str__(self) -> str:
        """Return it for people."""
        candidates = f"{self.n_candidates} candidates x " if self.n_candidates > 1 else ""
        return f"{candidates}{self.n_examples} x {self.n_tokens} tokens"


class Backend(Protocol):
    """A frozen encoder on a device."""

    name: str
    device: str
    precision: str
    reason: str  # why this backend: one line, for people
    backbone: Backbone
    deep_inline: bool  # whether deep prompts may enter as rows of the sequence

    def forward(
        self,
        prompts: PromptSet,
        head: Head | None = None,
        *,
        micro_batch_tokens: int | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> Forward:
        """Return what computes ``prompts``' kind of candidates, read by ``head`` (None: the prompts' own).

        A batch holds at most ``micro_batch_tokens`` (None: as suits the device and its free memory).

        Raises MismatchError for prompts of another backbone, UsageError for a kind that it cannot run.
        """
        ...

    def side_by_side(self, batch_tokens: int) -> int:
        """Return how many runs may compute batches of ``batch_tokens`` at a time; 1: one after another."""
        ...

    def share(self, n_runs: int) -> None:
        """Let up to ``n_runs`` runs, as many as `side_by_side` says, compute at a time from now on."""
        ...

    def probe(self, probe: Probe) -> Callable[[], object]:
        """Return what runs one layer on ``probe``, waiting for it."""
        ...


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether ``error`` is some backend's way of saying that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch's CPU allocator, onnxruntime's arena and its own exceptions are RuntimeErrors (or bare
    # Exceptions) that only their text tells apart
    if isinstance(error, Mp2Error):
        return False
    text = str(error).lower()
    return any(
        phrase in text
        for phrase in (
            "out of memory",
            "status_alloc_failed",  # cuBLAS, cuDNN
            "allocation_failed",  # cuDNN 9
            "not enough memory",
            "can't allocate memory",
            "failed to allocate memory",
            "bad_alloc",
            "bad allocation",
        )
    )
