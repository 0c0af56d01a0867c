"""Bundles of runs that other heads than the span head read: run.py answers them as ``mp2 predict`` does."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import own_tasks
import pytest
import torch
from command_line import mp2_json
from safetensors.numpy import load_file
from serving import start_server
from small_bert import save_bert
from transformers import BertForMaskedLM

from mp2.backbone import load_backbone
from mp2.engine.bundle import Bundle
from mp2.errors import Mp2Error
from mp2.export import bundle as bundle_module
from mp2.export import write_bundle
from mp2.prompts import random_prompts, save_prompts
from mp2.runs.tuned import load_tuned, save_tuned

from .test_bundle import alone, make_run, predicted

PAIRS = """task = "pairs"
family = "sentence pairs"
type = "classification"
template = "“{text1}”和“{text2}”的意思一样吗？选项：{options}"
metric = "accuracy"
track = "extra"
version = 1
[labels]
no = "不同"
yes = "完全相同"
"""
TEXTS = [
    "上周买的耳机请把钱退给我",
    "打印机黑屏没有反应",
    "我的包裹停在中转站不动",
    "好",
    "密码对了也进不去" * 20,
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("heads")
    save_bert(root / "bert", BertForMaskedLM)
    own_tasks.write_tasks(root, seed=8)
    (root / "pairs.toml").write_text(PAIRS, encoding="utf-8")
    (root / "pairs").mkdir()
    rows = [
        {"text1": a, "text2": b, "label": "yes" if a == b else "no"} for a in TEXTS[:4] for b in TEXTS[:4]
    ]
    rows += [row for row in rows if row["label"] == "yes"]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (root / "pairs" / "train.jsonl").write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Ridge on one field and on two, on states alone; label words of several lengths; a span head beside."""
    out = tmp_path_factory.mktemp("runs")

    def tuned(task: str, *words: str) -> Path:
        where = ("--task", world / f"{task}.toml", "--data", world, "--backbone", world / "bert")
        short = ("--threads", "1", "--no-baselines", "--no-test", "--iters", "21", "--out", out)
        return Path(mp2_json("bbt", *where, *short, *words)["run_dir"])

    backbone = load_backbone(str(world / "bert"))
    prompts = random_prompts(backbone, "deep", prompt_tokens=4, intrinsic_dim=6, tasks=("t",))
    save_prompts(prompts, out / "span.safetensors")
    card = (world / "speech_act.toml").read_text("utf-8")
    return {
        "tickets": tuned("tickets", "--head", "ridge"),
        "pairs": tuned("pairs", "--head", "ridge", "--shallow"),
        "hotel_reviews": tuned("hotel_reviews", "--head", "ridge", "--ridge-features", "states"),
        "assistant": tuned("assistant", "--head", "mlm"),
        "departments": tuned("departments", "--head", "mlm", "--shallow"),
        "speech_act": make_run(
            out / "span",
            card,
            out / "span.safetensors",
            backbone=backbone,
            name=str(world / "bert"),
            max_tokens=90,
        ),
    }


def lines(task: str) -> list[dict[str, Any]]:
    if task == "pairs":
        return [{"task": task, "text1": a, "text2": b} for a in TEXTS for b in TEXTS]
    return [{"task": task, "text": text} for text in TEXTS]


def test_a_batch_mixes_heads_and_answers_as_predict_does(
    world: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    cards = {
        name: len({len(w) for w, *_ in own_tasks.TASKS[name][1].values()})
        for name in ("assistant", "departments")
    }
    assert max(cards.values()) > 1  # label words of several lengths
    manifest = write_bundle(list(runs.values()), tmp_path / "b")
    heads = {name: entry["head"] for name, entry in manifest["tasks"].items()}
    assert heads == {
        **dict.fromkeys(("tickets", "pairs", "hotel_reviews"), "ridge"),
        **dict.fromkeys(("assistant", "departments"), "mlm"),
        "speech_act": "span",
    }
    assert set(manifest["heads"]) == {"mlm", "ridge", "span"}
    of_task = {task: lines(task) for task in runs}
    mixed = [
        line
        for k in range(max(map(len, of_task.values())))
        for x in of_task.values()
        for line in x[k : k + 1]
    ]
    done = alone(tmp_path / "b", mixed, tmp_path)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(mixed)
    for task, run in runs.items():
        got = [answer for line, answer in zip(mixed, answers, strict=True) if line["task"] == task]
        expected = predicted(run, of_task[task])
        assert [x["label"] for x in got] == [x["label"] for x in expected]
        np.testing.assert_allclose(
            [x["probability"] for x in got], [x["probability"] for x in expected], rtol=0, atol=1e-5
        )
        assert len({round(x["probability"], 4) for x in got}) > 1  # the texts do count


def sharp(run: Path, copy: Path) -> Path:
    """A copy of a run, calibrated to the temperature 0.2."""
    shutil.copytree(run, copy)
    z, meta = load_tuned(copy / "prompt.safetensors")
    head = {name: x for name, x in load_file(copy / "prompt.safetensors").items() if name != "z"}
    save_tuned(copy / "prompt.safetensors", z, replace(meta, temperature=0.2), head)
    return copy


def losses(run: Path) -> list[float]:
    lines = (run / "journal.jsonl").read_text("utf-8").splitlines()
    return [x for line in lines for x in [json.loads(line).get("loss")] if x is not None]


def test_all_heads_through_a_server_answer_as_predict_does_and_tune_as_here(
    world: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    """Calibrated runs, deep and shallow prompts, three heads: in common batches, and behind --endpoint."""
    served = runs | {
        task: sharp(runs[task], tmp_path / task) for task in ("tickets", "assistant", "speech_act")
    }
    write_bundle(list(served.values()), tmp_path / "b")
    server = start_server(tmp_path / "b", tmp_path / "log")
    try:
        asked = [(task, line) for task in runs for line in lines(task)]
        bodies = [{key: x for key, x in line.items() if key != "task"} for _, line in asked]
        with ThreadPoolExecutor(16) as threads:
            found = list(
                threads.map(lambda k: server.ask(f"/v1/tasks/{asked[k][0]}", bodies[k]), range(len(asked)))
            )
        expected = [answer for task, run in served.items() for answer in predicted(run, lines(task))]
        assert [status for status, _ in found] == [200] * len(asked)
        assert [answer["label"] for _, answer in found] == [answer["label"] for answer in expected]
        np.testing.assert_allclose(
            [answer["probability"] for _, answer in found],
            [answer["probability"] for answer in expected],
            rtol=0,
            atol=1e-5,
        )
        for task, words in (
            ("tickets", ["--head", "ridge"]),
            ("departments", ["--head", "mlm", "--shallow"]),
        ):
            where = ("--task", world / f"{task}.toml", "--data", world, "--backbone", world / "bert")
            short = (
                "--threads",
                "1",
                "--no-baselines",
                "--no-test",
                "--iters",
                "21",
                "--out",
                tmp_path / task,
            )
            through = mp2_json("bbt", *where, *short, *words, "--endpoint", server.url)
            own, local = losses(Path(through["run_dir"])), losses(runs[task])
            assert len(own) == len(local) > 0
            np.testing.assert_allclose(own, local, rtol=0, atol=1e-5)
    finally:
        server.kill()


def test_the_temperature_is_the_runs(runs: dict[str, Path], tmp_path: Path) -> None:
    run = sharp(runs["speech_act"], tmp_path / "sharp")
    write_bundle([run], tmp_path / "b")
    assert Bundle.open(tmp_path / "b").card("speech_act")["temperature"] == 0.2
    done = alone(tmp_path / "b", lines("speech_act"), tmp_path)
    got = [json.loads(line)["probability"] for line in done.stdout.splitlines()]
    plain = [x["probability"] for x in predicted(runs["speech_act"], lines("speech_act"))]
    assert np.mean(got) > np.mean(plain) + 0.01
    expected = [x["probability"] for x in predicted(run, lines("speech_act"))]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_word_probabilities_are_an_output_only_where_a_run_needs_them(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    without = write_bundle([runs["tickets"], runs["speech_act"]], tmp_path / "a")
    assert "word_log_probs" not in without["graphs"]["backbone.onnx"]["outputs"]
    assert "label_words.bin" not in without["files"]
    found = write_bundle([runs["assistant"]], tmp_path / "b")["graphs"]["backbone.onnx"]["outputs"]
    assert found["word_log_probs"]["shape"][:2] == ["N", "S"]


def test_another_label_word_head_than_the_checkpoints_is_noticed(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = bundle_module.store_mlm
    monkeypatch.setattr(
        bundle_module,
        "store_mlm",
        lambda mlm, to: store(replace(mlm, bias=mlm.bias + torch.arange(len(mlm.bias))), to),
    )
    with pytest.raises(Mp2Error, match=r"word_log_probs.*nothing was written"):
        write_bundle([runs["assistant"]], tmp_path / "b")


def test_scores_that_are_no_numbers_end_the_program(runs: dict[str, Path], tmp_path: Path) -> None:
    write_bundle([runs["tickets"]], tmp_path / "b")
    card = tmp_path / "b" / "tasks" / "tickets.json"
    values = json.loads(card.read_text("utf-8"))
    card.write_text(json.dumps(values | {"scale": float("nan")}), encoding="utf-8")
    done = alone(tmp_path / "b", lines("tickets"), tmp_path)
    assert done.returncode == 1
    assert "line 1: its scores are no numbers" in done.stderr
    assert done.stdout == ""
