"""Folders that the fuzzers start from: small, and good."""

from __future__ import annotations

import pytest
from tuning_world import World, make_world

from mp2.backbone import Backbone


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> World:
    return make_world(tmp_path_factory.mktemp("world"), tiny_backbone)
