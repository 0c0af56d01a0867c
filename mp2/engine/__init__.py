"""Backends that run a frozen encoder under whole populations of prompts, and losses and scores on top."""

from mp2.engine.backend import Backend
from mp2.engine.forward import Forward, Pending
from mp2.engine.objective import Objective
from mp2.engine.scorer import Scorer
from mp2.engine.select import RUNTIMES, create_backend

__all__ = ["RUNTIMES", "Backend", "Forward", "Objective", "Pending", "Scorer", "create_backend"]
