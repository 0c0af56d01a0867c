"""The ONNX graphs of an engine folder, written node by node with standard operators (opset 20).

Chain: ``embed``, ``embed_inline``, ``layer_XX``, ``head``: what the engine runs, callable from any layer.
Deployment: ``backbone`` (deep prompts as keys and values) and ``backbone_inline`` (shallow prompts as rows
after [CLS]).

Inside, hidden states are [P, N, T, H] (candidates, examples, tokens). Either leading axis may be 1 on an
input and broadcasts: text no candidate has touched yet is projected once, and a prefix is multiplied where
it lies, never copied for each example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mp2.backbone import BackboneConfig
from mp2.export.weights import StoredArray, WeightStore

OPSET = 20
IR_VERSION = 10
MASKED = -1e30  # added to the scores of padding: exp() of it is 0, and no runtime turns it into NaN


class GraphBuilder:
    """Collects nodes and initializers of one graph; every method returns the names of its outputs."""

    hidden_type: int = TensorProto.FLOAT  # of the activations between the chain's graphs
    domains: Mapping[str, int] = {"": OPSET}  # of the operators, with versions

    def __init__(self, config: BackboneConfig, weights: WeightStore | Mapping[str, StoredArray]) -> None:
        """Build for ``config`` with stored ``weights``."""
        self.config = config
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._n_names = 0

    # -- plumbing ------------------------------------------------------------------------------------------

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        """Declare a graph input."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def weight(self, name: str) -> str:
        """Point at a stored array."""
        if name not in self._initializers:
            self._initializers[name] = self._weights[name].tensor()
        return name

    def constant(self, value: np.ndarray) -> str:
        """Embed a small constant; equal ones are stored once."""
        name = f"const_{value.dtype}_{'x'.join(map(str, value.shape))}_{value.tobytes().hex()}"
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(value, name)
        return name

    def ints(self, *values: int) -> str:
        """Embed a vector of int64."""
        return self.constant(np.array(values, dtype=np.int64))

    def op(self, kind: str, *inputs: str, n_outputs: int = 1, **attributes: object) -> list[str]:
        """Add a node with ``n_outputs`` outputs."""
        outputs = [f"{kind}_{self._n_names + k}" for k in range(n_outputs)]
        self._n_names += n_outputs
        self._nodes.append(helper.make_node(kind, list(inputs), outputs, name=outputs[0], **attributes))
        return outputs

    def one(self, kind: str, *inputs: str, **attributes: object) -> str:
        """Add a node with one output."""
        return self.op(kind, *inputs, n_outputs=1, **attributes)[0]

    def model(
        self, name: str, outputs: Sequence[tuple[str, str, int, Sequence[int | str]]]
    ) -> onnx.ModelProto:
        """Return the finished model; ``outputs``: (inner name, public name, dtype, shape)."""
        infos = []
        for inner, public, dtype, shape in outputs:
            self._nodes.append(helper.make_node("Identity", [inner], [public]))
            infos.append(helper.make_tensor_value_info(public, dtype, shape))
        graph = helper.make_graph(self._nodes, name, self._inputs, infos, list(self._initializers.values()))
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(name, at) for name, at in self.domains.items()],
            ir_version=IR_VERSION,
            producer_name="mp2",
        )

    # -- pieces --------------------------------------------------------------------------------------------

    def norm(self, x: str, name: str) -> str:
        """LayerNorm over the last axis with the stored ``name``.weight and .bias."""
        return self.one(
            "LayerNormalization",
            x,
            self.weight(f"{name}.weight"),
            self.weight(f"{name}.bias"),
            axis=-1,
            epsilon=self.config.layer_norm_eps,
        )

    def linear(self, x: str, name: str) -> str:
        """``x W + b`` for rows ``x`` [rows, in] and the stored W [in, out]."""
        return self.one("Gemm", x, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"))

    def activate(self, x: str) -> str:
        """The backbone's activation."""
        if self.config.activation == "relu":
            return self.one("Relu", x)
        approximate = "tanh" if self.config.activation == "gelu_tanh" else "none"
        return self.one("Gelu", x, approximate=approximate)

    def embed(self, input_ids: str, n_inline: str) -> str:
        """[1, N, T, H] for ids [N, T]; tokens after the first sit ``n_inline`` (a scalar) positions on."""
        n_tokens = self.one("Squeeze", self.one("Shape", input_ids, start=1, end=2), self.ints(0))
        zero, one = self.constant(np.array(0, np.int64)), self.constant(np.array(1, np.int64))
        index = self.one("Range", zero, n_tokens, one)
        moved = self.one("Mul", self.one("Min", index, one), n_inline)
        rows = self.one("Gather", self.weight("position_embeddings"), self.one("Add", index, moved))
        words = self.one("Gather", self.weight("word_embeddings"), input_ids)
        return self.one("Unsqueeze", self._sum_norm(words, rows), self.ints(0))

    def embed_inline(self, prompts: str) -> str:
        """[P, m, H] for prompt rows [P, m, H] at positions 1..m."""
        m = self.one("Shape", prompts, start=1, end=2)
        last = self.one("Add", m, self.ints(1))
        rows = self.one("Slice", self.weight("position_embeddings"), self.ints(1), last, self.ints(0))
        return self._sum_norm(prompts, rows)

    def _sum_norm(self, words: str, rows: str) -> str:
        typed = self.one("Add", words, self.weight("token_type_embedding"))
        return self.norm(self.one("Add", typed, rows), "embedding_norm")

    def bias(self, mask: str) -> str:
        """Additive scores [1, N, 1, 1, T] for a bool ``mask`` [N, T]."""
        zero, masked = (self.constant(np.array(v, np.float32)) for v in (0.0, MASKED))
        return self.one("Unsqueeze", self.one("Where", mask, zero, masked), self.ints(0, 2, 3))

    def layer(self, index: int, hidden: str, bias: str, prefix: tuple[str, str] | None) -> str:
        """[P, N, T, H] for hidden [P or 1, N, T, H] and a prefix, twice [P or 1, N or 1, h, m, d_h]."""
        config, name = self.config, f"layers.{index}"
        h, d, width = config.n_heads, config.head_size, config.hidden
        rows = self.one("Reshape", hidden, self.ints(-1, width))
        outer = self.one("Shape", hidden, start=0, end=3)  # P or 1, N, T
        heads = self.one("Concat", outer, self.ints(h, d), axis=0)
        query, key, value = self.op(
            "Split", self.linear(rows, f"{name}.qkv"), n_outputs=3, axis=-1, num_outputs=3
        )  # the stored query weights already hold the 1 / sqrt(d_h)

        def to_heads(x: str, perm: list[int]) -> str:
            return self.one("Transpose", self.one("Reshape", x, heads), perm=perm)

        query, value = to_heads(query, [0, 1, 3, 2, 4]), to_heads(value, [0, 1, 3, 2, 4])
        scores = self.one("MatMul", query, to_heads(key, [0, 1, 3, 4, 2]))
        if prefix is None:
            weights = self.one("Softmax", self.one("Add", scores, bias), axis=-1)
            context = self.one("MatMul", weights, value)
        else:
            keys, values = prefix
            n_candidates = self.one(
                "Concat", self.one("Shape", keys, start=0, end=1), self.ints(1, 1, 1, 1), axis=0
            )
            # with one text under P prefixes, this addition is also what spreads the text's scores over P
            scores = self.one("Add", scores, self.one("Expand", bias, n_candidates))
            prefix_scores = self.one("MatMul", query, self.one("Transpose", keys, perm=[0, 1, 2, 4, 3]))
            weights = self.one("Softmax", self.one("Concat", prefix_scores, scores, axis=-1), axis=-1)
            sizes = self.one(
                "Concat",
                self.one("Shape", keys, start=3, end=4),
                self.one("Shape", hidden, start=2, end=3),
                axis=0,
            )
            on_prefix, on_text = self.op("Split", weights, sizes, n_outputs=2, axis=-1)
            context = self.one(
                "Add", self.one("MatMul", on_text, value), self.one("MatMul", on_prefix, values)
            )
        context = self.one("Transpose", context, perm=[0, 1, 3, 2, 4])
        context = self.one("Reshape", context, self.ints(-1, width))
        projected = self.linear(context, f"{name}.attention_output")
        spread = self.one("Concat", self.ints(-1), self.one("Shape", hidden, start=1, end=4), axis=0)
        y = self.one("Add", self.one("Reshape", projected, spread), hidden)
        y = self.norm(self.one("Reshape", y, self.ints(-1, width)), f"{name}.attention_norm")
        up = self.activate(self.linear(y, f"{name}.intermediate"))
        y = self.norm(self.one("Add", self.linear(up, f"{name}.output"), y), f"{name}.output_norm")
        return self.one("Reshape", y, spread)

    def head(self, hidden: str, weight: str, bias: str) -> str:
        """[..., 2] span logits for ``weight`` [2, H] and ``bias`` [2]."""
        return self.one("Add", self.one("MatMul", hidden, self.one("Transpose", weight, perm=[1, 0])), bias)


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
    """Hidden, mask [N, T], prefix_keys, prefix_values -> hidden [P, N, T, H]; m may be 0."""
    config = b.config
    hidden = b.input("hidden", b.hidden_type, ["P_hidden", "N", "T", config.hidden])
    mask = b.input("mask", TensorProto.BOOL, ["N", "T"])
    shape: Sequence[int | str] = ["P_prefix", "N_prefix", config.n_heads, "m", config.head_size]
    prefix = tuple(b.input(f"prefix_{kind}", TensorProto.FLOAT, shape) for kind in ("keys", "values"))
    out = b.layer(index, hidden, b.bias(mask), (prefix[0], prefix[1]))
    return b.model(f"layer_{index:02d}", [(out, "hidden_out", b.hidden_type, ["P", "N", "T", config.hidden])])


def head_model(b: GraphBuilder) -> onnx.ModelProto:
    """Hidden [P, N, T, H], span_weight [2, H], span_bias [2] -> logits [P, N, T, 2]."""
    hidden = b.input("hidden", b.hidden_type, ["P", "N", "T", b.config.hidden])
    logits = b.head(hidden, *_span(b, baked=False))
    return b.model("head", [(logits, "logits", TensorProto.FLOAT, ["P", "N", "T", 2])])


def backbone_model(b: GraphBuilder, *, baked_head: bool) -> onnx.ModelProto:
    """Text [N, T], prompt_keys, prompt_values [L, 1 or N, h, m, d_h] -> start_logits, end_logits [N, T].

    One prompt for the whole batch, or one for each row. Without ``baked_head`` the head is two more inputs.
    """
    ids, mask = _text(b)
    config = b.config
    shape: Sequence[int | str] = [config.n_layers, "P", config.n_heads, "m", config.head_size]
    keys, values = (b.input(f"prompt_{kind}", TensorProto.FLOAT, shape) for kind in ("keys", "values"))
    span = _span(b, baked=baked_head)
    bias = b.bias(mask)
    hidden = b.embed(ids, b.constant(np.array(0, np.int64)))
    for i in range(config.n_layers):
        at = b.ints(i)  # a vector of one index keeps the axis: [1, 1 or N, h, m, d_h]
        hidden = b.layer(i, hidden, bias, (b.one("Gather", keys, at), b.one("Gather", values, at)))
    return _finish(b, "backbone", hidden, span)


def backbone_inline_model(b: GraphBuilder, *, baked_head: bool) -> onnx.ModelProto:
    """Text [N, T], prompts [1 or N, m, H] -> start_logits, end_logits [N, T] of the text's tokens."""
    ids, mask = _text(b)
    prompts = b.input("prompts", TensorProto.FLOAT, ["P", "m", b.config.hidden])
    span = _span(b, baked=baked_head)
    m = b.one("Shape", prompts, start=1, end=2)
    rows = b.one("Unsqueeze", b.embed_inline(prompts), b.ints(0))
    n = b.one("Shape", ids, start=0, end=1)
    rows = b.one("Expand", rows, b.one("Concat", b.ints(1), n, b.ints(1, 1), axis=0))
    text = b.embed(ids, b.one("Squeeze", m, b.ints(0)))
    hidden = b.one("Concat", _rows(b, text, 0, 1, 2), rows, _rows(b, text, 1, None, 2), axis=2)
    ones = b.one("Expand", b.constant(np.array([[True]])), b.one("Concat", n, m, axis=0))
    bias = b.bias(
        b.one("Concat", ones, mask, axis=1)
    )  # the prompt is always attended: [CLS] may change places
    for i in range(b.config.n_layers):
        hidden = b.layer(i, hidden, bias, None)
    rest = b.one("Slice", hidden, b.one("Add", m, b.ints(1)), b.ints(2**62), b.ints(2))
    return _finish(b, "backbone_inline", b.one("Concat", _rows(b, hidden, 0, 1, 2), rest, axis=2), span)


def _text(b: GraphBuilder) -> tuple[str, str]:
    ids = b.input("input_ids", TensorProto.INT64, ["N", "T"])
    mask = b.input("attention_mask", TensorProto.INT64, ["N", "T"])
    return ids, b.one("Cast", mask, to=TensorProto.BOOL)


def _span(b: GraphBuilder, *, baked: bool) -> tuple[str, str]:
    if baked:
        return b.weight("span_weight"), b.weight("span_bias")
    weight = b.input("span_weight", TensorProto.FLOAT, [2, b.config.hidden])
    return weight, b.input("span_bias", TensorProto.FLOAT, [2])


def _rows(b: GraphBuilder, x: str, start: int, stop: int | None, axis: int) -> str:
    return b.one("Slice", x, b.ints(start), b.ints(2**62 if stop is None else stop), b.ints(axis))


def _finish(b: GraphBuilder, name: str, hidden: str, span: tuple[str, str]) -> onnx.ModelProto:
    logits = b.one("Squeeze", b.head(hidden, *span), b.ints(0))  # [N, T, 2]
    parts = b.op("Split", logits, n_outputs=2, axis=-1, num_outputs=2)
    last = b.ints(-1)
    return b.model(
        name,
        [
            (b.one("Squeeze", part, last), public, TensorProto.FLOAT, ["N", "T"])
            for part, public in zip(parts, ("start_logits", "end_logits"), strict=True)
        ],
    )
