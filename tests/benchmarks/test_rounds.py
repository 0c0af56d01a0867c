from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.speed import rounds
from benchmarks.speed.rounds import Pieces, check_rounds, ranged, spread, verdict
from mp2.errors import UsageError


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((6.01, 9.0, 7.0), "met"),
        ((6.0, 9.0, 7.0), "not shown"),  # the median is above, one round is not
        ((5.0, 6.5, 5.0), "not shown"),
        ((6.0, 5.0, 4.0), "missed"),
    ],
)
def test_a_target_is_met_only_where_the_whole_range_is_above_it(
    values: tuple[float, ...], expected: str
) -> None:
    assert verdict(values, 6.0) == expected


def test_spread_is_median_least_and_most_with_all_rounds() -> None:
    found = spread([3.0, 1.0, 2.004, 9.0], 2)
    assert found == {"median": 2.5, "min": 1.0, "max": 9.0, "rounds": [3.0, 1.0, 2.0, 9.0]}
    assert ranged(found, 1) == "2.5 (1.0-9.0)"


def test_fewer_than_three_rounds_are_refused() -> None:
    check_rounds(3)
    with pytest.raises(UsageError, match="--rounds is 2, expected at least 3"):
        check_rounds(2)


def test_pieces_are_taken_up_only_under_the_same_settings_and_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[int] = []

    def make() -> dict[str, int]:
        made.append(1)
        return {"n": len(made)}

    def n(settings: list[str], minutes: float = 1.0) -> int | None:
        found = Pieces(tmp_path, settings, minutes).get("a", make)
        return None if found is None else found["n"]

    assert n(["x"]) == n(["x"], -1.0) == 1
    assert n(["y"], -1.0) is None
    assert n(["y"]) == 2
    monkeypatch.setattr(rounds, "SOURCE_SHA256", "another code")
    assert n(["x"]) == 3
