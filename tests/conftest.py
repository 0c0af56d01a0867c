"""Tiny backbones made in a fixture; no test touches the network."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, and for the processes that tests start
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # tests import onnxruntime themselves, too

import pytest
import torch
from tiny_words import tiny_vocab
from tuning_world import World, make_world
from warm_programs import warm_programs

from mp2.backbone import Backbone, BackboneConfig, random_backbone
from mp2.export import export_engine

torch.set_num_threads(1)


def pytest_sessionstart() -> None:
    """Collect without the collector, in whose runs Python 3.11's parser loses count (gh-106905)."""
    gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, small files last: processes that share the files end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    n_tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -n_tests[item.path]))


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


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> World:
    return make_world(tmp_path_factory.mktemp("world"), tiny_backbone)


@pytest.fixture(scope="session")
def engine_dir(tiny_backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine folder of ``tiny_backbone``."""
    return export_engine(tiny_backbone, tmp_path_factory.mktemp("engine") / "tiny").path


@pytest.fixture(scope="session")
def warm() -> Iterator[dict[str, str]]:
    """The environment of a script whose ``mp2`` and ``python`` start fast."""
    with warm_programs() as environment:
        yield environment


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Root of the real data sets (with ``upstream`` and ``downstream``), or skip."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("MP2_TEST_DATA", default))
    if not root.is_dir():
        pytest.skip("the real data sets are not on this machine (set MP2_TEST_DATA)")
    return root
