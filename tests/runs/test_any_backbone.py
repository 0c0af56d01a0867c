"""`mp2 bbt` over an encoder without pre-trained prompts: 32 examples in, labels out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import own_tasks
import pytest
from command_line import mp2, mp2_json, predicted_accuracy, predictions
from safetensors.torch import load_file, save_file
from small_bert import save_bert
from transformers import BertForMaskedLM, BertModel


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("any")
    save_bert(root / "bert", BertForMaskedLM)
    save_bert(root / "headless", BertModel)
    own_tasks.write_tasks(root, seed=8)
    return root


def options(world: Path, task: str, out: Path, backbone: str = "bert") -> list[object]:
    where = ("--task", world / f"{task}.toml", "--data", world, "--backbone", world / backbone)
    return ["bbt", *where, "--threads", "1", "--out", out, "--no-baselines", "--iters", "81"]


@pytest.mark.parametrize("task", list(own_tasks.TASKS))
def test_ridge_labels_tasks_of_their_own_from_32_examples(world: Path, task: str, tmp_path: Path) -> None:
    result = mp2_json(*options(world, task, tmp_path))
    n_labels = len(own_tasks.TASKS[task][1])
    assert result["head"]["kind"] == "ridge"
    assert result["examples"]["train"] + result["examples"]["dev"] <= 32
    assert result["test_score"] > 2 / n_labels if n_labels > 2 else result["test_score"] > 0.7
    assert result["train_loss"] <= result["stages"]["untuned"]["train_loss"]
    test = world / task / "test.jsonl"
    assert predicted_accuracy(result["run_dir"], test) == pytest.approx(result["test_score"])


def test_the_checkpoints_own_head_reads_label_words(world: Path, tmp_path: Path) -> None:
    result = mp2_json(*options(world, "tickets", tmp_path), "--head", "mlm")
    assert result["head"]["kind"] == "mlm"
    assert result["stages"]["stage2"]["train_loss"] < result["stages"]["untuned"]["train_loss"]
    test = world / "tickets" / "test.jsonl"
    assert predicted_accuracy(result["run_dir"], test) == pytest.approx(result["test_score"])
    other = tmp_path / "other"  # the same encoder under another head
    shutil.copytree(world / "bert", other)
    tensors = load_file(other / "model.safetensors")
    tensors["cls.predictions.transform.dense.bias"] += 1.0
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    refused = mp2("predict", "--run", result["run_dir"], "--input", test, "--backbone", other)
    assert refused.exit_code == 2
    assert "reads answers by the masked-language-model head" in refused.output


@pytest.mark.parametrize("kind", ["--deep", "--shallow"])
def test_a_checkpoint_without_any_head_is_read_by_ridge(world: Path, kind: str, tmp_path: Path) -> None:
    result = mp2_json(*options(world, "speech_act", tmp_path, "headless"), kind)
    assert result["head"]["kind"] == "ridge"
    assert "no other" in result["head"]["reason"]
    refused = mp2(*options(world, "speech_act", tmp_path, "headless"), "--head", "mlm")
    assert refused.exit_code == 2
    assert "no masked-language-model head" in refused.output


def test_the_span_head_needs_pre_trained_prompts(world: Path, tmp_path: Path) -> None:
    refused = mp2(*options(world, "tickets", tmp_path), "--head", "span")
    assert refused.exit_code == 2
    assert "no span head" in refused.output


def test_probabilities_of_new_texts_add_up_to_something_sensible(world: Path, tmp_path: Path) -> None:
    result = mp2_json(*options(world, "hotel_reviews", tmp_path))
    found = predictions(result["run_dir"], "-", "房间又脏又旧\n早餐让人满意\n")
    assert {line["label"] for line in found} <= {"good", "bad"}
    assert all(0.5 <= line["probability"] <= 1 for line in found)


def test_a_ridge_run_that_was_cut_off_ends_with_the_same_bytes(world: Path, tmp_path: Path) -> None:
    whole = mp2_json(*options(world, "tickets", tmp_path / "a"))
    cut = Path(mp2_json(*options(world, "tickets", tmp_path / "b"))["run_dir"])
    journal = cut / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: len(lines) // 2]))
    before = (cut / "prompt.safetensors").read_bytes()
    for name in ("prompt.safetensors", "result.json"):
        (cut / name).unlink()
    again = mp2_json("bbt", "--resume", cut)
    assert again["train_loss"] == whole["train_loss"]
    assert (cut / "prompt.safetensors").read_bytes() == before
    assert json.loads((cut / "config.json").read_text("utf-8"))["head"] == whole["head"]


@pytest.mark.parametrize("head", ["span", "mlm"])
def test_features_of_ridge_beside_another_head_are_refused(world: Path, head: str, tmp_path: Path) -> None:
    words = ("--head", head, "--ridge-features", "states")
    refused = mp2(*options(world, "tickets", tmp_path), *words)
    assert refused.exit_code == 2
    assert f"head {head} has none" in refused.output
