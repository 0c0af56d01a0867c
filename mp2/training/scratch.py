"""Prompts from scratch: where BBT and BBTv2 start, in the shape of a prompt file.

BBT (Sun et al. 2022, "Black-Box Tuning for Language-Model-as-a-Service") tunes one intrinsic vector at the
input, BBTv2 (Sun et al. 2022, "BBTv2: Towards a Gradient-Free Future with Large Language Models") one a
layer; a random projection leads from it to the prompt, and nothing is pre-trained. In our terms: one module
a layer (K = 1), z = 0, and a random A. ``mp2 bbt --router-search none`` on such a file *is* BBT (shallow) or
BBTv2 (deep): same engine, same divide and conquer, same budget.

The span head is the one thing that is kept from pre-trained prompts. BBT reads answers from a masked
language model's own head, which was trained with the backbone; an encoder that answers by spans has no such
head, and a random one could not be made up for by any prompt. Whoever compares with these baselines gives
them a head that has seen the upstream tasks: that is in their favour.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from mp2.backbone.load import Backbone, load_backbone
from mp2.errors import UsageError
from mp2.limits import check_new_folder, check_seed
from mp2.optimizers.config import LayerConfig
from mp2.prompts import PromptSet, load_prompts, save_prompts

_ROWS, _LENGTH = 64, 64  # of the probe that measures hidden states: 4,096 tokens of the vocabulary


def scratch_prompts(backbone: Backbone, like: PromptSet, *, seed: int = 0, alpha: float = 1.0) -> PromptSet:
    """Untrained prompts for BBT (shallow) or BBTv2 (deep) with the kind, m, d and span head of ``like``.

    A is N(0, s) with s = alpha * std_hat / (sqrt(d) * sigma) (BBTv2), so that the first population's prompts
    have the standard deviation alpha * std_hat: std_hat is that of the word embeddings for inline prompts,
    and of the hidden states that enter layer l for its prefix, which takes the same key and value projections
    as they do. sigma is the first step size that ``mp2 bbt`` has for the layer; CMA-ES does not depend on the
    scale of its space, so this is the search of BBTv2 with its own sigma.

    Raises:
        MismatchError: ``like`` was made for another backbone.
    """
    like.check_fits(backbone)
    deep = like.kind == "deep"
    meta = replace(
        like.meta,
        n_modules=1,
        router_inference="hard",
        router_normalisation="count",
        tasks=(),
        provenance={"made_by": "mp2 scratch", "seed": seed, "alpha": alpha, "span_head_of": like.sha256},
    )
    scales = hidden_scales(backbone) if deep else [float(backbone.encoder.word_embeddings.weight.std())]
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(meta.shapes()["projection"], generator=generator)
    for layer, scale in enumerate(scales):
        sigma = LayerConfig().sigma(layer, "deep" if deep else "shallow")
        projection[layer] *= alpha * scale / (meta.intrinsic_dim**0.5 * sigma)
    return PromptSet(
        meta=meta,
        z=torch.zeros(meta.shapes()["z"]),
        projection=projection,
        routers=torch.zeros(meta.shapes()["routers"]),
        span_weight=like.span_weight.clone(),
        span_bias=like.span_bias.clone(),
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


def scratch_command(backbone_name: str, like: str, seed: int, out: Path) -> PromptSet:
    """What ``mp2 scratch`` does: write a prompt file to start BBT or BBTv2 from."""
    check_seed(seed)
    if not out.name:
        raise UsageError("--out is empty, expected a file to write")
    check_new_folder(out.parent)
    backbone = load_backbone(backbone_name)
    prompts = scratch_prompts(backbone, load_prompts(like, backbone), seed=seed)
    save_prompts(prompts, out)
    return prompts
