"""Backends that run a frozen encoder under whole populations of prompts, and losses and scores on top."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mp2.lazy import lazily

if TYPE_CHECKING:
    from mp2.engine.backend import Backend
    from mp2.engine.forward import Forward, Pending
    from mp2.engine.objective import Objective
    from mp2.engine.scorer import Scorer
    from mp2.engine.select import RUNTIMES, create_backend

_MODULES = {
    "RUNTIMES": "select",
    "Backend": "backend",
    "Forward": "forward",
    "Objective": "objective",
    "Pending": "forward",
    "Scorer": "scorer",
    "create_backend": "select",
}
__all__ = ["RUNTIMES", "Backend", "Forward", "Objective", "Pending", "Scorer", "create_backend"]


def __getattr__(name: str) -> Any:
    return lazily(__name__, _MODULES, name)
