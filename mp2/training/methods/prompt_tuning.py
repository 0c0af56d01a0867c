"""Prompt tuning: m rows at the input and the span head, by Adam; nothing else is trained.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning": rows before the text, started
from word embeddings drawn from the vocabulary. The MP2 paper names no rate for it; 5e-3 and 1e-2 are tried,
and dev chooses. It is tuned for as many epochs as MP2 (appendix A.2).

From a single soft prompt that ``mp2 pretrain --method spot`` or ``ppt`` made, prompt and span head, this is
SPoT (Vu et al. 2022) and PPT (Gu et al. 2022) downstream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mp2.backbone import Backbone
from mp2.training.methods.method import Method


def sampled_words(backbone: Backbone, m: int, generator: torch.Generator) -> Tensor:
    """Word embeddings [1, m, H] of tokens drawn with the same chance each, special ones left out."""
    tokens = backbone.tokenizer
    special = {tokens.pad_id, tokens.unk_id, tokens.cls_id, tokens.sep_id, tokens.mask_id}
    ids = torch.tensor([i for i in range(tokens.vocab_size) if i not in special])
    chosen = ids[torch.randint(len(ids), (m,), generator=generator)]
    return backbone.encoder.word_embeddings.weight[chosen].detach().float()[None].clone()


METHOD = Method(
    name="prompt-tuning",
    kind="shallow",
    rows=sampled_words,
    rates=(5e-3, 1e-2),
    epochs=1000,
    continues=True,
)
