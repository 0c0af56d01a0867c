"""What a pre-training leaves: routers, curves, scores, numbers, a card, TensorBoard scalars."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mp2.backbone import Backbone
from mp2.prompts import load_prompts
from mp2.tasks import TaskCard
from mp2.training import PretrainConfig, PretrainInputs, PretrainResult, pretrain

SETTINGS: dict[str, Any] = {
    "n_modules": 4,
    "prompt_tokens": 3,
    "intrinsic_dim": 8,
    "steps": 25,
    "batch_size": 8,
    "router_lr": 1e-4,
    "prompt_lr": 1e-2,
    "max_tokens": 64,
    "dev_limit": 8,
    "eval_every": 10,
}


@pytest.fixture(scope="module")
def done(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PretrainResult]:
    """A finished run's folder and result."""
    out = tmp_path_factory.mktemp("out")
    inputs = PretrainInputs(tasks=("mood",), backbone="lively", command="mp2 pretrain --tasks mood")
    config = PretrainConfig(**SETTINGS)
    return out, pretrain(world[0], backbone, config, out, data=world[1], inputs=inputs)


def test_routers_are_written_as_a_table_of_what_the_prompt_file_holds(done: tuple[Path, Any]) -> None:
    out, _ = done
    prompts = load_prompts(out / "prompts.safetensors")
    with (out / "routers.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["task", "family", "layer", "module", "logit", "active"]
    assert len(rows) == 3 * 2 * 4
    for row in rows:
        task = prompts.meta.tasks.index(row["task"])
        logit = prompts.routers[task, int(row["layer"]), int(row["module"])].item()
        assert float(row["logit"]) == pytest.approx(logit, rel=1e-5)
        assert row["active"] == ("1" if logit > 0 else "0")
        assert row["family"] == "toy"
    assert {row["active"] for row in rows} == {"0", "1"}


def test_the_card_says_what_from_what_how_and_how_good(
    done: tuple[Path, PretrainResult], backbone: Backbone
) -> None:
    out, result = done
    card = (out / "model_card.md").read_text("utf-8")
    assert card.startswith("# Modular prompts (deep, prefix) for lively\n")
    assert f"was frozen: its hash before and after the run is `{backbone.sha256}`" in card
    scores = result.scores["find"]
    cells = f"| {100 * scores['before']:.1f} | {100 * scores['after']:.1f} |"
    assert f"| find | toy | extraction | 60 | 8 | f1 {cells}" in card
    assert "| all 3 | | | 180 | | mean |" in card
    assert "mp2 pretrain --tasks mood" in card
    assert "Seed 0; 1 process on cpu" in card
    assert '"router_lr": 0.0001' in card
    assert "0 steps had a non-finite loss" in card
    assert "## Licence" in card


def test_the_card_says_so_when_the_backbone_was_trained_too(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path
) -> None:
    config = PretrainConfig(**{**SETTINGS, "steps": 3, "backbone_lr": 1e-3})
    result = pretrain(world[0], backbone, config, tmp_path, data=world[1])
    card = (tmp_path / "model_card.md").read_text("utf-8")
    assert "**The backbone's weights were trained in this run too**" in card
    assert result.backbone.sha256 in card
    assert backbone.sha256 in card
    assert "was frozen" not in card
    numbers = json.loads((tmp_path / "result.json").read_text())
    assert numbers["backbone_trained"] is True
    assert numbers["backbone_sha256_before"] != numbers["backbone_sha256_after"]


def test_numbers_and_settings_can_be_read_back(done: tuple[Path, PretrainResult], backbone: Backbone) -> None:
    out, result = done
    numbers = json.loads((out / "result.json").read_text())
    assert numbers["prompts_sha256"] == result.prompts.sha256
    assert numbers["backbone_sha256_before"] == numbers["backbone_sha256_after"] == backbone.sha256
    assert numbers["examples_per_s"] == pytest.approx(25 * 8 / result.seconds, rel=1e-2)
    assert 0 <= numbers["data_wait_share"] <= 1
    raw = json.loads((out / "config.json").read_text())
    assert raw.pop("inputs")["tasks"] == ["mood"]
    assert PretrainConfig(**raw) == PretrainConfig(**SETTINGS)


def test_curves_are_a_picture_and_no_partial_file_is_left(done: tuple[Path, Any]) -> None:
    out, _ = done
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("*.part"))


def test_tensorboard_has_losses_rates_temperature_and_dev_scores(done: tuple[Path, PretrainResult]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out, result = done
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    losses = [json.loads(line)["loss"] for line in (out / "losses.jsonl").read_text().splitlines()]
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert list(shown) == [10, 20]
    assert shown[20] == pytest.approx(sum(losses[10:20]) / 10, rel=1e-5)
    assert events.Scalars("rate/router")[0].value == pytest.approx(1e-4)
    assert events.Scalars("train/temperature")[0].value == 1.0
    assert [event.step for event in events.Scalars("dev/find")] == [0, 10, 20, 25]
    assert events.Scalars("dev/find")[-1].value == pytest.approx(result.scores["find"]["after"])
    assert "dev/mean" in events.Tags()["scalars"]


def test_without_tensorboard_one_line_says_so_and_the_run_goes_on(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    lines: list[str] = []
    config = PretrainConfig(**{**SETTINGS, "steps": 11, "eval_every": 5})
    pretrain(world[0], backbone, config, tmp_path, data=world[1], log=lines.append)
    assert sum("TensorBoard" in line for line in lines) == 1
    assert not (tmp_path / "tensorboard").exists()
    assert (tmp_path / "prompts.safetensors").is_file()


def test_the_progress_line_has_pace_time_left_loss_and_data_wait(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path
) -> None:
    lines: list[str] = []
    config = PretrainConfig(**{**SETTINGS, "steps": 4, "eval_every": 0})
    pretrain(world[0], backbone, config, tmp_path, data=world[1], log=lines.append)
    [line] = [line for line in lines if line.startswith("step 4/4")]
    for part in ("loss ", " steps/s", " examples/s", "data wait ", " % ETA 0:00"):
        assert part in line
