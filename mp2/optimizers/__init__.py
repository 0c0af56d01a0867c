"""What searches: router searches (stage I), CMA-ES by layer (stage II), and the driver of both."""

from __future__ import annotations

from typing import Any

from mp2.lazy import lazily

_MODULES = {
    "Evaluations": "two_stage",
    "LayerCma": "cma_layers",
    "LayerConfig": "config",
    "METHODS": "router_search",
    "Objective": "two_stage",
    "Outcome": "two_stage",
    "Progress": "two_stage",
    "RouterConfig": "config",
    "RouterSearch": "router_search",
    "Scores": "two_stage",
    "SearchConfig": "config",
    "Space": "two_stage",
    "TwoStage": "two_stage",
    "create_router_search": "router_search",
    "layer_searches": "cma_layers",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    return lazily(__name__, _MODULES, name)
