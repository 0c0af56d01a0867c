"""``mp2 pretrain --init``: a run that starts from the prompts of another."""

from __future__ import annotations

import torch

from mp2.backbone.load import Backbone
from mp2.errors import MismatchError
from mp2.prompts import ModularPrompts, PromptSet
from mp2.training.config import PretrainConfig


def differences(init: PromptSet, backbone: Backbone, config: PretrainConfig) -> list[str]:
    """What differs between this run and the one that made its first prompts, a line each.

    Raises:
        MismatchError: these prompts are of another shape.
    """
    meta, shape = init.meta, backbone.config
    if (meta.n_layers, meta.hidden) != (shape.n_layers, shape.hidden):
        raise MismatchError(
            f"--init prompts are for {meta.n_layers} layers of hidden size {meta.hidden}, "
            f"backbone '{shape.name}' has {shape.n_layers} of {shape.hidden}"
        )
    got = (meta.n_modules, meta.prompt_tokens, meta.intrinsic_dim, meta.kind)
    expected = (config.n_modules, config.prompt_tokens, config.intrinsic_dim, config.kind)
    if got != expected:
        raise MismatchError(f"--init prompts have (K, m, d, kind) = {got}, this run has {expected}")
    lines = []
    if meta.backbone_sha256 != backbone.sha256:
        lines.append(
            f"--init prompts were trained on '{meta.backbone}' with weights {meta.backbone_sha256[:12]}; "
            f"'{backbone.name}' has the same shape but weights {backbone.sha256[:12]}"
        )
    if config.n_inline != meta.n_inline:
        lines.append(f"--init prompts were trained with {meta.injection} injection")
    routers = (meta.router_inference, meta.router_normalisation)
    if routers != (config.router_inference, config.router_normalisation):
        lines.append("--init prompts were trained for {} routers divided by the {}".format(*routers))
    return lines


def start_from(prompts: ModularPrompts, init: PromptSet) -> None:
    """Copy z, A, head, and the routers of the tasks that both have."""
    with torch.no_grad():
        for name in ("z", "projection", "span_weight", "span_bias"):
            getattr(prompts, name).copy_(getattr(init, name))
        for i, task in enumerate(prompts.meta.tasks):
            if task in init.meta.tasks:
                prompts.routers[i] = init.routers[init.meta.tasks.index(task)]
