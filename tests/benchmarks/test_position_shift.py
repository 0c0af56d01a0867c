"""What empty inline rows cost: what each way of moving a text does to its hidden states, and the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tuning_world import make_world

from benchmarks.paper import position_shift
from mp2.backbone import Backbone


def test_each_way_is_what_it_says(tiny_backbone: Backbone) -> None:
    ids = torch.tensor([[2, 20, 21, 22, 3]])
    found = {way: position_shift.last_hidden(tiny_backbone, ids, 4, way) for way in position_shift.WAYS}
    assert {tuple(hidden.shape) for hidden in found.values()} == {(1, 5, 24)}
    assert torch.equal(found["no prompt"], tiny_backbone.encoder(ids))
    zero = torch.zeros(3, 4, 24)
    assert torch.allclose(found["placeholders"], tiny_backbone.encoder(ids, added=zero), atol=1e-6)
    for way in position_shift.WAYS[1:]:
        assert not torch.allclose(found[way], found["no prompt"], atol=1e-4), way


def test_without_rows_nothing_moves_and_the_command_writes_its_scores(
    tmp_path: Path,
    tiny_backbone: Backbone,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    world = make_world(tmp_path, tiny_backbone)
    arguments = [
        *("--data", str(world.data), "--backbone", str(world.backbone), "--prompts", str(world.deep)),
        *("--tasks", str(world.card), "--rows", "0", "--max-tokens", "60", "--out", str(tmp_path / "o.json")),
    ]
    monkeypatch.setattr(sys, "argv", ["benchmarks.paper.position_shift", *arguments])
    monkeypatch.setattr(position_shift, "provenance", dict)
    position_shift.main()
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["m"] == 0
    (row,) = found["rows"].values()
    assert len(set(row.values())) == 1
    assert str(row["moved"]) in capsys.readouterr().out
