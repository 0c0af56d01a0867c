"""What a low precision costs the search: how a population's losses agree with those in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mp2.engine.backend import Backend, is_out_of_memory
from mp2.engine.objective import Objective
from mp2.engine.select import exact_backend
from mp2.errors import OutOfMemoryError
from mp2.heads import Head
from mp2.prompts import PromptSet

if TYPE_CHECKING:
    from mp2.tasks import MrcInput

POPULATION = 20
_SEED = 8


@dataclass(frozen=True)
class Agreement:
    """How a population's losses at one layer agree with float32's."""

    layer: int
    n_candidates: int
    n_examples: int
    spearman: float  # 1: the same order
    max_error: float  # of a loss, absolute; NaN or infinite where a loss is
    spread: float  # standard deviation of the float32 losses: what the error is to be held against

    def line(self) -> str:
        """Return it as a line of the report."""
        return (
            f"losses of {self.n_candidates} candidates at layer {self.layer} on {self.n_examples} examples: "
            f"rank agreement {self.spearman:.4f}, largest error {self.max_error:.1e}, "
            f"spread {self.spread:.1e}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values; null for what is not finite."""
        values = asdict(self)
        return {name: x if np.isfinite(x) else None for name, x in values.items()}


def agreement(
    backend: Backend,
    prompts: PromptSet,
    inputs: Sequence[MrcInput],
    layer: int,
    *,
    head: Head | None = None,
    sigma: float = 0.05,
    n_candidates: int = POPULATION,
) -> Agreement:
    """Return how losses of a first CMA-ES population at ``layer`` agree with torch in float32.

    The candidates, steps of ``sigma`` from the prompt with every module on, are the same in every call. torch
    runs on the backend's device, or on the CPU where the weights in float32 do not fit beside it; shallow
    prompts have layer 0 only. ``head`` reads the losses (None: the prompts' own).
    """
    z = prompts.fuse(torch.ones(prompts.z.shape[:2])).detach().numpy()
    steps = np.random.default_rng(_SEED).standard_normal((n_candidates, z.shape[1]))
    candidates = z[layer] + sigma * steps

    def losses(on: Backend) -> np.ndarray:
        objective = Objective(on.forward(prompts, head), inputs)
        objective.set_incumbent(z)
        return objective.layer_losses(layer, candidates).fetch()

    try:
        exact = losses(exact_backend(backend.backbone, backend.device))
    except Exception as error:
        if not (isinstance(error, OutOfMemoryError) or is_out_of_memory(error)) or backend.device == "cpu":
            raise
        exact = None
    if torch.device(backend.device).type == "cuda":
        torch.cuda.empty_cache()  # not every backend allocates through torch
    if exact is None:
        exact = losses(exact_backend(backend.backbone, "cpu"))
    rough = losses(backend)
    return Agreement(
        layer,
        n_candidates,
        len(inputs),
        spearman(exact, rough),
        float(np.abs(exact - rough).max()),
        float(exact.std()),
    )


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the rank correlation of two vectors; equal values share their mean rank, NaN ranks last."""
    ranks = []
    for x in (a, b):
        known = np.nan_to_num(x, nan=np.inf)
        _, inverse, counts = np.unique(known, return_inverse=True, return_counts=True)
        mean_rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
        ranks.append(mean_rank - mean_rank.mean())
    scale = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum() / scale) if scale else 0.0
