"""Probabilities that mean what they say: temperature scaling and the expected calibration error.

Guo et al. 2017, "On Calibration of Modern Neural Networks": all log-scores are divided by one temperature,
which is fitted on held-out examples by the cross-entropy of their answers. The order of the options, so the
prediction, stays as it is. The expected calibration error sorts predictions into bins by their probability
and averages, weighted by the bins' sizes, how far the share of right ones is from the mean probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mp2.tasks.decode import option_scores

if TYPE_CHECKING:
    from mp2.tasks.mrc import MrcInput

Floats = npt.NDArray[np.floating]

N_BINS = 15  # of equal width, as in the paper
SMALLEST, LARGEST = 1 / 64, 64.0  # temperatures
_GOLDEN = (np.sqrt(5) - 1) / 2
_N_STEPS = 40  # golden sections: the logarithm to 4e-8


def fitted_temperature(rows: Sequence[Floats], gold: Sequence[int]) -> float:
    """The temperature with the lowest cross-entropy of ``gold`` places in log-scores ``rows`` [n_options].

    Targets are smoothed as Platt (1999) does it, 1 - 1/(n + 2) for the gold option of n examples and the rest
    shared by the others: without that a held-out set without a mistake would ask for a temperature of zero.
    -inf in a row is no option.
    """
    left_out = 1 / (len(rows) + 2)
    kept: list[Floats] = []  # each row less its largest score
    targets: list[float] = []  # and what its targets make of it
    for row, place in zip(rows, gold, strict=True):
        options = np.isfinite(row)
        if not options[place] or options.sum() < 2:
            continue
        scores = np.asarray(row, dtype=np.float64) - np.max(row)
        others = (scores[options].sum() - scores[place]) / (options.sum() - 1)
        kept.append(scores[options])
        targets.append((1 - left_out) * float(scores[place]) + left_out * float(others))
    if not kept:
        return 1.0
    table = np.full((len(kept), max(map(len, kept))), -np.inf)
    for filled, finite in zip(table, kept, strict=True):
        filled[: len(finite)] = finite

    def loss(log_temperature: float) -> float:
        sharp = np.exp(-log_temperature)
        return float(np.mean(np.log(np.exp(sharp * table).sum(1)) - sharp * np.array(targets)))

    low, high = np.log(SMALLEST), np.log(LARGEST)  # the loss has one minimum: it is convex in 1 / temperature
    for _ in range(_N_STEPS):
        a, b = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if loss(a) <= loss(b):
            high = b
        else:
            low = a
    return float(np.exp((low + high) / 2))


def cross_entropies(
    rows: Sequence[Floats], gold: Sequence[int], temperature: float
) -> npt.NDArray[np.float64]:
    """The cross-entropy of each row's ``gold`` place, the log-scores divided by ``temperature``."""
    scaled = [np.asarray(row, dtype=np.float64) / temperature for row in rows]
    return np.array([np.logaddexp.reduce(row) - row[place] for row, place in zip(scaled, gold, strict=True)])


def answer_rows(inputs: Sequence[MrcInput], scores: Sequence[Floats]) -> tuple[list[Floats], list[int]]:
    """What `fitted_temperature` takes: of tasks with options a row an example, of others two an input.

    Those are the log-probabilities of an answer's start and end. Inputs whose answer is not known, or lies in
    another window, have none.
    """
    if len(inputs) and inputs[0].label >= 0:
        gold = {item.example: item.label for item in inputs}
        rows = option_scores(len(gold), inputs, scores)
        return rows, [gold[example] for example in range(len(gold))]
    pairs = [
        (np.asarray(logp)[:, column], place)
        for item, logp in zip(inputs, scores, strict=True)
        for column, place in enumerate((item.start, item.end))
        if item.start > 0
    ]
    return [row for row, _ in pairs], [place for _, place in pairs]


def calibration_error(probabilities: Sequence[float], right: Sequence[bool]) -> float:
    """Expected calibration error, 0 to 1, in `N_BINS` bins of equal width."""
    p, r = np.asarray(probabilities, dtype=np.float64), np.asarray(right, dtype=np.float64)
    bins = np.clip(np.ceil(p * N_BINS) - 1, 0, N_BINS - 1).astype(int)
    return float(sum(abs(p[bins == k].sum() - r[bins == k].sum()) for k in range(N_BINS)) / len(p))
