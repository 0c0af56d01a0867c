"""What searches: router searches (stage I), CMA-ES by layer (stage II), and the driver of both."""

from mp2.optimizers.cma_layers import LayerCma, LayerSearches
from mp2.optimizers.router_search import METHODS, create_router_search
from mp2.optimizers.routers import RouterSearch
from mp2.optimizers.two_stage import Objective, Outcome, Progress, Space, TwoStage

__all__ = [
    "METHODS",
    "LayerCma",
    "LayerSearches",
    "Objective",
    "Outcome",
    "Progress",
    "RouterSearch",
    "Space",
    "TwoStage",
    "create_router_search",
]
