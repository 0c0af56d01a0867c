"""Typed engine folders of the tiny backbone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mp2.backbone import Backbone
from mp2.backbone.mlm_head import MlmHead, MlmTransform
from mp2.engine.folder import EngineFolder
from mp2.engine.tensorrt.profiles import TaskShapes
from mp2.export import export_engine
from mp2.export.engine_folder import save_graph
from mp2.export.graph_builder import GraphBuilder
from mp2.export.graphs import INLINE_GRAPH, PREFIX_GRAPH, backbone_inline_model, backbone_model
from mp2.export.input_maxima import input_maxima, random_inputs
from mp2.export.stored_arrays import store_backbone, store_mlm
from mp2.prompts import random_prompts

SHAPES = TaskShapes(candidates=4, examples=3, lengths=(8, 20), prompt_tokens=5)


@pytest.fixture(scope="session")
def tiny_mlm(tiny_backbone: Backbone) -> MlmHead:
    """A random masked-language-model head over the tiny backbone, not tied to its words."""
    rng = torch.Generator().manual_seed(4)
    config = tiny_backbone.config
    return MlmHead(
        transform=MlmTransform(
            dense_weight=torch.randn(config.hidden, config.hidden, generator=rng),
            dense_bias=torch.randn(config.hidden, generator=rng),
            norm_weight=torch.randn(config.hidden, generator=rng),
            norm_bias=torch.randn(config.hidden, generator=rng),
            activation=config.activation,
            norm_eps=config.layer_norm_eps,
        ),
        decoder=torch.randn(config.vocab_size, config.hidden, generator=rng),
        bias=torch.randn(config.vocab_size, generator=rng),
        tied=False,
    )


@pytest.fixture(scope="session")
def typed(tiny_backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], EngineFolder]:
    """precision -> its engine folder, made once; not to be written to."""
    made: dict[str, EngineFolder] = {}

    def get(precision: str) -> EngineFolder:
        if precision not in made:
            prompts = random_prompts(tiny_backbone, "deep", prompt_tokens=4, intrinsic_dim=6, tasks=("t",))
            out = tmp_path_factory.mktemp("typed") / precision
            made[precision] = export_engine(
                tiny_backbone, out, precision=precision, prompts=prompts, shapes=SHAPES
            )
        return made[precision]

    return get


@pytest.fixture(scope="session")
def whole(
    tiny_backbone: Backbone, tiny_mlm: MlmHead, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """precision -> a folder with the two deployment graphs, made once; not to be written to."""
    made: dict[str, Path] = {}

    def get(precision: str) -> Path:
        if precision not in made:
            folder = made[precision] = tmp_path_factory.mktemp("whole")
            maxima = input_maxima(tiny_backbone, random_inputs(tiny_backbone))
            store = store_backbone(tiny_backbone, folder, precision, maxima)
            store_mlm(tiny_mlm, store)
            for name, write in ((PREFIX_GRAPH, backbone_model), (INLINE_GRAPH, backbone_inline_model)):
                save_graph(
                    write(GraphBuilder(tiny_backbone.config, store, precision), tiny_mlm), folder / name
                )
        return made[precision]

    return get
