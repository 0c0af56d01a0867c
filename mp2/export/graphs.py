"""The ONNX graphs of a backbone.

Chain: ``embed``, ``embed_inline``, ``layer_XX``, ``layer_XX_plain``, ``head``: what the engine runs, callable
from any layer. Layers without a prompt have graphs of their own: not every TensorRT release takes an empty
tensor. Deployment: `PREFIX_GRAPH` (deep prompts as keys and values), `INLINE_GRAPH` (shallow prompts
as rows after [CLS]), in which each row of the batch has a prompt of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto

from mp2.export.graph_builder import GraphBuilder, Shape

if TYPE_CHECKING:
    from mp2.backbone.mlm_head import MlmHead

PREFIX_GRAPH, INLINE_GRAPH = "backbone.onnx", "backbone_inline.onnx"
_END = 2**62


# -- the chain ---------------------------------------------------------------------------------------------


def embed_model(b: GraphBuilder) -> onnx.ModelProto:
    """input_ids [N, T], n_inline [] -> hidden [1, N, T, H]."""
    ids = b.input("input_ids", TensorProto.INT64, ["N", "T"])
    hidden = b.embed(ids, b.input("n_inline", TensorProto.INT64, []))
    return b.model("embed", [(hidden, "hidden_out", b.hidden_type, [1, "N", "T", b.config.hidden])])


def embed_inline_model(b: GraphBuilder) -> onnx.ModelProto:
    """Prompts [P, m, H] -> hidden [P, 1, m, H]."""
    rows = b.embed_inline(b.input("prompts", TensorProto.FLOAT, ["P", "m", b.config.hidden]))
    hidden = b.one("Unsqueeze", rows, b.ints(1))
    return b.model("embed_inline", [(hidden, "hidden_out", b.hidden_type, ["P", 1, "m", b.config.hidden])])


def layer_model(b: GraphBuilder, index: int) -> onnx.ModelProto:
    """Hidden, mask [N, T], prefix_keys, prefix_values -> hidden [P, N, T, H]."""
    config = b.config
    hidden = b.input("hidden", b.hidden_type, ["P_hidden", "N", "T", config.hidden])
    mask = b.input("mask", TensorProto.BOOL, ["N", "T"])
    shape: Shape = ["P_prefix", "N_prefix", config.n_heads, "m", config.head_size]
    keys, values = (b.input(f"prefix_{kind}", TensorProto.FLOAT, shape) for kind in ("keys", "values"))
    prefix_mask = b.seen(b.sizes(mask, 0, 1), b.sizes(keys, 3, 4))
    out = b.layer(index, hidden, b.bias(b.one("Concat", prefix_mask, mask, axis=1)), (keys, values))
    return b.model(f"layer_{index:02d}", [(out, "hidden_out", b.hidden_type, ["P", "N", "T", config.hidden])])


def plain_layer_model(b: GraphBuilder, index: int) -> onnx.ModelProto:
    """Hidden [P, N, T, H], mask [N, T] -> hidden [P, N, T, H], no prompt at this layer."""
    shape: Shape = ["P", "N", "T", b.config.hidden]
    hidden = b.input("hidden", b.hidden_type, shape)
    out = b.layer(index, hidden, b.bias(b.input("mask", TensorProto.BOOL, ["N", "T"])), None)
    return b.model(f"layer_{index:02d}_plain", [(out, "hidden_out", b.hidden_type, shape)])


def head_model(b: GraphBuilder) -> onnx.ModelProto:
    """Hidden [P, N, T, H], span_weight [2, H], span_bias [2] -> logits [P, N, T, 2], float32."""
    hidden = b.input("hidden", b.hidden_type, ["P", "N", "T", b.config.hidden])
    weight = b.input("span_weight", TensorProto.FLOAT, [2, b.config.hidden])
    bias = b.input("span_bias", TensorProto.FLOAT, [2])
    product = b.one("MatMul", b.full(hidden), b.one("Transpose", weight, perm=[1, 0]))
    return b.model("head", [(b.one("Add", product, bias), "logits", TensorProto.FLOAT, ["P", "N", "T", 2])])


# -- deployment --------------------------------------------------------------------------------------------


def backbone_model(b: GraphBuilder, mlm: MlmHead | None = None) -> onnx.ModelProto:
    """Text and deep prompts as keys and values -> what heads start from; `PREFIX_GRAPH`.

    input_ids, attention_mask [N, T] (1 = a real token); prompt_keys, prompt_values [P, L, h, m, d_h], of
    which row i has the first prompt_length[i] (m may be 0). P is 1 (one prompt for the whole batch) or N (row
    i has prompt i). For the heads (``mlm`` where label words are asked for) and the outputs see `_finish`.
    """
    ids, mask, length = _text(b)
    config = b.config
    shape: Shape = ["P", config.n_layers, config.n_heads, "m", config.head_size]
    keys, values = (b.input(f"prompt_{kind}", TensorProto.FLOAT, shape) for kind in ("keys", "values"))
    bias = b.bias(b.one("Concat", _prompt_mask(b, ids, length, b.sizes(keys, 3, 4)), mask, axis=1))
    states = [b.embed(ids, b.constant(np.array(0, np.int64)))]
    for i in range(config.n_layers):
        own = (  # [1, P, h, m, d_h]
            b.one("Unsqueeze", b.one("Gather", x, b.constant(np.array(i, np.int64)), axis=1), b.ints(0))
            for x in (keys, values)
        )
        states.append(b.layer(i, states[-1], bias, (next(own), next(own))))
    return _finish(b, "backbone", states, mlm)


def backbone_inline_model(b: GraphBuilder, mlm: MlmHead | None = None) -> onnx.ModelProto:
    """Text and shallow prompts as rows of the sequence -> what heads start from; `INLINE_GRAPH`.

    As `backbone_model`, with prompt_rows [P, m, H] after [CLS] in place of keys and values. The outputs are
    of the text's tokens alone.
    """
    ids, mask, length = _text(b)
    prompts = b.input("prompt_rows", TensorProto.FLOAT, ["P", "m", b.config.hidden])
    n, m = b.sizes(ids, 0, 1), b.sizes(prompts, 1, 2)
    rows = b.one("Unsqueeze", b.embed_inline(prompts), b.ints(0))
    rows = b.one("Expand", rows, b.join(b.ints(1), n, b.ints(1, 1)))
    text = b.embed(ids, b.one("Unsqueeze", length, b.ints(1)))

    def inserted(x: str, between: str, axis: int) -> str:
        first, rest = b.part(x, b.ints(0), b.ints(1), axis), b.part(x, b.ints(1), b.ints(_END), axis)
        return b.one("Concat", first, between, rest, axis=axis)

    def taken_out(x: str) -> str:
        rest = b.part(x, b.one("Add", m, b.ints(1)), b.ints(_END), 2)
        return b.one("Concat", b.part(x, b.ints(0), b.ints(1), 2), rest, axis=2)

    states = [inserted(text, rows, 2)]
    bias = b.bias(inserted(mask, _prompt_mask(b, ids, length, m), 1))
    for i in range(b.config.n_layers):
        states.append(b.layer(i, states[-1], bias, None))
    return _finish(b, "backbone_inline", [taken_out(state) for state in states], mlm)


def _text(b: GraphBuilder) -> tuple[str, str, str]:
    """Declare input_ids, attention_mask [N, T] and prompt_length [P]; the mask comes as bool."""
    ids = b.input("input_ids", TensorProto.INT64, ["N", "T"])
    mask = b.input("attention_mask", TensorProto.INT64, ["N", "T"])
    length = b.input("prompt_length", TensorProto.INT64, ["P"])
    return ids, b.one("Cast", mask, to=TensorProto.BOOL), length


def _prompt_mask(b: GraphBuilder, ids: str, length: str, m: str) -> str:
    """[N, m], true at the prompt rows that a row of the batch has."""
    index = b.counted(b.one("Squeeze", m, b.ints(0)))
    mask = b.one("Less", index, b.one("Unsqueeze", length, b.ints(1)))  # [P, m]
    return b.one("Expand", mask, b.join(b.sizes(ids, 0, 1), b.ints(1)))


def _finish(b: GraphBuilder, name: str, states: Sequence[str], mlm: MlmHead | None) -> onnx.ModelProto:
    """Take the span head as inputs; give its logits, and what other heads start from; all float32.

    span_weight [P, 2, H] and span_bias [P, 2] give start_logits and end_logits [N, T]. ``hidden`` [N, T, H]
    are the last hidden states. ``pooled`` [N, S, L + 1, H] are means over segments [N, S, 2] (first and last
    token; zero where the last comes before the first) of what enters layer 0 and of every layer's output
    (``states``). With ``mlm``, whose weights `store_mlm` stored, ``word_log_probs`` [N, S, V] are what that
    head gives the vocabulary at the last layer's means: a segment is then one [MASK].
    """
    width = b.config.hidden
    weight = b.input("span_weight", TensorProto.FLOAT, ["P", 2, width])
    bias = b.input("span_bias", TensorProto.FLOAT, ["P", 2])
    full = [b.one("Squeeze", b.full(state), b.ints(0)) for state in states]  # [N, T, H]
    product = b.one("MatMul", full[-1], b.one("Transpose", weight, perm=[0, 2, 1]))
    logits = b.one("Add", product, b.one("Unsqueeze", bias, b.ints(1)))
    parts = b.op("Split", logits, n_outputs=2, axis=-1, num_outputs=2)
    start, end = (b.one("Squeeze", part, b.ints(-1)) for part in parts)
    segments = b.input("segments", TensorProto.INT64, ["N", "S", 2])
    first, last = b.op("Split", segments, n_outputs=2, axis=-1, num_outputs=2)  # [N, S, 1]
    index = b.counted(b.one("Squeeze", b.sizes(full[0], 1, 2), b.ints(0)))  # [T]
    inside = b.one("And", b.one("LessOrEqual", first, index), b.one("LessOrEqual", index, last))  # [N, S, T]
    inside = b.one("Cast", inside, to=TensorProto.FLOAT)
    n_inside = b.one("ReduceSum", inside, b.ints(2), keepdims=1)
    share = b.one("Div", inside, b.one("Max", n_inside, b.constant(np.array(1, np.float32))))
    means = [b.one("MatMul", share, x) for x in full]  # [N, S, H]
    pooled = b.one("Concat", *(b.one("Unsqueeze", mean, b.ints(2)) for mean in means), axis=2)
    outputs: list[tuple[str, str, int, Shape]] = [
        (start, "start_logits", TensorProto.FLOAT, ["N", "T"]),
        (end, "end_logits", TensorProto.FLOAT, ["N", "T"]),
        (full[-1], "hidden", TensorProto.FLOAT, ["N", "T", width]),
        (pooled, "pooled", TensorProto.FLOAT, ["N", "S", b.config.n_layers + 1, width]),
    ]
    if mlm is not None:
        log_probs = _word_log_probs(b, mlm, means[-1])
        outputs.append((log_probs, "word_log_probs", TensorProto.FLOAT, ["N", "S", b.config.vocab_size]))
    return b.model(name, outputs)


def _word_log_probs(b: GraphBuilder, mlm: MlmHead, states: str) -> str:
    """Log-probabilities [N, S, V] of the vocabulary for states [N, S, H], in float32."""
    rows = b.one("Reshape", states, b.ints(-1, b.config.hidden))
    if mlm.transform is not None:
        dense = b.one("Gemm", rows, b.weight("mlm.dense.weight"), b.weight("mlm.dense.bias"), transB=1)
        rows = b.norm(b.activation(dense), "mlm.norm")
    words = b.weight("word_embeddings" if mlm.tied else "mlm.decoder")
    logits = b.one("Gemm", rows, words, b.weight("mlm.bias"), transB=1)
    outer = b.join(b.sizes(states, 0, 2), b.ints(b.config.vocab_size))
    return b.one("Reshape", b.one("LogSoftmax", logits, axis=-1), outer)
