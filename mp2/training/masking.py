"""Which tokens masked language modelling hides: single characters, spans of them, or each in half the rows.

Either way a fixed share of every row is predicted (15 %), every position with the same chance; of what is
chosen 80 % is masked, 10 % replaced by random tokens, 10 % kept (Devlin et al., 2019). ``char`` throws these
dice for each character, ``span`` for each span (Joshi et al., 2020): a character inside a hidden span cannot
be guessed from its neighbours in the word, which is what whole-word masking is for; no word list is needed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mp2.backbone.tokenizer import SPECIAL_TOKENS

_LENGTHS = 0.2 * 0.8 ** np.arange(10)  # of spans of 1 .. 10: geometric, mean 3.8 (Joshi et al., 2020)
_AT_MOST = np.cumsum(_LENGTHS / _LENGTHS.sum())
Ints = NDArray[np.int64]


def mask_tokens(
    rows: Ints, rng: np.random.Generator, masking: str, mask_rate: float, mask_id: int, vocab_size: int
) -> tuple[Ints, Ints, Ints]:
    """Masked copy of ``rows`` [N, T] ([CLS] first, [SEP] last: never hidden), flat positions, their targets.

    Every row has the same number of chosen positions; both arrays [n] go row by row.
    """
    n_rows, length = rows.shape
    n_chosen = max(1, round((length - 2) * mask_rate))
    within, dice = _PICK[masking](rng, n_rows, length - 2, n_chosen)
    chosen = (within + 1 + np.arange(n_rows)[:, None] * length).ravel()
    flat = rows.ravel().copy()
    targets = flat[chosen].copy()
    random_ids = rng.integers(len(SPECIAL_TOKENS), vocab_size, len(chosen))
    flat[chosen] = np.where(dice < 0.8, mask_id, np.where(dice < 0.9, random_ids, targets))
    return flat.reshape(rows.shape), chosen, targets


def _characters(
    rng: np.random.Generator, n_rows: int, body: int, n_chosen: int
) -> tuple[Ints, NDArray[np.float64]]:
    """Positions [N, n_chosen] in a body of ``body`` tokens, different in each row; dice [N * n_chosen]."""
    kth = min(n_chosen, body - 1)  # with a high rate every position may be chosen
    order = rng.random((n_rows, body)).argpartition(kth, axis=1)[:, :n_chosen]
    return order, rng.random(n_rows * n_chosen)


def _spans(
    rng: np.random.Generator, n_rows: int, body: int, n_chosen: int
) -> tuple[Ints, NDArray[np.float64]]:
    """As ``_characters``, in spans; a span that would exceed the number to choose is cut.

    Spans are laid out in random order with random gaps, then the row is turned by a random amount, so that
    every position has the same chance (a span may so go on at the row's beginning).
    """
    lengths = np.minimum(np.searchsorted(_AT_MOST, rng.random((n_rows, n_chosen))), 9) + 1
    lengths = np.diff(np.minimum(lengths.cumsum(1), n_chosen), prepend=0, axis=1)  # sums to n_chosen
    lengths = rng.permuted(lengths, axis=1)
    open_before = np.sort(rng.integers(0, body - n_chosen + 1, lengths.shape), axis=1)
    span = np.repeat(np.arange(lengths.size), lengths.ravel())  # of each chosen position
    position = np.arange(n_chosen)[None, :] + open_before.ravel()[span].reshape(n_rows, n_chosen)
    position = (position + rng.integers(0, body, (n_rows, 1))) % body
    return position, rng.random(lengths.size)[span]


def _mixed(
    rng: np.random.Generator, n_rows: int, body: int, n_chosen: int
) -> tuple[Ints, NDArray[np.float64]]:
    """As ``_characters`` in every other row, as ``_spans`` in the rest."""
    within, dice = np.empty((n_rows, n_chosen), np.int64), np.empty((n_rows, n_chosen))
    for first, pick in ((0, _characters), (1, _spans)):
        part = slice(first, None, 2)
        picked, thrown = pick(rng, len(within[part]), body, n_chosen)
        within[part], dice[part] = picked, thrown.reshape(picked.shape)
    return within, dice.ravel()


_PICK = {"char": _characters, "span": _spans, "mixed": _mixed}
