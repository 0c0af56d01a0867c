"""Runs: their config, folder, journal and result; resuming them; several at once; labelling with them."""

from mp2.runs.config import BbtConfig, LayerConfig, RouterConfig
from mp2.runs.predict import Predictor
from mp2.runs.recorder import NonFiniteLossWarning, Recorder, Scores
from mp2.runs.series import resume_run, resume_series, start_run, start_runs, start_series

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
    "start_runs",
    "start_series",
]
