"""Bundles of graphs alone, which plans are built of."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from mp2.backbone import Backbone
from mp2.engine.bundle import BUNDLE_FORMAT, BUNDLE_SCHEMA_VERSION, Bundle
from mp2.engine.folder import file_sha256
from mp2.engine.tensorrt.profiles import TaskShapes
from mp2.export.bundle import graph_interface
from mp2.export.engine_folder import backbone_entry, save_graph
from mp2.export.graph_builder import GraphBuilder
from mp2.export.graphs import INLINE_GRAPH, PREFIX_GRAPH, backbone_inline_model, backbone_model
from mp2.export.stored_arrays import store_backbone

SHAPES = TaskShapes(candidates=1, examples=4, lengths=(8, 20), prompt_tokens=5)


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
