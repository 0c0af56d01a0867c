"""Untrained prompts for the search of ``mp2 bbt``: a file of them, or made on the fly for any backbone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mp2.errors import UsageError
from mp2.limits import check_new_folder, check_seed
from mp2.optimizers.config import Kind, LayerConfig
from mp2.runs.config import PUBLISHED

if TYPE_CHECKING:
    from mp2.backbone import Backbone
    from mp2.prompts import PromptSet

ON_THE_FLY: dict[str, Kind] = {
    "scratch-deep": "deep",
    "scratch-shallow": "shallow",
    PUBLISHED["bbtv2"]: "deep",
    PUBLISHED["bbt"]: "shallow",
}
"""Names of prompts that are made when a run begins, for a backbone that has no trained ones."""


def untrained_prompts(
    backbone: Backbone,
    like: PromptSet | Kind,
    *,
    seed: int = 0,
    alpha: float = 1.0,
    published: bool = False,
) -> PromptSet:
    """Prompts from scratch (`mp2.prompts.scratch`) for the first step sizes that ``mp2 bbt`` has.

    ``like``: trained prompts whose shape and span head are taken, or only the kind: the paper's m and d (as
    far as the backbone's positions allow), and no span head. ``published``: where BBT and BBTv2 start.
    """
    from mp2.prompts.scratch import scratch_prompts, scratch_shape

    if isinstance(like, str):
        shape = scratch_shape(backbone, like, prompt_tokens=rows_at_input(backbone.config.max_positions))
    else:
        shape = like.meta
    kind: Kind = "shallow" if shape.kind == "shallow" else "deep"
    sigmas = [LayerConfig().sigma(layer, kind) for layer in range(shape.prompt_layers)]
    source = shape if isinstance(like, str) else like
    return scratch_prompts(backbone, source, sigmas, seed=seed, alpha=alpha, published=published)


def rows_at_input(positions: int) -> int:
    """Prompt tokens m of a backbone with so many positions: shallow prompts take them from the text."""
    from mp2.prompts.scratch import PROMPT_TOKENS

    return min(PROMPT_TOKENS, positions // 2)


def made_on_the_fly(backbone: Backbone, name: str) -> PromptSet:
    """The prompts that one of :data:`ON_THE_FLY` names."""
    return untrained_prompts(backbone, ON_THE_FLY[name], published=name in PUBLISHED.values())


def scratch_command(
    backbone_name: str,
    like: str | None,
    kind: Kind,
    seed: int,
    out: Path,
    *,
    revision: str | None = None,
    head: str | None = None,
) -> PromptSet:
    """What ``mp2 scratch`` does: write a prompt file to start a search from.

    Without ``like`` for any backbone, of the ``kind`` asked for. ``head``: prompts whose span head to take.
    """
    from mp2.backbone import load_backbone
    from mp2.prompts import load_prompts, save_prompts
    from mp2.prompts.scratch import with_head

    check_seed(seed)
    if not out.name:
        raise UsageError("--out is empty, expected a file to write")
    check_new_folder(out.parent)
    backbone = load_backbone(backbone_name, revision=revision)
    source = kind if like is None else load_prompts(like, backbone)
    prompts = untrained_prompts(backbone, source, seed=seed)
    if head is not None:
        prompts = with_head(prompts, load_prompts(head, backbone))
    save_prompts(prompts, out)
    return prompts
