"""Engine folders and bundles: manifests, and graphs whose hash somebody made fit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export.test_bundle import make_run

from fuzz.campaign import campaign, damaged_bytes, damaged_json, damaged_tensors
from mp2.backbone import Backbone
from mp2.engine.bundle import BUNDLE_SCHEMA_VERSION, Bundle
from mp2.engine.folder import EngineFolder
from mp2.engine.onnx.backend import OnnxBackend
from mp2.export import write_bundle
from mp2.serve.model import _tasks


def test_manifest(engine_dir: Path, tiny_backbone: Backbone) -> None:
    path = engine_dir / "manifest.json"
    good = path.read_bytes()

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = EngineFolder.open(engine_dir, tiny_backbone)
        assert found.manifest.backbone.n_layers == 3
        for name in found.files:
            assert ".." not in name
            assert hashlib.sha256((engine_dir / name).read_bytes()).hexdigest() == found.files[name]

    try:
        campaign("engine manifest", good, read)
    finally:
        path.write_bytes(good)


def test_graphs(engine_dir: Path, tiny_backbone: Backbone) -> None:
    """A layer's graph is damaged and its hash made right: one line, or the right shape."""
    path, manifest = engine_dir / "layer_01.onnx", engine_dir / "manifest.json"
    good, said = path.read_bytes(), manifest.read_bytes()
    feeds = torch.zeros(1, 1, 4, 24), torch.ones(1, 4, dtype=torch.bool)
    prefix = torch.zeros(1, 1, 4, 2, 6), torch.zeros(1, 1, 4, 2, 6)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        raw: dict[str, Any] = json.loads(said)
        raw["files"]["layer_01.onnx"] = hashlib.sha256(data).hexdigest()
        manifest.write_text(json.dumps(raw))
        runtime = OnnxBackend(tiny_backbone, engine_dir, threads=1)
        assert runtime.layer(1, *feeds, prefix).shape == (1, 1, 4, 24)

    try:
        campaign("graph", good, read, (damaged_bytes,))
    finally:
        path.write_bytes(good)
        manifest.write_bytes(said)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    run = make_run(folder / "run", "demo_topic", "mini-deep", max_tokens=100)
    write_bundle([run], folder / "bundle")
    return folder / "bundle"


@pytest.mark.parametrize("name", ["tasks/demo_topic.json", "tasks/demo_topic.safetensors", "tokenizer.json"])
def test_files_of_a_bundle(bundle: Path, name: str) -> None:
    """A file of it is damaged and its hash made right: one line, or tasks of the right fields."""
    path = bundle / name
    good, said = path.read_bytes(), json.loads((bundle / "manifest.json").read_text())

    def read(data: bytes) -> None:
        path.write_bytes(data)
        said["files"][name] = hashlib.sha256(data).hexdigest()
        tokenizer, tasks = _tasks(Bundle(bundle, said))
        for task in tasks.values():
            assert task["head"] in ("span", "mlm", "ridge")
            assert all(isinstance(part["ids"], list) for part in task["parts"])
            assert all(np.isfinite(tensor).all() for tensor in task["tensors"].values())
        assert tokenizer.get_vocab_size() > 0

    damage = damaged_json if name.endswith("json") else damaged_tensors
    try:
        campaign(f"bundle's {name}", good, read, (damage, damage, damaged_bytes))
    finally:
        read(good)


def test_bundle_manifest(tmp_path: Path) -> None:
    for name in ("backbone.onnx", "card.json", "t.safetensors"):
        (tmp_path / name).write_bytes(name.encode())
    tensors = {"input_ids": {"dtype": "int64", "shape": ["N", "T"]}}
    sizes = {"n_layers": 3, "hidden": 24, "n_heads": 4, "ffn": 40, "vocab_size": 50, "token_type": 0}
    good = {
        **{"format": "mp2 bundle", "schema_version": BUNDLE_SCHEMA_VERSION, "precision": "fp32", "opset": 18},
        "backbone": {"name": "tiny", "sha256": "a" * 64, "activation": "gelu", **sizes},
        "graphs": {"backbone.onnx": {"inputs": tensors, "outputs": tensors}},
        "limits": {"positions": 96, "pad_id": 0},
        "tasks": {
            "a": {
                **{"card": "card.json", "tensors": "t.safetensors", "graph": "backbone.onnx"},
                **{"head": "span", "prompt_length": 3},
            }
        },
        "files": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.iterdir()},
    }
    path = tmp_path / "manifest.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found = Bundle.open(tmp_path)
        for name in found.files:
            assert found.file(name).parent == tmp_path

    campaign("bundle manifest", json.dumps(good).encode(), read)
