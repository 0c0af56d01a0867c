from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mp2.backbone import Backbone
from mp2.engine.chain import group_by_length
from mp2.engine.cpu.backend import CpuBackend
from mp2.engine.forward import even_parts
from mp2.prompts import PromptSet

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


@given(st.integers(0, 40), st.integers(1, 50))
def test_even_parts_tile_and_differ_by_one_at_most(total: int, at_most: int) -> None:
    parts = even_parts(total, at_most)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(total))
    sizes = [part.stop - part.start for part in parts]
    assert not sizes or (max(sizes) <= at_most and max(sizes) - min(sizes) <= 1)
    assert len(parts) == -(-total // at_most)


@pytest.mark.parametrize("limit", [1, 30, 100, 1000])
def test_pieces_of_a_batch_stay_within_the_limit(
    tiny_backbone: Backbone, deep: PromptSet, limit: int
) -> None:
    forward = CpuBackend(tiny_backbone).forward(deep, micro_batch_tokens=limit)
    inputs = make_inputs((9, 14, 9, 5, 14, 30), 50)
    for population in (1, 7, 20):
        for batch in forward.batches(inputs, population):
            sizes = [x.stop - x.start for x in forward.pieces(population, batch)]
            assert sum(sizes) == population
            assert all(size * batch.n_tokens <= limit or size == 1 for size in sizes)


def test_large_populations_are_never_padded(tiny_backbone: Backbone, deep: PromptSet) -> None:
    forward = CpuBackend(tiny_backbone).forward(deep, micro_batch_tokens=1000)
    buckets = forward.batches(make_inputs((9, 14, 9, 5, 14), 50), 20)
    assert [bucket.input_ids.shape for bucket in buckets] == [(2, 14), (2, 9), (1, 5)]
    assert [bucket.n_tokens for bucket in buckets] == [28, 18, 5]
    assert all(bucket.mask is None for bucket in buckets)


def test_buckets_are_trimmed_masked_and_keep_their_targets(tiny_backbone: Backbone, deep: PromptSet) -> None:
    inputs = make_inputs((12, 14, 13, 40), 50)
    forward = CpuBackend(tiny_backbone).forward(deep, micro_batch_tokens=1000)
    buckets = forward.batches(inputs, 1)
    assert [bucket.input_ids.shape[1] for bucket in buckets] == [40, 14]
    bucket = buckets[1]
    assert bucket.indices.tolist() == [1, 2, 0]
    assert bucket.mask is not None
    assert bucket.mask.sum(1).tolist() == [14, 13, 12]
    assert (bucket.input_ids[~bucket.mask] == tiny_backbone.tokenizer.pad_id).all()
    for row, i in enumerate(bucket.indices):
        assert torch.equal(
            bucket.input_ids[row, : bucket.lengths[row]], torch.from_numpy(inputs[i].input_ids)
        )
        assert bucket.targets[row].tolist() == [inputs[i].start, inputs[i].end]


def test_inline_rows_count_as_tokens(tiny_backbone: Backbone, shallow: PromptSet) -> None:
    inputs = make_inputs((24, 24), 50)  # 30 rows each, with 6 of the prompt
    for limit, expected in ((60, [60]), (59, [30, 30])):
        forward = CpuBackend(tiny_backbone).forward(shallow, micro_batch_tokens=limit)
        assert [batch.n_tokens for batch in forward.batches(inputs, 1)] == expected
