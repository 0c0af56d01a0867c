"""Tiny backbones made in a fixture; no test touches the network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mp2.backbone import Backbone, BackboneConfig, random_backbone

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CHARACTERS = sorted(
    set(
        "这个东西真的很好不错喜欢太差了失望退货天气今日晴有雨旅游美食体育科技健康教育财经音乐宠物主题识别：“”的是？选项"
        "，。负面正面情感分析意思判断与关系矛盾蕴含中立阅读理解文档问题答案在哪里谁什么人一二三四五六七八九十关键词提取"
    )
)


def tiny_vocab() -> list[str]:
    """A character vocabulary in BERT's order."""
    return [*SPECIAL, *CHARACTERS, *"abcdefghij0123456789", *("##" + c for c in "abcdefghij0123456789")]


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
