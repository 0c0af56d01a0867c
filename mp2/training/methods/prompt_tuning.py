"""Prompt tuning: m rows at the input and the span head, by Adam; nothing else is trained.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning": rows before the text, started
from word embeddings drawn from the vocabulary. The MP2 paper names no rate for it; 5e-3 and 1e-2 are tried,
and dev chooses. It is tuned for as many epochs as MP2 (appendix A.2).

The same rows are pre-trained, prompt and span head, by ``mp2 pretrain --method spot``, ``ppt`` or ``head``;
from there (``mp2 tune --method prompt-tuning --prompts FILE``) this is SPoT and PPT downstream.

SPoT (Vu et al. 2022, "SPoT: Better Frozen Model Adaptation through Soft Prompt Transfer"): one soft prompt of
m rows at the input, on the same upstream tasks as MP2, mixed in the same way (the paper's appendix A.1: Adam,
3e-3, 650K steps of 32). PPT (Gu et al. 2022): the same prompt on next-sentence selection
(`mp2.training.next_sentence`; 3e-2, 400K steps of 32). ``head`` trains the span head alone, upstream and
without prompts (``mp2 scratch --head FILE``): what MP2's head would know without MP2's prompts; not in the
paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mp2.backbone import Backbone
from mp2.prompts import ModularPrompts
from mp2.training.methods.method import Method


def sampled_words(backbone: Backbone, m: int, generator: torch.Generator) -> Tensor:
    """Word embeddings [1, m, H] of tokens drawn with the same chance each, special ones left out."""
    tokens = backbone.tokenizer
    special = {tokens.pad_id, tokens.unk_id, tokens.cls_id, tokens.sep_id, tokens.mask_id}
    ids = torch.tensor([i for i in range(tokens.vocab_size) if i not in special])
    chosen = ids[torch.randint(len(ids), (m,), generator=generator)]
    return backbone.encoder.word_embeddings.weight[chosen].detach().float()[None].clone()


@torch.no_grad()
def begin_single(prompts: ModularPrompts, backbone: Backbone, seed: int) -> None:
    """Make ``prompts`` (K = d = 1) one soft prompt that starts from words: z is 1, and nothing scales it."""
    generator = torch.Generator().manual_seed(seed)
    prompts.z.fill_(1.0).requires_grad_(False)
    prompts.routers.fill_(0.0).requires_grad_(False)
    rows = sampled_words(backbone, prompts.meta.prompt_tokens, generator)
    prompts.projection.copy_(rows.reshape(prompts.projection.shape))
    prompts.projection.requires_grad_(prompts.meta.prompt_tokens > 0)


METHOD = Method(
    name="prompt-tuning",
    kind="shallow",
    rows=sampled_words,
    rates=(5e-3, 1e-2),
    epochs=1000,
    continues=True,
)
