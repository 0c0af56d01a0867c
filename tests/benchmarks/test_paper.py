"""`python -m benchmarks.paper`: every table and figure at toy scale, over a tiny random backbone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import own_tasks
import pytest
from recipe_world import write_upstream
from runs.test_any_backbone import save_bert
from transformers import BertForMaskedLM

from benchmarks.paper import figure3, figure4
from benchmarks.paper.__main__ import COMMANDS, run
from benchmarks.paper.cells import Cell, cell_file
from benchmarks.paper.cost import TESTS, Rates, cell_s, rates_of
from benchmarks.paper.methods import METHODS, Lab, Settings
from benchmarks.paper.published import beside
from mp2.backbone import Backbone, load_backbone
from mp2.errors import MissingDependencyError, Mp2Error, UnknownNameError, UsageError
from mp2.prompts import PromptSet, random_prompts, save_prompts
from mp2.tasks import load_card
from mp2.training.config import PretrainConfig
from mp2.training.methods import METHODS as TUNE
from mp2.training.methods.method import first_prompt

TASK = "tickets"


def made_by(prompts: PromptSet, method: str) -> PromptSet:
    """As `mp2 pretrain --method` marks what it makes."""
    return replace(
        prompts, meta=replace(prompts.meta, provenance={"made_by": "mp2 pretrain", "method": method})
    )


def pretrained(backbone: Backbone, kind: Any, **rates: float) -> PromptSet:
    """Random prompts that say how they were pre-trained."""
    prompts = random_prompts(backbone, kind, n_modules=4, prompt_tokens=3, intrinsic_dim=5, tasks=("bq",))
    config = asdict(PretrainConfig(kind=kind, **rates))
    return replace(
        prompts, meta=replace(prompts.meta, provenance={"made_by": "mp2 pretrain", "config": config})
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone with the head of masked language modelling, prompts of every method, a task."""
    root = tmp_path_factory.mktemp("paper")
    backbone = load_backbone(save_bert(root / "bert", BertForMaskedLM))
    own_tasks.write_tasks(root, seed=8)
    shutil.copy(root / TASK / "test.jsonl", root / TASK / "dev.jsonl")  # none of train
    soft = first_prompt(TUNE["prompt-tuning"], backbone, 3, 1)
    files = {
        "deep": pretrained(backbone, "deep"),
        "shallow": pretrained(backbone, "shallow"),
        "deep-one-rate": pretrained(backbone, "deep", router_lr=1e-3, prompt_lr=1e-3),
        "spot": made_by(soft, "spot"),
        "ppt": made_by(soft, "ppt"),
        "head": made_by(first_prompt(TUNE["head-tuning"], backbone, None, 1), "head"),
    }
    for name, prompts in files.items():
        save_prompts(prompts, root / f"{name}.safetensors")
    return root


def command(world: Path, name: str, out: Path, *more: object, prompts: tuple[str, ...] = ()) -> list[str]:
    files = [str(world / f"{p}.safetensors") for p in prompts]
    words = [name, "--data", world, "--backbone", world / "bert", "--prompts", *files, "--seeds", "8"]
    words += ["--iters", 26, "--epochs", 4, "--test-limit", 6, "--max-tokens", 48]
    return [str(word) for word in (*words, "--work", out / name, "--out", out / f"{name}.json", *more)]


ALL = ("deep", "shallow", "spot", "ppt", "head")
PLAIN = [m for m in METHODS if "inline" not in m]


@pytest.fixture(scope="module")
def table(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cell of each method."""
    out = tmp_path_factory.mktemp("table3")
    task = world / f"{TASK}.toml"
    run(command(world, "table3", out, "--tasks", task, "--methods", *PLAIN, prompts=ALL))
    return out


def test_table3_has_a_cell_of_every_method_and_computes_none_twice(
    world: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = {m: json.loads(cell_file(table / "table3", Cell(m, TASK, 8)).read_text()) for m in PLAIN}
    assert not {m: c["refused"] for m, c in cells.items() if "refused" in c}
    for method, cell in cells.items():
        assert all(0 <= stage["test_score"] <= 1 for stage in cell["stages"].values()), method
    assert {"tfidf", "probe"} == set(cells["simple"]["stages"])
    assert cells["prompt-tuning"]["learning_rate"] in (None, 0.5)  # 5e-3 for 4 epochs in place of 1,000
    task = world / f"{TASK}.toml"
    before = {p: p.stat().st_mtime_ns for p in (table / "table3" / "cells").glob("*.json")}
    run(command(world, "table3", table, "--tasks", task, "--methods", *PLAIN, prompts=ALL))
    assert {p: p.stat().st_mtime_ns for p in before} == before
    shown = capsys.readouterr().out
    assert "BBTv2, upstream head" in shown
    rows = json.loads((table / "table3.json").read_text())["rows"]
    assert len({row["column"] for row in rows}) >= len(PLAIN) - 1


def test_a_cell_that_fails_does_not_stop_the_others_and_is_tried_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Lab.run

    def fails(lab: Lab, method: str, *cell: Any) -> dict[str, Any]:
        if method == "simple":
            raise RuntimeError("a stumbling\nblock")
        return whole(lab, method, *cell)

    task = world / f"{TASK}.toml"
    words = command(world, "table3", tmp_path, "--tasks", task, "--methods", "simple", "majority")
    work = tmp_path / "table3"
    with monkeypatch.context() as patch:
        patch.setattr(Lab, "run", fails)
        with pytest.raises(Mp2Error, match="1 of 2 cells failed") as error:
            run(words)
        assert error.value.exit_code == 1
        assert cell_file(work, Cell("majority", TASK, 8)).is_file()
        shown = capsys.readouterr()
        assert shown.err.count(f"{TASK}.simple.8: failed: RuntimeError: a stumbling block") == 1
        assert f"- {TASK}.simple.8: RuntimeError: a stumbling block" in shown.out
        assert (
            "Missing: 1 of 2 cells; the same command computes them.\n- simple: tickets (seed 8)" in shown.out
        )
        assert "in fails" in (work / "failed" / f"{TASK}.simple.8.txt").read_text("utf-8")
    run(words)
    assert not list((work / "failed").iterdir())
    assert "Missing" not in capsys.readouterr().out


def test_the_page_says_its_scale_and_what_cannot_be_had(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_upstream(tmp_path / "data", ["lcqmc"], ("train", "test"))
    words = command(world, "table3", tmp_path, "--budget-minutes", "1e-9", prompts=("deep",))
    words[words.index(str(world))] = str(tmp_path / "data")
    run(words)
    said = capsys.readouterr().err
    assert "no cell was begun within --budget-minutes" in said
    assert not (tmp_path / "table3.json").exists()
    assert "Without bq, ccpm, cote_mfw" in said
    assert "Without prompt-tuning, gradient-shallow, shallow: --prompts has no shallow prompts." in said
    assert "Without spot: --prompts has no spot prompts." in said
    run([*words, "--methods", "majority", "--budget-minutes", "1"])
    state = json.loads((tmp_path / "table3.json").read_text("utf-8"))["state"]
    assert state[0].startswith("Scale: 26 iterations of black-box tuning (paper: 8,000); 4 epochs")
    assert "seed 8 (paper: five); at most 48 tokens; backbone bert" in state[0]
    assert state[0] in capsys.readouterr().out
    assert state[1].startswith("Without bq")
    with pytest.raises(UsageError, match="--budget-minutes is 0"):
        run([*words, "--budget-minutes", "0"])


def test_a_dry_run_says_what_all_cells_would_cost_and_computes_none(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ("majority", "simple", "prompt-tuning", "gradient", "deep", "bbtv2")
    task = world / f"{TASK}.toml"
    more = ("--tasks", task, "--methods", *methods, "--seeds", "8,13", "--dry-run")
    words = [*command(world, "table3", tmp_path, *more, prompts=ALL), "--iters", "1000", "--epochs", "100"]
    run(words)
    rows = json.loads((tmp_path / "table3_cost.json").read_text("utf-8"))["rows"]
    found = {row["method"]: row for row in rows}
    assert {method: row["cells"] for method, row in found.items()} == dict.fromkeys(methods, 2)
    assert {method: row["steps"] for method, row in found.items()} == {
        **{"majority": 0, "simple": 0, "deep": 1000, "bbtv2": 1000},
        **{"prompt-tuning": 200, "gradient": 100},  # two rates, one
    }
    deep = found["deep"]
    assert deep["core_hours"] >= 0.9 * 2 * 1000 * min(deep["step_s"]) / 3600
    assert not (tmp_path / "table3").exists() or not list((tmp_path / "table3").rglob("*.json"))
    shown = capsys.readouterr().out
    assert "| all | 12 |" in shown
    assert "Scale: 1,000 iterations" in shown


def test_costs_between_two_timed_tasks_are_on_a_line(world: Path) -> None:
    files = tuple(str(world / f"{name}.safetensors") for name in ("deep", "shallow"))
    settings = Settings(
        backbone=str(world / "bert"), prompts=files, iters=1000, epochs=100, test_limit=50, max_tokens=48
    )
    lab = Lab(settings, world, world / "none")
    low, high = Rates(1, 0.1, 1.0, 0.01), Rates(1, 0.3, 3.0, 0.03)
    n_dev = 1000 / (20 * lab.backbone.config.n_layers) + 2
    steps, seconds = cell_s(lab, "deep", low, high, 0.5, 50)
    assert (steps, seconds) == (1000, pytest.approx(1000 * 0.2 + n_dev * 2 + 50 * 0.02))
    low, high = (replace(rates, steps_an_epoch=4) for rates in (low, high))
    steps, seconds = cell_s(lab, "model-tuning", low, high, 0.0, 50)
    assert (steps, seconds) == (400, pytest.approx(400 * 0.1 + 42 * 1.0 + 50 * 0.01))
    steps, seconds = cell_s(lab, "simple", Rates(1, 0.0, 0.0, 0.2), Rates(1, 0.0, 0.0, 0.2), 0.3, 50)
    assert (steps, seconds) == (0, pytest.approx(10))


def test_what_has_no_steps_is_timed_whole_and_the_rest_on_few_test_examples(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {}

    def run_of(lab: Lab, method: str, *_: Any) -> dict[str, Any]:
        limits[method] = lab.settings.test_limit
        parts = {"stage1": 1.0, "stage2": 1.0, "dev": 1.0, "test": 1.0}
        counts = {"evaluations": {"dev": 1}, "examples": {"test": 1}}
        return {} if method == "simple" else {"seconds": parts, "iterations": 1, **counts}

    monkeypatch.setattr(Lab, "run", run_of)
    files = (str(world / "deep.safetensors"),)
    settings = Settings(
        backbone=str(world / "bert"), prompts=files, iters=1000, epochs=100, test_limit=50, max_tokens=48
    )
    lab = Lab(settings, world, world / "none")
    for method in ("simple", "deep"):
        rates_of(lab, Cell(method, TASK, 8), 50)
    assert limits == {"simple": 50, "deep": TESTS}


def test_the_three_heads_differ_and_the_published_ones_read_label_words(table: Path) -> None:
    def loss(method: str) -> float:
        cell = json.loads(cell_file(table / "table3", Cell(method, TASK, 8)).read_text())
        return float(cell["stages"]["untuned"]["train_loss"])

    losses = [loss(f"bbtv2-{head}-head") for head in ("mp2", "upstream", "tuned")]
    assert len({round(x, 6) for x in losses}) == 3
    runs = table / "table3" / "runs" / TASK
    (config,) = runs.glob("bbtv2-seed8/*/config.json")
    assert json.loads(config.read_text())["head"]["kind"] == "mlm"


@pytest.mark.parametrize("method", ["deep", "bbtv2"])
def test_a_cell_that_was_killed_goes_on_from_its_journal(
    world: Path, table: Path, tmp_path: Path, method: str
) -> None:
    """Cut back to what a kill in the middle of the search leaves."""
    task, work, own = world / f"{TASK}.toml", tmp_path / "table3", f"runs/{TASK}/{method}-seed8"
    file = cell_file(work, Cell(method, TASK, 8))
    whole = json.loads(cell_file(table / "table3", Cell(method, TASK, 8)).read_text("utf-8"))
    shutil.copytree(table / "table3" / own, work / own)
    (run_dir,) = (work / own).iterdir()
    for name in ("result.json", "prompt.safetensors"):
        (run_dir / name).unlink()
    lines = (run_dir / "journal.jsonl").read_bytes().splitlines(keepends=True)
    kept = b"".join(lines[: len(lines) // 2])
    (run_dir / "journal.jsonl").write_bytes(kept + lines[len(lines) // 2][:20])
    run(command(world, "table3", tmp_path, "--tasks", task, "--methods", method, prompts=ALL))
    assert json.loads(file.read_text("utf-8"))["stages"] == whole["stages"]
    began = b"".join(lines[:2])  # a generation that was cut off is computed again, with times of its own
    assert (run_dir / "journal.jsonl").read_bytes().startswith(began)
    assert len(list(run_dir.parent.iterdir())) == 1


@pytest.mark.slow
def test_several_processes_share_the_cells_and_one_prints_the_page(world: Path, tmp_path: Path) -> None:
    task = world / f"{TASK}.toml"
    words = command(world, "table3", tmp_path, "--tasks", task, "--methods", "majority", "simple")
    words[words.index("8")] = "8,13,21"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.paper", *words, "--jobs", "2"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| task | metric |") == 1
    assert done.stderr.count(f"{TASK} majority seed") == 3  # each by one of them
    assert len(list((tmp_path / "table3" / "cells").glob("*.json"))) == 6


def test_figure3_has_both_paradigms_with_the_end_of_stage_one(world: Path, tmp_path: Path) -> None:
    task = world / f"{TASK}.toml"
    run(command(world, "figure3", tmp_path, "--tasks", task, prompts=("shallow",)))
    rows = json.loads((tmp_path / "figure3.json").read_text())["rows"]
    assert [row["method"] for row in rows] == list(figure3.PARADIGMS)
    assert [row["stage1_ends"] for row in rows] == [2, 16]  # sixteen routers are all there are
    assert (tmp_path / "figure3.png").stat().st_size > 5000
    (cell,) = (json.loads(path.read_text()) for path in tmp_path.rglob("cells/*.shallow*.json"))
    stages = cell["stages"]
    another = stages["stage1"]["router"] != stages["untuned"]["router"]  # else it was scored already
    assert rows[1]["at"] == ([1, 16, 26] if another else [1, 26])


def test_a_seed_keeps_its_dev_score_until_the_next() -> None:
    def cell(seed: int, dev: list[tuple[int, float]]) -> dict[str, Any]:
        curve = {"dev": dev, "stage1_ends": 5}
        return {"method": "shallow", "task": "bq", "seed": seed, "curve": curve}

    (row,) = figure3.curves([cell(1, [(1, 0.2), (5, 0.6), (9, 0.8)]), cell(2, [(1, 0.4), (7, 0.6)])])
    assert (row["at"], row["mean"]) == ([1, 5, 7, 9], [30.0, 50.0, 60.0, 70.0])
    assert (row["best_in_stage1"], row["best"]) == (50.0, 70.0)


def test_figure4b_takes_more_examples_and_ppt_beside_mp2(world: Path, tmp_path: Path) -> None:
    task = world / f"{TASK}.toml"
    n = len(load_card(task).labels)
    more = ("--tasks", task, "--examples", n, 2 * n)
    run(command(world, "figure4b", tmp_path, *more, prompts=("deep", "shallow", "ppt")))
    rows = json.loads((tmp_path / "figure4b.json").read_text())["rows"]
    assert {(row["method"], row["x"]) for row in rows} == {
        (m, k * n) for m in figure4.METHODS for k in (1, 2)
    }


def write_iflytek(folder: Path, counts: dict[str, int]) -> None:
    (folder / "iflytek").mkdir(parents=True)
    for split, factor in (("train", 1), ("test", 0)):
        lines = [
            json.dumps({"text": f"应用{label}第{i}个", "label": label}, ensure_ascii=False)
            for label, n in counts.items()
            for i in range(n if factor else 2)
        ]
        (folder / "iflytek" / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def test_figure4as_tasks_are_nested_and_of_labels_with_enough_examples(tmp_path: Path) -> None:
    labels = list(load_card("iflytek").labels)[:6]
    write_iflytek(tmp_path, dict.fromkeys(labels[:5], 16) | {labels[5]: 15})
    cards = figure4.label_subsets(tmp_path, tmp_path / "out", [2, 4])
    two, four = (load_card(cards[n]) for n in (2, 4))
    assert set(two.labels) < set(four.labels) <= set(labels[:5])
    assert (two.task, len(four.labels), two.shots_per_label) == ("iflytek_2", 4, 8)
    assert two.labels.items() <= load_card("iflytek").labels.items()
    kept = (tmp_path / "out" / "data" / "iflytek_2" / "train.jsonl").read_text("utf-8").splitlines()
    assert len(kept) == 32
    with pytest.raises(UsageError, match="5 labels of iflytek have 16 examples, expected 6"):
        figure4.label_subsets(tmp_path, tmp_path / "out", [6])


def test_figure4a_runs_on_them(world: Path, tmp_path: Path) -> None:
    write_iflytek(tmp_path / "data", dict.fromkeys(list(load_card("iflytek").labels)[:3], 16))
    words = command(world, "figure4a", tmp_path, "--labels", 2, 3, prompts=("deep", "shallow", "ppt"))
    words[words.index(str(world))] = str(tmp_path / "data")
    run(words)
    rows = json.loads((tmp_path / "figure4a.json").read_text())["rows"]
    assert {(row["method"], row["x"]) for row in rows} == {(m, n) for m in figure4.METHODS for n in (2, 3)}


def test_table5_knows_which_prompts_learned_fast_and_slow(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = world / f"{TASK}.toml"
    prompts = ("deep", "shallow", "deep-one-rate")
    run(command(world, "table5", tmp_path, "--tasks", task, prompts=prompts))
    rows = json.loads((tmp_path / "table5.json").read_text())["rows"]
    found = {(row["kind"], row["learning"]) for row in rows}
    assert found == {("deep", "w/"), ("deep", "w/o"), ("shallow", "w/o")}  # shallow has one rate by default
    assert f"| {TASK} | deep | w/ |" in capsys.readouterr().out


def test_steering_keeps_earlier_points_and_adds_further_ones(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, files = world / f"{TASK}.toml", (world / "bert", world / "deep.safetensors")
    words = command(world, "steering", tmp_path, "--tasks", task)
    at = words.index("--backbone")
    words = [*words[:at], *words[words.index("--seeds") :]]
    run([*words, "--point", "2e3", *map(str, files)])
    first = json.loads((tmp_path / "steering.json").read_text())["rows"]
    run([*words, "--point", "1000", *map(str, files)])
    rows = json.loads((tmp_path / "steering.json").read_text())["rows"]
    assert [row["tokens"] for row in rows] == [1000, 2000]
    assert rows[1] == first[0]
    by_column = {row["column"]: row["by_seed"]["8"] for row in rows[0]["scores"]}
    gain = rows[0]["gains"]["over BBTv2 as published"]
    assert gain["gap"] == pytest.approx(by_column["deep"] - by_column["BBTv2"], abs=0.01)
    assert rows[0]["settings"]["backbone"] == "bert"  # no folder of this machine
    assert (tmp_path / "steering.png").stat().st_size > 5000
    assert "| 2,000 | 1 |" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--point begins with 'many'"):
        run([*words, "--point", "many", *map(str, files)])
    with pytest.raises(UsageError, match="by --point"):
        run([*words, "--backbone", "mini"])


def test_differences_are_ours_less_the_papers() -> None:
    assert beside((90.46, 0.16), 80.0, 2.0, 5) == ("90.5", "80.0 ± 2.0", "-10.5")
    assert beside(None, 80.0, 2.0, 1) == ("", "80.0", "")
    assert beside((1.0, 0.0), None, None) == ("1.0", "", "")


def test_names_are_listed_and_wrong_ones_answered() -> None:
    with pytest.raises(UnknownNameError, match="unknown table or figure 'table6'"):
        run(["table6"])
    with pytest.raises(UsageError, match="no table or figure was named"):
        run([])
    assert set(COMMANDS) == {
        "table3",
        "table4",
        "table5",
        "figure3",
        "figure4a",
        "figure4b",
        "figure5",
        "steering",
    }


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'mp2[ray]'")
def test_a_ray_cluster_computes_the_same_cells(world: Path, table: Path, tmp_path: Path) -> None:
    methods, task = ("majority", "deep", "bbtv2"), world / f"{TASK}.toml"
    more = ("--tasks", task, "--methods", *methods, "--ray", "local")
    run(command(world, "table3", tmp_path, *more, prompts=ALL))
    for method in methods:
        cell = Cell(method, TASK, 8)
        here, there = (json.loads(cell_file(w / "table3", cell).read_text()) for w in (table, tmp_path))
        assert there["stages"] == here["stages"], method


def test_ray_that_is_missing_is_said(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    task = world / f"{TASK}.toml"
    words = command(world, "table3", tmp_path, "--tasks", task, "--methods", "majority", "--ray", "local")
    with pytest.raises(MissingDependencyError, match="pip install"):
        run(words)
    with pytest.raises(UsageError, match="--jobs are processes of this machine"):
        run([*words, "--jobs", "2"])
