"""Prompts from scratch: scales, the kept head, and that `mp2 bbt` on them is BBT / BBTv2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tuning_world import World, make_world

from mp2.backbone import Backbone
from mp2.cli import main
from mp2.errors import MismatchError
from mp2.prompts import PromptSet, random_prompts
from mp2.runs import LayerConfig
from mp2.runs.scratch import untrained_prompts


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> World:
    return make_world(tmp_path_factory.mktemp("scratch"), tiny_backbone)


@pytest.fixture(scope="module", params=["deep", "shallow"])
def like(request: pytest.FixtureRequest, tiny_backbone: Backbone) -> PromptSet:
    return random_prompts(
        tiny_backbone, request.param, n_modules=4, prompt_tokens=20, intrinsic_dim=50, seed=3, tasks=("a",)
    )


def test_first_population_has_the_scale_of_what_stands_beside_it(
    tiny_backbone: Backbone, like: PromptSet
) -> None:
    prompts = untrained_prompts(tiny_backbone, like, seed=5)
    encoder = tiny_backbone.encoder
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, tiny_backbone.tokenizer.vocab_size, (32, 40), generator=generator)
    hidden = encoder.embed(ids)
    for layer in range(prompts.meta.prompt_layers):
        expected = hidden.std() if like.kind == "deep" else encoder.word_embeddings.weight.std()
        sigma = LayerConfig().sigma(layer, like.kind)
        z = sigma * torch.randn(400, prompts.meta.intrinsic_dim, generator=generator)
        assert float((z @ prompts.projection[layer]).std()) == pytest.approx(float(expected), rel=0.1)
        hidden = encoder.layer(layer, hidden)


def test_one_module_that_is_zero_and_the_head_of_the_model(tiny_backbone: Backbone, like: PromptSet) -> None:
    prompts = untrained_prompts(tiny_backbone, like, seed=5)
    assert prompts.kind == like.kind
    assert prompts.meta.n_modules == 1
    assert not prompts.z.any()
    assert torch.equal(prompts.span_weight, like.span_weight)
    assert torch.equal(prompts.span_bias, like.span_bias)


def test_the_seed_draws_the_projection(tiny_backbone: Backbone, like: PromptSet) -> None:
    first, again, other = (untrained_prompts(tiny_backbone, like, seed=seed) for seed in (1, 1, 2))
    assert first.sha256 == again.sha256 != other.sha256


def test_prompts_of_another_backbone_are_refused(tiny_backbone: Backbone, like: PromptSet) -> None:
    other = Backbone(tiny_backbone.config, tiny_backbone.encoder, tiny_backbone.tokenizer, "0" * 64)
    with pytest.raises(MismatchError, match="another training"):
        untrained_prompts(other, like)


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_bbt_runs_on_scratch_prompts_without_stage_one(world: World, kind: str, tmp_path: Path) -> None:
    like = world.deep if kind == "deep" else world.shallow
    file = tmp_path / "scratch.safetensors"
    made = CliRunner().invoke(
        main, ["scratch", "--backbone", str(world.backbone), "--like", str(like), "--out", str(file)]
    )
    assert made.exit_code == 0, made.output
    options = world.options(kind=kind)
    options[options.index("--prompts") + 1] = str(file)
    done = CliRunner().invoke(
        main, ["bbt", *options, "--router-search", "none", "--iters", "121", "--no-test", "--json"]
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["iterations"] == 121
    assert result["stages"]["stage1"]["iteration"] == 1  # the untuned prompt is all there is to stage I
    assert result["best_train_loss"] < result["stages"]["untuned"]["train_loss"]
