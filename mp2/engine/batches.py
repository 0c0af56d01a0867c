"""Cut examples and populations into batches: sorted by length, little or no padding, bounded memory.

With a population of P candidates an example already is P sequences of one length, so examples are grouped
by *equal* length and nothing is padded, or next to nothing. Only when a group would be too small to keep
the device busy (P small) are neighbours in length put together, padded to the longest of them and masked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from mp2.tasks import MrcInput

# A group is padded only while it has fewer tokens than this share of the micro-batch, and never to more than
# 1 / _MIN_FILL of an example's own length: below that, two calls are cheaper than the padding.
_SMALL_SHARE = 0.25
_MIN_FILL = 0.75
_ALMOST_FULL = 0.97  # padding that costs less than a call of its own


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Examples that run together: ``N`` sequences, trimmed to the longest of them (``T`` tokens)."""

    indices: np.ndarray  # [N] int64, positions in the caller's order
    input_ids: torch.Tensor  # [N, T] int64
    mask: torch.Tensor | None  # [N, T] bool, True = real token; None when nothing is padded
    lengths: np.ndarray  # [N] int64
    start: torch.Tensor  # [N] int64, gold span
    end: torch.Tensor  # [N] int64, inclusive

    @property
    def n_examples(self) -> int:
        """N."""
        return int(self.input_ids.shape[0])

    @property
    def n_tokens(self) -> int:
        """T."""
        return int(self.input_ids.shape[1])


def group_by_length(lengths: Sequence[int], n_candidates: int, limit_tokens: int) -> list[list[int]]:
    """Return groups of indices into ``lengths``, longest first, each meant for one batch.

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


def make_buckets(
    inputs: Sequence[MrcInput],
    *,
    n_candidates: int,
    limit_tokens: int,
    pad_id: int,
    device: str | torch.device,
) -> list[Bucket]:
    """Return buckets that hold every input once, for populations of ``n_candidates``."""
    lengths = [len(item.input_ids) for item in inputs]
    buckets = []
    for group in group_by_length(lengths, n_candidates, limit_tokens):
        sizes = np.array([lengths[i] for i in group], dtype=np.int64)
        longest = int(sizes.max())
        ids = np.full((len(group), longest), pad_id, dtype=np.int64)
        for row, i in enumerate(group):
            ids[row, : sizes[row]] = inputs[i].input_ids
        mask = None
        if int(sizes.min()) != longest:
            mask = torch.from_numpy(np.arange(longest)[None, :] < sizes[:, None]).to(device)
        buckets.append(
            Bucket(
                indices=np.array(group, dtype=np.int64),
                input_ids=torch.from_numpy(ids).to(device),
                mask=mask,
                lengths=sizes,
                start=torch.tensor([int(inputs[i].start) for i in group], device=device),
                end=torch.tensor([int(inputs[i].end) for i in group], device=device),
            )
        )
    return buckets


def pieces(
    n_candidates: int, n_examples: int, n_tokens: int, limit_tokens: int
) -> Iterator[tuple[slice, slice]]:
    """Yield (candidates, examples) slices that tile P x N sequences of ``n_tokens``.

    A piece holds at most ``limit_tokens`` tokens (one sequence at least). Examples stay together as long as
    they fit, because what does not depend on the candidate is computed once per piece. Pieces are of even
    size.
    """
    sequences = max(1, limit_tokens // max(1, n_tokens))
    for examples in even_parts(n_examples, min(n_examples, sequences)):
        per_candidate = examples.stop - examples.start
        for candidates in even_parts(n_candidates, max(1, sequences // per_candidate)):
            yield candidates, examples


def even_parts(total: int, at_most: int) -> list[slice]:
    """Cut ``total`` things into the fewest parts of even size of at most ``at_most``."""
    n_parts = -(-total // at_most)
    edges = [total * k // n_parts for k in range(n_parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]
