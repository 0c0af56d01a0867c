"""Runs: their config, folder, journal and result; resuming them; several at once; labelling with them."""

from __future__ import annotations

from typing import Any

from mp2.lazy import lazily

_MODULES = {
    "BbtConfig": "config",
    "LayerConfig": "config",
    "Logger": "loggers",
    "NonFiniteLossWarning": "recorder",
    "Predictor": "predict",
    "Recorder": "recorder",
    "RouterConfig": "config",
    "Scores": "recorder",
    "resume_run": "series",
    "resume_series": "series",
    "start_run": "series",
    "start_series": "series",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    return lazily(__name__, _MODULES, name)
