"""The plan of a run: `mp2 bbt --explain` and the line at the start, on a tiny random backbone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tuning_world import World

from mp2.backbone import Backbone
from mp2.cli import main
from mp2.engine.cpu.backend import CpuBackend
from mp2.engine.cuda.backend import CudaBackend
from mp2.prompts import load_prompts, save_prompts
from mp2.runs import series
from mp2.runs.config import BbtConfig
from mp2.runs.frozen_model import FrozenModel
from mp2.tasks import load_card


def explain(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(main, ["bbt", *arguments, "--explain", "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


STAGE_ONE = ["--iters", "75", "--router-iters", "20", "--shots", "4", "--seed", "13"]
SHORT = [*STAGE_ONE, "--popsize", "8"]


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_the_plan_counts_what_the_run_then_does(world: World, kind: str, tmp_path: Path) -> None:
    options = [*world.options(kind=kind), *SHORT]
    plan = explain(*options)
    assert not (world.root / "runs").exists()
    done = CliRunner().invoke(main, ["bbt", *options, "--out", str(tmp_path), "--json"])
    result = json.loads(done.stdout)
    stages, planned = result["stages"], plan["iterations"]
    if kind == "deep":
        assert planned == {"stage1": 20, "stage2": 55}
        assert stages["stage1"]["iteration"] == 20
    else:  # four modules have no more than 16 routers: what is left goes to stage II
        assert planned == {"stage1": 20, "stage2": 55}
        assert stages["stage1"]["iteration"] == 16
    assert sum(planned.values()) == result["iterations"]
    assert {k: plan["examples"][k] for k in ("train", "dev", "test")} == result["examples"]
    assert {k: plan["engine"][k] for k in ("runtime", "precision", "device")} == result["engine"]
    assert plan["batches"]["population"] == 8


def test_people_read_what_runs_and_why(world: World) -> None:
    done = CliRunner().invoke(main, ["bbt", *world.options(), *SHORT, "--seeds", "1,2,3", "--explain"])
    assert done.exit_code == 2
    options = [o for o in SHORT if o not in ("--seed", "13")]
    done = CliRunner().invoke(main, ["bbt", *world.options(), *options, "--seeds", "1,2,3", "--explain"])
    assert done.exit_code == 0, done.output
    words = " ".join(done.stdout.split())
    assert "torch, fp32, cpu, 1 thread (asked for" in words
    assert "seed 1 and 2 more runs" in words
    assert "stage I 20 iterations, router search bits" in words
    assert "stage II 55 iterations, CMA-ES with a population of 8" in words


def test_a_search_over_prompts_with_soft_routers_says_that_it_tries_hard_ones(
    world: World, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    path = world.deep
    hard = load_prompts(path, tiny_backbone)
    meta = replace(hard.meta, router_inference="soft")
    save_prompts(replace(hard, meta=meta), tmp_path / "soft.safetensors")
    said = "the search tries routers of 0 and 1"
    for prompts, expected in ((path, False), (tmp_path / "soft.safetensors", True)):
        options = [*world.options(), *STAGE_ONE, "--prompts", str(prompts), "--out", str(tmp_path / "runs")]
        done = CliRunner().invoke(main, ["bbt", *options, "--router-only"])
        assert (done.exit_code, said in done.stderr) == (0, expected)


def test_runs_that_share_a_device_are_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuBackend, "side_by_side", lambda *_: 2)
    options = [*world.options(), *[o for o in SHORT if o not in ("--seed", "13")], "--seeds", "1,2,3"]
    done = CliRunner().invoke(main, ["bbt", *options, "--explain"])
    assert "2 side by side, each on a CUDA stream of its own" in " ".join(done.stdout.split())


def test_without_stage_two_and_test_neither_is_planned(world: World) -> None:
    plan = explain(*world.options(), *STAGE_ONE, "--router-only", "--no-test")
    assert plan["iterations"] == {"stage1": 20, "stage2": 0}
    assert plan["examples"]["test"] == 0


def test_a_plan_is_of_a_new_run(world: World) -> None:
    done = CliRunner().invoke(main, ["bbt", "--resume", str(world.root), "--explain"])
    assert (done.exit_code, "no --resume" in done.stderr) == (2, True)


def test_a_run_says_first_what_it_runs_on(world: World, tmp_path: Path) -> None:
    options = [o for o in STAGE_ONE if o not in ("--seed", "13")]
    more = ["--task", str(world.choice_card), "--seeds", "3,1", "--router-only", "--no-test"]
    done = CliRunner().invoke(main, ["bbt", *world.options(), *options, *more, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("mp2: "))
    assert line.startswith("mp2: torch, fp32, cpu, 1 thread (asked for")
    assert line.endswith("; 20 + 0 iterations")
    quiet = ["bbt", *world.options(), *options, *more, "--out", str(tmp_path), "--quiet"]
    done = CliRunner().invoke(main, quiet)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "mean of 2" in done.stdout


@pytest.mark.parametrize("n", [0, 2])
def test_test_examples_that_are_also_in_train_are_said(world: World, tmp_path: Path, n: int) -> None:
    data, name = tmp_path / "data", load_card(world.card).task
    shutil.copytree(world.data / name, data / name)
    lines = (data / name / "train.jsonl").read_text("utf-8").splitlines()
    tests = [json.dumps(json.loads(line) | {"text": f"新{i}"}) for i, line in enumerate(lines[:5])]
    (data / name / "dev.jsonl").unlink(missing_ok=True)
    (data / name / "test.jsonl").write_text("\n".join([*lines[:n], *tests]) + "\n", encoding="utf-8")
    (data / name / "train.jsonl").write_text("\n".join(lines[:64]) + "\n", encoding="utf-8")
    words = [*STAGE_ONE, "--router-only", "--data", str(data), "--shots", "40", "--out", str(tmp_path)]
    done = CliRunner().invoke(main, ["bbt", *world.options(), *words])
    assert done.exit_code == 0, done.output
    assert (f"{n} of {n + 5} test examples are also in train or dev" in done.stderr) == bool(n)


def test_a_low_precision_says_what_it_costs_and_changes_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*world.options(), *SHORT, "--no-test", "--precision"]
    plan = explain(*options, "bf16")
    assert explain(*options, "fp32")["precision_agreement"] is None
    found = plan["precision_agreement"]
    assert (found["n_candidates"], found["layer"], found["n_examples"]) == (8, 1, 8)
    assert found["max_error"] > 0
    table = CliRunner().invoke(main, ["bbt", *options, "bf16", "--explain"]).stdout
    assert "precision bf16: losses differ by at most" in " ".join(table.split())

    done = CliRunner().invoke(main, ["bbt", *options, "bf16", "--out", str(tmp_path / "a"), "--json"])
    line = (
        f"(Spearman) {found['spearman']:.4f} over 8 candidates at layer 1 on 8 of 8 examples, against fp32\n"
    )
    assert "mp2: precision bf16: losses differ by at most" in done.stderr
    assert line in done.stderr
    result = json.loads(done.stdout)
    assert result["precision_agreement"] == found
    assert result["iterations"] == 75
    # without the comparison: the same run
    monkeypatch.setattr("mp2.runs.precision.precision_agreement", lambda problem: None)
    silent = CliRunner().invoke(main, ["bbt", *options, "bf16", "--out", str(tmp_path / "b"), "--json"])
    other = json.loads(silent.stdout)
    assert (other["stages"], other["router"]) == (result["stages"], result["router"])
    assert "precision bf16" not in silent.stderr
    # one that was cut off keeps what was found when it began
    folder = Path(result["run_dir"])
    (folder / "result.json").unlink()
    resumed = CliRunner().invoke(main, ["bbt", "--resume", str(folder), "--json"])
    assert json.loads(resumed.stdout)["precision_agreement"] == found


def test_a_precision_that_overflows_gives_way_before_the_run_begins_and_its_files_say_so(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflowing(config: BbtConfig) -> FrozenModel:
        """As on a GPU under --precision auto, with a feed-forward bias that float16 cannot hold."""
        model = load_model(config)
        with torch.no_grad():
            body = model.backbone.encoder.body(0)
            body.intermediate.bias[0] = 1e5
            body.output.weight[:, 0] *= 1e-4
        runtime = CudaBackend(model.backbone, device="cpu", precision="fp16", wider="bf16")
        return FrozenModel(model.backbone, model.prompts, runtime)

    load_model = series.load_model
    monkeypatch.setattr(series, "load_model", overflowing)
    options = [*world.options(), *SHORT, "--no-test", "--out", str(tmp_path), "--json"]
    done = CliRunner().invoke(main, ["bbt", *options])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "fp16 overflows over" in done.stderr
    assert "mp2: precision bf16: losses differ by at most" in done.stderr
    result = json.loads(done.stdout)
    config = json.loads((Path(result["run_dir"]) / "config.json").read_text("utf-8"))
    assert (result["engine"]["precision"], config["config"]["precision"]) == ("bf16", "bf16")
    assert np.isfinite(result["train_loss"])
