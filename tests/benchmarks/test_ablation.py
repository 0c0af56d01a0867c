"""The ablation benchmark: three pre-trainings that differ in one setting each, then cells to compare."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from training.toy_tasks import lively_backbone, write_tasks
from tuning_world import make_world

from benchmarks.paper import ablation
from mp2.backbone import save_backbone
from mp2.prompts import load_prompts


def test_one_command_pre_trains_tunes_and_answers_and_then_only_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = lively_backbone()
    save_backbone(backbone, tmp_path / "lively")
    cards, upstream = write_tasks(tmp_path / "up", n_train=20, n_dev=4)
    world = make_world(tmp_path / "down", backbone)
    arguments = [
        *("--upstream", str(upstream), "--data", str(world.data), "--backbone", str(tmp_path / "lively")),
        *("--upstream-tasks", *(str(card.path) for card in cards), "--tasks", str(world.card)),
        *("--seeds", "8", "--steps", "2", "--prompt-tokens", "3", "--intrinsic-dim", "4"),
        *("--epochs", "4", "--test-limit", "3", "--max-tokens", "60", "--work", str(tmp_path / "work")),
        *("--methods", "gradient", "gradient-inline", "gradient-sum", "--out", str(tmp_path / "out.json")),
    ]
    monkeypatch.setattr(sys, "argv", ["benchmarks.paper.ablation", *arguments])
    monkeypatch.setattr(ablation, "provenance", dict)
    ablation.main()
    shown = capsys.readouterr()
    assert shown.err.count("mood gradient") == 3
    assert "- prefix against inline, pre-trained, by gradient: better on" in shown.out
    assert "- division by the sum against by K, gradient: better on" in shown.out
    assert "- pre-trained, inline: mean upstream dev" in shown.out
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["settings"]["prompts"] == ["prefix", "inline", "sum"]
    assert set(found["pretrained"]) == {"prefix", "inline", "sum"}
    metas = {
        name: load_prompts(tmp_path / "work" / "pretrained" / name / "prompts.safetensors", backbone).meta
        for name in ablation.VARIANTS
    }
    assert {name: (m.injection, m.router_normalisation) for name, m in metas.items()} == {
        "prefix": ("prefix", "count"),
        "inline": ("inline", "count"),
        "sum": ("prefix", "sum"),
    }
    ablation.main()
    again = capsys.readouterr()
    assert again.err == ""
    assert again.out == shown.out


def test_nothing_new_is_begun_after_the_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_backbone(lively_backbone(), tmp_path / "lively")
    cards, upstream = write_tasks(tmp_path / "up", n_train=20, n_dev=4)
    arguments = [
        *("--upstream", str(upstream), "--data", str(upstream), "--backbone", str(tmp_path / "lively")),
        *("--upstream-tasks", *(str(card.path) for card in cards), "--steps", "2", "--minutes", "1e-9"),
        *("--prompt-tokens", "3", "--intrinsic-dim", "4", "--work", str(tmp_path / "work")),
    ]
    monkeypatch.setattr(sys, "argv", ["benchmarks.paper.ablation", *arguments])
    monkeypatch.setattr(ablation, "provenance", dict)
    with pytest.raises(SystemExit) as stopped:
        ablation.main()
    assert stopped.value.code == 2
    assert "no cells" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "work" / "pretrained").iterdir()] == ["prefix"]
