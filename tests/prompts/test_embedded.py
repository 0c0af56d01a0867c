"""The weights that ship with the package: they load, belong together, are small, and can be steered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import mp2
from mp2.backbone import load_backbone
from mp2.cli import main
from mp2.prompts import load_prompts

PACKAGE = Path(mp2.__file__).parent


@pytest.mark.parametrize("name", ["mini-deep", "mini-shallow"])
def test_embedded_prompts_fit_the_embedded_backbone(name: str) -> None:
    backbone = load_backbone("mini")
    prompts = load_prompts(name, backbone)
    assert prompts.kind == name.removeprefix("mini-")
    assert prompts.meta.tasks


def test_embedded_weights_are_at_most_20_megabytes() -> None:
    files = [*(PACKAGE / "backbone" / "mini").iterdir(), *(PACKAGE / "prompts" / "mini").iterdir()]
    assert sum(file.stat().st_size for file in files) <= 20e6


def test_both_stages_lower_the_loss_of_the_demo_task_and_the_prompt_predicts(tmp_path: Path) -> None:
    runner = CliRunner()
    arguments = [
        "bbt",
        "--task",
        "demo_topic",
        "--iters",
        "80",
        "--router-iters",
        "40",
        "--threads",
        "1",
        "--json",
    ]
    done = runner.invoke(main, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    untuned, stage1 = (result["stages"][name] for name in ("untuned", "stage1"))
    # the untuned router is the first candidate: only less than its loss says that the search found something
    assert stage1["train_loss"] < 0.9 * untuned["train_loss"]
    assert stage1["router"] != untuned["router"]
    assert result["best_train_loss"] < stage1["train_loss"]
    assert result["iterations"] == 80
    baselines = {name: found["test_score"] for name, found in result["baselines"].items()}
    assert set(baselines) == {"majority", "tfidf", "probe"}
    assert max(baselines.values()) < untuned["test_score"] < result["test_score"]
    text = tmp_path / "texts.txt"
    text.write_text("球队在主场赢了比赛。\n", "utf-8")
    answer = runner.invoke(main, ["predict", "--run", result["run_dir"], "--input", str(text)])
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["label"] == "sports"
