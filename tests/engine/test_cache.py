"""The activation cache: its limit, its order, what it gives back."""

from __future__ import annotations

import pytest
import torch

from mp2.engine.forward import ActivationCache

KIB = 256  # floats


class Encoder:
    """Layers that add one to inputs of one KiB; counts what runs."""

    def __init__(self) -> None:
        self.n_run = 0
        self.failing = 0

    def advance(self, bucket: int, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        if self.failing:
            self.failing -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.n_run += 1
        return hidden + 1

    def embed(self, bucket: int) -> torch.Tensor:
        return torch.full((1, 1, 1, KIB), 100.0 * bucket)


@pytest.mark.parametrize("limit", [0, 1, 4, 5, 7, 100])
def test_it_keeps_to_its_limit_over_all_buckets_and_returns_the_same(limit: int) -> None:
    encoder = Encoder()
    cache = ActivationCache(encoder.advance, encoder.embed, 1024 * limit)
    for layer in (0, 1, 2, 3, 1, 3, 0, 2):
        for bucket in range(5):
            assert torch.equal(cache.at(bucket, layer), encoder.embed(bucket) + layer)
            assert cache.n_bytes <= 1024 * limit
        cache.drop_above(layer)
    assert (cache.n_bytes > 0) == (limit > 0)


def test_with_room_for_one_input_a_bucket_a_round_upwards_runs_each_layer_once() -> None:
    encoder = Encoder()
    cache = ActivationCache(encoder.advance, encoder.embed, 1024 * 6)  # five, and the next of one
    for layer in range(8):
        for bucket in range(5):
            cache.at(bucket, layer)
    assert encoder.n_run == 5 * 7


def test_where_memory_runs_out_it_gives_back_all_and_then_holds_half() -> None:
    encoder = Encoder()
    cache = ActivationCache(encoder.advance, encoder.embed, 1024 * 100)
    assert not cache.give_back()  # of nothing; it may fill up as before
    cache.at(0, 7)
    assert cache.n_bytes == 8 * 1024
    encoder.failing = 1
    with pytest.raises(torch.OutOfMemoryError):
        cache.at(1, 3)
    assert cache.give_back()
    assert cache.n_bytes == 0
    assert not cache.give_back()
    for bucket in range(3):
        assert torch.equal(cache.at(bucket, 3), encoder.embed(bucket) + 3)
        assert cache.n_bytes <= 9 * 1024 // 2
