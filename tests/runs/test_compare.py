"""`mp2 compare`: a table and a picture of several runs, ended or not; the lines of a run's own picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import mp2, mp2_json
from matplotlib.axes import Axes
from tuning_world import World

from mp2.runs.compare import table
from mp2.runs.curve import read_curve

SHORT = ("--iters", "20", "--router-iters", "8", "--popsize", "6", "--shots", "4")


@pytest.fixture(scope="module")
def runs(world: World) -> list[dict[str, Any]]:
    """Two seeds without gradients, one by gradient."""
    results = mp2_json("bbt", *world.options(), *SHORT, "--seeds", "8,13")
    tuned = mp2_json("tune", *world.tune_options(), "--epochs", "4", "--shots", "4")
    return [*results, tuned]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Heights of the level lines that are drawn."""
    drawn: list[float] = []
    axhline = Axes.axhline

    def draw(self: Axes, y: float, **style: Any) -> Any:
        drawn.append(y)
        return axhline(self, y, **style)

    monkeypatch.setattr(Axes, "axhline", draw)
    return drawn


def test_a_table_of_runs_and_seeds_with_their_baselines(runs: list[dict[str, Any]]) -> None:
    head, rows = table(runs)
    assert head[:4] == ["task", "method", "seed", "train loss"]
    assert head[4:] == ["majority", "TF-IDF", "probe", "untuned", "stage I", "stage II"]
    assert [row[:3] for row in rows] == [
        ["mood", "mp2-deep", "8"],
        ["mood", "mp2-deep", "13"],
        ["mood", "mp2-deep", "mean of 2"],
        ["mood", "mp2-deep-gradient", "8"],
    ]
    for row, result in zip([rows[0], rows[1], rows[3]], runs, strict=True):
        assert row[-1] == f"{100 * result['test_score']:.1f}"
        assert row[4] == f"{100 * result['baselines']['majority']['test_score']:.1f}"
    a, b = (100 * result["test_score"] for result in runs[:2])
    assert rows[2][-1] == f"{(a + b) / 2:.1f} ± {abs(a - b) / 2**0.5:.1f}"


def test_seeds_that_took_different_heads_have_a_mean_that_says_which(runs: list[dict[str, Any]]) -> None:
    first, second = (dict(result) for result in runs[:2])
    chosen = {"kind": "ridge", "reason": "leave-one-out loss 0.1, of the span head 0.2"}
    first["head"] = {"kind": "span", "reason": "training loss 0.1, of ridge 0.2"}
    second["head"] = chosen
    head, rows = table([first, second])
    assert head[:4] == ["task", "head", "seed", "train loss"]
    assert [row[:3] for row in rows] == [
        ["mood", "span", "8"],
        ["mood", "ridge", "13"],
        ["mood", "span 1, ridge 1", "mean of 2"],
    ]
    assert rows[2][3] == "-", "losses of different heads are not alike"
    assert rows[2][-1].partition(" ")[0] == f"{50 * (first['test_score'] + second['test_score']):.1f}"
    asked = first | {"head": {"kind": "span", "reason": "asked for"}}
    assert [row[2] for row in table([asked, second])[1]] == ["8", "13"], "two settings"


def test_the_command_takes_runs_and_folders_of_runs_and_draws_them(
    world: World, runs: list[dict[str, Any]], tmp_path: Path, lines: list[float]
) -> None:
    picture = tmp_path / "all.png"
    done = mp2("compare", world.root / "runs", "--picture", picture)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0] == "test accuracy, head span, backbone tiny"
    assert len(done.stdout.splitlines()) == 7
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert not lines, "the seeds have different examples"
    one = mp2_json("compare", runs[0]["run_dir"], "--picture", picture)
    assert [result["seed"] for result in one] == [8]
    baselines = runs[0]["baselines"].values()
    assert lines == [line["dev_score"] for line in baselines]


def test_without_a_dev_set_the_stages_are_drawn_on_test(
    world: World, runs: list[dict[str, Any]], tmp_path: Path, lines: list[float]
) -> None:
    cut = tmp_path / "run"
    shutil.copytree(runs[0]["run_dir"], cut)
    kept = [x for x in (cut / "journal.jsonl").read_text("utf-8").splitlines() if '"split": "dev"' not in x]
    (cut / "journal.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    assert not read_curve(cut).dev
    done = mp2("compare", cut, "--picture", tmp_path / "p.png")
    assert (done.exit_code, done.stderr) == (0, "")
    assert lines == [line["test_score"] for line in runs[0]["baselines"].values()]


def test_a_run_that_has_not_ended_is_drawn_as_far_as_it_came(
    runs: list[dict[str, Any]], tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(runs[0]["run_dir"], cut)
    (cut / "result.json").unlink()
    done = mp2("compare", cut, runs[1]["run_dir"], "--picture", tmp_path / "p.png")
    assert done.exit_code == 0, done.output
    assert f"{cut} has not ended: it is drawn as far as it came" in done.stderr
    assert len(done.stdout.splitlines()) == 4
    assert mp2("compare", cut, "--picture", tmp_path / "q.png").exit_code == 0
    assert (tmp_path / "q.png").exists()


def test_curves_come_from_the_journal_or_from_the_runs_own_file(runs: list[dict[str, Any]]) -> None:
    curve = read_curve(Path(runs[0]["run_dir"]))
    assert curve.loss[-1] == (20, runs[0]["best_train_loss"])
    assert curve.dev[0] == (1, runs[0]["stages"]["untuned"]["dev_score"])
    assert [loss for _, loss in curve.loss] == sorted((loss for _, loss in curve.loss), reverse=True)
    tuned = read_curve(Path(runs[2]["run_dir"]))
    assert [epoch for epoch, _ in tuned.loss] == [0, 2, 4]  # untuned, the ends of both stages
    assert tuned.dev[0] == (0, runs[2]["stages"]["untuned"]["dev_score"])


def test_what_cannot_be_compared_is_refused(runs: list[dict[str, Any]], tmp_path: Path) -> None:
    done = mp2("compare", tmp_path / "none")
    assert done.exit_code == 2
    assert "there is no folder" in done.stderr
    done = mp2("compare", tmp_path)
    assert done.exit_code == 2
    assert "is not a run folder" in done.stderr
    done = mp2("compare", runs[0]["run_dir"], "--picture", tmp_path / "no" / "p.png")
    assert done.exit_code == 2
    assert "there is no folder" in done.stderr
    broken = tmp_path / "broken"
    shutil.copytree(runs[2]["run_dir"], broken)
    (broken / "curve.json").write_text(json.dumps({"loss": [[1]]}))
    done = mp2("compare", broken, "--picture", tmp_path / "p.png")
    assert done.exit_code == 2
    assert "curve.json: field 'dev': missing" in done.stderr


@pytest.mark.parametrize("dev", ["auto", "none"])
def test_a_runs_picture_has_its_baselines(world: World, lines: list[float], dev: str) -> None:
    result = mp2_json("bbt", *world.options(), *SHORT, "--dev", dev)
    split = "dev_score" if dev == "auto" else "test_score"
    assert lines == [line[split] for line in result["baselines"].values()]
    assert {"majority", "probe", "tfidf"} == set(result["baselines"])


def test_a_series_ends_with_its_table_and_what_to_type_next(world: World) -> None:
    words = ("--iters", "2", "--router-search", "none", "--shots", "2", "--seeds", "8,13")
    done = mp2("bbt", *world.options(), *words)
    assert done.exit_code == 0, done.output
    *_, head, first, second, mean, last = done.stdout.splitlines()
    assert head.split()[:4] == ["task", "seed", "train", "loss"]
    assert head.split()[4:7] == ["majority", "TF-IDF", "probe"]
    assert [line.split()[:2] for line in (first, second, mean)] == [
        ["mood", "8"],
        ["mood", "13"],
        ["mood", "mean"],
    ]
    assert last.startswith("their curves in one picture: mp2 compare ")
    assert mp2(*last.split("mp2 ", 1)[1].split(), "--picture", world.root / "p.png").exit_code == 0
