"""Masked language modelling of seconds: a corpus of four sentences and a tiny encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mp2.training import MlmConfig
from training.toy_runs import losses as journal_losses

SENTENCES = ["这个东西真的很好，不错。", "天气今日晴有雨！", "旅游美食体育科技", "“健康”教育财经音乐？"]


def tiny(**changes: Any) -> MlmConfig:
    settings = {
        "n_layers": 2,
        "hidden": 16,
        "n_heads": 2,
        "ffn": 24,
        "vocab_size": 200,
        "max_positions": 32,
        "length": 16,
        "batch_size": 8,
        "steps": 14,
        "precision": "fp32",
        "seed": 3,
        "checkpoint_minutes": 0.0,  # a checkpoint a step
    }
    return MlmConfig(**{**settings, **changes})


def corpus_of(folder: Path) -> Path:
    """Make a corpus of 150 sentences, one document, in ``folder``."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    (folder / "a.txt").write_text("\n".join(rng.choice(SENTENCES, 150)) + "\n", "utf-8")
    return folder


def losses(out: Path) -> list[float | None]:
    return journal_losses(out, "mlm_losses.jsonl")
