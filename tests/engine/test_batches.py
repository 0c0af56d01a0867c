from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mp2.engine.batches import group_by_length, make_buckets, pieces

from .slow_reference import make_inputs

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(lengths, st.integers(1, 30), st.integers(1, 3000))
def test_groups_hold_everything_once_and_stay_within_the_limit(
    lengths: list[int], n_candidates: int, limit: int
) -> None:
    groups = group_by_length(lengths, n_candidates, limit)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[i] for i in group)
        assert len(group) == 1 or n_candidates * len(group) * longest <= limit
        assert min(lengths[i] for i in group) >= 0.75 * longest


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 60), st.integers(1, 3000))
def test_pieces_tile_population_and_examples_within_the_limit(p: int, n: int, t: int, limit: int) -> None:
    seen = np.zeros((p, n), dtype=int)
    for candidates, examples in pieces(p, n, t, limit):
        part = seen[candidates, examples]
        assert part.size >= 1
        assert part.size == 1 or part.size * t <= limit
        seen[candidates, examples] += 1
    assert (seen == 1).all()


def test_large_populations_are_never_padded() -> None:
    inputs = make_inputs((9, 14, 9, 5, 14), 50)
    buckets = make_buckets(inputs, n_candidates=20, limit_tokens=1000, pad_id=0, device="cpu")
    assert [bucket.n_tokens for bucket in buckets] == [14, 9, 5]
    assert all(bucket.mask is None for bucket in buckets)


def test_buckets_are_trimmed_masked_and_keep_their_spans() -> None:
    inputs = make_inputs((12, 14, 13, 40), 50)
    buckets = make_buckets(inputs, n_candidates=1, limit_tokens=1000, pad_id=3, device="cpu")
    assert [bucket.n_tokens for bucket in buckets] == [40, 14]
    bucket = buckets[1]
    assert bucket.indices.tolist() == [1, 2, 0]
    assert bucket.mask is not None
    assert bucket.mask.sum(1).tolist() == [14, 13, 12]
    assert (bucket.input_ids[~bucket.mask] == 3).all()
    for row, i in enumerate(bucket.indices):
        assert torch.equal(
            bucket.input_ids[row, : bucket.lengths[row]], torch.from_numpy(inputs[i].input_ids)
        )
        assert (bucket.start[row], bucket.end[row]) == (inputs[i].start, inputs[i].end)
