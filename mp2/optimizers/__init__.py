"""Gradient-free tuning: router search (stage I), CMA-ES by layer (stage II), runs that can be resumed."""

from mp2.optimizers.cma_layers import LayerCma, LayerSearches
from mp2.optimizers.config import BbtConfig, LayerConfig, RouterConfig
from mp2.optimizers.predict import Predictor
from mp2.optimizers.recorder import NonFiniteLossWarning, Recorder, Scores
from mp2.optimizers.router_search import METHODS, create_router_search
from mp2.optimizers.routers import RouterSearch
from mp2.optimizers.series import resume_run, resume_series, start_run, start_runs, start_series
from mp2.optimizers.two_stage import Objective, Outcome, Progress, Space, TwoStage

__all__ = [
    "METHODS",
    "BbtConfig",
    "LayerCma",
    "LayerConfig",
    "LayerSearches",
    "NonFiniteLossWarning",
    "Objective",
    "Outcome",
    "Predictor",
    "Progress",
    "Recorder",
    "RouterConfig",
    "RouterSearch",
    "Scores",
    "Space",
    "TwoStage",
    "create_router_search",
    "resume_run",
    "resume_series",
    "start_run",
    "start_runs",
    "start_series",
]
