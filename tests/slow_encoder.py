"""A post-LN encoder as plain float64 loops, one unpadded sequence, one query at a time: slow, independent."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mp2.backbone import Backbone

Floats = NDArray[np.float64]


def weights_of(backbone: Backbone) -> dict[str, Floats]:
    """The backbone's parameters in float64, by name."""
    return {name: t.double().numpy() for name, t in backbone.encoder.state_dict().items()}


def slow_hidden(
    backbone: Backbone,
    ids: Sequence[int],
    *,
    prefix_prompts: Sequence[Floats] | None = None,
    inline: Floats | None = None,
) -> Floats:
    """Last hidden states [T, H] of one sequence.

    ``prefix_prompts``: soft prompts [m, H] of each layer, put through the layer's key and value projections.
    ``inline``: soft prompts [m, H] that stand after [CLS] in the sequence; their rows are dropped at the end.
    """
    w, config = weights_of(backbone), backbone.config
    words = [w["word_embeddings.weight"][i] for i in ids]
    m = 0 if inline is None else len(inline)
    if inline is not None:
        words = [words[0], *inline, *words[1:]]
    rows = []
    for position, word in enumerate(words):
        row = (
            word
            + w["position_embeddings.weight"][position]
            + w["token_type_embeddings.weight"][config.token_type]
        )
        rows.append(_norm(row, w, "embedding_norm", config.layer_norm_eps))
    hidden = np.stack(rows)
    for i in range(config.n_layers):
        hidden = _layer(backbone, w, i, hidden, None if prefix_prompts is None else prefix_prompts[i])
    return np.concatenate([hidden[:1], hidden[1 + m :]])


def _layer(
    backbone: Backbone, w: dict[str, Floats], i: int, hidden: Floats, prompts: Floats | None
) -> Floats:
    config, at = backbone.config, f"layers.{i}."
    size = config.head_size
    attended = hidden if prompts is None else np.concatenate([prompts, hidden])
    queries = _linear(hidden, w, at + "query")
    keys, values = _linear(attended, w, at + "key"), _linear(attended, w, at + "value")
    out = np.empty_like(hidden)
    for t in range(len(hidden)):
        mixed = np.empty(config.hidden)
        for head in range(config.n_heads):
            part = slice(head * size, (head + 1) * size)
            scores = np.array([queries[t, part] @ key[part] for key in keys]) / math.sqrt(size)
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            mixed[part] = sum(share * value[part] for share, value in zip(shares, values, strict=True))
        row = _norm(
            _linear(mixed, w, at + "attention_output") + hidden[t],
            w,
            at + "attention_norm",
            config.layer_norm_eps,
        )
        inner = np.array([_activate(config.activation, x) for x in _linear(row, w, at + "intermediate")])
        out[t] = _norm(_linear(inner, w, at + "output") + row, w, at + "output_norm", config.layer_norm_eps)
    return out


def _linear(x: Floats, w: dict[str, Floats], name: str) -> Floats:
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def _norm(x: Floats, w: dict[str, Floats], name: str, eps: float) -> Floats:
    centred = x - x.mean()
    return centred / math.sqrt((centred**2).mean() + eps) * w[name + ".weight"] + w[name + ".bias"]


def _activate(name: str, x: float) -> float:
    if name == "gelu":
        return x * (1 + math.erf(x / math.sqrt(2))) / 2
    if name == "gelu_tanh":
        return x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return max(x, 0.0)
