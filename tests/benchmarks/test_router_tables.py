"""Tables of the router-search comparison, from made-up cells."""

from __future__ import annotations

import pytest

from benchmarks.paper.router_tables import cost_table, quality_table, summary, task_table


def cell(task: str, seed: int, method: str, loss: float) -> dict[str, object]:
    return {
        "kind": "deep",
        "task": task,
        "seed": seed,
        "cell": f"{method} 100",
        "loss": loss,
        "dev_score": 0.5,
        "seconds": 1.0,
    }


ROWS = [
    cell("a", 8, "bits", 1.0),
    cell("a", 8, "random", 2.0),
    cell("a", 8, "bo", 0.5),
    cell("a", 13, "bits", 3.0),
    cell("a", 13, "random", 3.0),
    cell("b", 8, "bits", 7.0),
    cell("b", 8, "random", 6.0),
]


def test_ranks_and_wins_are_over_the_problems_that_both_ran() -> None:
    found = {row["method"]: row for row in summary(ROWS)}
    assert found["random"]["ours"] == [1, 1, 1]  # bits better on a 8, equal on a 13, worse on b 8
    assert found["bits"]["rank"] == pytest.approx((1 + 1.5 + 2) / 3)
    assert found["random"]["rank"] == pytest.approx((2 + 1.5 + 1) / 3)
    assert found["bo"]["rank"] == 1
    assert (found["bo"]["problems"], found["bo"]["ours_loss"]) == (1, 1.0)
    assert "| random | 3 | 1.50 | 3.6667 | 3.6667 | 50.0 | 1 / 1 / 1 |" in quality_table(ROWS)


def test_losses_by_task_are_means_and_sample_deviations_over_seeds() -> None:
    lines = task_table(ROWS).splitlines()
    assert "| deep bits 100 | 2.0000 ± 1.4142 (2) | 7.0000 ± 0.0000 (1) |" in lines
    assert "| deep bo 100 | 0.5000 ± 0.0000 (1) | - |" in lines


def test_cost_is_given_in_all_and_for_each() -> None:
    costs = [
        {"method": "bits", "seconds": 0.5, "each": 0.005},
        {"method": "bo", "seconds": 100.0, "each": 1.25},
    ]
    assert "| bo | 100.0000 | 1250.000 |" in cost_table(costs)
