"""Model, prompt and head tuning, P-tuning v2: where they start, what they train, what they leave behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import mp2, mp2_json, predicted_accuracy
from tuning_world import World, make_world

from mp2.backbone import Backbone, load_backbone
from mp2.errors import UsageError
from mp2.optimizers.two_stage import Checkpoint
from mp2.prompts import load_prompts, save_prompts
from mp2.prompts.scratch import hidden_scales
from mp2.runs import BbtConfig
from mp2.runs.few_shot_problem import FewShotProblem
from mp2.runs.frozen_model import FrozenModel, load_model
from mp2.tasks import load_card
from mp2.training.config import TUNE_METHODS, TuneConfig
from mp2.training.methods import METHODS
from mp2.training.methods.method import first_prompt
from mp2.training.prompted import span_losses
from mp2.training.soft_prompt import SoftPromptTuner

M = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> World:
    return make_world(tmp_path_factory.mktemp("methods"), tiny_backbone)


@pytest.fixture(scope="module")
def model(world: World) -> FrozenModel:
    return load_model(run_of(world, prompts=str(world.shallow)))


def run_of(world: World, **settings: Any) -> BbtConfig:
    values = {"task": str(world.card), "data": str(world.data), "backbone": str(world.backbone)}
    return BbtConfig(**{**values, "runtime": "torch", "threads": 1, **settings})


def tuner_of(world: World, model: FrozenModel, name: str, **settings: Any) -> SoftPromptTuner:
    """A tuner of a few epochs at a high rate, from a prompt of M rows."""
    run = run_of(world)
    method = replace(METHODS[name], rates=(1e-2,))
    start = first_prompt(method, model.backbone, M, run.seed)
    problem = FewShotProblem(replace(run, head="span"), load_card(run.task), replace(model, prompts=start))
    config = TuneConfig(run=run, method=name, **{"epochs": 4, "dev_every": 2, **settings})
    return SoftPromptTuner(config, method, problem)


def test_every_method_of_the_command_is_there() -> None:
    assert set(TUNE_METHODS) == {"mp2", *METHODS}


@pytest.mark.parametrize(
    ("name", "layers", "m"),
    [("prompt-tuning", 1, M), ("p-tuning-v2", 3, M), ("model-tuning", 1, 0), ("head-tuning", 1, 0)],
)
def test_starts_are_random_and_of_the_papers_shape(
    tiny_backbone: Backbone, name: str, layers: int, m: int
) -> None:
    layers = layers if layers == 1 else tiny_backbone.config.n_layers
    start = first_prompt(METHODS[name], tiny_backbone, M, 8)
    rows = start.projection.view(layers, m, tiny_backbone.config.hidden)  # 24 x 50 x 1024 = 1.2M at full size
    assert start.z.flatten().tolist() == [1.0] * layers
    assert start.has_span_head
    other = first_prompt(METHODS[name], tiny_backbone, M, 9)
    assert not torch.equal(start.span_weight, other.span_weight)
    assert torch.equal(start.span_weight, first_prompt(METHODS[name], tiny_backbone, M, 8).span_weight)
    for layer in rows:
        assert (torch.cdist(layer, layer) + torch.eye(len(layer)) > 0).all()  # no two rows are alike


def test_prompt_tuning_starts_from_words_and_p_tuning_in_the_size_of_the_states(
    tiny_backbone: Backbone,
) -> None:
    words = first_prompt(METHODS["prompt-tuning"], tiny_backbone, 5, 8).projection.view(5, -1)
    known = tiny_backbone.encoder.word_embeddings.weight
    assert (torch.cdist(words, known).min(1).values == 0).all()
    deep = first_prompt(METHODS["p-tuning-v2"], tiny_backbone, 50, 8).projection
    np.testing.assert_allclose(deep.flatten(1).std(1), hidden_scales(tiny_backbone), rtol=0.1)


@pytest.mark.parametrize("name", list(METHODS))
def test_only_what_a_method_trains_has_gradients_and_changes(
    world: World, model: FrozenModel, name: str
) -> None:
    tuner = tuner_of(world, model, name)
    before = {n: p.detach().clone() for n, p in model.backbone.encoder.named_parameters()}
    outcome = tuner.run()
    for n, p in model.backbone.encoder.named_parameters():
        assert torch.equal(p, before[n]), n  # the caller's backbone stays what it is, in model tuning too
        assert p.grad is None
    prompts = tuner._model
    assert prompts.z.grad is None
    assert prompts.routers.grad is None
    assert prompts.span_weight.grad is not None
    assert (prompts.projection.grad is not None) == (name in ("prompt-tuning", "p-tuning-v2"))
    trained = {n for n, p in tuner._encoder.named_parameters() if p.grad is not None}
    assert trained == (set(before) if name == "model-tuning" else set())
    assert (outcome.backbone is not None) == (name == "model-tuning")
    assert outcome.rate == 1e-2 or outcome.stages.final.at == "untuned"


@pytest.mark.parametrize("name", list(METHODS))
def test_the_loss_that_is_trained_is_the_one_that_the_engine_has(
    world: World, model: FrozenModel, name: str
) -> None:
    """Without dropout: the tuner's forward against the engine's, before anything has moved."""
    tuner = tuner_of(world, model, name)
    tuner.method = replace(tuner.method, dropout=0.0)
    scored = tuner._check("untuned", tuner._start, tuner._ones()).train_loss
    parts = tuner._batches()[0]
    losses = []
    with torch.no_grad():
        for ids, mask, starts, ends in parts:
            rows = tuner._model.prompts(tuner._ones())
            start, end = tuner._model.logits(tuner._encoder, ids, mask, rows)
            losses.append(span_losses(start, end, mask, starts, ends))
    assert scored == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)


@pytest.mark.parametrize("name", list(METHODS))
def test_training_in_bf16_has_nearly_the_gradients_of_float32(
    world: World, model: FrozenModel, name: str
) -> None:
    """And they, like the parameters, are kept in float32."""
    gradients = {}
    for precision in ("fp32", "bf16"):
        tuner = tuner_of(world, model, name, training_precision=precision)
        trained = tuner.parameters()
        for parameter in trained:
            parameter.requires_grad_(True)
        tuner._backward(tuner._batches()[0])
        found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trained]
        assert {g.dtype for g in found} == {torch.float32}
        gradients[precision] = torch.cat([g.flatten() for g in found])
    fp32, bf16 = gradients["fp32"], gradients["bf16"]
    assert not torch.equal(fp32, bf16)
    assert torch.cosine_similarity(fp32, bf16, dim=0) > 0.98
    assert 0.9 < bf16.norm() / fp32.norm() < 1.1


def test_training_lowers_the_loss(world: World, model: FrozenModel) -> None:
    for name in METHODS:
        tuner = tuner_of(world, model, name, epochs=20, dev_every=20)
        curve = dict(tuner.run().stages.loss_curve)
        assert curve[20] < curve[0], name


def test_the_rate_with_the_best_dev_score_is_chosen_and_each_begins_anew(
    world: World, model: FrozenModel
) -> None:
    tuner = tuner_of(world, model, "head-tuning", lr=(1e-9, 0.1), epochs=10, dev_every=5)
    outcome = tuner.run()
    ranks = {c.iteration: c.rank() for c in tuner._checkpoints}
    best = min(ranks, key=lambda n: (ranks[n], n))
    assert outcome.stages.final.iteration == best
    assert outcome.rate == (None if best == 0 else 1e-9 if best <= 10 else 0.1)
    assert [c.iteration for c in tuner._checkpoints] == [0, 5, 10, 15, 20]
    alone = tuner_of(world, model, "head-tuning", lr=(0.1,), epochs=10, dev_every=5)
    alone._rng = np.random.default_rng([8, 7])
    for _ in range(10):
        alone._batches()  # the draws of the first rate
    alone.run()
    np.testing.assert_allclose(
        [c.train_loss for c in alone._checkpoints[1:]], [c.train_loss for c in tuner._checkpoints[3:]]
    )


def test_model_tuning_that_helps_nothing_leaves_the_backbone_as_it_was(
    world: World, model: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dev prefers the start: then the backbone that is kept beside its prompts is the first one, too."""
    tuner = tuner_of(world, model, "model-tuning")
    monkeypatch.setattr(Checkpoint, "rank", lambda self: (float(self.at != "untuned"), 0.0))
    outcome = tuner.run()
    assert (outcome.stages.final.at, outcome.rate) == ("untuned", None)
    assert outcome.backbone is not None
    trained = dict(tuner._encoder.named_parameters())
    for name, parameter in model.backbone.encoder.named_parameters():
        assert torch.equal(dict(outcome.backbone.encoder.named_parameters())[name], parameter), name
        assert torch.equal(trained[name], parameter), name


def test_same_seed_same_result(world: World, model: FrozenModel) -> None:
    for name in ("p-tuning-v2", "model-tuning"):
        first, second = (tuner_of(world, model, name).run() for _ in range(2))
        assert first.stages.loss_curve == second.stages.loss_curve
        assert first.prompts.sha256 == second.prompts.sha256


@pytest.mark.parametrize("name", list(METHODS))
def test_a_run_is_a_folder_that_predict_reads(world: World, tmp_path: Path, name: str) -> None:
    tokens = ["--prompt-tokens", M] if METHODS[name].rows is not METHODS["model-tuning"].rows else []
    options = ["--task", world.card, "--data", world.data, "--backbone", world.backbone, "--threads", 1]
    result = mp2_json(
        "tune", "--method", name, *options, *tokens, "--epochs", 6, "--lr", "1e-3,1e-2", "--out", tmp_path
    )
    assert result["method"] == name
    assert set(result["stages"]) == {"untuned", "stage2"}
    assert result["iterations"] == 12
    assert result["learning_rate"] in (None, 1e-3, 1e-2)
    run_dir = Path(result["run_dir"])
    right = predicted_accuracy(run_dir, world.data / "mood" / "test.jsonl")
    assert right == pytest.approx(result["test_score"])
    meta = load_prompts(run_dir / "prompts.safetensors").meta
    if name == "model-tuning":
        assert load_backbone(run_dir / "backbone").sha256 == meta.backbone_sha256
    else:
        assert meta.backbone_sha256 == load_backbone(world.backbone).sha256


def test_prompt_tuning_from_a_single_prompt_has_its_makers_name(
    world: World, model: FrozenModel, tmp_path: Path
) -> None:
    start = first_prompt(METHODS["prompt-tuning"], model.backbone, M, 4)
    meta = replace(start.meta, provenance={"made_by": "mp2 pretrain", "method": "spot"})
    save_prompts(replace(start, meta=meta), tmp_path / "spot.safetensors")
    options = ["--task", world.card, "--data", world.data, "--backbone", world.backbone, "--threads", 1]
    command = ["tune", "--method", "prompt-tuning", *options, "--prompts", tmp_path / "spot.safetensors"]
    result = mp2_json(*command, "--epochs", 2, "--out", tmp_path)
    assert result["method"] == "spot"
    assert result["stages"]["untuned"]["train_loss"] > 0
    refused = mp2("tune", "--method", "mp2", *command[3:])
    assert refused.exit_code == 2
    assert "--method prompt-tuning" in refused.stderr


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("model-tuning", ["--router-lr", 0.1], "router_lr was given, and method model-tuning has none"),
        ("prompt-tuning", ["--router-epochs", 5], "router_epochs was given"),
        ("p-tuning-v2", ["--injection", "inline"], "injection was given"),
        ("prompt-tuning", ["--router-only"], "router_only was given"),
        ("prompt-tuning", ["--deep"], "deep was given"),
        ("model-tuning", ["--prompt-tokens", 4], "prompt_tokens was given"),
        ("mp2", ["--prompt-tokens", 4], "prompt_tokens was given, and method mp2 has none"),
        ("mp2", ["--lr", "1e-3"], "lr was given, and method mp2 has none"),
        ("prompt-tuning", ["--lr", "2"], "lr is 2.0, expected 0 < rate < 1"),
        ("prompt-tuning", ["--lr", "fast"], "--lr is 'fast', expected rates"),
        ("p-tuning-v2", ["--prompts", "deep"], "prompts was given, and method p-tuning-v2 has none"),
        ("prompt-tuning", ["--prompts", "deep"], "starts from one soft prompt"),
    ],
)
def test_options_that_a_method_does_not_read_are_refused(
    world: World, tmp_path: Path, method: str, given: list[Any], message: str
) -> None:
    given = [world.deep if word == "deep" else word for word in given]
    options = ["--task", world.card, "--data", world.data, "--backbone", world.backbone]
    done = mp2("tune", "--method", method, *options, *given, "--out", tmp_path / "runs")
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert not list((tmp_path / "runs").glob("*")) if (tmp_path / "runs").exists() else True


def test_a_head_alone_is_what_scratch_can_take(world: World, model: FrozenModel, tmp_path: Path) -> None:
    head = first_prompt(METHODS["head-tuning"], model.backbone, None, 4)
    save_prompts(head, tmp_path / "head.safetensors")
    out = tmp_path / "scratch.safetensors"
    mp2(
        "scratch",
        "--backbone",
        world.backbone,
        "--deep",
        "--head",
        tmp_path / "head.safetensors",
        "--out",
        out,
    )
    made = load_prompts(out, model.backbone)
    assert torch.equal(made.span_weight, head.span_weight)
    assert made.meta.provenance["span_head_of"] == head.sha256
    with pytest.raises(UsageError, match="has none"):
        TuneConfig(run=run_of(world), method="model-tuning", injection="inline")


def test_a_head_alone_is_no_start_of_a_search(world: World, model: FrozenModel, tmp_path: Path) -> None:
    save_prompts(first_prompt(METHODS["head-tuning"], model.backbone, None, 4), tmp_path / "head.safetensors")
    where = [
        "--task",
        world.card,
        "--data",
        world.data,
        "--backbone",
        world.backbone,
        "--out",
        tmp_path / "runs",
    ]
    done = mp2("bbt", *where, "--prompts", tmp_path / "head.safetensors")
    assert done.exit_code == 2, done.output
    assert "is a span head without prompts: 'mp2 scratch --head' makes some" in done.stderr
