"""What a runtime is: the stages of the encoder, each callable from any layer, over whole populations.

Shapes: P candidates, N examples, T tokens, H hidden, h heads, d_h head size, m prompt tokens. Every batch
carries both a candidate axis and an example axis, and either may be 1 where nothing differs along it: text
that no candidate has touched yet is ``[1, N, T, H]``, a prefix shared by all examples is ``[P, 1, h, m,
d_h]``. A runtime computes what is shared once.
"""

from __future__ import annotations

import sys
from typing import Protocol

import torch

from mp2.errors import Mp2Error, UsageError

Prefix = tuple[torch.Tensor, torch.Tensor]
"""Keys and values ``[P or 1, N or 1, h, m, d_h]``, put before the layer's own."""

PRECISIONS = ("fp32", "bf16", "int8")


class Runtime(Protocol):
    """Something that runs the encoder stage by stage; all tensors live on ``device``."""

    name: str
    device: str
    precision: str
    reason: str  # why this runtime: one line, for people

    def embed(self, input_ids: torch.Tensor, n_inline: int = 0) -> torch.Tensor:
        """Return ``[1, N, T, H]`` for ``input_ids`` [N, T] int64.

        Tokens after [CLS] sit ``n_inline`` positions further on.
        """
        ...

    def embed_inline(self, prompts: torch.Tensor) -> torch.Tensor:
        """Return ``[P, 1, m, H]`` for inline prompt rows ``prompts`` [P, m, H] at positions 1..m."""
        ...

    def layer(
        self, index: int, hidden: torch.Tensor, mask: torch.Tensor | None, prefix: Prefix | None
    ) -> torch.Tensor:
        """Return layer ``index``'s output ``[P, N, T, H]``.

        ``hidden`` is [P or 1, N, T, H], ``mask`` [N, T] bool (True = real token; None: all are), ``prefix``
        see `Prefix`.
        """
        ...

    def head(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """Return float32 span logits ``[P, N, T, 2]`` (start, end) for ``weight`` [2, H] and ``bias`` [2]."""
        ...


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether ``error`` is some runtime's way of saying that memory ran out."""
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


def check_positions(n_tokens: int, n_inline: int, most: int) -> None:
    """Raise ``UsageError`` where a sequence and its inline prompt rows need more than ``most`` positions."""
    if n_tokens + n_inline > most:
        raise UsageError(
            f"sequence of {n_tokens} tokens and {n_inline} inline prompt rows, expected at most "
            f"{most} positions; shorten the examples"
        )


def say(line: str) -> None:
    """Print a line of a runtime's log."""
    print(f"mp2: {line}", file=sys.stderr, flush=True)
