"""`mp2 bbt --explain` and the line at the start of a run, on a tiny random backbone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tuning_world import World, make_world

from mp2.backbone import Backbone
from mp2.cli import main
from mp2.prompts import load_prompts, save_prompts


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> World:
    return make_world(tmp_path_factory.mktemp("world"), tiny_backbone)


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
    stage1 = 20 if kind == "deep" else 16  # four modules have no more routers
    assert sum(plan["work"]["populations"]) == stage1
    assert result["stages"]["stage1"]["iteration"] == stage1
    assert plan["iterations"] == [stage1, 75 - stage1]
    assert sum(plan["iterations"]) == result["iterations"]
    assert plan["work"]["layer_iterations"] == 75 - stage1
    assert len(plan["costs"]["visit_s"]) == (3 if kind == "deep" else 1)
    assert result["evaluations"]["dev"] <= plan["work"]["n_dev"]
    assert result["evaluations"]["test"] <= plan["work"]["n_test"]
    assert plan["training"]["examples"] == result["examples"]["train"]
    assert plan["engine"]["runtime"] == result["engine"]["runtime"]
    seconds = plan["seconds"]
    assert seconds["total_s"] == pytest.approx(sum(s for name, s in seconds.items() if name != "total_s"))
    assert min(seconds["stage1_s"], seconds["stage2_s"], seconds["dev_s"], seconds["test_s"]) > 0


def test_the_table_says_what_why_and_how_long(world: World) -> None:
    done = CliRunner().invoke(main, ["bbt", *world.options(), *SHORT, "--seeds", "1,2,3", "--explain"])
    assert done.exit_code == 2
    options = [o for o in SHORT if o not in ("--seed", "13")]
    done = CliRunner().invoke(main, ["bbt", *world.options(), *options, "--seeds", "1,2,3", "--explain"])
    assert done.exit_code == 0, done.output
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line[:1].strip()}
    assert {"engine", "training", "dev", "test", "prepare", "total", "seeds"} <= set(lines)
    assert "torch, fp32, cpu, 1 thread (asked for" in lines["engine"]
    assert "3 seeds" in lines["seeds"]
    assert max(len(line) for line in done.stdout.splitlines()) <= 110


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


def test_seeds_that_compute_side_by_side_take_less_than_one_after_another(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mp2.runs.planning.lanes_for", lambda objective, n_runs: 2)
    monkeypatch.setattr("mp2.runs.explain.clock", lambda seconds: f"{seconds:.6f} s")
    options = [*world.options(), *[o for o in SHORT if o not in ("--seed", "13")], "--seeds", "1,2,3"]
    done = CliRunner().invoke(main, ["bbt", *options, "--explain"])
    words = " ".join(done.stdout.split("\nseeds", 1)[1].split())
    assert "for 3 seeds, 2 side by side, each on a CUDA stream of its own" in words
    total = float(done.stdout.split("\ntotal", 1)[1].split()[0])
    least, most = (float(text) for text in (words.split()[0], words.split()[3]))
    assert (least, most) == (pytest.approx(2 * total, abs=1e-4), pytest.approx(3 * total, abs=1e-4))


def test_a_slow_router_search_is_tried_in_part(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mp2.runs.planning._SUGGEST_LIMIT_S", 0.0)
    options = [*world.options(), *STAGE_ONE, "--router-only", "--no-test", "--router-search", "random"]
    plan = explain(*options, "--router-iters", "50")
    assert plan["work"]["populations"] == [1, 20, 20, 9]  # one was tried


def test_without_stage_two_and_test_neither_is_planned(world: World) -> None:
    plan = explain(*world.options(), *STAGE_ONE, "--router-only", "--no-test")
    assert plan["iterations"] == [20, 0]
    assert plan["costs"]["visit_s"] == []
    assert (plan["seconds"]["stage2_s"], plan["seconds"]["test_s"]) == (0, 0)


def test_a_plan_is_of_a_new_run(world: World) -> None:
    done = CliRunner().invoke(main, ["bbt", "--resume", str(world.root), "--explain"])
    assert (done.exit_code, "no --resume" in done.stderr) == (2, True)


def test_a_run_says_first_what_it_runs_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["bbt", *world.options(), *STAGE_ONE, "--router-only", "--no-test", "--out", str(tmp_path)]
    done = CliRunner().invoke(main, options)
    assert "mp2: torch, fp32, cpu, 1 thread (asked for" in done.stderr
    monkeypatch.setattr("mp2.runs.explain._WORTH_S", 0.0)
    done = CliRunner().invoke(main, options)
    assert "); about 0:0" in done.stderr
    assert "(stage I 0:0" in done.stderr


def test_several_runs_say_it_once_and_each_task_its_time(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [o for o in STAGE_ONE if o not in ("--seed", "13")]
    more = ["--task", str(world.choice_card), "--seeds", "3,1", "--router-only", "--no-test"]
    words = ["bbt", *world.options(), *options, *more, "--out", str(tmp_path)]
    monkeypatch.setattr("mp2.runs.explain._WORTH_S", 0.0)
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    said = [line for line in done.stderr.splitlines() if line.startswith("mp2: ")]
    assert said[0].startswith("mp2: torch, fp32, cpu, 1 thread (asked for")
    assert [line.split(": about")[0] for line in said[1:]] == ["mp2: a run of mood", "mp2: a run of pick"]


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
    assert "precision  bf16: losses differ by at most" in table

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
