"""What masked language modelling hides: characters and spans."""

from __future__ import annotations

import numpy as np
import pytest

from mp2.training.masking import mask_tokens

KINDS = pytest.mark.parametrize("masking", ["char", "span"])


@KINDS
def test_fifteen_per_cent_are_chosen_of_these_80_masked_10_replaced_10_kept(masking: str) -> None:
    rows = np.random.default_rng(0).integers(5, 200, (600, 102))
    rows[:, 0], rows[:, -1] = 2, 3
    masked, chosen, targets = mask_tokens(rows, np.random.default_rng(1), masking, 0.15, 4, 200)
    n = len(chosen)
    assert n == 600 * 15
    assert np.bincount(chosen // 102).tolist() == [15] * 600
    assert len(set(chosen)) == n
    assert np.array_equal(rows.ravel()[chosen], targets)
    untouched = np.delete(np.arange(rows.size), chosen)
    assert np.array_equal(masked.ravel()[untouched], rows.ravel()[untouched])
    assert not np.isin(chosen % 102, (0, 101)).any()  # never [CLS] or [SEP]
    now = masked.ravel()[chosen]
    kept_by_chance = 0.1 / 195
    for share, expected in (
        (np.mean(now == 4), 0.8),
        (np.mean(now == targets), 0.1 + kept_by_chance),
        (np.mean((now != 4) & (now != targets)), 0.1 - kept_by_chance),
    ):
        n_dice = n if masking == "char" else n / 5  # E[length^2] / E[length] of the spans
        assert abs(share - expected) < 4.5 * np.sqrt(expected * (1 - expected) / n_dice)
    replaced = now[(now != 4) & (now != targets)]
    assert replaced.min() >= 5  # never a special token
    positions = np.bincount(chosen % 102, minlength=102)[1:101]
    assert ((positions - 90) ** 2 / (90 * 0.85)).sum() < 150  # uniform: chi-square of 99 at 99.9 %


@KINDS
def test_masking_depends_on_the_generator_alone_and_leaves_the_rows(masking: str) -> None:
    rows = np.random.default_rng(0).integers(5, 200, (4, 16))
    before = rows.copy()
    first, again = (mask_tokens(rows, np.random.default_rng(7), masking, 0.15, 4, 200) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert np.array_equal(rows, before)
    assert not np.array_equal(mask_tokens(rows, np.random.default_rng(8), masking, 0.15, 4, 200)[1], first[1])


@KINDS
@pytest.mark.parametrize(("length", "rate"), [(3, 0.15), (4, 0.99), (6, 0.9), (16, 0.97)])
def test_short_rows_and_high_rates_can_be_masked(length: int, rate: float, masking: str) -> None:
    rows = np.full((5, length), 9)
    _, chosen, _ = mask_tokens(rows, np.random.default_rng(0), masking, rate, 4, 200)
    assert len(chosen) == 5 * max(1, round((length - 2) * rate))
    assert not np.isin(chosen % length, (0, length - 1)).any()


def test_spans_are_runs_of_geometric_length_with_one_die_each() -> None:
    rows = np.random.default_rng(0).integers(5, 200, (2000, 202))
    masked, chosen, _ = mask_tokens(rows, np.random.default_rng(1), "span", 0.15, 4, 200)
    hidden = np.zeros(rows.size, int)
    hidden[chosen] = 1
    hidden = hidden.reshape(rows.shape)
    starts = (np.diff(hidden, axis=1) == 1).sum()
    assert 3.4 < len(chosen) / starts < 4.0  # 3.8, but for spans that touch, are cut or wrap around
    alone = (hidden[:, 1:-1] == 1) & (hidden[:, :-2] == 0) & (hidden[:, 2:] == 1)  # a span's first character
    fate = np.where(masked == 4, 0, np.where(masked == rows, 1, 2))
    first, second = fate[:, 1:-1][alone], fate[:, 2:][alone]
    assert np.mean(first == second) > 0.97  # but where another span begins, or chance replaced by the same
    single = mask_tokens(rows, np.random.default_rng(1), "char", 0.15, 4, 200)[0]
    apart = np.where(single == 4, 0, 1)[:, 1:-1][alone]
    assert np.mean(apart == 0) < 0.2
