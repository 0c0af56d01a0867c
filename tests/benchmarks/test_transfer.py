"""The transfer benchmark: cells are computed once, folders are not mixed up, the table reads them right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from tuning_world import World, make_world

from benchmarks import transfer
from benchmarks.transfer_methods import Lab, Settings
from benchmarks.transfer_table import answers, markdown, read_score, summarise
from mp2.backbone import Backbone
from mp2.errors import MismatchError, UnknownNameError, UsageError

METHODS = ("majority", "deep", "bbtv2", "bbt", "gradient-soft", "deep-sum")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> World:
    return make_world(tmp_path_factory.mktemp("transfer"), tiny_backbone)


def make_lab(world: World, work: Path) -> Lab:
    settings = Settings(
        backbone=str(world.backbone),
        prompts=(str(world.deep), str(world.shallow)),
        iters=12,
        epochs=20,
        test_limit=8,
        max_tokens=60,
    )
    return Lab(settings, world.data, work)


def cell(task: str, method: str, seed: int, test: float, **stages: Any) -> dict[str, Any]:
    found = {**stages, "final": {"test_score": test, "dev_score": 0.5, "dev_loss": 1.0}}
    about = {"task": task, "track": "unseen_task", "metric": "accuracy"}
    return {**about, "method": method, "seed": seed, "stages": found, "cpu_s": 1.0, "provenance": {}}


def test_every_method_gives_a_cell_and_none_is_computed_twice(world: World, tmp_path: Path) -> None:
    lab = make_lab(world, tmp_path)
    cells = [(8, str(world.card), method) for method in METHODS]
    names = {m: transfer.cell_file(tmp_path, m, str(world.card), 8) for m in METHODS}
    shown: list[str] = []
    transfer.work_through(lab, cells, {"commit": "x"}, shown.append)
    transfer.work_through(lab, cells, {"commit": "x"}, shown.append)
    assert len(shown) == len(METHODS)
    for method, file in names.items():
        found = json.loads(file.read_text())
        assert "refused" not in found, (method, found)
        assert all(0 <= stage["test_score"] <= 1 for stage in found["stages"].values())
    bbtv2 = json.loads(names["bbtv2"].read_text())
    assert bbtv2["stages"]["stage1"]["iteration"] == 1  # nothing is pre-trained: no router to search


def test_a_cell_in_another_process_hands_is_left_to_it(world: World, tmp_path: Path) -> None:
    lab = make_lab(world, tmp_path)
    task = str(world.card)
    file = transfer.cell_file(tmp_path, "majority", task, 8)
    file.parent.mkdir(parents=True)
    shown: list[str] = []
    with FileLock(file.with_suffix(".lock")):
        transfer.work_through(lab, [(8, task, "majority"), (13, task, "majority")], {}, shown.append)
    assert not file.exists()
    assert len(shown) == 1


def test_a_task_that_does_not_fit_is_a_result_and_a_wrong_name_is_an_error(
    world: World, tmp_path: Path
) -> None:
    lab = make_lab(world, tmp_path)
    lab = Lab(Settings(**{**vars(lab.settings), "max_tokens": 12}), world.data, tmp_path)
    assert "does not fit 12 tokens" in transfer.run_cell(lab, "deep", str(world.card), 8, {})["refused"]
    with pytest.raises(UnknownNameError, match="no_such_task"):
        transfer.run_cell(lab, "deep", "no_such_task", 8, {})


def test_cells_of_other_settings_or_weights_are_not_mixed(tmp_path: Path) -> None:
    transfer.claim_folder(tmp_path, {"iters": 500, "weights": {"backbone": "a"}})
    transfer.claim_folder(tmp_path, {"iters": 500, "weights": {"backbone": "a"}})
    with pytest.raises(MismatchError, match="'b'"):
        transfer.claim_folder(tmp_path, {"iters": 500, "weights": {"backbone": "b"}})


def test_two_prompt_files_of_one_kind_are_refused(world: World, tmp_path: Path) -> None:
    lab = make_lab(world, tmp_path)
    twice = Settings(**{**vars(lab.settings), "prompts": (str(world.deep), str(world.deep))})
    with pytest.raises(UsageError, match="both"):
        Lab(twice, world.data, tmp_path)


def test_a_method_without_its_prompts_is_refused_before_any_cell(world: World, tmp_path: Path) -> None:
    settings = Settings(**{**vars(make_lab(world, tmp_path).settings), "prompts": (str(world.deep),)})
    lab = Lab(settings, world.data, tmp_path)
    lab.check(["majority", "deep", "bbtv2", "gradient"])
    for method in ("shallow", "bbt", "gradient-shallow", "shallow-sum"):
        with pytest.raises(UsageError, match=f"'{method}' needs shallow prompts"):
            lab.check(["deep", method])


def test_majority_counts_the_test_labels(world: World, tmp_path: Path) -> None:
    lab = make_lab(world, tmp_path)
    lines = (world.data / "mood" / "test.jsonl").read_text().splitlines()[: lab.settings.test_limit]
    labels = [json.loads(line)["label"] for line in lines]
    assert lab.majority(str(world.card)) == max(labels.count("pos"), labels.count("neg")) / len(labels)


def test_router_only_is_what_dev_prefers_of_untuned_and_stage_one() -> None:
    stages = {
        "untuned": {"test_score": 0.1, "dev_score": 0.5, "dev_loss": 2.0},
        "stage1": {"test_score": 0.2, "dev_score": 0.5, "dev_loss": 1.0},
        "stage2": {"test_score": 0.3, "dev_score": 0.6, "dev_loss": 1.0},
    }
    assert read_score(stages, "router") == 0.2
    stages["stage1"]["dev_score"] = 0.4
    assert read_score(stages, "router") == 0.1
    assert read_score(stages, "final") == 0.3


def test_answers_compare_common_seeds_and_count_wins() -> None:
    cells = [
        cell("tnews", "deep", 8, 0.6),
        cell("tnews", "deep", 13, 0.8),
        cell("tnews", "bbtv2", 8, 0.5),
        cell("lcqmc", "deep", 8, 0.5),
        cell("lcqmc", "bbtv2", 8, 0.7),
        cell("lcqmc", "majority", 8, 0.5),
    ]
    for found in cells[:2]:
        found["stages"] = {
            "untuned": found["stages"]["final"],
            "stage1": found["stages"]["final"],
            **found["stages"],
        }
    cells[3]["stages"] = {
        "untuned": {"test_score": 0.4, "dev_score": 0, "dev_loss": None},
        **cells[3]["stages"],
    }
    cells[3]["stages"]["stage1"] = cells[3]["stages"]["untuned"]
    cells[3]["stages"]["final"] = cells[3]["stages"].pop("final")
    rows = summarise(cells)
    deep = next(r for r in rows if (r["task"], r["column"]) == ("tnews", "deep"))
    assert deep["mean"] == pytest.approx(70)
    assert deep["sd"] == pytest.approx(14.142, abs=1e-3)  # n - 1
    found = answers(rows)
    against = found["deep MP2 against BBTv2 from scratch"]
    assert (against["tasks"], against["better"]) == (2, 1)
    assert against["by_task"] == {"lcqmc": -20.0, "tnews": 10.0}  # tnews: seed 8 alone
    assert found["not better than majority"]["deep"] == ["lcqmc"]
    assert found["not better than majority"]["BBTv2"] == []
    table = markdown(
        rows, found, {"test_limit": 9, "backbone": "b", "iters": 1, "epochs": 1, "max_tokens": 2}
    )
    assert "| tnews | accuracy |" in table
    assert "70.0 ± 14.1" in table


def test_table_without_cells_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no cells"):
        transfer.write_results(tmp_path, tmp_path / "out.json")
