"""Objectives whose evaluations are launched and not waited for, and how many of them a device takes at once.

Of the runtimes, torch on CUDA launches. On CPUs an evaluation has all cores to itself; ONNX Runtime's and
TensorRT's GPU runtimes queue everything on one stream and fetch piece by piece: there, evaluations of several
runs are computed one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mp2.engine.cuda.objective import CudaObjective, LogProbs
from mp2.engine.objective import Objective
from mp2.engine.pending import Pending

if TYPE_CHECKING:
    from mp2.tasks import MrcInput


class Launches:
    """A `CudaObjective`, each evaluation of which returns as soon as it was launched."""

    def __init__(self, objective: CudaObjective) -> None:
        """Launch evaluations of ``objective``; fetch each before the next is launched."""
        self._objective = objective

    def router_losses(self, routers: np.ndarray) -> Pending[np.ndarray]:
        """See `Objective.router_losses`."""
        return self._objective.launch_router_losses(routers)

    def set_incumbent(self, z: np.ndarray) -> None:
        """See `Objective.set_incumbent`."""
        self._objective.set_incumbent(z)

    def layer_losses(self, layer: int, z: np.ndarray) -> Pending[np.ndarray]:
        """See `Objective.layer_losses`."""
        return self._objective.launch_layer_losses(layer, z)

    def commit(self, layer: int, z: np.ndarray) -> None:
        """See `Objective.commit`."""
        self._objective.commit(layer, z)

    def log_probs(self, z: np.ndarray, inputs: Sequence[MrcInput]) -> Pending[LogProbs]:
        """See `Objective.log_probs`."""
        return self._objective.launch_log_probs(z, inputs)


def launching(objective: Objective | CudaObjective) -> Objective | Launches:
    """Return ``objective`` with evaluations that are only launched, where its runtime can do that."""
    return Launches(objective) if isinstance(objective, CudaObjective) else objective


def lanes_for(objective: Objective | CudaObjective, n_runs: int) -> int:
    """Return how many evaluations of ``n_runs`` runs like this one are computed side by side; 1: in turn."""
    return min(n_runs, objective.most_lanes()) if isinstance(objective, CudaObjective) else 1


def spread(objectives: Sequence[Objective | CudaObjective], n_runs: int) -> int:
    """Let the objectives of one runtime compute side by side; returns how many do, at most ``n_runs``."""
    n_lanes = min(lanes_for(objective, n_runs) for objective in objectives)
    first = objectives[0]
    if isinstance(first, CudaObjective):
        first.runtime.lanes.spread(n_lanes)
    return n_lanes
