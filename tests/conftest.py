"""Tiny backbones made in a fixture; no test touches the network."""

from __future__ import annotations

import gc
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, and for the processes that tests start

import pytest
import torch
from tiny_words import tiny_vocab

from mp2.backbone import Backbone, BackboneConfig, random_backbone

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # tests import onnxruntime themselves, too
torch.set_num_threads(1)


def pytest_sessionstart() -> None:
    """Collect without the collector, in whose runs Python 3.11's parser loses count (gh-106905)."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(scope="session")
def tiny_config() -> BackboneConfig:
    return BackboneConfig(
        name="tiny",
        n_layers=3,
        hidden=24,
        n_heads=4,
        ffn=40,
        vocab_size=len(tiny_vocab()),
        max_positions=96,
    )


@pytest.fixture(scope="session")
def tiny_backbone(tiny_config: BackboneConfig) -> Backbone:
    return random_backbone(tiny_config, tiny_vocab(), seed=7)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Root of the real data sets (with ``upstream`` and ``downstream``), or skip."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("MP2_TEST_DATA", default))
    if not root.is_dir():
        pytest.skip("the real data sets are not on this machine (set MP2_TEST_DATA)")
    return root
