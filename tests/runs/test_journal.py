"""The journal as a file: what is torn is dropped, what is damaged is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mp2.errors import FormatError
from mp2.runs.journal import finite_or_none, open_journal, read_journal

GENERATION = [
    {"event": "losses", "stage": 1, "iteration": i + 1, "of": [0, 3], "candidate": "a", "loss": 0.1 * i}
    for i in range(3)
]
SCORES = {"event": "scores", "split": "dev", "at": "untuned", "iteration": 3, "score": 0.5, "loss": 1.0}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "journal.jsonl"
    journal, _, _ = open_journal(path, {"config_sha256": "x"})
    journal.append(GENERATION)
    journal.append([SCORES])
    journal.close()
    return path


def test_what_was_appended_is_read_back(path: Path) -> None:
    header, records, whole = read_journal(path)
    assert header is not None
    assert header["config_sha256"] == "x"
    assert [r.lines for r in records] == [GENERATION, [SCORES]]
    assert whole == path.stat().st_size


def test_cut_anywhere_keeps_whole_events_and_goes_on(path: Path) -> None:
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        journal, _, records = open_journal(path, {"config_sha256": "x"})
        assert [r.lines for r in records] == [GENERATION, [SCORES]][: len(records)]
        rest = [GENERATION, [SCORES]][len(records) :]
        for lines in rest:
            journal.append(lines)
        journal.close()
        assert path.read_bytes() == data, size


def test_floats_come_back_with_all_their_bits(tmp_path: Path) -> None:
    journal, _, _ = open_journal(tmp_path / "j", {})
    loss = 0.1 + 0.2
    journal.append([SCORES | {"loss": loss}])
    journal.close()
    assert read_journal(tmp_path / "j")[1][0].lines[0]["loss"] == loss
    assert finite_or_none(float("nan")) is None
    assert finite_or_none(float("-inf")) is None


@pytest.mark.parametrize(
    ("line", "replacement", "message"),
    [
        (0, {"event": "header", "schema_version": 99}, ":1: expected a journal header with schema_version 1"),
        (2, {"event": "los"}, r":3: field 'event': is 'los', expected losses or scores"),
        (2, GENERATION[0], ":3: iteration 1, expected 2"),
        (2, SCORES, ":3: scores inside a generation"),
        (2, GENERATION[1] | {"loss": "x"}, r":3: field 'loss': is 'x', expected a number or null"),
        (2, GENERATION[1] | {"loss": True}, r":3: field 'loss': is True, expected a number"),
        (2, GENERATION[1] | {"loss": 10**400}, r":3: field 'loss': is 1000.*…, expected a number"),
        (2, GENERATION[1] | {"iteration": None}, ":3: field 'iteration': is None, expected a whole number"),
        (2, GENERATION[1] | {"of": [0]}, r":3: field 'of': has 1 values, expected 2"),
        (
            2,
            GENERATION[1] | {"forward_s": "1"},
            ":3: field 'forward_s': is '1', expected a number, 0 or more",
        ),
        (2, {k: v for k, v in GENERATION[1].items() if k != "of"}, ":3: field 'of': missing"),
        (4, SCORES | {"score": None}, ":5: field 'score': is None, expected a number"),
        (
            0,
            {"event": "header", "schema_version": 1, "versions": "1"},
            ":1: field 'versions': is '1', expected an object",
        ),
    ],
)
def test_a_damaged_line_is_named(path: Path, line: int, replacement: dict[str, object], message: str) -> None:
    lines = path.read_text().splitlines()
    lines[line] = json.dumps(replacement)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(FormatError, match=message):
        read_journal(path)


def test_a_folder_in_the_journals_place_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").mkdir()
    with pytest.raises(FormatError, match=r"journal.jsonl: is a folder, expected the run's journal"):
        open_journal(tmp_path / "journal.jsonl", {})


def test_rubbish_in_the_middle_is_refused(path: Path) -> None:
    lines = path.read_text().splitlines()
    lines[2] = "rubbish"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(FormatError, match=r"journal\.jsonl:3: not JSON"):
        read_journal(path)
