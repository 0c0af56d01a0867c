"""How prompts enter: inline deep prompts learn, resume, are tuned, and are never taken for prefixes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import mp2, mp2_json, predicted_accuracy
from tuning_world import make_world

from benchmarks.speed.plain_loop import PlainLoop
from mp2.backbone import Backbone
from mp2.errors import FormatError, MismatchError, UsageError
from mp2.prompts import ModularPrompts, fuse, load_prompts, new_meta, random_prompts, save_prompts
from mp2.tasks import TaskCard
from mp2.training import PretrainConfig, Pretrainer
from mp2.training.mixture import load_mixture, sample_batch
from mp2.training.prompted import PromptedEncoder
from training.toy_runs import cut_at, losses, run

SIZES = {"n_modules": 4, "prompt_tokens": 3, "intrinsic_dim": 8}


def config(**changes: Any) -> PretrainConfig:
    settings = {
        **SIZES,
        "injection": "inline",
        "steps": 8,
        "batch_size": 8,
        "router_lr": 1e-2,
        "prompt_lr": 3e-2,
        "max_tokens": 64,
        "dev_limit": 8,
        "checkpoint_minutes": 0.0,
    }
    return PretrainConfig(**{**settings, **changes})


def test_the_training_loss_is_that_of_a_bert_model_with_hooks(
    world: tuple[list[TaskCard], Path], backbone: Backbone
) -> None:
    tasks = load_mixture(world[0], world[1], backbone.tokenizer, 64, dev_limit=8, log=lambda _: None)
    names = tuple(task.card.task for task in tasks)
    meta = new_meta(
        "lively", backbone.sha256, backbone.encoder, "deep", tasks=names, injection="inline", **SIZES
    )
    prompts = ModularPrompts(meta, torch.Generator().manual_seed(1))
    with torch.no_grad():
        prompts.z.normal_(0, 30, generator=torch.Generator().manual_seed(2))
    batch = sample_batch(tasks, 0, batch_size=8, seed=0, pad_id=backbone.tokenizer.pad_id)
    seed = torch.Generator().manual_seed(3)
    weights = prompts.router_weights(batch.task, temperature=0.7, generator=seed.clone_state())
    loss = PromptedEncoder(backbone.encoder, prompts)(batch, 0.7, seed)
    chosen = [x for x in tasks[batch.task].train if any(_same(x.input_ids, row) for row in batch.input_ids)]
    loop = PlainLoop(backbone, prompts.to_set(), chosen)
    z = fuse(prompts.z, weights, "count").detach().numpy()
    assert len(chosen) == 8
    assert loss.item() == pytest.approx(loop.loss(z), rel=1e-5)
    loss.backward()
    for name in ("z", "projection", "routers", "span_weight"):  # every layer has its part in the loss
        gradient = getattr(prompts, name).grad
        if name == "routers":
            gradient = gradient[batch.task]
        assert (gradient.flatten(1).abs().amax(1) > 0).all(), name
    assert all(p.grad is None for p in backbone.encoder.parameters())


def _same(ids: np.ndarray, row: torch.Tensor) -> bool:
    return bool((row[: len(ids)].numpy() == ids).all() and (row[len(ids) :] == 0).all())


def test_inline_prompts_learn_and_the_file_says_how_they_enter(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path
) -> None:
    result = run(world, backbone, config(steps=200, batch_size=16, checkpoint_minutes=9.0), tmp_path)
    values = losses(tmp_path)
    assert np.mean(values[-40:]) < 0.75 * np.mean(values[:10])
    loaded = load_prompts(tmp_path / "prompts.safetensors", backbone)
    assert loaded.meta.injection == "inline"
    assert loaded.meta.n_inline == 3
    assert loaded.sha256 == result.prompts.sha256
    as_prefix = replace(loaded, meta=replace(loaded.meta, injection="prefix"))
    assert as_prefix.sha256 != loaded.sha256
    assert "(deep, inline)" in (tmp_path / "model_card.md").read_text("utf-8").splitlines()[0]


def test_a_run_cut_off_goes_on_bit_for_bit_and_not_under_the_other_injection(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path
) -> None:
    unbroken = run(world, backbone, config(), tmp_path / "unbroken")
    with cut_at(Pretrainer, 3), pytest.raises(KeyboardInterrupt):
        run(world, backbone, config(), tmp_path / "cut")
    with pytest.raises(MismatchError, match="injection"):
        run(world, backbone, config(injection=None), tmp_path / "cut")
    with pytest.raises(MismatchError, match="router_normalisation"):
        run(world, backbone, config(router_normalisation="sum"), tmp_path / "cut")
    resumed = run(world, backbone, config(), tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "unbroken")
    assert resumed.prompts.sha256 == unbroken.prompts.sha256


def test_router_conventions_are_trained_and_stored(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path
) -> None:
    usual = run(world, backbone, config(injection=None), tmp_path / "usual")
    other = config(injection=None, router_inference="soft", router_normalisation="sum")
    found = run(world, backbone, other, tmp_path / "other").prompts
    meta = load_prompts(tmp_path / "other" / "prompts.safetensors").meta
    assert (meta.router_inference, meta.router_normalisation) == ("soft", "sum")
    assert not torch.equal(found.z, usual.prompts.z)  # the sum is in the training forward too


def test_inline_rows_take_positions(
    world: tuple[list[TaskCard], Path], backbone: Backbone, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="within 6 tokens"):  # 96 positions, 90 rows
        run(world, backbone, config(prompt_tokens=90), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "shallow", "injection": "prefix"}, "expected inline or added for shallow prompts"),
        ({"injection": "infix"}, "unknown injection 'infix'. Did you mean 'prefix' or 'inline'"),
        ({"router_inference": "firm"}, "unknown router inference 'firm'. Known: hard, soft"),
        ({"router_normalisation": "max"}, "unknown router normalisation 'max'.* Known: count, sum"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(**changes)


def test_files_without_a_word_on_injection_are_what_they_were(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    for kind, expected in (("deep", "prefix"), ("shallow", "inline")):
        prompts = random_prompts(tiny_backbone, kind, prompt_tokens=2, intrinsic_dim=3)  # type: ignore[arg-type]
        assert prompts.meta.injection == expected
        save_prompts(prompts, tmp_path / kind)
        assert load_prompts(tmp_path / kind).sha256 == prompts.sha256
    shallow = random_prompts(tiny_backbone, "shallow", prompt_tokens=2, intrinsic_dim=3)
    with pytest.raises(FormatError, match="injection"):
        replace(shallow.meta, injection="prefix")


# ---- few-shot tuning and what follows


@pytest.fixture(scope="module")
def tuned(
    tmp_path_factory: pytest.TempPathFactory, backbone: Backbone
) -> tuple[Any, dict[str, Any], list[str]]:
    """A world, the result of tuning its prefix prompts inline, and the options of that run."""
    small = make_world(tmp_path_factory.mktemp("tune"), backbone)
    options = small.tune_options()
    more = ["--injection", "inline", "--epochs", 12, "--router-epochs", 0, "--prompt-lr", 0.05]
    return small, mp2_json("tune", *options, *more), options


def test_tuning_inline_says_so_everywhere_and_predict_agrees(
    tuned: tuple[Any, dict[str, Any], list[str]],
) -> None:
    small, result, _ = tuned
    assert result["injection"] == "inline"
    run_dir = Path(result["run_dir"])
    assert load_prompts(run_dir / "prompts.safetensors").meta.injection == "inline"
    right = predicted_accuracy(run_dir, small.data / "mood" / "test.jsonl")
    assert right == pytest.approx(result["test_score"])


def test_without_router_epochs_every_module_stays_on(tuned: tuple[Any, dict[str, Any], list[str]]) -> None:
    _, result, _ = tuned
    assert result["stages"]["stage1"] == result["stages"]["untuned"]
    assert set("".join(result["router"])) == {"1"}
    assert result["iterations"] == 12


def test_black_box_tuning_runs_an_inline_file_inline(tuned: tuple[Any, dict[str, Any], list[str]]) -> None:
    small, result, options = tuned
    file = Path(result["run_dir"]) / "prompts.safetensors"
    options = [str(file) if o == str(small.deep) else o for o in options]
    result = mp2_json("bbt", *options, "--head", "span", "--iters", 24, "--router-iters", 4, "--popsize", 4)
    untuned = result["stages"]["untuned"]["train_loss"]
    prompts = load_prompts(file)
    from mp2.backbone import load_backbone
    from mp2.engine import Objective
    from mp2.engine.cpu.backend import CpuBackend
    from mp2.tasks import MrcFormatter, few_shot_split, load_card, load_examples

    loaded, card = load_backbone(str(small.backbone)), load_card(str(small.card))
    formatter = MrcFormatter(card, loaded.tokenizer, loaded.config.max_positions - 3)
    split = few_shot_split(card, load_examples(card, "train", small.data), 8, None)
    inputs = [formatter.training_input(e, i) for i, e in enumerate(split.train)]
    z = prompts.fuse(torch.ones(prompts.z.shape[:2])).numpy()
    assert untuned == pytest.approx(PlainLoop(loaded, prompts, inputs).loss(z), rel=1e-4)
    as_prefix = replace(prompts, meta=replace(prompts.meta, injection="prefix"))
    other = Objective(CpuBackend(loaded).forward(as_prefix), inputs).full_losses(z[None]).fetch()[0]
    assert untuned != pytest.approx(other, rel=1e-4)


def test_shallow_prompts_cannot_be_tuned_as_a_prefix(tuned: tuple[Any, dict[str, Any], list[str]]) -> None:
    small, _, _ = tuned
    done = mp2("tune", *small.tune_options(kind="shallow"), "--injection", "prefix")
    assert done.exit_code == 2
    assert "expected inline or added for shallow prompts" in done.stderr


def test_export_with_inline_prompts_is_refused(
    tuned: tuple[Any, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    small, result, _ = tuned
    file = Path(result["run_dir"]) / "prompts.safetensors"
    asked = ["--precision", "fp16", "--backbone", small.backbone, "--prompts", file]
    done = mp2("export", *asked, "--out", tmp_path / "e")
    assert done.exit_code == 2
    assert "the graphs have prefixes and word-embedding rows only" in done.stderr
    assert not (tmp_path / "e").exists()
