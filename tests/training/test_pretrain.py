"""Multi-task pre-training: what it learns, what it must not touch, and runs that are cut off."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mp2.backbone import Backbone, load_backbone, random_backbone, save_backbone, weights_sha256
from mp2.errors import LossError, MismatchError, RunLockedError, UsageError
from mp2.prompts import PromptSet, load_prompts, random_prompts
from mp2.tasks import TaskCard
from mp2.training import (
    PretrainConfig,
    Pretrainer,
    PromptedEncoder,
    score_table,
    span_loss,
)
from mp2.training.checkpoint import alone_in
from mp2.training.mixture import Batch, load_mixture
from mp2.training.ranks import Ranks
from mp2.training.trainer import MAX_SKIPPED_IN_A_ROW
from training.toy_runs import SIZES, cut_at, kill_after, losses, run, tiny


def trainer(
    world: tuple[list[TaskCard], Path], backbone: Backbone, config: PretrainConfig, out: Path, **more: Any
) -> Pretrainer:
    tasks = load_mixture(world[0], world[1], backbone.tokenizer, 64, dev_limit=8, log=lambda _: None)
    return Pretrainer(backbone, tasks, config, out, **more)


# ---- the loss


def test_the_span_loss_equals_a_float64_sum_by_hand_and_padding_has_no_part() -> None:
    rng = np.random.default_rng(0)
    lengths, start, end = [6, 4, 1], [2, 0, 0], [5, 3, 0]
    mask = np.arange(6) < np.array(lengths)[:, None]
    logits = rng.normal(0, 3, (2, 3, 6))
    expected = 0.0
    for row, n in enumerate(lengths):
        for kind, gold in enumerate((start[row], end[row])):
            real = [float(x) for x in logits[kind, row, :n]]
            expected += (math.log(sum(math.exp(x) for x in real)) - real[gold]) / 2 / 3
    logits[:, ~mask] = 1e4  # would swallow everything
    got = span_loss(
        torch.tensor(logits[0]),
        torch.tensor(logits[1]),
        torch.tensor(mask),
        torch.tensor(start),
        torch.tensor(end),
    )
    assert got.item() == pytest.approx(expected, rel=1e-6)


def test_a_certain_and_right_prediction_costs_nothing_and_one_without_choice_too() -> None:
    logits = torch.tensor([[0.0, 200.0, 0.0], [3.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    gold = torch.tensor([1, 0])
    assert span_loss(logits, logits, mask, gold, gold).item() == pytest.approx(0.0, abs=1e-6)


# ---- learning, and what stays as it is


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_prompts_learn_and_the_frozen_backbone_keeps_every_byte(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path, kind: Any
) -> None:
    before = {name: t.clone() for name, t in backbone.encoder.state_dict().items()}
    start = trainer(world, backbone, tiny(kind=kind), tmp_path / "unused").model.prompts.to_set()
    config = tiny(kind=kind, steps=250, batch_size=16, prompt_lr=3e-2, checkpoint_minutes=9.0)
    result = run(world, backbone, config, tmp_path / "out")
    values = losses(tmp_path / "out")
    assert np.mean(values[-40:]) < 0.65 * np.mean(values[:10])
    gain = {name: s["after"] - s["before"] for name, s in result.scores.items()}
    assert gain["find"] > 0.1
    for name, tensor in backbone.encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert weights_sha256(backbone.encoder) == backbone.sha256 == result.backbone.sha256
    assert not any(p.requires_grad for p in backbone.encoder.parameters())
    assert not (tmp_path / "out" / "backbone").exists()
    for name in ("z", "projection", "routers", "span_weight", "span_bias"):  # all of them are trained
        assert not torch.equal(getattr(result.prompts, name), getattr(start, name)), name
    loaded = load_prompts(tmp_path / "out" / "prompts.safetensors", backbone)
    assert loaded.sha256 == result.prompts.sha256
    assert loaded.meta.tasks == ("mood", "find", "pick")
    assert loaded.meta.kind == kind
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == result.scores
    assert json.loads((tmp_path / "out" / "config.json").read_text())["steps"] == 250


def test_a_frozen_backbone_stays_on_the_callers_device(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path
) -> None:
    there = torch.device("meta")  # a device of every machine
    one = trainer(world, backbone, tiny(), tmp_path, ranks=Ranks(device=there))
    assert {p.device for p in one.model.parameters()} == {there}
    assert {p.device for p in backbone.encoder.parameters()} == {torch.device("cpu")}
    here = trainer(world, backbone, tiny(), tmp_path)
    assert here.model.encoder is backbone.encoder  # no copy where none is needed


def test_training_the_backbone_too_solves_the_toy_tasks_and_fresh_prompts_then_steer_it_frozen(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path
) -> None:
    old = {name: t.clone() for name, t in backbone.encoder.state_dict().items()}
    config = tiny(steps=250, batch_size=16, backbone_lr=3e-3, checkpoint_minutes=9.0)
    result = run(world, backbone, config, tmp_path / "joint")
    assert np.mean(losses(tmp_path / "joint")[-20:]) < 0.2
    assert min(s["after"] for s in result.scores.values()) > 0.85
    # the caller's backbone is what its hash says; the new one is another, and the prompts belong to it
    assert weights_sha256(backbone.encoder) == backbone.sha256 != result.backbone.sha256
    assert all(torch.equal(t, old[name]) for name, t in backbone.encoder.state_dict().items())
    saved = load_backbone(tmp_path / "joint" / "backbone")
    assert saved.sha256 == result.backbone.sha256 == result.prompts.meta.backbone_sha256
    load_prompts(tmp_path / "joint" / "prompts.safetensors", saved)
    with pytest.raises(MismatchError, match=f"{saved.sha256[:12]}.*{backbone.sha256[:12]}"):
        load_prompts(tmp_path / "joint" / "prompts.safetensors", backbone)
    config = tiny(steps=150, batch_size=16, checkpoint_minutes=9.0, seed=9)  # the body knows seed 0's head
    frozen = run(world, saved, config, tmp_path / "frozen")
    before, after = (np.mean([s[key] for s in frozen.scores.values()]) for key in ("before", "after"))
    assert after > 0.85
    assert after > before + 0.15
    assert weights_sha256(saved.encoder) == saved.sha256


def test_the_papers_rates_are_the_defaults() -> None:
    assert PretrainConfig(kind="deep").rates == (5e-4, 1e-4)
    assert PretrainConfig(kind="shallow").rates == (1e-3, 1e-3)
    assert PretrainConfig(kind="deep", prompt_lr=0.2).rates == (5e-4, 0.2)
    config = PretrainConfig()
    assert (config.n_modules, config.prompt_tokens, config.intrinsic_dim) == (8, 50, 300)
    assert (config.steps, config.batch_size, config.temperature) == (1_000_000, 32, 1.0)


def test_each_group_is_trained_at_its_own_rate(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path
) -> None:
    config = tiny(router_lr=0.25, prompt_lr=0.0)
    one = trainer(world, backbone, config, tmp_path, init=init_prompts(backbone))
    before = one.model.prompts.to_set()
    one.train_step()
    after = one.model.prompts.to_set()
    assert torch.equal(before.z, after.z)
    assert torch.equal(before.span_weight, after.span_weight)
    moved = (after.routers - before.routers).abs().amax((1, 2))
    assert moved.max().item() == pytest.approx(0.25, rel=1e-2)  # Adam's first step is the rate
    assert (moved > 0).sum() == 1  # only the task of the batch


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, {0: 1.0, 50: 1.0, 99: 1.0}),
        ({"schedule": "constant", "warmup_steps": 10}, {0: 0.1, 9: 1.0, 99: 1.0}),
        ({"schedule": "linear"}, {0: 1.0, 50: 0.5, 99: 0.01}),
        ({"schedule": "linear", "warmup_steps": 20}, {0: 0.05, 19: 1.0, 20: 1.0, 60: 0.5, 99: 1 / 80}),
    ],
)
def test_the_schedule_has_the_right_end_points(
    world: tuple[list[TaskCard], Path],
    backbone: Backbone,
    tmp_path: Path,
    settings: dict[str, Any],
    expected: dict[int, float],
) -> None:
    one = trainer(world, backbone, tiny(steps=100, **settings), tmp_path)
    for step, rate in expected.items():
        one.step = step
        assert one.rates() == pytest.approx([rate * 1e-2, rate * 1e-2])


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_each_step_draws_its_own_router_noise_at_the_configured_temperature(
    world: tuple[list[TaskCard], Path],
    backbone: Backbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    temperature: float,
) -> None:
    one = trainer(world, backbone, tiny(temperature=temperature, router_lr=0.0), tmp_path)
    drawn: list[torch.Tensor] = []
    forward = one.model.prompts.forward

    def remember(encoder: Any, ids: Any, mask: Any, weights: torch.Tensor) -> Any:
        drawn.append(weights.detach())
        return forward(encoder, ids, mask, weights)

    monkeypatch.setattr(one.model.prompts, "forward", remember)
    for _ in range(200):
        one.train_step()
    values = torch.stack(drawn).flatten().double()
    assert len(set(values.tolist())) > 0.99 * len(values)
    # logits are near 0: temperature * logit(sample) is logistic, of deviation pi / sqrt(3)
    noise = temperature * (values.clamp(1e-9, 1 - 1e-7).logit())
    assert noise.std().item() == pytest.approx(math.pi / 3**0.5, rel=0.1)
    assert abs(noise.mean().item()) < 0.2


def test_the_temperature_falls_geometrically_from_the_first_step_to_the_last() -> None:
    config = tiny(steps=101, temperature=2.0, temperature_end=0.02)
    got = [config.temperature_at(step) for step in range(101)]
    assert got[0] == 2.0
    assert got[50] == pytest.approx(0.2)
    assert got[100] == pytest.approx(0.02)
    assert np.allclose(np.diff(np.log(got)), math.log(0.01) / 100)
    assert tiny(temperature=0.7).temperature_at(11) == 0.7
    assert tiny(steps=1, temperature=0.7, temperature_end=0.1).temperature_at(0) == 0.7


def test_each_step_uses_its_own_temperature(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(steps=9, temperature_end=0.1)
    used: list[float] = []
    forward = PromptedEncoder.forward

    def remember(self: PromptedEncoder, batch: Batch, temperature: float, noise: Any) -> torch.Tensor:
        used.append(temperature)
        return forward(self, batch, temperature, noise)

    monkeypatch.setattr(PromptedEncoder, "forward", remember)
    run(world, backbone, config, tmp_path)
    assert used == [config.temperature_at(step) for step in range(9)]


# ---- dev scores on the way


def test_dev_is_scored_every_so_many_steps_and_shown_as_a_table(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path
) -> None:
    lines: list[str] = []
    result = run(world, backbone, tiny(steps=12, eval_every=4), tmp_path / "scored", log=lines.append)
    plain = run(world, backbone, tiny(steps=12), tmp_path / "plain")
    assert result.prompts.sha256 == plain.prompts.sha256  # looking changes nothing
    points = [
        json.loads(line) for line in (tmp_path / "scored" / "dev_scores.jsonl").read_text().splitlines()
    ]
    assert [point["step"] for point in points] == [0, 4, 8, 12]
    for name, scores in result.scores.items():
        assert (points[0]["scores"][name], points[-1]["scores"][name]) == (scores["before"], scores["after"])
    tables = [line.splitlines() for line in lines if line.startswith("dev at step")]
    assert [rows[0] for rows in tables] == ["dev at step 4", "dev at step 8"]
    assert tables[0][1].split() == ["task", "before", "now"]
    row = next(row.split() for row in tables[1] if row.startswith("find"))
    assert row[2] == f"{100 * points[2]['scores']['find']:.1f}"
    stopped = tiny(steps=4)  # what step 4 was scored at is what a run of four steps ends with
    four = run(world, backbone, stopped, tmp_path / "four")
    assert {name: scores["after"] for name, scores in four.scores.items()} == points[1]["scores"]


# ---- runs that are cut off


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "deep", "temperature_end": 0.1, "eval_every": 2},
        {"kind": "shallow"},
        {"kind": "deep", "backbone_lr": 1e-3, "schedule": "linear"},
    ],
    ids=["deep-annealed-scored", "shallow", "with-backbone"],
)
@pytest.mark.parametrize(("last_saved", "killed_at"), [(4, 4), (3, 9)])
def test_a_run_cut_off_after_a_checkpoint_goes_on_bit_for_bit(
    world: tuple[list[TaskCard], Path],
    backbone: Backbone,
    tmp_path: Path,
    settings: dict[str, Any],
    last_saved: int,
    killed_at: int,
) -> None:
    config = tiny(**settings)
    unbroken = run(world, backbone, config, tmp_path / "unbroken")
    with cut_at(Pretrainer, killed_at, last_saved), pytest.raises(KeyboardInterrupt):
        run(world, backbone, config, tmp_path / "cut")
    with (tmp_path / "cut" / "losses.jsonl").open("a") as file:
        file.write('{"step": 77, "lo')  # a torn line
    lines: list[str] = []
    resumed = run(world, backbone, config, tmp_path / "cut", log=lines.append)
    assert f"resumed at step {last_saved}" in lines
    assert losses(tmp_path / "cut") == losses(tmp_path / "unbroken")
    curves = [(tmp_path / name / "dev_scores.jsonl").read_text() for name in ("cut", "unbroken")]
    assert curves[0] == curves[1]
    assert resumed.prompts.sha256 == unbroken.prompts.sha256
    assert resumed.backbone.sha256 == unbroken.backbone.sha256
    assert resumed.scores == unbroken.scores


PROGRAM = """
import json, sys, torch
from pathlib import Path
from mp2.backbone import load_backbone
from mp2.tasks import load_card
from mp2.training import PretrainConfig, pretrain
torch.set_num_threads(1)
cards, data, backbone, out, config = json.loads(sys.argv[1])
loaded = [load_card(c) for c in cards]
pretrain(loaded, load_backbone(backbone), PretrainConfig(**config), Path(out), data=Path(data))
"""


def test_a_run_killed_by_sigkill_goes_on_bit_for_bit(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path
) -> None:
    from dataclasses import asdict

    save_backbone(backbone, tmp_path / "lively")
    config = tiny(steps=60, temperature_end=0.2, eval_every=7)
    unbroken = run(world, backbone, config, tmp_path / "unbroken")
    out = tmp_path / "cut"
    cards = [str(card.path) for card in world[0]]
    arguments = [cards, str(world[1]), str(tmp_path / "lively"), str(out), asdict(config)]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(arguments)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    kill_after(process, out / "losses.jsonl", 10)
    lines: list[str] = []
    resumed = run(world, backbone, config, out, log=lines.append)
    assert any(line.startswith("resumed at step ") for line in lines)
    assert resumed.prompts.sha256 == unbroken.prompts.sha256
    assert losses(out) == losses(tmp_path / "unbroken")
    assert (out / "dev_scores.jsonl").read_text() == (tmp_path / "unbroken" / "dev_scores.jsonl").read_text()


def test_a_finished_run_started_again_trains_no_more(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path
) -> None:
    first = run(world, backbone, tiny(steps=3), tmp_path)
    assert run(world, backbone, tiny(steps=3), tmp_path).prompts.sha256 == first.prompts.sha256
    assert len(losses(tmp_path)) == 3


@pytest.mark.parametrize("change", [{"seed": 1}, {"steps": 4}, {"prompt_lr": 2e-2}, {"temperature": 0.5}])
def test_a_checkpoint_of_other_settings_is_refused_and_left_whole(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path, change: dict[str, Any]
) -> None:
    run(world, backbone, tiny(steps=3), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(MismatchError, match=r"checkpoint\.safetensors was made with other settings.*--out"):
        run(world, backbone, tiny(**{"steps": 3, **change}), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_checkpoint_over_another_backbone_task_list_or_size_is_refused(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path
) -> None:
    run(world, backbone, tiny(steps=2), tmp_path)
    other = random_backbone(backbone.config, backbone.tokenizer.tokens(), seed=99)
    with pytest.raises(MismatchError, match="other settings, data or backbone"):
        run(world, other, tiny(steps=2), tmp_path)
    with pytest.raises(
        MismatchError, match="other settings, data or backbone: tasks, train_data, dev_data; give"
    ):
        run((world[0][:2], world[1]), backbone, tiny(steps=2), tmp_path)
    with pytest.raises(MismatchError, match="other settings, data or backbone: n_modules; give"):
        run(world, backbone, tiny(steps=2, n_modules=5), tmp_path)


def exchange_labels(world: tuple[list[TaskCard], Path], folder: Path, split: str) -> Path:
    """A copy of the world's data in which every label of mood's ``split`` is the other one."""
    shutil.copytree(world[1], folder)
    path = folder / "mood" / f"{split}.jsonl"
    other = {"pos": "neg", "neg": "pos"}
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    lines = [json.dumps({**r, "label": other[r["label"]]}, ensure_ascii=False) for r in records]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return folder


@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_checkpoint_of_other_data_is_refused_before_anything_is_written(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path, split: str
) -> None:
    out = tmp_path / "out"
    with cut_at(Pretrainer, 3), pytest.raises(KeyboardInterrupt):
        run(world, backbone, tiny(), out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = exchange_labels(world, tmp_path / "data", split)
    with pytest.raises(MismatchError, match=f"other settings, data or backbone: {split}_data; give"):
        run((world[0], other), backbone, tiny(), out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    shutil.copytree(world[1], tmp_path / "moved")
    lines: list[str] = []
    run((world[0], tmp_path / "moved"), backbone, tiny(), out, log=lines.append)
    assert "resumed at step 3" in lines  # the same data, in another place


def test_a_checkpoint_begun_with_other_prompts_is_refused_before_anything_is_written(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path
) -> None:
    first, second = (init_prompts(backbone), init_prompts(backbone, seed=6))
    with cut_at(Pretrainer, 3), pytest.raises(KeyboardInterrupt):
        run(world, backbone, tiny(), tmp_path, init=first)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for init in (second, None):
        with pytest.raises(MismatchError, match="other settings, data or backbone: init; give"):
            run(world, backbone, tiny(), tmp_path, init=init)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    lines: list[str] = []
    run(world, backbone, tiny(), tmp_path, init=first, log=lines.append)
    assert "resumed at step 3" in lines


def test_a_second_run_in_the_same_folder_is_refused(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path
) -> None:
    with (
        alone_in(tmp_path),
        pytest.raises(RunLockedError, match=f"another process is training in {tmp_path}"),
    ):
        run(world, backbone, tiny(steps=2), tmp_path)
    run(world, backbone, tiny(steps=2), tmp_path)  # free again


# ---- losses that are no numbers


def nan_at(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    """Make the loss of these calls (from 0) non-finite."""
    calls = iter(range(10_000))
    loss = Pretrainer.loss

    def poisoned(self: Pretrainer, batch: Batch) -> torch.Tensor:
        n = next(calls)
        return loss(self, batch) * (torch.nan if n in bad and n % 2 else torch.inf if n in bad else 1.0)

    monkeypatch.setattr(Pretrainer, "loss", poisoned)


def test_a_non_finite_loss_is_skipped_and_counted_and_moves_nothing(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_at(monkeypatch, {2, 3, 7})
    one = trainer(world, backbone, tiny(), tmp_path)
    for step in range(5):
        before = one.model.prompts.to_set()
        value = one.train_step()
        assert math.isfinite(value) == (step not in (2, 3))
        assert (one.model.prompts.to_set().sha256 == before.sha256) == (step in (2, 3))
    assert (one.step, one.skipped, one.in_a_row) == (5, 2, 0)


def test_a_non_finite_gradient_of_a_finite_loss_is_skipped_too(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path
) -> None:
    one = trainer(world, backbone, tiny(), tmp_path)
    handle = one.model.prompts.z.register_hook(lambda gradient: gradient * torch.inf)
    before = one.model.prompts.to_set().sha256
    assert math.isnan(one.train_step())
    assert one.model.prompts.to_set().sha256 == before
    assert (one.step, one.skipped) == (1, 1)
    handle.remove()
    assert math.isfinite(one.train_step())
    assert one.model.prompts.to_set().sha256 != before


def test_skipped_steps_stand_in_the_journal_the_result_and_the_table(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_at(monkeypatch, {2, 3, 11})
    lines: list[str] = []
    result = run(world, backbone, tiny(), tmp_path, log=lines.append)
    assert result.skipped_steps == 3
    assert [i for i, value in enumerate(losses(tmp_path)) if value is None] == [2, 3, 11]
    assert "3 steps had a non-finite loss" in score_table(result)
    assert not any("nan" in line or "inf" in line for line in lines)


def test_ten_non_finite_losses_in_a_row_stop_the_run_and_nine_do_not(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAX_SKIPPED_IN_A_ROW == 10
    nan_at(monkeypatch, set(range(1, 10)))
    assert run(world, backbone, tiny(), tmp_path / "nine").skipped_steps == 9
    nan_at(monkeypatch, set(range(1, 11)))
    with pytest.raises(
        LossError, match=r"10 non-finite losses in a row at step 10; .*checkpoint\.safetensors"
    ):
        run(world, backbone, tiny(), tmp_path / "ten")
    assert len(losses(tmp_path / "ten")) == 10  # the journal is whole up to there


def test_the_error_names_no_checkpoint_where_none_was_written(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan_at(monkeypatch, set(range(10)))
    with pytest.raises(LossError, match=r"in a row at step 9; no checkpoint was written yet$"):
        run(world, backbone, tiny(checkpoint_minutes=9.0), tmp_path)


# ---- starting from prompts


def init_prompts(backbone: Backbone, **changes: Any) -> PromptSet:
    sizes = {**SIZES, "seed": 5, **changes}
    return random_prompts(backbone, "deep", tasks=("other", "find"), **sizes)


def test_init_copies_prompts_head_and_the_routers_of_known_tasks(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path
) -> None:
    init = init_prompts(backbone)
    fresh = trainer(world, backbone, tiny(), tmp_path).model.prompts.to_set()
    got = trainer(world, backbone, tiny(), tmp_path, init=init).model.prompts.to_set()
    for name in ("z", "projection", "span_weight", "span_bias"):
        assert torch.equal(getattr(got, name), getattr(init, name))
    assert torch.equal(got.routers[1], init.routers[1])  # find
    assert torch.equal(got.routers[[0, 2]], fresh.routers[[0, 2]])
    assert got.meta.tasks == ("mood", "find", "pick")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"n_modules": 5}, r"\(5, 3, 8, 'deep'\), this run has \(4, 3, 8, 'deep'\)"),
        ({"prompt_tokens": 2}, r"\(4, 2, 8, 'deep'\)"),
        ({"intrinsic_dim": 9}, r"\(4, 3, 9, 'deep'\)"),
    ],
)
def test_init_of_another_size_is_refused_with_both_sizes(
    world: tuple[list[TaskCard], Path],
    backbone: Backbone,
    tmp_path: Path,
    changes: dict[str, int],
    expected: str,
) -> None:
    with pytest.raises(MismatchError, match=expected):
        trainer(world, backbone, tiny(), tmp_path, init=init_prompts(backbone, **changes))


def test_init_for_a_backbone_of_another_shape_is_refused(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match=r"for 3 layers of hidden size 24, backbone 'lively' has 2 of 32"):
        trainer(world, backbone, tiny(), tmp_path, init=init_prompts(tiny_backbone))


@pytest.mark.parametrize("same", [True, False])
def test_init_for_other_weights_of_the_same_shape_is_a_start_and_said_so(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path, same: bool
) -> None:
    other = random_backbone(backbone.config, backbone.tokenizer.tokens(), seed=1)
    lines: list[str] = []
    init = init_prompts(backbone if same else other)
    trainer(world, backbone, tiny(), tmp_path, init=init, log=lines.append)
    if same:
        assert not lines
    else:
        assert len(lines) == 1
        assert other.sha256[:12] in lines[0]
        assert backbone.sha256[:12] in lines[0]


@pytest.mark.parametrize(
    ("settings", "noted"),
    [
        ({}, []),
        (
            {"router_inference": "soft"},
            ["--init prompts were trained for hard routers divided by the count;"],
        ),
        (
            {"router_normalisation": "sum"},
            ["--init prompts were trained for hard routers divided by the count;"],
        ),
    ],
)
def test_init_trained_for_other_routers_is_a_start_and_said_so(
    world: tuple[list[TaskCard], Path],
    backbone: Backbone,
    tmp_path: Path,
    settings: dict[str, str],
    noted: list[str],
) -> None:
    lines: list[str] = []
    trainer(world, backbone, tiny(**settings), tmp_path, init=init_prompts(backbone), log=lines.append)
    assert len(lines) == len(noted)
    assert all(note in line for note, line in zip(noted, lines, strict=True))


# ---- settings


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"n_modules": 0}, "modules is 0"),
        ({"seed": 2**64}, "seed is 18446744073709551616, expected 0 to"),
        ({"temperature": 0.0}, r"temperature is 0\.0, expected a positive"),
        ({"precision": "fp16"}, "unknown precision 'fp16'. Did you mean 'bf16' or 'fp32'"),
        ({"kind": "depp"}, "unknown kind of prompts 'depp'. Did you mean 'deep'"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine'. .*Known: constant, linear"),
        ({"router_lr": 1.5}, r"router_lr is 1\.5, expected 0 <= rate < 1"),
        ({"prompt_lr": -1e-3}, r"prompt_lr is -0\.001"),
        ({"backbone_lr": float("nan")}, "backbone_lr is nan"),
        ({"temperature_end": 0.0}, r"temperature_end is 0\.0, expected a positive"),
        ({"eval_every": -1}, "eval_every is -1, expected at least 0"),
        ({"checkpoint_minutes": -0.5}, r"checkpoint_minutes is -0\.5"),
        ({"warmup_steps": -3}, "warmup_steps is -3"),
    ],
)
def test_bad_settings_name_the_value(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        tiny(**changes)


def test_shallow_prompts_leave_room_for_their_rows_in_the_position_table(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path
) -> None:
    config = tiny(kind="shallow", prompt_tokens=50, max_tokens=512, steps=2)
    run(world, backbone, config, tmp_path / "out")  # 96 positions: 46 tokens and 50 rows
    with pytest.raises(UsageError, match="within 6 tokens"):
        run(world, backbone, tiny(kind="shallow", prompt_tokens=90), tmp_path / "none")


def test_training_draws_nothing_from_global_generators(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path
) -> None:
    states = torch.random.get_rng_state(), copy.deepcopy(np.random.get_state()[1])  # noqa: NPY002
    run(world, backbone, tiny(steps=2), tmp_path)
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
