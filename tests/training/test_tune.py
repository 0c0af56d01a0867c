"""Gradient tuning: what each stage may change, selection, the run folder, and that predict reads it."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import mp2, mp2_json, predicted_accuracy
from tuning_world import World, make_world

from mp2.backbone import Backbone
from mp2.errors import UsageError
from mp2.prompts import fuse, load_prompts, random_prompts
from mp2.runs import BbtConfig
from mp2.runs.few_shot_problem import FewShotProblem
from mp2.runs.frozen_model import load_model
from mp2.runs.scratch import untrained_prompts
from mp2.tasks import load_card
from mp2.training.config import TuneConfig
from mp2.training.tune import Batch, GradientTuner, as_soft_prompts, never_empty, started
from mp2.training.tune_run import start_tune


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> World:
    return make_world(tmp_path_factory.mktemp("tune"), tiny_backbone)


def config_of(world: World, kind: str = "deep", **run: object) -> BbtConfig:
    values = {
        "task": str(world.card),
        "data": str(world.data),
        "backbone": str(world.backbone),
        "prompts": str(world.deep if kind == "deep" else world.shallow),
        "runtime": "torch",
        "head": "span",
        "threads": 1,
    }
    return BbtConfig(**{**values, **run})  # type: ignore[arg-type]


def tuner_of(world: World, kind: str = "deep", **settings: object) -> GradientTuner:
    run = config_of(world, kind)
    problem = FewShotProblem(run, load_card(run.task), load_model(run))
    rates = {"epochs": 12, "dev_every": 3, "router_lr": 0.3, "prompt_lr": 0.05}
    return GradientTuner(TuneConfig(run=run, **{**rates, **settings}), problem)  # type: ignore[arg-type]


def test_soft_prompts_are_z_times_projection(tiny_backbone: Backbone) -> None:
    prompts = random_prompts(tiny_backbone, "deep", n_modules=3, prompt_tokens=4, intrinsic_dim=5, seed=2)
    soft = as_soft_prompts(prompts, "t")
    router = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1]])
    expected = np.einsum(
        "lk,lkd,ldx->lx", router.double() / 3, prompts.z.double(), prompts.projection.double()
    )
    got = torch.einsum("ld,ldx->lx", soft.fuse(router), soft.projection)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_losses_of_untuned_prompts_are_those_of_black_box_tuning(world: World, kind: str) -> None:
    tuner = tuner_of(world, kind)
    every = torch.ones(tuner.problem.model.prompts.z.shape[:2])
    meta = tuner.problem.model.prompts.meta
    z = fuse(tuner.problem.model.prompts.z, every, meta.router_normalisation).numpy()
    expected = tuner.problem.objective.full_losses(z[None]).fetch()[0]
    assert tuner.run().stages.untuned.train_loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_prompts_from_scratch_are_trained_to_rows_that_differ(
    world: World, tiny_backbone: Backbone, kind: str
) -> None:
    """From z = 0 all rows of a layer would get one gradient."""
    scratch = untrained_prompts(
        tiny_backbone, load_prompts(str(world.deep if kind == "deep" else world.shallow))
    )
    tuner = tuner_of(world, kind)
    problem = tuner.problem
    problem.model = replace(problem.model, prompts=scratch)
    config = replace(tuner.config, router_epochs=0, router_lr=None)
    outcome = GradientTuner(config, problem).run()
    meta = outcome.prompts.meta
    rows = outcome.prompts.projection.view(-1, meta.prompt_tokens, meta.hidden)
    for layer in rows:
        assert (torch.cdist(layer, layer) + torch.eye(len(layer))).min() > 1e-4
    assert started(scratch, 1).z.std() > 0
    assert torch.equal(started(scratch, 1).z, started(scratch, 1).z)
    pretrained = load_prompts(str(world.deep))
    assert torch.equal(started(pretrained, 1).z, pretrained.z)  # only what is zero


def test_a_layer_without_a_module_keeps_the_one_of_the_highest_logit() -> None:
    logits = torch.tensor([[-0.3, -0.1, -2.0], [0.5, -1.0, 0.2]])
    expected = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    assert torch.equal(never_empty((logits > 0).float(), logits), expected)
    soft = torch.sigmoid(logits)
    assert torch.equal(never_empty(soft, logits), soft)


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_stage_two_trains_prompts_after_a_stage_one_that_switched_all_off(world: World, kind: str) -> None:
    tuner = tuner_of(world, kind, router_epochs=6, router_lr=1e-9)
    with torch.no_grad():
        tuner._model.routers.fill_(-1.0)
        tuner._model.routers[..., 2] = -0.5
    before = tuner._model.projection.detach().clone()
    tuner._best = None  # whatever the untuned prompt scores: stage I's checkpoint is to be the best
    tuner._train("stage1", tuner._model.routers, 1e-9, 6)
    assert tuner._best is not None
    _, _, weights = tuner._best
    assert torch.equal(weights.nonzero()[:, 1], torch.full((len(weights),), 2))
    tuner._train("stage2", tuner._model.projection, 0.05, 12, weights)
    changed = (tuner._model.projection != before).flatten(2).any(-1)
    assert changed[:, 2].all()


@pytest.mark.parametrize("trained", ["routers", "projection"])
def test_a_part_of_a_batch_changes_no_gradient_and_is_gone_before_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch, trained: str
) -> None:
    """Parts by length against all examples padded into one forward."""
    tuner = tuner_of(world)
    model = tuner._model.requires_grad_(False)
    parameter = getattr(model, trained).requires_grad_(True)
    alive: list[int] = []
    made: list[weakref.ref[torch.Tensor]] = []
    forward = model.forward

    def watched(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        alive.append(sum(reference() is not None for reference in made))
        start, end = forward(*arguments)
        made.append(weakref.ref(start))
        return start, end

    monkeypatch.setattr(model, "forward", watched)

    def gradient_of(parts: list[Batch]) -> tuple[float, torch.Tensor]:
        parameter.grad = None
        noise = torch.Generator().manual_seed(4)
        loss = tuner._backward(parts, model.router_weights(0, temperature=0.7, generator=noise))
        assert parameter.grad is not None
        return loss, parameter.grad.clone()

    parts = tuner._batches()[0]
    assert len(parts) > 1
    loss, gradient = gradient_of(parts)
    assert alive == [0] * len(parts)
    whole, expected = gradient_of([tuner._place(tuner.problem.train_inputs)])
    assert loss == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)
    assert gradient.abs().max() > 0


def test_stage_one_moves_the_router_alone_and_stage_two_only_selected_prompts(world: World) -> None:
    tuner = tuner_of(world)
    before = tuner._model.projection.detach().clone()
    head = tuner._model.span_weight.detach().clone()
    logits = tuner._model.routers.detach().clone()
    tuner._train("stage1", tuner._model.routers, 0.3, 6)
    assert not torch.equal(tuner._model.routers, logits)
    assert torch.equal(tuner._model.projection, before)
    logits = tuner._model.routers.detach().clone()
    frozen = torch.zeros(tuner._model.routers.shape[1:])
    frozen[:, 1] = 1.0
    tuner._train("stage2", tuner._model.projection, 0.05, 12, frozen)
    assert torch.equal(tuner._model.routers, logits)
    assert torch.equal(tuner._model.span_weight, head)
    changed = (tuner._model.projection != before).flatten(2).any(-1)
    assert changed[:, 1].all()
    assert not changed[:, [0, 2, 3]].any()


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_training_lowers_the_loss_and_keeps_the_backbone(world: World, kind: str) -> None:
    tuner = tuner_of(world, kind, epochs=40)
    backbone = {n: t.clone() for n, t in tuner.problem.model.backbone.encoder.state_dict().items()}
    found = tuner.run().stages
    # a tiny random backbone hardly listens to prefixes
    assert found.loss_curve[-1][1] < found.untuned.train_loss - 1e-4
    for name, tensor in tuner.problem.model.backbone.encoder.state_dict().items():
        assert torch.equal(tensor, backbone[name]), name


def test_the_best_dev_score_is_selected(world: World) -> None:
    found = tuner_of(world, epochs=40).run().stages
    assert found.final.dev.score == max(score for _, score in found.dev_curve)
    assert found.stage1.rank() <= found.untuned.rank()
    assert found.final.rank() <= found.stage1.rank()


def test_soft_router_is_kept_in_stage_two(world: World) -> None:
    tuner = tuner_of(world)
    prompts = tuner.problem.model.prompts
    soft = replace(prompts, meta=replace(prompts.meta, router_inference="soft"))
    tuner.problem.model = replace(tuner.problem.model, prompts=soft)
    found = GradientTuner(tuner.config, tuner.problem).run().stages
    later = [c for c in (found.stage1, found.final) if c.at != "untuned"]
    for checkpoint in later:
        weights = checkpoint.z * prompts.meta.n_modules
        assert ((weights > 0) & (weights < 1)).all()


def test_same_seed_same_result(world: World, tmp_path: Path) -> None:
    config = TuneConfig(run=config_of(world, seed=5), epochs=6, dev_every=2, router_lr=0.3, prompt_lr=0.05)
    first, again = (start_tune(config, tmp_path) for _ in range(2))
    for name in ("router", "stages", "best_train_loss", "selected"):
        assert first[name] == again[name]
    assert first["run_dir"] != again["run_dir"]


def test_the_result_counts_the_prompts_that_were_scored_on_test(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[bytes] = []
    plain = FewShotProblem.test_scores

    def counted(self: FewShotProblem, z: Any, temperature: float) -> Any:
        scored.append(z.tobytes())
        return plain(self, z, temperature)

    monkeypatch.setattr(FewShotProblem, "test_scores", counted)
    # rates that move nothing: the untuned prompt stays the best one of all three stages
    config = TuneConfig(run=config_of(world), epochs=2, router_lr=1e-30, prompt_lr=1e-30)
    result = start_tune(config, tmp_path)
    assert set(result["stages"]) == {"untuned", "stage1", "stage2"}
    assert result["evaluations"]["test"] == len(scored) == len(set(scored)) < 3
    without = start_tune(replace(config, run=config_of(world, test=False)), tmp_path)
    assert without["evaluations"]["test"] == 0


@pytest.mark.parametrize("change", [{"epochs": 3}, {"router_lr": 0.2}, {"injection": "inline"}])
def test_the_results_hash_of_the_settings_covers_all_of_them(
    world: World, tmp_path: Path, change: dict[str, Any]
) -> None:
    config = TuneConfig(run=config_of(world, test=False), epochs=2, router_lr=0.3)
    hashes = [
        start_tune(c, tmp_path)["provenance"]["config_sha256"]
        for c in (config, config, replace(config, **change))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_run_folder_can_be_predicted_with(world: World, tmp_path: Path) -> None:
    rates = ["--epochs", 20, "--router-lr", 0.3, "--prompt-lr", 0.05]
    result = mp2_json("tune", *world.tune_options(), *rates)
    run_dir = Path(result["run_dir"])
    assert result["method"] == "mp2-deep-gradient"
    assert set(result["stages"]) == {"untuned", "stage1", "stage2"}
    assert result["test_score"] == result["stages"]["stage2"]["test_score"]
    assert (run_dir / "curve.png").stat().st_size > 1000
    right = predicted_accuracy(run_dir, world.data / "mood" / "test.jsonl")
    assert right == pytest.approx(result["test_score"])
    kind = load_prompts(run_dir / "prompts.safetensors").meta
    assert (kind.intrinsic_dim, kind.n_modules) == (4, 4)


@pytest.mark.parametrize("named", ["as now", "by its old absolute path"])
def test_a_run_folder_that_was_moved_can_be_predicted_with(world: World, tmp_path: Path, named: str) -> None:
    result = start_tune(TuneConfig(run=config_of(world), epochs=2), tmp_path / "runs")
    moved = shutil.move(result["run_dir"], tmp_path / "moved")
    config = json.loads((tmp_path / "moved" / "config.json").read_text("utf-8"))
    assert config["config"]["prompts"] == "prompts.safetensors"
    if named != "as now":
        config["config"]["prompts"] = str(Path(result["run_dir"]) / "prompts.safetensors")
        (tmp_path / "moved" / "config.json").write_text(json.dumps(config), "utf-8")
    right = predicted_accuracy(moved, world.data / "mood" / "test.jsonl")
    assert right == pytest.approx(result["test_score"])


def test_the_table_of_a_run_is_that_of_black_box_tuning(world: World) -> None:
    done = mp2("tune", *world.tune_options(), "--epochs", 2)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("mood  mp2-deep-gradient  seed 8")
    assert [line[:8] for line in lines[2:5]] == ["untuned ", "stage I ", "stage II"]


def test_several_seeds_give_a_list(world: World) -> None:
    short = ["--epochs", 2, "--seeds", "8,13", "--router-only", "--no-test"]
    results = mp2_json("tune", *world.tune_options(kind="shallow"), *short)
    assert [r["seed"] for r in results] == [8, 13]
    assert {r["method"] for r in results} == {"mp2-shallow-gradient-router"}
    assert set(results[0]["stages"]) == {"untuned", "stage1"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"epochs": 1}, "epochs is 1"), ({"router_lr": 2.0}, "router_lr is 2.0"), ({"temperature": 0.0}, "0.0")],
)
def test_impossible_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TuneConfig(run=BbtConfig(task="t"), **settings)  # type: ignore[arg-type]
