"""One soft prompt, or a span head alone, pre-trained: SPoT, PPT, and a head without prompts.

SPoT (Vu et al. 2022, "SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer"): one soft prompt of
m rows at the input, on the same upstream tasks as MP2, mixed in the same way (the paper's appendix A.1: Adam,
3e-3, 650K steps of 32). PPT: the same prompt on next-sentence selection (`mp2.training.next_sentence`; 3e-2,
400K steps of 32). Both start from word embeddings drawn from the vocabulary. ``head`` trains the span head
alone, upstream and without prompts: what MP2's head would know without MP2's prompts; not in the paper.

Downstream: ``mp2 tune --method prompt-tuning --prompts FILE``, or ``mp2 scratch --head FILE``.
"""

from __future__ import annotations

import torch

from mp2.backbone import Backbone
from mp2.prompts import ModularPrompts
from mp2.training.methods.prompt_tuning import sampled_words


@torch.no_grad()
def begin_single(prompts: ModularPrompts, backbone: Backbone, seed: int) -> None:
    """Make ``prompts`` (K = d = 1) one soft prompt that starts from words: z is 1, and nothing scales it."""
    generator = torch.Generator().manual_seed(seed)
    prompts.z.fill_(1.0).requires_grad_(False)
    prompts.routers.fill_(0.0).requires_grad_(False)
    rows = sampled_words(backbone, prompts.meta.prompt_tokens, generator)
    prompts.projection.copy_(rows.reshape(prompts.projection.shape))
    prompts.projection.requires_grad_(prompts.meta.prompt_tokens > 0)
