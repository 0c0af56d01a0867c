"""A checkpoint's own masked-language-model head: hidden states -> logits over the vocabulary.

BERT's (Devlin et al., 2019): a dense layer with the body's activation and a norm, then the word embeddings
and a bias (``cls.predictions.*``; RoBERTa-wwm, MacBERT and ERNIE have the same). CPT's on its understanding
side is the word embeddings and a bias alone (FudanNLP/CPT, ``CPTForMaskedLM``: ``lm_head``,
``final_logits_bias``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mp2.backbone.checkpoint import body_prefix
from mp2.backbone.config import BackboneConfig
from mp2.backbone.config_file import ConfigFile
from mp2.backbone.encoder import activate
from mp2.backbone.weights import Weights, tensors_sha256

_BERT = "cls.predictions."
_NAMES = {
    "dense_weight": _BERT + "transform.dense.weight",
    "dense_bias": _BERT + "transform.dense.bias",
    "norm_weight": _BERT + "transform.LayerNorm.weight",
    "norm_bias": _BERT + "transform.LayerNorm.bias",
}
_DECODER, _BIAS, _DECODER_BIAS = _BERT + "decoder.weight", _BERT + "bias", _BERT + "decoder.bias"
_CPT_DECODER, _CPT_BIAS = "lm_head.weight", "final_logits_bias"


@dataclass(frozen=True)
class MlmTransform:
    """What BERT's head does before the vocabulary: norm(activation(dense(hidden)))."""

    dense_weight: Tensor  # [H, H]
    dense_bias: Tensor  # [H]
    norm_weight: Tensor  # [H]
    norm_bias: Tensor  # [H]
    activation: str
    norm_eps: float

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., H] -> [..., H]."""
        inner = activate(self.activation, F.linear(hidden, self.dense_weight, self.dense_bias))
        return F.layer_norm(inner, inner.shape[-1:], self.norm_weight, self.norm_bias, self.norm_eps)


@dataclass(frozen=True)
class MlmHead:
    """A masked-language-model head; ``decoder`` is the encoder's own word embeddings where it is ``tied``."""

    transform: MlmTransform | None  # None: CPT has none
    decoder: Tensor  # [V, H]
    bias: Tensor  # [V]
    tied: bool

    def logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states [..., H] -> logits [..., V]."""
        inner = hidden if self.transform is None else self.transform(hidden)
        return F.linear(inner, self.decoder, self.bias)

    def to(self, device: torch.device) -> MlmHead:
        """The head with its tensors, in float32, on ``device``."""
        t = self.transform
        if t is not None:
            tensors = {name: getattr(t, name).to(device, torch.float32) for name in _NAMES}
            t = replace(t, **tensors)
        decoder, bias = (x.detach().to(device, torch.float32) for x in (self.decoder, self.bias))
        return replace(self, transform=t, decoder=decoder, bias=bias)

    def state(self) -> dict[str, Tensor]:
        """The tensors under BERT's names; a tied decoder is left out, as it is the word embeddings.

        A head without a transform has CPT's names.
        """
        if self.transform is None:
            return {_CPT_BIAS: self.bias[None]} | ({} if self.tied else {_CPT_DECODER: self.decoder})
        tensors = {theirs: getattr(self.transform, ours) for ours, theirs in _NAMES.items()}
        own = {} if self.tied else {_DECODER: self.decoder, _DECODER_BIAS: self.bias.clone()}
        return {**tensors, _BIAS: self.bias, **own}

    def sha256(self) -> str:
        """Hash over its own tensors; the word embeddings of a tied head are in the backbone's."""
        return tensors_sha256(self.state())


def read_mlm_head(
    file: ConfigFile, config: BackboneConfig, weights: Weights, words: Tensor
) -> MlmHead | None:
    """The checkpoint's head over the encoder's word embeddings ``words`` [V, H]; None where it has none.

    Raises:
        FormatError: a head of which a part is missing or has another shape.
    """
    body = body_prefix(weights)
    outer = _outer(weights, _NAMES["dense_weight"], body)
    if outer is not None:
        return _bert_head(outer, config, weights, words)
    outer = _outer(weights, _CPT_BIAS, body)
    if outer is not None or file.is_cpt:
        return _cpt_head(outer or "", file, config, weights, words)
    return None


def _outer(weights: Weights, name: str, body: str) -> str | None:
    """Prefix of the head's names: that of the model which the body is a part of."""
    return max((p for p in weights.prefixes(name) if body.startswith(p)), key=len, default=None)


def _bert_head(outer: str, config: BackboneConfig, weights: Weights, words: Tensor) -> MlmHead:
    h, v = config.hidden, config.vocab_size
    bias = outer + (_DECODER_BIAS if outer + _DECODER_BIAS in weights else _BIAS)
    shapes: dict[str, tuple[int, ...]] = {outer + name: (h,) for name in _NAMES.values()}
    shapes |= {outer + _NAMES["dense_weight"]: (h, h), bias: (v,)}
    if outer + _DECODER in weights:
        shapes[outer + _DECODER] = (v, h)
    tensors = weights.tensors(shapes)
    decoder = tensors.get(outer + _DECODER, words)
    tied = torch.equal(decoder, words)
    return MlmHead(
        transform=MlmTransform(
            **{ours: tensors[outer + theirs] for ours, theirs in _NAMES.items()},
            activation=config.activation,
            norm_eps=config.layer_norm_eps,
        ),
        decoder=words if tied else decoder,
        bias=tensors[bias],
        tied=tied,
    )


def _cpt_head(
    outer: str, file: ConfigFile, config: BackboneConfig, weights: Weights, words: Tensor
) -> MlmHead | None:
    """Tied unless the configuration says otherwise, whatever is stored: that is how CPT's code loads it."""
    shapes: dict[str, tuple[int, ...]] = {}
    if outer + _CPT_BIAS in weights:
        shapes[outer + _CPT_BIAS] = (1, config.vocab_size)
    if not file.tied_head:
        if outer + _CPT_DECODER not in weights:
            return None
        shapes[outer + _CPT_DECODER] = (config.vocab_size, config.hidden)
    tensors = weights.tensors(shapes)
    return MlmHead(
        transform=None,
        decoder=tensors.get(outer + _CPT_DECODER, words),
        bias=tensors.get(outer + _CPT_BIAS, words.new_zeros(1, config.vocab_size))[0],
        tied=file.tied_head,
    )
