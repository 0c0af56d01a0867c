"""What a pre-training run found."""

from __future__ import annotations

from dataclasses import dataclass

from mp2.backbone.load import Backbone
from mp2.prompts import PromptSet


@dataclass(frozen=True)
class PretrainResult:
    """Prompts, the backbone they belong to, dev scores of each task before and after, and the run's numbers.

    ``seconds`` is the time spent in steps; ``data_wait_share`` the share of it spent waiting for batches.
    """

    prompts: PromptSet
    backbone: Backbone
    scores: dict[str, dict[str, float]]
    skipped_steps: int
    seconds: float
    data_wait_share: float
