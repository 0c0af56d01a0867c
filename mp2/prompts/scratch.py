"""Prompts from scratch: where BBT and BBTv2 start, in the shape of a prompt file.

BBT (Sun et al. 2022, "Black-Box Tuning for Language-Model-as-a-Service") tunes one intrinsic vector at the
input, BBTv2 (Sun et al. 2022, "BBTv2: Towards a Gradient-Free Future with Large Language Models") one a
layer; a random projection leads from it to the prompt, and nothing is pre-trained. In our terms: one module
a layer (K = 1), z = 0, and a random A. ``mp2 bbt --router-search none`` on such a file *is* BBT (shallow) or
BBTv2 (deep): same engine, same divide and conquer, same budget.

A span head can only come from pre-trained prompts. With those of ``like`` the baselines are given a head that
has seen the upstream tasks, which is in their favour; without, answers are read by another head
(`mp2.heads`): the checkpoint's own masked-language-model head is BBT's and BBTv2's as published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from mp2.backbone.load import Backbone
from mp2.prompts.modular import new_meta
from mp2.prompts.prompt_set import PromptMeta, PromptSet

_ROWS, _LENGTH = 64, 64  # of the probe that measures hidden states: 4,096 tokens of the vocabulary
PROMPT_TOKENS, INTRINSIC_DIM = 50, 300  # paper, section 4.2 and Table 3


def scratch_prompts(
    backbone: Backbone,
    like: PromptSet | PromptMeta,
    sigmas: Sequence[float],
    *,
    seed: int = 0,
    alpha: float = 1.0,
) -> PromptSet:
    """Untrained prompts for BBT (shallow) or BBTv2 (deep) with the kind, m and d of ``like``, and its head.

    ``like`` is a set of prompts, whose span head is kept, or only a shape (`scratch_shape`): no span head.
    ``sigmas`` are the first step sizes that the search has for each layer with prompts.

    A is N(0, s) with s = alpha * std_hat / (sqrt(d) * sigma) (BBTv2), so that the first population's prompts
    have the standard deviation alpha * std_hat: std_hat is that of the word embeddings for inline prompts,
    and of the hidden states that enter layer l for its prefix, which takes the same key and value projections
    as they do. sigma is the first step size that ``mp2 bbt`` has for the layer; CMA-ES does not depend on the
    scale of its space, so this is the search of BBTv2 with its own sigma.

    Raises:
        MismatchError: ``like`` was made for another backbone.
    """
    head_of = like if isinstance(like, PromptSet) else None
    if head_of is not None:
        head_of.check_fits(backbone)
    shape = like.meta if isinstance(like, PromptSet) else like
    deep = shape.kind == "deep"
    provenance = {"made_by": "mp2 scratch", "seed": seed, "alpha": alpha}
    meta = replace(
        shape,
        n_modules=1,
        router_inference="hard",
        router_normalisation="count",
        tasks=(),
        provenance=provenance | ({} if head_of is None else {"span_head_of": head_of.sha256}),
    )
    scales = hidden_scales(backbone) if deep else [float(backbone.encoder.word_embeddings.weight.std())]
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(meta.shapes()["projection"], generator=generator)
    for layer, (scale, sigma) in enumerate(zip(scales, sigmas, strict=True)):
        projection[layer] *= alpha * scale / (meta.intrinsic_dim**0.5 * sigma)
    return PromptSet(
        meta=meta,
        z=torch.zeros(meta.shapes()["z"]),
        projection=projection,
        routers=torch.zeros(meta.shapes()["routers"]),
        span_weight=torch.zeros(2, meta.hidden) if head_of is None else head_of.span_weight.clone(),
        span_bias=torch.zeros(2) if head_of is None else head_of.span_bias.clone(),
    )


def scratch_shape(
    backbone: Backbone,
    kind: Literal["deep", "shallow"],
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    intrinsic_dim: int = INTRINSIC_DIM,
) -> PromptMeta:
    """The shape of untrained prompts for any backbone."""
    return new_meta(
        backbone.name,
        backbone.sha256,
        backbone.encoder,
        kind,
        n_modules=1,
        prompt_tokens=prompt_tokens,
        intrinsic_dim=intrinsic_dim,
    )


@torch.no_grad()
def hidden_scales(backbone: Backbone) -> list[float]:
    """Standard deviation of the hidden states that enter each layer, over 4,096 random tokens.

    Post-LN layers fix it almost whatever the text is, so no task's data are needed.
    """
    encoder = backbone.encoder
    length = min(_LENGTH, backbone.config.max_positions)
    generator = torch.Generator().manual_seed(0)
    vocabulary = backbone.tokenizer.vocab_size
    hidden = encoder.embed(torch.randint(0, vocabulary, (_ROWS, length), generator=generator))
    scales = []
    for layer in range(backbone.config.n_layers):
        scales.append(float(hidden.std()))
        hidden = encoder.layer(layer, hidden)
    return scales
