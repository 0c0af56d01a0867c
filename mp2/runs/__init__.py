"""Runs: their config, folder, journal and result; resuming them; several at once; labelling with them."""

from mp2.optimizers.config import LayerConfig, RouterConfig
from mp2.optimizers.two_stage import Scores
from mp2.runs.config import BbtConfig
from mp2.runs.predict import Predictor
from mp2.runs.recorder import NonFiniteLossWarning, Recorder
from mp2.runs.series import resume_run, resume_series, start_run, start_series

__all__ = [
    "BbtConfig",
    "LayerConfig",
    "NonFiniteLossWarning",
    "Predictor",
    "Recorder",
    "RouterConfig",
    "Scores",
    "resume_run",
    "resume_series",
    "start_run",
    "start_series",
]
