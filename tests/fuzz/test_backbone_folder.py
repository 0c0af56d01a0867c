"""A checkpoint folder: configuration, vocabulary, tokenizer files, index of shards, weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tuning_world import World

from fuzz.campaign import campaign, damaged_bytes, damaged_tensors
from mp2.backbone import load_backbone
from mp2.backbone.checkpoint import read_shape, read_state
from mp2.backbone.config_file import read_config
from mp2.backbone.tokenizer import Tokenizer
from mp2.backbone.weights import read_weights


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    import transformers  # noqa: F401 - some seconds, which are no case's


@pytest.fixture
def checkpoint(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.backbone, tmp_path / "tiny"))


def test_config(checkpoint: Path) -> None:
    path = checkpoint / "config.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        file, weights = read_config(checkpoint), read_weights(checkpoint)
        config = read_shape(file, "tiny", weights)
        state = read_state(file, config, weights)
        assert len(state["word_embeddings.weight"]) == config.vocab_size

    campaign("backbone config", path.read_bytes(), read)


def test_weights(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for tensor in load_backbone(checkpoint).encoder.state_dict().values():
            assert torch.isfinite(tensor).all()

    campaign("weights", path.read_bytes(), read, (damaged_bytes, damaged_tensors, damaged_tensors))


def test_shard_index(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "model-1.safetensors")
    from safetensors import safe_open

    with safe_open(checkpoint / "model-1.safetensors", "pt") as file:
        names = list(file.keys())
    path = checkpoint / "model.safetensors.index.json"
    good = {"metadata": {}, "weight_map": dict.fromkeys(names[:12], "model-1.safetensors")}

    def read(data: bytes) -> None:
        path.write_bytes(data)
        load_backbone(checkpoint)

    campaign("shard index", json.dumps(good).encode(), read)


def test_vocabulary(checkpoint: Path) -> None:
    path = checkpoint / "vocab.txt"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = Tokenizer.from_folder(checkpoint)
        assert max(found.encode("好 a").ids, default=0) < found.vocab_size

    campaign("vocabulary", path.read_bytes(), read, (damaged_bytes,))


def test_tokenizer_json(checkpoint: Path) -> None:
    text = Tokenizer.from_folder(checkpoint).to_json()
    (checkpoint / "vocab.txt").unlink()
    path = checkpoint / "tokenizer.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = Tokenizer.from_folder(checkpoint)
        assert max(found.encode("好 a").ids, default=0) < found.vocab_size

    campaign("tokenizer.json", text.encode(), read)


def test_tokenizer_config(checkpoint: Path) -> None:
    path = checkpoint / "tokenizer_config.json"
    good = {"do_lower_case": True, "tokenizer_class": "BertTokenizer", "unk_token": "[UNK]"}

    def read(data: bytes) -> None:
        path.write_bytes(data)
        Tokenizer.from_folder(checkpoint)

    campaign("tokenizer config", json.dumps(good).encode(), read)
