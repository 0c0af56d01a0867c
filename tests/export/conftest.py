"""Typed engine folders of the tiny backbone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mp2.backbone import Backbone
from mp2.export import EngineFolder
from mp2.export.tensorrt import TaskShapes
from mp2.export.tensorrt.export import export_typed
from mp2.prompts import random_prompts

SHAPES = TaskShapes(candidates=4, examples=3, lengths=(8, 20), prompt_tokens=5)


@pytest.fixture(scope="session")
def typed(tiny_backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], EngineFolder]:
    """precision -> its engine folder, made once; not to be written to."""
    made: dict[str, EngineFolder] = {}

    def get(precision: str) -> EngineFolder:
        if precision not in made:
            prompts = random_prompts(tiny_backbone, "deep", prompt_tokens=4, intrinsic_dim=6, tasks=("t",))
            out = tmp_path_factory.mktemp("typed") / precision
            made[precision] = export_typed(
                tiny_backbone, out, precision=precision, prompts=prompts, shapes=SHAPES
            )
        return made[precision]

    return get
