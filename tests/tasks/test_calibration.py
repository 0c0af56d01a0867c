from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from mp2.tasks.calibration import N_BINS, answer_rows, calibration_error, fitted_temperature
from mp2.tasks.mrc import MrcInput


def smoothed_loss(rows: np.ndarray, gold: np.ndarray, temperature: float) -> float:
    n, c = rows.shape
    targets = np.full((n, c), 1 / (n + 2) / (c - 1))
    targets[np.arange(n), gold] = 1 - 1 / (n + 2)
    scaled = rows / temperature
    return float(-(targets * (scaled - np.logaddexp.reduce(scaled, 1)[:, None])).sum(1).mean())


@pytest.mark.parametrize("true", [0.3, 1.0, 5.0])
def test_the_temperature_that_the_answers_were_drawn_with_is_found(true: float) -> None:
    rng = np.random.default_rng(0)
    rows = 3 * true * rng.standard_normal((4000, 5))
    gold = np.array([rng.choice(5, p=np.exp(r / true) / np.exp(r / true).sum()) for r in rows])
    found = fitted_temperature(list(rows), gold.tolist())
    assert found == pytest.approx(true, rel=0.1)
    best = minimize_scalar(lambda t: smoothed_loss(rows, gold, np.exp(t)), bounds=(-4, 4), method="bounded")
    assert np.log(found) == pytest.approx(best.x, abs=1e-3)


def test_a_set_without_a_mistake_does_not_ask_for_certainty() -> None:
    rows = [np.array([2.0, 0.0, 0.0])] * 32
    temperature = fitted_temperature(rows, [0] * 32)
    scores = np.exp(rows[0] / temperature)
    assert scores[0] / scores.sum() == pytest.approx(1 - 1 / 34, abs=1e-4)  # Platt's target


def test_options_that_a_row_has_not_are_left_out_and_nothing_to_fit_is_one() -> None:
    rows = [np.array([1.0, 0.0, -np.inf]), np.array([0.0, 1.0, -np.inf])] * 8
    assert fitted_temperature(rows, [0, 0] * 8) == fitted_temperature([r[:2] for r in rows], [0, 0] * 8)
    assert fitted_temperature([], []) == 1.0
    assert fitted_temperature([np.array([np.nan, np.nan])], [0]) == 1.0


def test_the_calibration_error_is_the_bins_weighted_gap() -> None:
    assert N_BINS == 15
    assert calibration_error([1.0] * 10, [True] * 5 + [False] * 5) == pytest.approx(0.5)
    assert calibration_error([0.5] * 10, [True] * 5 + [False] * 5) == pytest.approx(0.0)
    # two bins: 4 of .9 with 2 right (gap .4), 6 of .5 with 6 right (gap .5)
    probabilities, right = [0.9] * 4 + [0.5] * 6, [True, True, False, False] + [True] * 6
    assert calibration_error(probabilities, right) == pytest.approx(0.4 * 0.4 + 0.6 * 0.5)
    assert calibration_error([1 / 15], [True]) == pytest.approx(14 / 15)  # a bin holds its upper edge


def item(example: int, **facts: object) -> MrcInput:
    given = {"input_ids": np.arange(6), "start": 0, "end": 0, "option_spans": np.empty((0, 2), np.int64)}
    return MrcInput(example=example, **(given | facts))  # type: ignore[arg-type]


def test_rows_of_options_are_the_best_of_each_examples_inputs() -> None:
    inputs = [item(0, label=1), item(0, label=1), item(1, label=0)]
    scores = [np.array([0.0, -np.inf]), np.array([-np.inf, 2.0]), np.array([3.0, 1.0])]
    rows, gold = answer_rows(inputs, scores)
    np.testing.assert_array_equal(rows, [[0.0, 2.0], [3.0, 1.0]])
    assert gold == [1, 0]


def test_rows_of_spans_are_starts_and_ends_of_windows_with_the_answer() -> None:
    inputs = [item(0, start=2, end=3), item(0)]
    logp = np.log(np.full((6, 2), 1 / 6))
    rows, gold = answer_rows(inputs, [logp, logp])
    assert gold == [2, 3]
    assert [len(row) for row in rows] == [6, 6]
