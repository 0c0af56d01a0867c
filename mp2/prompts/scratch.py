"""Prompts from scratch: where BBT and BBTv2 start, in the shape of a prompt file.

BBT (Sun et al. 2022, "Black-Box Tuning for Language-Model-as-a-Service") tunes one intrinsic vector at the
input, BBTv2 (Sun et al. 2022, "BBTv2: Towards a Gradient-Free Future with Large Language Models") one a
layer; a random projection leads from it to the prompt, and no prompt is pre-trained. In our terms: one
module a layer (K = 1), z = 0, and a random A.

``published`` is where BBT and BBTv2 themselves start (``mp2 bbt --method bbt``, ``bbtv2``): prompts are added
to placeholder rows, after the embedding LayerNorm, BBTv2's before every layer; the scale of A comes from the
word embeddings at the input and from the states that enter each further layer, clipped five times at three
standard deviations; answers are read by the checkpoint's own masked-language-model head. Without it the
prompts enter as MP2's do (deep: keys and values), which is the same search in MP2's place.

A span head can only come from somewhere else: pre-trained prompts (``like``), a head trained upstream without
prompts, or one tuned on the few-shot examples (`with_head`). It knows what it was trained on: over a backbone
that was trained with labels, MP2's head under a *zero prompt* already answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from mp2.backbone.load import Backbone
from mp2.errors import MismatchError, UsageError
from mp2.prompts.modular import new_meta
from mp2.prompts.prompt_set import PromptMeta, PromptSet

_CLIPS = 5
_ROWS, _LENGTH = 64, 64  # of the probe that measures hidden states: 4,096 tokens of the vocabulary
PROMPT_TOKENS, INTRINSIC_DIM = 50, 300  # paper, section 4.2 and Table 3


def scratch_prompts(
    backbone: Backbone,
    like: PromptSet | PromptMeta,
    sigmas: Sequence[float],
    *,
    seed: int = 0,
    alpha: float = 1.0,
    published: bool = False,
) -> PromptSet:
    """Untrained prompts for BBT (shallow) or BBTv2 (deep) with the kind, m and d of ``like``, and its head.

    ``like`` is a set of prompts, whose span head is kept, or only a shape (`scratch_shape`): no span head.
    ``sigmas`` are the first step sizes that the search has for each layer with prompts.

    A is N(0, s) with s = alpha * std_hat / (sqrt(d) * sigma) (BBTv2), so that the first population's prompts
    have the standard deviation alpha * std_hat: std_hat is that of the word embeddings for inline prompts,
    and of the hidden states that enter layer l for its prefix, which takes the same key and value projections
    as they do. sigma is the first step size that ``mp2 bbt`` has for the layer; CMA-ES does not depend on the
    scale of its space, so this is the search of BBTv2 with its own sigma (theirs: alpha 1, sigma 1 and 0.2).
    ``published``: see above.

    Raises:
        MismatchError: ``like`` was made for another backbone.
    """
    head_of = like if isinstance(like, PromptSet) else None
    if head_of is not None:
        head_of.check_fits(backbone)
    shape = like.meta if isinstance(like, PromptSet) else like
    deep = shape.kind == "deep"
    provenance = {"made_by": "mp2 scratch", "seed": seed, "alpha": alpha}
    if published:
        shape = replace(shape, injection="inline" if deep else "added")
    meta = replace(
        shape,
        n_modules=1,
        router_inference="hard",
        router_normalisation="count",
        tasks=(),
        provenance=provenance | ({} if head_of is None else {"span_head_of": head_of.sha256}),
    )
    words = float(backbone.encoder.word_embeddings.weight.std())
    scales = hidden_scales(backbone, clipped=published) if deep else [words]
    if published:
        scales[0] = words  # theirs at the input, though they add after the norm
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


def with_head(prompts: PromptSet, head_of: PromptSet) -> PromptSet:
    """The prompts with the span head of others over the same backbone, which may be a head alone.

    Raises:
        MismatchError: the head was trained over another backbone.
        UsageError: there is none.
    """
    if not head_of.has_span_head:
        raise UsageError(
            "the prompts named for their span head have none; expected those of mp2 pretrain or tune"
        )
    meta, other = prompts.meta, head_of.meta
    if meta.backbone_sha256 != other.backbone_sha256:
        raise MismatchError(
            f"the span head was trained over backbone '{other.backbone}' ({other.backbone_sha256[:12]}), "
            f"expected '{meta.backbone}' ({meta.backbone_sha256[:12]})"
        )
    meta = replace(meta, provenance={**meta.provenance, "span_head_of": head_of.sha256})
    return replace(
        prompts,
        meta=meta,
        span_weight=head_of.span_weight.clone(),
        span_bias=head_of.span_bias.clone(),
    )


@torch.no_grad()
def hidden_scales(backbone: Backbone, *, clipped: bool = False) -> list[float]:
    """Standard deviation of the hidden states that enter each layer, over 4,096 random tokens.

    Post-LN layers fix it almost whatever the text is, so no task's data are needed. ``clipped``: of what is
    left after values beyond three standard deviations are clipped, five times over, as BBTv2's code has it.
    """
    encoder = backbone.encoder
    length = min(_LENGTH, backbone.config.max_positions)
    generator = torch.Generator().manual_seed(0)
    vocabulary = backbone.tokenizer.vocab_size
    hidden = encoder.embed(torch.randint(0, vocabulary, (_ROWS, length), generator=generator))
    scales = []
    for layer in range(backbone.config.n_layers):
        values = hidden
        for _ in range(_CLIPS if clipped else 0):
            mean, bound = values.mean(), 3 * values.std()
            values = values.clamp(mean - bound, mean + bound)
        scales.append(float(values.std()))
        hidden = encoder.layer(layer, hidden)
    return scales
