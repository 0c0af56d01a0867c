"""Modular prompts, routers, and the way from intrinsic prompts to keys and values."""

from mp2.prompts.bernoulli import hard_router, relaxed_bernoulli
from mp2.prompts.modular import ModularPrompts, new_meta, prefix_of
from mp2.prompts.projector import PrefixProjector
from mp2.prompts.prompt_set import (
    PromptMeta,
    PromptSet,
    fuse,
    load_prompts,
    random_prompts,
    save_prompts,
)

__all__ = [
    "ModularPrompts",
    "PrefixProjector",
    "PromptMeta",
    "PromptSet",
    "fuse",
    "hard_router",
    "load_prompts",
    "new_meta",
    "prefix_of",
    "random_prompts",
    "relaxed_bernoulli",
    "save_prompts",
]
