"""``--head auto`` over prompts with a span head: ridge is compared, on the training examples alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import own_tasks
import pytest
import torch
from command_line import mp2, mp2_json, predicted_accuracy

from mp2.errors import UsageError
from mp2.runs.config import BbtConfig
from mp2.runs.few_shot_problem import FewShotProblem
from mp2.runs.frozen_model import FrozenModel, load_model, resolve_paths
from mp2.runs.head_choice import N_COMPARED, HeadChoice, HeadChooser, possible_heads
from mp2.tasks import load_card

SHORT = ("--threads", "1", "--iters", "60", "--router-iters", "20", "--max-tokens", "96")


@pytest.fixture(scope="module")
def model() -> FrozenModel:
    return load_model(resolve_paths(BbtConfig(task="demo_topic", threads=1)))


def problem(model: FrozenModel, **changes: Any) -> FewShotProblem:
    values: dict[str, Any] = {"task": "demo_sentiment", "test": False, "threads": 1, "max_tokens": 96}
    config = resolve_paths(BbtConfig(**(values | changes)))
    return FewShotProblem(config, load_card(config.task), model)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Task -> the result of a default run on its 32 examples."""
    root = tmp_path_factory.mktemp("own")
    own_tasks.write_tasks(root, seed=8)
    found = {}
    for task in own_tasks.TASKS:
        where = ("--task", root / f"{task}.toml", "--data", root, "--out", root / "runs")
        found[task] = mp2_json("bbt", *where, *SHORT) | {"test": root / task / "test.jsonl"}
    return found


def test_the_default_is_no_worse_than_simple_baselines_on_four_of_five_tasks(
    own: dict[str, dict[str, Any]],
) -> None:
    for baseline in ("tfidf", "probe"):
        wins = [
            result["test_score"] >= result["baselines"][baseline]["test_score"] for result in own.values()
        ]
        assert sum(wins) >= 4, {task: (r["test_score"], r["baselines"]) for task, r in own.items()}
    for result in own.values():
        assert result["test_score"] > result["baselines"]["majority"]["test_score"] or result["verdict"]
        assert result["head"]["kind"] == "ridge"
        assert "of the span head" in result["head"]["reason"]
        assert result["calibration"]["by"] == "leave-one-out"  # 32 examples leave none to dev


def test_what_ridge_answers_over_pre_trained_prompts_is_predicted(own: dict[str, dict[str, Any]]) -> None:
    result = own["departments"]
    assert predicted_accuracy(result["run_dir"], result["test"]) == pytest.approx(result["test_score"])


def test_ridge_is_taken_where_the_span_head_is_not_better_by_two_standard_errors(model: FrozenModel) -> None:
    n_known = 1 + len(torch.unique(model.prompts.routers > 0, dim=0))
    found = problem(model)
    assert found.head.kind == "ridge"
    assert found.head.reason.startswith("leave-one-out loss")
    assert f"under the best of {n_known} known prompts" in found.head.reason


@pytest.mark.parametrize(
    ("gain", "kind"), [(-0.21, "span"), (-0.19, "ridge"), (1.0, "ridge"), (np.nan, "ridge")]
)
def test_the_margin_is_two_standard_errors_of_the_mean_difference(
    model: FrozenModel, monkeypatch: pytest.MonkeyPatch, gain: float, kind: str
) -> None:
    n = 25  # differences of deviation 0.5: a standard error of 0.1
    noise = np.resize([0.5, -0.5], n - 1)
    differences = np.append(noise, 0.0) + gain
    span = HeadChoice("span", None, [], "")  # type: ignore[arg-type]
    ridge = HeadChoice("ridge", None, [], "")  # type: ignore[arg-type]
    assert np.isnan(gain) or np.std(differences, ddof=1) / np.sqrt(n) == pytest.approx(0.1)
    losses = np.linspace(1, 2, n)
    monkeypatch.setattr(HeadChooser, "_best_known_span", lambda self, step: (span, losses + differences, 3))
    monkeypatch.setattr(HeadChooser, "_ridge", lambda self, reason: (losses, ridge))
    chooser = HeadChooser(load_card("demo_topic"), model.backend, model.prompts, None, [], "states")  # type: ignore[arg-type]
    assert chooser.choose("auto").kind == kind


def test_of_many_examples_some_are_compared_and_the_same_ones_of_both_heads(
    model: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, asked = 2 * N_COMPARED, []
    ridge_losses = np.tile(
        [1.0, 9.0], N_COMPARED
    )  # of all examples; of every second one the span head's are less
    span = HeadChoice("span", None, [], "")  # type: ignore[arg-type]

    def best_known(self: HeadChooser, step: int) -> tuple[HeadChoice, np.ndarray, int]:
        asked.append(step)
        return span, np.linspace(1.5, 1.6, n // step), 3

    monkeypatch.setattr(HeadChooser, "_best_known_span", best_known)
    monkeypatch.setattr(
        HeadChooser, "_ridge", lambda self, reason: (ridge_losses, replace(span, kind="ridge"))
    )
    train: Any = [None] * n
    chooser = HeadChooser(load_card("demo_topic"), model.backend, model.prompts, None, train, "states")  # type: ignore[arg-type]
    assert chooser.choose("auto").kind == "ridge"
    assert asked == [2]


def test_losses_of_a_step_are_those_of_its_examples(model: FrozenModel) -> None:
    found = problem(model, head="span", max_tokens=60)
    formatter, train = found.data.formatter, found.split.train

    def losses(train: list[Any], step: int) -> np.ndarray:
        chooser = HeadChooser(found.card, model.backend, model.prompts, formatter, train, "states")
        return chooser._best_known_span(step)[1]

    assert losses(train, 4) == pytest.approx(losses(train[::4], 1), abs=1e-5)


def test_losses_of_the_best_known_prompt_are_those_of_the_labels(model: FrozenModel) -> None:
    found = problem(model, head="span")
    chooser = HeadChooser(
        found.card, model.backend, model.prompts, found.data.formatter, found.split.train, "states"
    )
    _, losses, n_known = chooser._best_known_span(1)
    assert losses.shape == (found.n_train,)
    means = []
    for router in [torch.ones_like(model.prompts.routers[0]), *(model.prompts.routers > 0).float()]:
        z = model.prompts.fuse(router).detach().numpy()
        outputs = found.scorer.outputs(z, found.train_inputs).fetch()
        rows = np.stack(
            [found.head.head.scores(i, x) for i, x in zip(found.train_inputs, outputs, strict=True)]
        )
        labels = np.array([item.label for item in found.train_inputs])
        means += [
            np.mean(np.logaddexp.reduce(rows / t, 1) - (rows / t)[np.arange(len(labels)), labels])
            for t in np.geomspace(0.2, 20, 60)
        ]
    assert losses.mean() == pytest.approx(min(means), abs=5e-3)  # smoothed targets, a grid
    assert n_known <= len(model.prompts.routers) + 1


@pytest.mark.parametrize("task", ["demo_topic", "c3", "cmrc2018"])
@pytest.mark.parametrize(("has_span_head", "mlm_head"), [(True, None), (False, None), (False, object())])
def test_the_heads_that_are_checked_are_those_that_auto_compares(
    monkeypatch: pytest.MonkeyPatch, task: str, has_span_head: bool, mlm_head: object
) -> None:
    asked: list[str] = []
    backend: Any = SimpleNamespace(backbone=SimpleNamespace(name="any", mlm_head=mlm_head))
    prompts: Any = SimpleNamespace(has_span_head=has_span_head)
    choice = HeadChoice("span", None, [], "")  # type: ignore[arg-type]
    losses = np.array([1.0, 2.0])

    def made(kind: str, found: Any) -> Any:
        return lambda self, *reason: asked.append(kind) or found

    monkeypatch.setattr(HeadChooser, "_best_known_span", made("span", (choice, losses, 1)))
    monkeypatch.setattr(HeadChooser, "_span", made("span", choice))
    monkeypatch.setattr(HeadChooser, "_ridge", made("ridge", (losses, choice)))
    monkeypatch.setattr(HeadChooser, "_mlm", made("mlm", (1.0, choice)))
    card = load_card(task)
    chooser = HeadChooser(card, backend, prompts, None, [], "states")  # type: ignore[arg-type]
    try:
        possible = possible_heads("auto", card, has_span_head, lambda: backend.backbone)
    except UsageError as error:
        with pytest.raises(UsageError, match=re.escape(str(error))):
            chooser.choose("auto")
    else:
        chooser.choose("auto")
        assert asked == possible


def test_features_of_a_head_that_was_only_compared_are_said_to_be(tmp_path: Path) -> None:
    words = ("--task", "demo_sentiment", *SHORT, "--no-test", "--no-baselines", "--ridge-features", "states")
    done = mp2("bbt", *words, "--out", tmp_path)
    assert done.exit_code == 0, done.stderr
    (result,) = (json.loads(path.read_text("utf-8")) for path in tmp_path.glob("*/result.json"))
    said = "mp2: --ridge-features states was for the ridge head that was compared\n"
    assert (said in done.stderr) == (result["head"]["kind"] == "span")
    assert f"mp2: head {result['head']['kind']}" in done.stderr
    assert result["head"]["kind"] == "span" or result["head"]["ngrams"] is False


def test_a_run_that_goes_on_does_not_choose_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--task", "demo_sentiment", *SHORT, "--no-test", "--no-baselines")
    whole = mp2_json("bbt", *words, "--out", tmp_path)
    run = Path(whole["run_dir"])
    before = (run / "prompt.safetensors").read_bytes()
    for name in ("prompt.safetensors", "result.json"):
        (run / name).unlink()
    journal = run / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:30]))

    def refuse(self: HeadChooser) -> HeadChoice:
        raise AssertionError("chosen again")

    monkeypatch.setattr(HeadChooser, "_span_or_ridge", refuse)
    again = mp2_json("bbt", "--resume", run)
    assert again["head"] == whole["head"]
    assert (run / "prompt.safetensors").read_bytes() == before


@pytest.mark.parametrize(("word", "why"), [("地" * 240, "does not fit 512 tokens"), ("龘", "cannot spell")])
def test_ridge_reads_what_the_span_head_cannot(tmp_path: Path, word: str, why: str) -> None:
    """And ``tasks check`` knows it; with ``--head span`` both refuse the task."""
    own_tasks.write_tasks(tmp_path, seed=8)
    card = tmp_path / "sentiments.toml"
    lines = next(iter(sorted(tmp_path.glob("*.toml")))).read_text("utf-8").splitlines()
    at = lines.index("[labels]")
    task = json.loads(lines[0].partition("=")[2])
    for i in range(at + 1, len(lines)):
        lines[i] = f'{lines[i].partition("=")[0]}= "{word}{"天" * (i - at)}"'
    card.write_text("\n".join(lines), encoding="utf-8")
    where = ("--data", tmp_path / task, "--no-test")
    done = mp2("tasks", "check", card, *where)
    assert done.exit_code == 0, done.output
    assert f"note: head ridge: span cannot read this task (task '{task}'" in done.output
    assert why in done.output
    done = mp2("tasks", "show", card, *where[:2])
    assert (done.exit_code, "cannot spell" in done.output) == (0, "spell" in why)
    budget = ("--iters", 2, "--router-iters", 1, "--threads", 1, "--no-baselines", "--out", tmp_path / "runs")
    head = mp2_json("bbt", "--task", card, *where, *budget)["head"]
    assert (head["kind"], why in head["reason"]) == ("ridge", True)
    for command in (("tasks", "check", card), ("bbt", "--task", card, *budget)):
        done = mp2(*command, *where, "--head", "span")
        assert (done.exit_code, why in done.output) == (2, True)
