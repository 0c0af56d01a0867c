"""A bundle's graph as a plan, on the double of TensorRT: names, shapes, values, rebuilt where it must be."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from mp2.backbone import Backbone
from mp2.engine.bundle import BUNDLE_FORMAT, BUNDLE_SCHEMA_VERSION, Bundle
from mp2.engine.folder import file_sha256
from mp2.engine.tensorrt import whole
from mp2.engine.tensorrt.plans import Gpu
from mp2.engine.tensorrt.profiles import TaskShapes
from mp2.engine.tensorrt.whole import PlannedGraph
from mp2.errors import FormatError
from mp2.export.bundle import build_bundle_plans, graph_interface
from mp2.export.engine_folder import backbone_entry, save_graph
from mp2.export.graph_builder import GraphBuilder
from mp2.export.graphs import (
    INLINE_GRAPH,
    PREFIX_GRAPH,
    backbone_inline_model,
    backbone_model,
)
from mp2.export.stored_arrays import store_backbone

from .double import FakeDevice, FakeLibrary

SHAPES = TaskShapes(candidates=1, examples=4, lengths=(8, 20), prompt_tokens=5)


@pytest.fixture(params=[10, 11])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    library = FakeLibrary(request.param)
    monkeypatch.setattr(whole, "load_tensorrt", lambda: library)
    monkeypatch.setattr(whole, "resolve_device", torch.device)
    monkeypatch.setattr(whole, "CudaDevice", lambda name: FakeDevice(name, library))
    monkeypatch.setattr(Gpu, "current", classmethod(lambda cls, device: cls("NVIDIA H100", "9.0")))
    return library


@pytest.fixture
def bundle(tiny_backbone: Backbone, tmp_path: Path) -> Callable[[str], Bundle]:
    """precision -> a bundle of graphs alone, without tasks."""

    def make(precision: str) -> Bundle:
        folder = tmp_path / precision
        folder.mkdir()
        store = store_backbone(tiny_backbone, folder, precision, None)
        for graph, write in ((PREFIX_GRAPH, backbone_model), (INLINE_GRAPH, backbone_inline_model)):
            save_graph(write(GraphBuilder(tiny_backbone.config, store, precision)), folder / graph)
        (folder / "shapes.json").write_text(json.dumps(asdict(SHAPES)))
        manifest = {
            "format": BUNDLE_FORMAT,
            "schema_version": BUNDLE_SCHEMA_VERSION,
            "backbone": asdict(backbone_entry(tiny_backbone)),
            "precision": precision,
            "graphs": {graph: graph_interface(folder / graph) for graph in (PREFIX_GRAPH, INLINE_GRAPH)},
            "tasks": {},
            "limits": {"positions": tiny_backbone.config.max_positions, "pad_id": 0},
            "files": {path.name: file_sha256(path) for path in folder.iterdir()},
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return Bundle.open(folder)

    return make


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_plans_of_whole_graphs_equal_torch_whatever_a_batch_mixes(
    tiny_backbone: Backbone, library: FakeLibrary, bundle: Callable[[str], Bundle], precision: str
) -> None:
    seen = []
    plans = build_bundle_plans(bundle(precision), tiny_backbone, device="cpu", report=seen.append)
    assert set(plans) == {PREFIX_GRAPH, INLINE_GRAPH}
    assert len(seen) == 2 * 3 * 4
    assert [c.line() for c in seen if not c.ok] == []
    assert library.elsewhere == []


def test_a_plan_is_found_again_and_grows_for_larger_batches(
    tiny_backbone: Backbone, library: FakeLibrary, bundle: Callable[[str], Bundle]
) -> None:
    folder, notes = bundle("fp16"), list[str]()
    config = tiny_backbone.config

    def feeds(n: int, t: int, m: int) -> dict[str, torch.Tensor]:
        keys, values = torch.randn(2, n, config.n_layers, config.n_heads, m, config.head_size)
        return {
            "input_ids": torch.arange(10, 10 + n * t).view(n, t) % config.vocab_size,
            "attention_mask": torch.ones(n, t, dtype=torch.int64),
            "prompt_length": torch.full((n,), m),
            "prompt_keys": keys,
            "prompt_values": values,
            "span_weight": torch.randn(n, 2, config.hidden),
            "span_bias": torch.randn(n, 2),
            "segments": torch.tensor([[[0, 2]]]).expand(n, 1, 2),
        }

    first = PlannedGraph(folder.path, PREFIX_GRAPH, device="cpu", note=notes.append)
    first.prepare()
    (profile, _) = [call for (call,) in library.named("IBuilderConfig.add_optimization_profile")]
    assert profile._behaviour.shapes["prompt_keys"] == [[1, 3, 4, 1, 6], [4, 3, 4, 5, 6], [4, 3, 4, 5, 6]]
    got = first.run(feeds(3, 7, 5))
    assert {name: tuple(x.shape) for name, x in got.items()} == {
        "start_logits": (3, 7),
        "end_logits": (3, 7),
        "hidden": (3, 7, config.hidden),
        "pooled": (3, 1, config.n_layers + 1, config.hidden),
    }
    without = feeds(2, 9, 0)
    nothing = first.run(without)
    zeros = torch.zeros(2, config.n_layers, config.n_heads, 4, config.head_size)
    padded = first.run({**without, "prompt_keys": zeros, "prompt_values": zeros})
    torch.testing.assert_close(nothing["hidden"], padded["hidden"])
    again = PlannedGraph(folder.path, PREFIX_GRAPH, device="cpu", note=notes.append)
    again.run(feeds(4, 20, 5))
    assert notes == [f"building a TensorRT plan of {PREFIX_GRAPH}: there is none yet"]
    again.run(feeds(5, 20, 5))
    assert "no profile of its plan covers {'N': 5, 'T': 20, 'P': 5, 'm': 5, 'S': 1}" in notes[1]


def test_a_damaged_bundle_is_refused(library: FakeLibrary, bundle: Callable[[str], Bundle]) -> None:
    folder = bundle("fp32")
    (folder.path / "embed.bin").write_bytes(b"")
    with pytest.raises(FormatError, match=r"embed\.bin: sha256 is .* write the bundle again"):
        PlannedGraph(folder.path, PREFIX_GRAPH, device="cpu")
