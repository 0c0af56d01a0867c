"""Collects the nodes of a graph of a backbone, with standard operators (opset 20), in one of four precisions.

Inside, hidden states are [P, N, T, H] (candidates, examples, tokens). Either leading axis of an input may be
1: text that no candidate has touched yet is projected once.

The precision is the type of the weights, matrix products, scores, softmax, activation and of the hidden
states between the graphs. In fp16 and bf16 these stay float32: embedding tables, residual sums, LayerNorm
with its statistics, the span head and its logits. ``fp8`` is the fp16 graph whose four linear layers go
through QuantizeLinear / DequantizeLinear to float8 (e4m3fn), one scale a tensor. Every tensor's type is
written in the graph, which is what TensorRT's strongly typed networks want.

Attention is written as TensorRT's fused attention wants it: query [B, h, T, d_h] (already scaled, in the
weights), keys and values [B, h, m + T, d_h], an additive mask, softmax; the prefix is put before the text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mp2.backbone import BackboneConfig
from mp2.export.stored_arrays import ELEMENTS, WeightStore

OPSET = 20
IR_VERSION = 10
MASKED = -3e4  # added to the scores of padding: float16 holds it, and exp() of it is 0

Shape = Sequence[int | str]


class GraphBuilder:
    """Collects nodes and initializers of one graph; every method returns the names of its outputs."""

    def __init__(self, config: BackboneConfig, weights: WeightStore, precision: str) -> None:
        """Build for ``config`` in ``precision``; ``weights`` holds what `store_backbone` wrote for it."""
        self.config = config
        self.hidden_type: int = ELEMENTS[precision]  # of the hidden states between the graphs
        self._fp8 = precision == "fp8"
        self._weights = weights
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._n_names = 0

    # -- plumbing ------------------------------------------------------------------------------------------

    def input(self, name: str, dtype: int, shape: Shape) -> str:
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
        self._initializers.setdefault(name, numpy_helper.from_array(value, name))
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

    def model(self, name: str, outputs: Sequence[tuple[str, str, int, Shape]]) -> onnx.ModelProto:
        """Return the finished model; ``outputs``: (inner name, public name, dtype, shape)."""
        infos = []
        for inner, public, dtype, shape in outputs:
            self._nodes.append(helper.make_node("Identity", [inner], [public]))
            infos.append(helper.make_tensor_value_info(public, dtype, shape))
        graph = helper.make_graph(self._nodes, name, self._inputs, infos, list(self._initializers.values()))
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="mp2",
        )

    # -- shapes and types ----------------------------------------------------------------------------------

    def half(self, x: str) -> str:
        """Cast float32 to the type of the hidden states."""
        return x if self.hidden_type == TensorProto.FLOAT else self.one("Cast", x, to=self.hidden_type)

    def full(self, x: str) -> str:
        """Cast the type of the hidden states to float32."""
        return x if self.hidden_type == TensorProto.FLOAT else self.one("Cast", x, to=TensorProto.FLOAT)

    def sizes(self, x: str, start: int, end: int) -> str:
        """The sizes of axes ``start`` to ``end`` of ``x``, as a vector."""
        return self.one("Shape", x, start=start, end=end)

    def join(self, *vectors: str) -> str:
        """Vectors of sizes put one after the other."""
        return self.one("Concat", *vectors, axis=0)

    def part(self, x: str, start: str, stop: str, axis: int) -> str:
        """``x`` from ``start`` to ``stop`` (vectors of one number) along ``axis``."""
        return self.one("Slice", x, start, stop, self.ints(axis))

    # -- pieces --------------------------------------------------------------------------------------------

    def norm(self, x: str, name: str) -> str:
        """LayerNorm over the last axis with the stored ``name``.weight and .bias, in float32."""
        weight, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        eps = self.config.layer_norm_eps
        return self.one("LayerNormalization", x, weight, bias, axis=-1, epsilon=eps)

    def linear(self, x: str, name: str) -> str:
        """``x W + b`` for rows ``x`` [rows, in] and the stored W [in, out]; in fp8 with x and W quantized."""
        weight = self.weight(f"{name}.weight")
        if self._fp8:
            scale, zero = self.weight(f"{name}.input_scale"), "zero_fp8"
            self._initializers.setdefault(zero, helper.make_tensor(zero, TensorProto.FLOAT8E4M3FN, [], [0.0]))
            x = self.one("DequantizeLinear", self.one("QuantizeLinear", x, scale, zero), scale, zero)
            weight = self.one("DequantizeLinear", weight, self.weight(f"{name}.weight_scale"), zero)
        return self.one("Add", self.one("MatMul", x, weight), self.weight(f"{name}.bias"))

    def activation(self, x: str) -> str:
        """The backbone's activation."""
        if self.config.activation == "relu":
            return self.one("Relu", x)
        approximate = "tanh" if self.config.activation == "gelu_tanh" else "none"
        return self.one("Gelu", x, approximate=approximate)

    def counted(self, n: str) -> str:
        """0, 1 ... below the scalar ``n``."""
        zero, one = self.constant(np.array(0, np.int64)), self.constant(np.array(1, np.int64))
        return self.one("Range", zero, n, one)

    def embed(self, input_ids: str, n_inline: str) -> str:
        """[1, N, T, H] for ids [N, T]; tokens after the first sit ``n_inline`` ([] or [N, 1]) further on."""
        index = self.counted(self.one("Squeeze", self.sizes(input_ids, 1, 2), self.ints(0)))
        moved = self.one("Mul", self.one("Min", index, self.constant(np.array(1, np.int64))), n_inline)
        rows = self.one("Gather", self.weight("position_embeddings"), self.one("Add", index, moved))
        words = self.one("Gather", self.weight("word_embeddings"), input_ids)
        return self.one("Unsqueeze", self._sum_norm(words, rows), self.ints(0))

    def embed_inline(self, prompts: str) -> str:
        """[P, m, H] for prompt rows [P, m, H] at positions 1..m."""
        last = self.one("Add", self.sizes(prompts, 1, 2), self.ints(1))
        return self._sum_norm(prompts, self.part(self.weight("position_embeddings"), self.ints(1), last, 0))

    def _sum_norm(self, words: str, rows: str) -> str:
        typed = self.one("Add", words, self.weight("token_type_embedding"))
        return self.half(self.norm(self.one("Add", typed, rows), "embedding_norm"))

    def seen(self, n: str, m: str) -> str:
        """A mask [N, m] that is true everywhere; ``n`` and ``m`` are vectors of one size."""
        return self.one("Expand", self.constant(np.array([[True]])), self.join(n, m))

    def bias(self, mask: str) -> str:
        """Additive scores [1, N, 1, 1, S] for a bool ``mask`` [N, S]: of the prefix, if any, and the text."""
        # chosen in float32 and then cast: onnxruntime has no Where of bfloat16 on CUDA
        zero, masked = (self.constant(np.array(v, np.float32)) for v in (0.0, MASKED))
        return self.half(self.one("Unsqueeze", self.one("Where", mask, zero, masked), self.ints(0, 2, 3)))

    def layer(self, index: int, hidden: str, bias: str, prefix: tuple[str, str] | None) -> str:
        """[P, N, T, H] for hidden [P or 1, N, T, H] and a float32 prefix, twice [P or 1, N or 1, h, m, d_h].

        ``bias`` covers the prefix and the text, see `bias`.
        """
        config, name = self.config, f"layers.{index}"
        width = self.ints(-1, config.hidden)
        heads = self.join(self.sizes(hidden, 0, 3), self.ints(config.n_heads, config.head_size))
        qkv = self.linear(self.one("Reshape", hidden, width), f"{name}.qkv")
        query, key, value = (  # [P or 1, N, h, T, d_h] each
            self.one("Transpose", self.one("Reshape", part, heads), perm=[0, 1, 3, 2, 4])
            for part in self.op("Split", qkv, n_outputs=3, axis=-1, num_outputs=3)
        )
        if prefix is not None:
            spread = self.join(self.sizes(prefix[0], 0, 1), self.ints(1, 1, 1, 1))
            query, key, value = (self.one("Expand", x, spread) for x in (query, key, value))
            onto = self.join(self.sizes(query, 0, 2), self.ints(1, 1, 1))
            keys, values = (self.one("Expand", self.half(x), onto) for x in prefix)
            key, value = self.one("Concat", keys, key, axis=3), self.one("Concat", values, value, axis=3)
        projected = self.linear(self._attend(query, key, value, bias), f"{name}.attention_output")
        outer = self.join(self.ints(-1), self.sizes(hidden, 1, 4))
        y = self.one("Add", self.full(self.one("Reshape", projected, outer)), self.full(hidden))
        y = self.half(self.norm(self.one("Reshape", y, width), f"{name}.attention_norm"))
        down = self.linear(self.activation(self.linear(y, f"{name}.intermediate")), f"{name}.output")
        y = self.norm(self.one("Add", self.full(down), self.full(y)), f"{name}.output_norm")
        return self.one("Reshape", self.half(y), outer)

    def _attend(self, query: str, key: str, value: str, bias: str) -> str:
        """Rows [P * N * T, H]; query [P, N, h, T, d_h], key and value with S for T, bias [1, N, 1, 1, S]."""
        h, d = self.config.n_heads, self.config.head_size
        bias = self.one("Expand", bias, self.join(self.sizes(query, 0, 1), self.ints(1, 1, 1, 1)))
        bias = self.one("Reshape", bias, self.join(self.ints(-1, 1, 1), self.sizes(bias, 4, 5)))
        query, key, value = (  # candidates and examples become one batch axis
            self.one("Reshape", x, self.join(self.ints(-1, h), self.sizes(x, 3, 4), self.ints(d)))
            for x in (query, key, value)
        )
        scores = self.one("MatMul", query, self.one("Transpose", key, perm=[0, 1, 3, 2]))
        weights = self.one("Softmax", self.one("Add", scores, bias), axis=-1)
        context = self.one("Transpose", self.one("MatMul", weights, value), perm=[0, 2, 1, 3])
        return self.one("Reshape", context, self.ints(-1, self.config.hidden))
