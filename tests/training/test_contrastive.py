"""Neighbouring passages: which tokens they share a document for, and the loss, against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mp2.training.contrastive import TEMPERATURE, contrastive_loss, shared_document

CLS, SEP = 2, 3


def brute_shared(first: list[int], second: list[int]) -> tuple[list[bool], list[bool]]:
    """For one pair of rows: walk from the border between them until a document ends."""
    body = len(first) - 2
    left = [False] * len(first)
    for i in range(body, 0, -1):
        if first[i] == SEP:
            break
        left[i] = True
    right = [False] * len(second)
    for i in range(1, body + 1):
        if second[i] == SEP:
            break
        right[i] = True
    if min(sum(left), sum(right)) < body / 4:
        return [False] * len(first), [False] * len(second)
    return left, right


@given(st.data(), st.integers(1, 4), st.integers(1, 12))
def test_a_pair_shares_the_document_that_crosses_its_border(
    data: st.DataObject, pairs: int, body: int
) -> None:
    token = st.sampled_from([SEP, 7, 8, 9, 10, 11, 12, 13])
    texts = data.draw(
        st.lists(st.lists(token, min_size=body, max_size=body), min_size=2 * pairs, max_size=2 * pairs)
    )
    rows = [[CLS, *text, SEP] for text in texts]
    expected = [row for i in range(0, len(rows), 2) for row in brute_shared(rows[i], rows[i + 1])]
    assert shared_document(np.array(rows), SEP).tolist() == expected


def brute_loss(hidden: np.ndarray, shared: np.ndarray) -> float:
    states = {i: hidden[i][shared[i]].mean(0) for i in range(len(hidden)) if shared[i].any()}
    unit = {i: state / np.linalg.norm(state) for i, state in states.items()}
    losses = []
    for i, own in unit.items():
        partner = i + 1 if i % 2 == 0 else i - 1
        scores = {j: float(own @ other) / TEMPERATURE for j, other in unit.items() if j != i}
        losses.append(math.log(sum(math.exp(s) for s in scores.values())) - scores[partner])
    return float(np.mean(losses))


@pytest.mark.parametrize("without", [[], [2, 3], [0, 1, 6, 7]])
def test_the_loss_is_info_nce_over_the_rows_that_have_a_neighbour(without: list[int]) -> None:
    rng = np.random.default_rng(0)
    hidden, shared = rng.normal(size=(8, 5, 6)), rng.random((8, 5)) < 0.6
    shared[:, 2] = True
    shared[without] = False
    got = contrastive_loss(torch.tensor(hidden, dtype=torch.float32), torch.tensor(shared))
    assert got.item() == pytest.approx(brute_loss(hidden, shared), rel=1e-5)


def test_a_batch_without_pairs_has_loss_and_gradient_zero() -> None:
    hidden = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = contrastive_loss(hidden, torch.zeros(4, 5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_a_step_against_the_gradient_brings_neighbours_together() -> None:
    hidden = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    shared = torch.ones(6, 5, dtype=torch.bool)
    contrastive_loss(hidden, shared).backward()
    assert hidden.grad is not None

    def likeness(states: torch.Tensor) -> torch.Tensor:
        return torch.cosine_similarity(states.mean(1)[::2], states.mean(1)[1::2])

    with torch.no_grad():
        moved = hidden - 0.5 * hidden.grad
        assert (likeness(moved) > likeness(hidden)).all()
