"""What a pre-training leaves: its settings, its checkpoint, its journals."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from fuzz.campaign import campaign, damaged_bytes, damaged_lines, damaged_tensors
from mp2.errors import FormatError
from mp2.journal_lines import journal_line
from mp2.training.checkpoint import SCORES_LINE, cut_back, load_checkpoint, read_steps, save_checkpoint
from mp2.training.config import PretrainConfig
from mp2.training.pretrain_run import PretrainInputs, saved_run

STATE = {
    **{"step": 5, "skipped": 1, "in_a_row": 0, "seconds": 2.5, "waited_s": 0.5, "before": {"a": 0.5}},
    "settings": {"steps": 10, "seed": 0, "rates": [1e-3, None]},
}


def test_pretrain_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    good = asdict(PretrainConfig()) | {"inputs": asdict(PretrainInputs(tasks=("a",), backbone="mini"))}

    def read(data: bytes) -> None:
        path.write_bytes(data)
        inputs, config = saved_run(str(tmp_path))
        assert all(type(task) is str for task in inputs.tasks)
        assert type(config.steps) is int
        assert config.steps >= 1

    campaign("pretrain config", json.dumps(good).encode(), read)


def test_checkpoint(tmp_path: Path) -> None:
    """What is accepted is what was written, to the bit."""
    path = tmp_path / "checkpoint.safetensors"
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_checkpoint(path, model, optimizer, STATE)
    good, weight = path.read_bytes(), model.weight.detach().clone()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        other = nn.Linear(3, 2)
        state = load_checkpoint(path, other, torch.optim.Adam(other.parameters()))
        if '"sha256"' in data[:4000].decode("latin-1").replace("\\", ""):
            assert state == STATE
            assert torch.equal(other.weight, weight)
        assert state["skipped"] <= state["step"]

    campaign("checkpoint", good, read, (damaged_bytes, damaged_tensors, damaged_tensors))


def test_journal_of_losses(tmp_path: Path) -> None:
    path = tmp_path / "losses.jsonl"
    lines = [{"step": i, "loss": 1.5 / i, "task": "情感"} for i in range(1, 9)]
    good = b"".join(map(journal_line, lines))

    def read(data: bytes) -> None:
        path.write_bytes(data)
        cut_back(path, 6, range(1, 7), lambda line: None)
        first = data.split(b"\n")[0]  # without a checksum, nothing says that there was one
        for line in read_steps(path) if path.exists() else []:
            assert line in lines[:6] or b'"crc32"' not in first

    campaign("losses", good, read, (damaged_lines, damaged_bytes))


def test_journal_of_dev_scores(tmp_path: Path) -> None:
    path = tmp_path / "dev_scores.jsonl"
    good = b"".join(journal_line({"step": i, "scores": {"a": 0.5, "b": 0.25}}) for i in range(4))

    def read(data: bytes) -> None:
        path.write_bytes(data)
        try:
            read_steps(path, SCORES_LINE)
        except FormatError:
            cut_back(path, 9, (), lambda line: None, SCORES_LINE)
            read_steps(path, SCORES_LINE)  # what is left is good
            raise

    campaign("dev scores", good, read, (damaged_lines, damaged_bytes))
