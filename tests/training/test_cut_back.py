"""Journals of training runs, cut back to a checkpoint."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from mp2.backbone import Backbone
from mp2.tasks import TaskCard
from mp2.training import Pretrainer
from mp2.training.checkpoint import cut_back
from training.toy_runs import cut_at, losses, run, tiny


def write(path: Path, steps: list[int], tail: str = "") -> Path:
    path.write_text("".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in steps) + tail, "utf-8")
    return path


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("tail", ["", '{"step": 7, "lo', '{"step": 2', '{"step": 2, "loss": 0.5}'])
def test_later_steps_and_a_torn_line_are_dropped(tmp_path: Path, tail: str) -> None:
    said: list[str] = []
    path = write(tmp_path / "losses.jsonl", [1, 2, 3, 4, 5, 6], tail)
    cut_back(path, 4, range(1, 5), said.append)
    assert steps(path) == [1, 2, 3, 4]
    assert not said


def test_lines_are_counted_by_their_step_and_missing_ones_are_said(tmp_path: Path) -> None:
    said: list[str] = []
    path = write(tmp_path / "losses.jsonl", [1, 4, 5, 6])
    cut_back(path, 5, range(1, 6), said.append)
    assert steps(path) == [1, 4, 5]
    assert said == [f"note: {path} lacks 2 of the steps up to 5, the first is 2: they are in no curve"]
    cut_back(tmp_path / "none.jsonl", 1, range(1, 2), said.append)
    assert said[1].startswith(f"note: {tmp_path / 'none.jsonl'} lacks 1 of the steps up to 1, the first is 1")
    assert not (tmp_path / "none.jsonl").exists()


def test_a_journal_that_cannot_be_replaced_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "losses.jsonl", [1, 2, 3])

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mp2.files.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        cut_back(path, 1, range(1, 2), lambda _: None)
    assert steps(path) == [1, 2, 3]


def test_a_run_without_some_of_its_journal_goes_on_and_says_so(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path
) -> None:
    config = tiny(eval_every=2)
    unbroken = run(world, backbone, config, tmp_path / "unbroken")
    out = tmp_path / "cut"
    with cut_at(Pretrainer, 9, 6), pytest.raises(KeyboardInterrupt):
        run(world, backbone, config, out)
    for name, lost in (("losses.jsonl", 2), ("dev_scores.jsonl", 4)):
        kept = [line for line in (out / name).read_text().splitlines() if json.loads(line)["step"] != lost]
        (out / name).write_text("\n".join(kept) + "\n")
    said: list[str] = []
    resumed = run(world, backbone, config, out, log=said.append)
    assert resumed.prompts.sha256 == unbroken.prompts.sha256
    assert steps(out / "losses.jsonl") == [1, *range(3, 13)]
    assert steps(out / "dev_scores.jsonl") == [0, 2, 6, 8, 10, 12]
    assert losses(tmp_path / "unbroken")[2:] == [
        json.loads(line)["loss"] for line in (out / "losses.jsonl").read_text().splitlines()[1:]
    ]
    notes = [line for line in said if " lacks " in line]
    assert len(notes) == 2
    assert "dev_scores.jsonl lacks 1 of the steps up to 6, the first is 4" in notes[0]
    assert "losses.jsonl lacks 1 of the steps up to 6, the first is 2" in notes[1]
