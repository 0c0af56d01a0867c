"""Neighbouring passages of one document, pulled together: the contrastive term of coCondenser.

Gao & Callan (2022, section 3.2): two spans of a document should be more alike than spans of different ones.
Here the spans are the rows of a batch, neighbours in the text (rows 2 k and 2 k + 1), in the same forward
pass that predicts their masked tokens; a row's state is the mean over its tokens, likeness is the cosine.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.05
"""Of the cosines (Gao et al., 2021, SimCSE)."""


def shared_document(rows: NDArray[np.int64], sep_id: int) -> NDArray[np.bool_]:
    """Which tokens of each row [N, T] belong to the document that it shares with its neighbour.

    ``rows`` are ``[CLS] text [SEP]`` as packed, with a [SEP] after each document, N even: row 2 k from its
    last [SEP] inside on, row 2 k + 1 up to its first. Nothing in both where either part is under a quarter of
    the text.
    """
    body = rows[:, 1:-1] == sep_id  # [N, T - 2]
    ended = body.cumsum(1) > 0
    to_end = ~(body[:, ::-1].cumsum(1) > 0)[:, ::-1]  # no document ends here or later
    shared = np.where(np.arange(len(rows))[:, None] % 2 == 0, to_end, ~ended)
    enough = (shared.sum(1) >= body.shape[1] / 4).reshape(-1, 2).all(1).repeat(2)
    return np.pad(shared & enough[:, None], ((0, 0), (1, 1)))


def contrastive_loss(hidden: Tensor, shared: Tensor) -> Tensor:
    """InfoNCE over the rows that have a neighbour: the row's own against all other rows.

    ``hidden`` [N, T, H]; ``shared`` [N, T] bool, the tokens whose mean is a row's state; rows without any are
    left out. 0 where no row is left. N is fixed and even, so that a compiled model has one shape.
    """
    n = len(hidden)
    weights = shared.to(torch.float32)
    size = weights.sum(1)
    with torch.autocast(hidden.device.type, enabled=False):
        states = torch.einsum("nt,nth->nh", weights, hidden.float()) / size.clamp(min=1)[:, None]
        states = F.normalize(states, dim=1)
        cosines = states @ states.T / TEMPERATURE  # [N, N]
    row = torch.arange(n, device=hidden.device)
    there = size > 0
    excluded = (row[:, None] == row) | ~there
    likeness = cosines.masked_fill(excluded, torch.finfo(cosines.dtype).min)
    losses = F.cross_entropy(likeness, row ^ 1, reduction="none")  # row ^ 1: the neighbour
    return torch.where(there, losses, 0.0).sum() / there.sum().clamp(min=1)
