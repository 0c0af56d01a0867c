"""Several processes on one run: what torchrun starts does what one process does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mp2.backbone import Backbone, load_backbone, save_backbone
from mp2.prompts import load_prompts
from mp2.tasks import TaskCard
from mp2.training import MlmConfig, PretrainConfig, pretrain, train_mlm
from mp2.training.corpus import ppmi_embeddings
from mp2.training.mixture import Batch, MixtureTask, sample_batch
from training.toy_tasks import lively_backbone, write_tasks

SIZES = {"n_modules": 4, "prompt_tokens": 3, "intrinsic_dim": 8, "max_tokens": 64, "dev_limit": 6}
RATES = {"router_lr": 1e-2, "prompt_lr": 1e-2, "checkpoint_minutes": 0.0}
RUNS: dict[str, dict[str, Any]] = {
    "deep": {"batch_size": 8, "temperature_end": 0.3, "eval_every": 5, "steps": 14},
    "unequal-parts": {"batch_size": 7, "steps": 8},
    "a-rank-without-rows": {"batch_size": 1, "steps": 8},
    "shallow": {"kind": "shallow", "batch_size": 8, "steps": 8},
    "with-backbone": {"batch_size": 5, "backbone_lr": 1e-3, "steps": 8},
}
BACKBONES: dict[str, dict[str, Any]] = {
    f"{masking}-{size}": {
        "n_layers": 2,
        "hidden": 16,
        "n_heads": 2,
        "ffn": 24,
        "vocab_size": 200,
        "max_positions": 32,
        "length": 24,
        "batch_size": size,
        "steps": 12,
        "precision": "fp32",
        "masking": masking,
        "ppmi_init": False,
    }
    for masking, size in (("char", 8), ("span", 5))
}
PROGRAM = """
import json, sys
from pathlib import Path
from mp2.backbone import load_backbone
from mp2.tasks import load_card
from mp2.training import PretrainConfig, Pretrainer
from mp2.training.mixture import load_mixture
from mp2.training.corpus import build_vocab, corpus_files, pack
from mp2.training.config import MlmConfig
from mp2.training.mlm_trainer import MlmTrainer
from mp2.training import mlm_trainer
from mp2.training.ranks import joined
from mp2.backbone import Tokenizer
from safetensors.torch import save_file
cards, data, backbone, out, runs, corpus, backbones = json.loads(sys.argv[1])
body = load_backbone(backbone)
with joined("cpu") as ranks:
    for name, settings in runs.items():
        loaded = [load_card(card) for card in cards]
        tasks = load_mixture(loaded, Path(data), body.tokenizer, 64, dev_limit=6, log=print)
        say = print if ranks.main else (lambda line: None)
        Pretrainer(body, tasks, PretrainConfig(**settings), Path(out) / name, ranks=ranks, log=say).run()
    for name, settings in backbones.items():
        config, folder = MlmConfig(**settings), Path(out) / name
        folder.mkdir(exist_ok=True)
        with ranks.main_first():
            tokenizer = Tokenizer.from_vocab(build_vocab(corpus_files(Path(corpus)), config.vocab_size))
            packed = pack(corpus_files(Path(corpus)), tokenizer, config.length, folder / "cache")
        run = MlmTrainer(folder, config, packed, tokenizer, ranks=ranks, compiled=False, log=str)
        with run.resumed():
            run.train()
    plain = mlm_trainer.ppmi_embeddings
    mlm_trainer.ppmi_embeddings = lambda *args, **more: plain(*args, **more) * (1 + ranks.rank)
    run.start_from_ppmi()
    embeddings = run.model.encoder.word_embeddings.weight.detach()
    save_file({"weight": embeddings}, Path(out) / f"ppmi-{ranks.rank}.safetensors")
"""


def start(*words: str, size: int = 2) -> list[subprocess.Popen[str]]:
    """Start a Python program ``size`` times, as torchrun does it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, *words],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]


def finish(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    """Wait for all; return their outputs. What hangs is killed and fails."""
    killer = threading.Timer(300, lambda: [process.kill() for process in processes])
    killer.start()
    outputs = [process.communicate()[0] for process in processes]
    killer.cancel()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    return outputs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[TaskCard], Path, Backbone, Path]:
    """Cards, data, a backbone and its folder."""
    root = tmp_path_factory.mktemp("world")
    cards, data = write_tasks(root)
    save_backbone(lively_backbone(), root / "lively")
    return cards, data, load_backbone(root / "lively"), root / "lively"


@pytest.fixture(scope="module")
def two_processes(
    world: tuple[list[TaskCard], Path, Backbone, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder with the runs of ``RUNS``, each made by two processes."""
    cards, data, _, backbone = world
    root = tmp_path_factory.mktemp("two")
    (root / "program.py").write_text(PROGRAM)
    (root / "corpus").mkdir()
    rng = np.random.default_rng(0)
    lines = rng.choice(["天气今日晴有雨！", "这个东西真的很好，不错。", "旅游美食体育科技"], 150)
    (root / "corpus" / "a.txt").write_text("\n".join(lines), "utf-8")
    runs = {name: {**SIZES, **RATES, **settings} for name, settings in RUNS.items()}
    arguments = [
        [str(card.path) for card in cards],
        str(data),
        str(backbone),
        str(root),
        runs,
        str(root / "corpus"),
        BACKBONES,
    ]
    finish(start(str(root / "program.py"), json.dumps(arguments)))
    return root


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "losses.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_agree_with_one_on_losses_prompts_and_scores(
    world: tuple[list[TaskCard], Path, Backbone, Path], two_processes: Path, tmp_path: Path, name: str
) -> None:
    cards, data, backbone, _ = world
    config = PretrainConfig(**{**SIZES, **RATES, **RUNS[name]})
    one = pretrain(cards, backbone, config, tmp_path, data=data)
    two = two_processes / name
    assert np.allclose(losses(two), losses(tmp_path), rtol=1e-5, atol=1e-5)
    assert len(losses(two)) == config.steps
    prompts = load_prompts(two / "prompts.safetensors")
    for tensor in ("z", "projection", "routers", "span_weight"):  # softmax does not see the head's bias
        assert torch.allclose(getattr(prompts, tensor), getattr(one.prompts, tensor), atol=1e-4), tensor
    if config.backbone_lr:
        ours, theirs = one.backbone.encoder.state_dict(), load_backbone(two / "backbone").encoder.state_dict()
        for weight, tensor in ours.items():
            # softmax sees neither keys' biases nor the last layer's: their gradients are noise
            if not weight.endswith("key.bias") and weight != "layers.1.output_norm.bias":
                assert torch.allclose(tensor, theirs[weight], atol=1e-4), weight
    assert json.loads((two / "scores.json").read_text()) == one.scores
    assert json.loads((two / "result.json").read_text())["processes"] == 2
    curves = [(folder / "dev_scores.jsonl").read_text() for folder in (two, tmp_path)]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("name", BACKBONES)
def test_two_processes_agree_with_one_on_a_backbone(two_processes: Path, tmp_path: Path, name: str) -> None:
    one = train_mlm(
        two_processes / "corpus", tmp_path / name, MlmConfig(**BACKBONES[name]), log=lambda _: None
    )
    assert one.config.n_layers == 2
    ours, theirs = (
        [json.loads(line)["loss"] for line in (folder / name / "mlm_losses.jsonl").read_text().splitlines()]
        for folder in (tmp_path, two_processes)
    )
    assert len(ours) == 12
    assert ours[-1] < ours[0]
    assert np.allclose(ours, theirs, rtol=1e-4)


def test_processes_start_from_the_same_embeddings_whatever_each_computes(two_processes: Path) -> None:
    first, second = (load_file(two_processes / f"ppmi-{rank}.safetensors")["weight"] for rank in range(2))
    assert torch.equal(first, second)
    (packed,) = (two_processes / "span-5" / "cache").glob("packed-*.npy")
    expected = ppmi_embeddings(np.load(packed), len(first), 16, seed=0)
    assert np.allclose(first.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_parts_of_a_batch_hold_every_row_once_and_their_weights_make_the_mean(
    world: tuple[list[TaskCard], Path, Backbone, Path], size: int
) -> None:
    from mp2.training.mixture import load_mixture

    cards, data, backbone, _ = world
    tasks: Sequence[MixtureTask] = load_mixture(
        cards, data, backbone.tokenizer, 64, dev_limit=2, log=lambda _: None
    )
    for step in range(6):
        whole = sample_batch(tasks, step, batch_size=7, seed=0, pad_id=0)
        parts = [whole.part(rank, size) for rank in range(size)]
        loss = torch.rand(7, dtype=torch.float64)
        of_row = {row_key(whole, i): loss[i] for i in range(7)}
        seen: list[tuple[int, ...]] = []
        total = 0.0
        for part in parts:
            assert part.mask.any(0).all()  # trimmed to its own longest row
            keys = [row_key(part, i) for i in range(len(part.start))]
            total += sum(float(w) * float(of_row[k]) for w, k in zip(part.weight, keys, strict=True))
            seen += [key for key, weight in zip(keys, part.weight, strict=True) if weight]
        assert sorted(seen) == sorted(row_key(whole, i) for i in range(7))
        mean = sum(float(of_row[row_key(whole, i)]) for i in range(7)) / 7
        assert total == pytest.approx(mean, rel=1e-6)


def row_key(batch: Batch, i: int) -> tuple[int, ...]:
    ids = batch.input_ids[i][batch.mask[i]].tolist()
    return (*ids, int(batch.start[i]), int(batch.end[i]))
