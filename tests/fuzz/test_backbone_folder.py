"""A checkpoint folder: configuration, vocabulary, tokenizer files, index of shards, weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tuning_world import World

from fuzz.campaign import campaign, damaged_bytes, damaged_tensors
from mp2.backbone import load_backbone
from mp2.backbone.checkpoint import read_shape, read_state
from mp2.backbone.config_file import read_config
from mp2.backbone.tokenizer import Tokenizer
from mp2.backbone.weights import read_weights

_TABLES = ("vocab_size", "max_position_embeddings", "type_vocab_size")


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    import transformers  # noqa: F401 - some seconds, which are no case's


@pytest.fixture
def checkpoint(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.backbone, tmp_path / "tiny"))


def test_config(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    sizes = [3, 24, 40, *(json.loads(path.read_text())[name] for name in _TABLES)]

    def read(data: bytes) -> None:
        path.write_bytes(data)
        file, weights = read_config(checkpoint), read_weights(checkpoint)
        config = read_shape(file, "tiny", weights)
        state = read_state(file, config, weights)
        assert len(state["word_embeddings.weight"]) == config.vocab_size
        told = ("n_layers", "hidden", "ffn", "vocab_size", "max_positions", "type_vocab_size")
        assert [getattr(config, name) for name in told] == sizes, "the tensors say otherwise"

    campaign("backbone config", path.read_bytes(), read)


def test_weights(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for tensor in load_backbone(checkpoint).encoder.state_dict().values():
            assert torch.isfinite(tensor).all()

    campaign("weights", path.read_bytes(), read, (damaged_bytes, damaged_tensors, damaged_tensors))


def test_shard_index(checkpoint: Path) -> None:
    """Each tensor comes from the file that the index names for it, or not at all."""
    whole = load_backbone(checkpoint).sha256
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = list(tensors)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, inside in parts.items():  # both have a tensor that the other one has, with other numbers
        other = {names[-1] if file[0] == "a" else names[0]: torch.zeros(3)}
        save_file(other | {name: tensors[name] for name in inside}, checkpoint / file)
    path = checkpoint / "model.safetensors.index.json"
    good = {"metadata": {}, "weight_map": {name: file for file, inside in parts.items() for name in inside}}

    def read(data: bytes) -> None:
        path.write_bytes(data)
        assert load_backbone(checkpoint).sha256 == whole

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


def test_torch_bin(checkpoint: Path) -> None:
    """``pytorch_model.bin``: a zip of pickles, read with ``weights_only``."""
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    path = checkpoint / "pytorch_model.bin"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for tensor in load_backbone(checkpoint).encoder.state_dict().values():
            assert torch.isfinite(tensor).all()

    campaign("torch bin", path.read_bytes(), read, (damaged_bytes,))


@pytest.mark.parametrize("name", ["added_tokens.json", "special_tokens_map.json", "added_tokens_decoder"])
def test_added_tokens(checkpoint: Path, name: str) -> None:
    """Every token that is declared has the id that it is declared with."""
    n = len((checkpoint / "vocab.txt").read_text("utf-8").splitlines())
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    token = {"content": "<gap>", **flags, "special": True}
    decoder = {
        "do_lower_case": True,
        "tokenizer_class": "BertTokenizer",
        "added_tokens_decoder": {str(n): token},
    }
    goods = {
        "added_tokens.json": {"<gap>": n},
        "special_tokens_map.json": {"unk_token": "[UNK]", "mask_token": {**token, "content": "[MASK]"}},
        "added_tokens_decoder": decoder,
    }
    path = checkpoint / ("tokenizer_config.json" if name == "added_tokens_decoder" else name)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = Tokenizer.from_folder(checkpoint)
        ids = found.encode("好<gap>a").ids
        assert max(ids) < found.vocab_size
        if name == "added_tokens.json":
            assert all(found.tokens()[at] == token for token, at in json.loads(data).items())

    campaign(name, json.dumps(goods[name]).encode(), read)
