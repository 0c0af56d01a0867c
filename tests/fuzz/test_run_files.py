"""What a run of ``mp2 bbt`` leaves: its config, its journal, its result, its tuned prompt."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fuzz.campaign import campaign, damaged_bytes, damaged_json, damaged_lines, damaged_tensors
from mp2.runs.config import SCHEMA_VERSION, BbtConfig
from mp2.runs.journal import open_journal, read_journal
from mp2.runs.result import read_result
from mp2.runs.run_folder import read_config
from mp2.runs.tuned import TunedMeta, load_tuned, save_tuned

META = TunedMeta(
    task="demo_topic",
    kind="deep",
    backbone="mini",
    backbone_sha256="a" * 64,
    prompts="mini-deep",
    prompts_sha256="b" * 64,
    router=["0101", "1111"],
    card="task = 'x'",
    max_tokens=128,
    at="stage2",
    iteration=40,
    seed=8,
)
STAGE = {"iteration": 3, "train_loss": 0.5, "dev_score": 0.5, "test_score": None, "router": ["01"]}
RESULT: dict[str, Any] = {
    **{"task": "demo_topic", "method": "mp2-deep", "seed": 8, "backbone": "mini", "iterations": 40},
    **{"train_loss": 0.5, "dev_score": 0.75, "test_score": None, "metric": "accuracy", "run_dir": "runs/x"},
    "seconds": dict.fromkeys(
        ("stage1", "stage2", "forward", "suggest", "journal", "other", "dev", "test", "load"), 1.5
    ),
    "engine": {"runtime": "torch", "precision": "fp32", "device": "cpu"},
    **{"router_search": "bits", "selected": {"at": "stage2", "iteration": 40}, "non_finite_losses": 0},
    "stages": {"untuned": STAGE, "stage1": STAGE, "stage2": STAGE},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    z = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
    save_tuned(tmp_path / "prompt.safetensors", z, META)
    (tmp_path / "result.json").write_text(json.dumps(RESULT), "utf-8")
    values = {"schema_version": SCHEMA_VERSION, "config": BbtConfig(task="demo_topic").to_json()}
    (tmp_path / "config.json").write_text(json.dumps(values), "utf-8")
    return tmp_path


def test_run_config(run: Path) -> None:
    path = run / "config.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        config = read_config(run)
        assert type(config.iters) is int
        assert 1 <= config.iters <= 10_000_000
        assert all(
            type(x) in (str, type(None)) for x in (config.task, config.data, config.engine, config.prompts)
        )
        assert type(config.test) is bool
        assert config.threads is None or type(config.threads) is int
        json.dumps(asdict(config), allow_nan=False)

    campaign("run config", path.read_bytes(), read)


def test_result(run: Path) -> None:
    path = run / "result.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        result = read_result(run)
        assert result is not None
        assert result["dev_score"] is None or 0 <= result["dev_score"] <= 1
        assert result["iterations"] >= 0
        assert result["seconds"]["stage1"] >= 0

    campaign("result", path.read_bytes(), read)


def test_tuned_prompt(run: Path) -> None:
    path = run / "prompt.safetensors"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        z, meta = load_tuned(path)
        assert z.dtype == np.float32
        assert np.isfinite(z).all()
        assert meta.kind in ("deep", "shallow")
        assert meta.temperature > 0
        assert len(meta.router) in (0, len(z))

    campaign("tuned prompt", path.read_bytes(), read, (damaged_bytes, damaged_tensors, damaged_tensors))


def test_journal(tmp_path: Path) -> None:
    """Each accepted line is one that was written, in its place: the checksums see to it."""
    path = tmp_path / "journal.jsonl"
    generations = [
        [
            {
                **{"event": "losses", "stage": 1, "iteration": first + i + 1, "of": [first, first + 3]},
                **{"candidate": "ab", "loss": 0.1 * (first + i), "forward_s": 0.25},
            }
            for i in range(3)
        ]
        for first in (0, 3, 6)
    ]
    journal, _, _ = open_journal(path, {"config_sha256": "x", "versions": {"mp2": "1"}})
    for lines in generations:
        journal.append(lines)
    scores = {"event": "scores", "split": "dev", "at": "stage1", "iteration": 9, "score": 0.5, "loss": 1.0}
    journal.append([scores])
    journal.close()
    written = [*generations, [scores]]

    def read(data: bytes) -> None:
        path.write_bytes(data)
        header, records, n_bytes = read_journal(path)
        found = [record.lines for record in records]
        places = [
            written.index(lines) for lines in found
        ]  # whole events only, and nothing that was not written
        assert n_bytes <= len(data)
        # a header without its checksum is compared with the run by `check_identity`
        unchecked = b'"crc32"' not in data.split(b"\n")[0]
        assert header is None or header.get("config_sha256") == "x" or unchecked
        assert sorted(places) == places or len(set(places)) < len(places)  # a replay compares candidates

    campaign(
        "journal",
        path.read_bytes(),
        read,
        (damaged_lines, damaged_lines, damaged_bytes, damaged_json_or_bytes),
    )


def damaged_json_or_bytes(rng: Any, data: bytes) -> bytes:
    """A file that is no journal at all, once in a while."""
    return damaged_json(rng, json.dumps(RESULT).encode()) if rng.random() < 0.1 else damaged_bytes(rng, data)
