"""`mp2 bbt --method bbt` and `bbtv2`: the published methods, nothing pre-trained, label words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import own_tasks
import pytest
from command_line import mp2, mp2_json, predicted_accuracy, predictions
from transformers import BertForMaskedLM

from mp2.backbone import load_backbone
from mp2.errors import UsageError
from mp2.optimizers.config import LayerConfig, RouterConfig
from mp2.prompts.scratch import hidden_scales
from mp2.runs import BbtConfig, resume_run
from mp2.runs.scratch import ON_THE_FLY, made_on_the_fly

from .test_any_backbone import save_bert


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    save_bert(root / "bert", BertForMaskedLM)
    own_tasks.write_tasks(root, seed=8)
    return root


def options(world: Path, out: Path, method: str, card: Path | None = None) -> list[object]:
    card = card or world / "tickets.toml"
    where = ("--task", card, "--data", card.parent, "--backbone", world / "bert")
    return ["bbt", "--method", method, *where, "--threads", 1, "--out", out, "--no-baselines", "--iters", 61]


@pytest.mark.parametrize(
    ("method", "kind", "injection"), [("bbt", "shallow", "added"), ("bbtv2", "deep", "inline")]
)
def test_a_published_run_has_label_words_random_projections_and_no_router(
    world: Path, tmp_path: Path, method: str, kind: str, injection: str
) -> None:
    result = mp2_json(*options(world, tmp_path, method))
    config = json.loads((Path(result["run_dir"]) / "config.json").read_text())["config"]
    assert (result["method"], result["head"]["kind"], result["router_search"]) == (method, "mlm", "none")
    assert (config["layers"]["keep"], config["prompts"]) == ("ever", f"published-{method}")
    prompts = made_on_the_fly(load_backbone(world / "bert"), config["prompts"])
    assert (prompts.kind, prompts.meta.injection) == (kind, injection)
    assert not prompts.z.any()
    right = predicted_accuracy(result["run_dir"], world / "tickets" / "test.jsonl")
    assert right == pytest.approx(result["test_score"])


def test_a_run_cut_off_goes_on_bit_for_bit(world: Path, tmp_path: Path) -> None:
    result = mp2_json(*options(world, tmp_path, "bbtv2"))
    run_dir = Path(result["run_dir"])
    prompt = (run_dir / "prompt.safetensors").read_bytes()
    journal = (run_dir / "journal.jsonl").read_bytes()
    for name in ("result.json", "prompt.safetensors"):
        (run_dir / name).unlink()
    (run_dir / "journal.jsonl").write_bytes(journal[: len(journal) // 2])
    resume_run(run_dir)
    assert (run_dir / "prompt.safetensors").read_bytes() == prompt


def test_projections_have_the_scale_of_this_encoders_words_and_clipped_states(world: Path) -> None:
    """Standard deviation alpha * std_hat / (sqrt(d) * sigma), as the code of BBTv2 draws them."""
    backbone = load_backbone(world / "bert")
    encoder = backbone.encoder
    words = float(encoder.word_embeddings.weight.std())
    expected = [words, *hidden_scales(backbone, clipped=True)[1:]]
    assert hidden_scales(backbone, clipped=True)[1] < hidden_scales(backbone)[1]
    for name, kind in ON_THE_FLY.items():
        if not name.startswith("published"):
            continue
        prompts = made_on_the_fly(backbone, name)
        d = prompts.meta.intrinsic_dim
        for layer, projection in enumerate(prompts.projection):
            std = expected[layer] / (d**0.5 * LayerConfig().sigma(layer, kind))
            assert float(projection.std()) == pytest.approx(std, rel=0.02)


def test_clipping_is_that_of_their_code(world: Path) -> None:
    backbone = load_backbone(world / "bert")
    values = backbone.encoder.embed(_random_ids(backbone)).numpy().ravel()
    for _ in range(5):
        mean, std = values.mean(), values.std()
        values = np.clip(values, mean - 3 * std, mean + 3 * std)
    assert hidden_scales(backbone, clipped=True)[0] == pytest.approx(values.std(), rel=1e-4)


def _random_ids(backbone: Any) -> Any:
    import torch

    shape = (64, min(64, backbone.config.max_positions))
    return torch.randint(0, backbone.tokenizer.vocab_size, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--prompts", "mini-deep"], "prompts is mini-deep"),
        (["--shallow"], "kind is shallow"),
        (["--head", "ridge"], "head is ridge"),
        (["--router-only"], "router_only is True"),
        (["--router-search", "bo"], "has no router to search"),
        (["--router-iters", 5], "has no router to search"),
        (["--keep", "incumbent"], "its own rule of what a layer keeps"),
    ],
)
def test_what_they_do_not_have_is_refused(
    world: Path, tmp_path: Path, given: list[Any], message: str
) -> None:
    done = mp2(*options(world, tmp_path, "bbtv2"), *given)
    assert done.exit_code == 2, done.output
    assert message in done.stderr


CHOICE = """
task = "choice"
family = "own"
type = "multiple_choice"
template = "“{context}”{question}选项：{options}"
metric = "accuracy"
track = "extra"
version = 1
"""


def write_choice(root: Path) -> None:
    """A task whose examples have two to four options, some of them of several characters."""
    kinds = ["房间", "服务", "早餐", "位置"]
    (root / "choice").mkdir()
    for split, n in (("train", 64), ("test", 12)):
        lines = []
        for i in range(n):
            options = kinds[: 2 + i % 3]
            lines.append(
                {
                    "context": f"{options[i % len(options)]}很好",
                    "question": "",
                    "options": options,
                    "label": i % len(options),
                }
            )
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (root / "choice" / f"{split}.jsonl").write_text(text, "utf-8")
    (root / "choice.toml").write_text(CHOICE, "utf-8")


@pytest.mark.parametrize("method", ["bbt", "bbtv2"])
def test_multiple_choice_is_answered_with_a_letter_of_the_examples_own(
    world: Path, tmp_path: Path, method: str
) -> None:
    write_choice(tmp_path)
    result = mp2_json(*options(world, tmp_path / "runs", method, tmp_path / "choice.toml"))
    assert result["head"]["kind"] == "mlm"
    assert result["stages"]["stage2"]["train_loss"] < result["stages"]["untuned"]["train_loss"] < 6
    test = tmp_path / "choice" / "test.jsonl"
    assert predicted_accuracy(result["run_dir"], test) == pytest.approx(result["test_score"])
    n_options = [len(json.loads(line)["options"]) for line in test.read_text("utf-8").splitlines()]
    found = predictions(result["run_dir"], test)
    assert all(one["label"] < n for one, n in zip(found, n_options, strict=True))
    chance = [1 / n for n in n_options]  # probabilities are over the example's own options
    assert all(one["probability"] >= least for one, least in zip(found, chance, strict=True))


def test_multiple_choice_without_prompts_is_read_by_letters_which_bundles_do_not_write(
    world: Path, tmp_path: Path
) -> None:
    write_choice(tmp_path)
    where = ("--task", tmp_path / "choice.toml", "--data", tmp_path, "--backbone", world / "bert")
    rest = ("--threads", 1, "--out", tmp_path / "runs", "--no-baselines", "--iters", 5)
    result = mp2_json("bbt", *where, *rest)
    assert result["head"]["kind"] == "mlm"
    assert "letters" in result["head"]["reason"]
    refused = mp2("export", "--run", result["run_dir"], "--out", tmp_path / "bundle")
    assert refused.exit_code == 2
    assert "letters of its options, which bundles do not write" in refused.stderr


def test_extraction_has_no_label_words(world: Path, tmp_path: Path) -> None:
    done = mp2("bbt", "--method", "bbt", "--task", "cmrc2018", "--backbone", world / "bert", "--data", world)
    assert done.exit_code == 2
    with pytest.raises(UsageError, match="drop --deep"):
        BbtConfig(method="bbt", task="t", kind="deep")


def test_an_mp2_run_of_before_has_the_hash_that_it_had() -> None:
    """Fields that came later do not change what older runs are resumed by."""
    config = BbtConfig(task="t")
    values = config.to_json()
    del values["method"], values["layers"]["keep"]
    assert BbtConfig.from_json(values).sha256() == config.sha256()
    other = BbtConfig(task="t", layers=LayerConfig(keep="ever"))
    assert other.sha256() != config.sha256()
    published = BbtConfig(task="t", method="bbtv2")
    assert BbtConfig.from_json(published.to_json()) == published
    assert published.router == RouterConfig(method="none")
