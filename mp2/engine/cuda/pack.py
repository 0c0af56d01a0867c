"""Packs: examples one after another in one row of tokens, nothing padded.

Matrix products, norms and activations do not care where a sequence ends; only attention and the final
softmax do. So on a GPU all examples of a batch lie in one row of S tokens, and P candidates are P such rows.
Inline prompts (shallow) take m slots after each [CLS].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from mp2.engine.forward import Batch

if TYPE_CHECKING:
    from mp2.tasks import MrcInput


@dataclass(frozen=True, eq=False, kw_only=True)
class Pack(Batch):
    """``n`` examples in one row of ``S`` slots; text tokens and, if ``m`` > 0, inline prompt slots."""

    slots: np.ndarray  # [n] int64, slots: text and prompt
    input_ids: torch.Tensor  # [text] int64
    positions: torch.Tensor  # [text] int64, of the position table
    text_slots: torch.Tensor  # [text] int64: where in the row each token is
    prompt_slots: torch.Tensor  # [n * m] int64
    first_slots: torch.Tensor  # [n] int64: of each [CLS]
    cells: torch.Tensor  # [text] int64: the token's cell in the padded [n, longest] grid
    n_inline: int  # m

    @property
    def n_slots(self) -> int:
        """S."""
        return self.n_tokens

    @property
    def longest(self) -> int:
        """Text tokens of the longest example."""
        return int(self.lengths.max())


class PackedStates:
    """`States` of a pack."""

    def __init__(self, hidden: torch.Tensor, pack: Pack) -> None:
        """Take ``hidden`` [p, S, H]."""
        self._hidden, self._pack = hidden, pack
        self.targets = pack.targets

    def each(self, change: Callable[[torch.Tensor], torch.Tensor], empty: float) -> torch.Tensor:
        """See `States.each`; ``change`` sees no padding."""
        pack, values = self._pack, change(self._hidden)
        p, _, c = values.shape
        grid = values.new_full((p, pack.n_examples * pack.longest, c), empty)
        grid[:, pack.cells] = values[:, pack.text_slots]
        return grid.view(p, pack.n_examples, pack.longest, c)

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """See `States.at`."""
        behind = torch.where(positions > 0, positions + self._pack.n_inline, 0)  # the prompt, after [CLS]
        return self._hidden[:, self._pack.first_slots + behind]


def make_packs(
    inputs: Sequence[MrcInput],
    targets: np.ndarray,
    *,
    limit_tokens: int,
    n_inline: int,
    device: str | torch.device,
) -> list[Pack]:
    """Return packs that hold every input once, longest first, each of at most ``limit_tokens`` slots.

    A single input longer than that is a pack of its own. ``targets`` [N, k] are the head's.
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
    return [_pack(inputs, targets[group], group, n_inline, device) for group in groups]


def _pack(
    inputs: Sequence[MrcInput],
    targets: np.ndarray,
    group: list[int],
    n_inline: int,
    device: str | torch.device,
) -> Pack:
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
        n_tokens=int(slots.sum()),
        targets=torch.from_numpy(targets).to(device),
        slots=slots,
        input_ids=place([np.asarray(inputs[i].input_ids) for i in group]),
        positions=place(after),
        text_slots=place([a + f for a, f in zip(after, first, strict=True)]),
        prompt_slots=place((first[:, None] + 1 + np.arange(n_inline)).reshape(-1)),
        cells=place([w + k * int(lengths.max()) for k, w in enumerate(within)]),
        first_slots=place(first),
        n_inline=n_inline,
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
        self._slots, self._tiles = slots, dict[int, torch.Tensor]()

    def tiles(self, n_queries: int) -> torch.Tensor:
        """Return where one row's queries are in tiles of ``n_queries``, int32 [tiles, 3].

        A tile's sequence begins at a slot and has a length; its first query is counted within it. Made once.
        """
        if n_queries not in self._tiles:
            starts = np.cumsum(self._slots) - self._slots
            found = [
                (start, length, first)
                for start, length in zip(starts, self._slots, strict=True)
                for first in range(0, int(length), n_queries)
            ]
            tiles = torch.from_numpy(np.array(found, dtype=np.int32))
            self._tiles[n_queries] = tiles.to(self.offsets.device)
        return self._tiles[n_queries]
