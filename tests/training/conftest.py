"""Three toy tasks and a backbone that can be steered, made once a module."""

from __future__ import annotations

from pathlib import Path

import pytest

from mp2.backbone import Backbone
from mp2.tasks import TaskCard
from training.toy_tasks import lively_backbone, write_tasks


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[TaskCard], Path]:
    """Cards and the folder of their data."""
    return write_tasks(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return lively_backbone()
