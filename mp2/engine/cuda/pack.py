"""Packs: examples one after another in one row of tokens, nothing padded.

Matrix products, norms and activations do not care where a sequence ends; only attention and the final
softmax do. So on a GPU all examples of a batch lie in one row of S tokens, and P candidates are P such rows.
Inline prompts (shallow) take m slots after each [CLS].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from mp2.tasks import MrcInput


@dataclass(frozen=True, kw_only=True)
class Pack:
    """``n`` examples in one row of ``S`` slots; text tokens and, if ``m`` > 0, inline prompt slots."""

    indices: np.ndarray  # [n] int64, positions in the caller's order
    lengths: np.ndarray  # [n] int64, text tokens
    slots: np.ndarray  # [n] int64, slots: text and prompt
    input_ids: torch.Tensor  # [text] int64
    positions: torch.Tensor  # [text] int64, of the position table
    text_slots: torch.Tensor  # [text] int64: where in the row each token is
    prompt_slots: torch.Tensor  # [n * m] int64
    cells: torch.Tensor  # [text] int64: the token's cell in the padded [n, longest] grid
    start: torch.Tensor  # [n] int64, gold span
    end: torch.Tensor  # [n] int64, inclusive

    @property
    def n_slots(self) -> int:
        """S."""
        return int(self.slots.sum())

    @property
    def longest(self) -> int:
        """Text tokens of the longest example."""
        return int(self.lengths.max())

    def to_grid(self, values: torch.Tensor, empty: float) -> torch.Tensor:
        """Values [P, S, c] of slots -> [P, n, longest, c] of text tokens; other cells are ``empty``."""
        p, _, c = values.shape
        grid = values.new_full((p, len(self.lengths) * self.longest, c), empty)
        grid[:, self.cells] = values[:, self.text_slots]
        return grid.view(p, len(self.lengths), self.longest, c)


def make_packs(
    inputs: Sequence[MrcInput], *, limit_tokens: int, n_inline: int, device: str | torch.device
) -> list[Pack]:
    """Return packs that hold every input once, longest first, each of at most ``limit_tokens`` slots.

    A single input longer than that is a pack of its own.
    """
    order = sorted(range(len(inputs)), key=lambda i: (-len(inputs[i].input_ids), i))
    groups: list[list[int]] = []
    filled = 0
    for index in order:
        slots = len(inputs[index].input_ids) + n_inline
        if not groups or filled + slots > limit_tokens:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += slots
    return [_pack(inputs, group, n_inline, device) for group in groups]


def _pack(inputs: Sequence[MrcInput], group: list[int], n_inline: int, device: str | torch.device) -> Pack:
    lengths = np.array([len(inputs[i].input_ids) for i in group], dtype=np.int64)
    slots = lengths + n_inline
    first = np.concatenate([[0], np.cumsum(slots)[:-1]])  # the slot of each [CLS]
    within = [np.arange(length) for length in lengths]
    after = [np.where(w > 0, w + n_inline, 0) for w in within]  # tokens after [CLS] stand behind the prompt

    def place(values: Sequence[np.ndarray] | np.ndarray) -> torch.Tensor:
        joined = values if isinstance(values, np.ndarray) else np.concatenate(values)
        return torch.from_numpy(np.ascontiguousarray(joined, dtype=np.int64)).to(device)

    return Pack(
        indices=np.array(group, dtype=np.int64),
        lengths=lengths,
        slots=slots,
        input_ids=place([np.asarray(inputs[i].input_ids) for i in group]),
        positions=place(after),
        text_slots=place([a + f for a, f in zip(after, first, strict=True)]),
        prompt_slots=place((first[:, None] + 1 + np.arange(n_inline)).reshape(-1)),
        cells=place([w + k * int(lengths.max()) for k, w in enumerate(within)]),
        start=place(np.array([int(inputs[i].start) for i in group])),
        end=place(np.array([int(inputs[i].end) for i in group])),
    )


class Spans:
    """Where the sequences of P rows of a pack begin and end, as attention kernels want it."""

    def __init__(self, slots: np.ndarray, n_rows: int, device: str | torch.device) -> None:
        """``slots`` [n]: the sequence lengths of one row; ``n_rows`` rows lie one after another."""
        ends = np.cumsum(np.tile(slots, n_rows))
        self.n_rows = n_rows
        self.n_sequences = len(slots)
        self.row_slots = int(slots.sum())
        self.longest = int(slots.max())
        self.offsets = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)).to(device)
        within = np.concatenate([np.arange(s) + k * self.longest for k, s in enumerate(slots)])
        self.cells = torch.from_numpy(within.astype(np.int64)).to(device)  # slot -> cell of [n, longest]
        real = np.arange(self.longest)[None] < slots[:, None]
        self.real = torch.from_numpy(real).to(device)  # [n, longest] bool
