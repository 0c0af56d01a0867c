"""What a few-shot method is: where it starts, what it trains, and how fast.

Shapes: L' layers with prompts, m prompt tokens (0: none), H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mp2.backbone import Backbone
from mp2.optimizers.config import Kind
from mp2.prompts import PromptMeta, PromptSet, new_meta

Rows = Callable[[Backbone, int, torch.Generator], Tensor]
"""Backbone, m, generator -> the first soft prompts [L', m, H]."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method; ``rates`` are the learning rates that are tried, and dev chooses one."""

    name: str
    kind: Kind
    rows: Rows
    rates: tuple[float, ...]
    epochs: int
    prompt_tokens: int = 50  # paper, section 4.2
    trains_backbone: bool = False
    continues: bool = False  # whether it may start from a prompt file (SPoT, PPT)
    dropout: float = 0.0  # of the numbers of the soft prompts
    weight_decay: float = 0.0
    clip: float | None = None  # largest norm of all gradients together


def single_prompt(
    backbone: Backbone, kind: Kind, rows: Tensor, generator: torch.Generator, made_by: str
) -> PromptSet:
    """One soft prompt [L', m, H] with a random span head U(+-1/sqrt(H)), as a prompt file holds it.

    K = d = 1, z = 1, A = the rows. Soft routers divided by their sum: with one module the weight is exactly 1
    in training and at inference, where division by K = 1 under a relaxed router would scale the rows by what
    was sampled, and a hard router could switch them off.
    """
    n_layers, m, h = rows.shape
    meta = new_meta(
        backbone.name,
        backbone.sha256,
        backbone.encoder,
        kind,
        n_modules=1,
        prompt_tokens=m,
        intrinsic_dim=1,
        router_inference="soft",
        router_normalisation="sum",
        provenance={"made_by": made_by},
    )
    return PromptSet(
        meta=meta,
        z=torch.ones(meta.shapes()["z"]),
        projection=rows.reshape(n_layers, 1, m * h).contiguous(),
        routers=torch.zeros(meta.shapes()["routers"]),
        span_weight=(torch.rand(2, h, generator=generator) * 2 - 1) * h**-0.5,
        span_bias=torch.zeros(2),
    )


def no_rows(backbone: Backbone, m: int, generator: torch.Generator) -> Tensor:
    """No soft prompt at all, [1, 0, H]: what methods without one start from."""
    return torch.zeros(1, 0, backbone.config.hidden)


def first_prompt(method: Method, backbone: Backbone, m: int | None, seed: int) -> PromptSet:
    """Where ``method`` starts from with ``seed``; ``m`` prompt tokens, None: the paper's.

    As many as half of the backbone's positions at most, if they take positions and m is None.
    """
    generator = torch.Generator().manual_seed(seed)
    n_rows = m or min(method.prompt_tokens, backbone.config.max_positions // 2)
    rows = method.rows(backbone, n_rows, generator)
    return single_prompt(backbone, method.kind, rows, generator, f"mp2 tune --method {method.name}")


def for_task(prompts: PromptSet, task: str) -> PromptSet:
    """The same soft prompt as a starting point for one task: no routers of other tasks."""
    provenance = {"made_by": "mp2 tune", "from": prompts.sha256}
    meta: PromptMeta = replace(prompts.meta, tasks=(task,), provenance=provenance)
    return replace(prompts, meta=meta, routers=torch.zeros(meta.shapes()["routers"]))
