"""What searches: router searches (stage I), CMA-ES by layer (stage II), and the driver of both."""

from mp2.optimizers.cma_layers import LayerCma, layer_searches
from mp2.optimizers.router_search import METHODS, RouterSearch, create_router_search
from mp2.optimizers.two_stage import Objective, Outcome, Progress, Space, TwoStage

__all__ = [
    "METHODS",
    "LayerCma",
    "Objective",
    "Outcome",
    "Progress",
    "RouterSearch",
    "Space",
    "TwoStage",
    "create_router_search",
    "layer_searches",
]
