"""Typed ONNX graphs for TensorRT's strongly typed networks: every tensor's type is written in the graph.

The same chain and deployment graphs as `mp2.export.graphs`, with standard operators of opset 20 only. What is
float16 or bfloat16: weights, matrix products, scores, softmax, activation, and the hidden states between the
graphs. What stays float32: embedding tables, residual sums, LayerNorm with its statistics, span head and
logits. ``fp8`` is the fp16 graph whose four linear layers go through QuantizeLinear / DequantizeLinear to
float8 (e4m3fn), one scale a tensor.

Attention is written as TensorRT's fused attention wants it: query [B, h, T, d_h] (already scaled, in the
weights), keys and values [B, h, m + T, d_h], additive mask, softmax; the prefix is put before the text.
Besides the base's ``layer_XX`` there is ``layer_XX_plain`` without prefix inputs: an empty tensor is not
something every TensorRT release takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper

from mp2.backbone import BackboneConfig
from mp2.export.graphs import GraphBuilder
from mp2.export.weights import WeightStore

PRECISIONS = ("fp16", "bf16", "fp8")
HIDDEN_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "fp8": TensorProto.FLOAT16}
_MASKED = -3e4  # added to the scores of padding: float16 holds it, and exp() of it is 0


def plain_layer_file(index: int) -> str:
    """Return the name of layer ``index``'s graph without prefix inputs, ``layer_07_plain.onnx``."""
    return f"layer_{index:02d}_plain.onnx"


class TypedGraphBuilder(GraphBuilder):
    """`GraphBuilder` in a half precision, the parts that need it in float32."""

    def __init__(self, config: BackboneConfig, store: WeightStore, precision: str) -> None:
        """Build in ``precision`` (one of `PRECISIONS`); ``store`` holds what `TypedWeights` wrote for it."""
        super().__init__(config, store)
        self.hidden_type = HIDDEN_TYPES[precision]
        self._fp8 = precision == "fp8"

    # -- types ---------------------------------------------------------------------------------------------

    def half(self, x: str) -> str:
        """Cast to the type of the hidden states."""
        return self.one("Cast", x, to=self.hidden_type)

    def full(self, x: str) -> str:
        """Cast to float32."""
        return self.one("Cast", x, to=TensorProto.FLOAT)

    def half_constant(self, value: float) -> str:
        """Embed a scalar of the type of the hidden states."""
        name = f"const_half_{value!r}"
        return self._constant_once(helper.make_tensor(name, self.hidden_type, [], [value]))

    def _constant_once(self, tensor: onnx.TensorProto) -> str:
        name = str(tensor.name)
        self._initializers.setdefault(name, tensor)
        return name

    # -- pieces --------------------------------------------------------------------------------------------

    def linear(self, x: str, name: str) -> str:
        """``x W + b`` for rows ``x`` [rows, in]; in fp8, of the quantized ``x`` and W."""
        weight = self.weight(f"{name}.weight")
        if self._fp8:
            scale = self.weight(f"{name}.input_scale")
            zero = self._constant_once(helper.make_tensor("zero_fp8", TensorProto.FLOAT8E4M3FN, [], [0.0]))
            x = self.one("DequantizeLinear", self.one("QuantizeLinear", x, scale, zero), scale, zero)
            weight = self.one("DequantizeLinear", weight, self.weight(f"{name}.weight_scale"), zero)
        return self.one("Add", self.one("MatMul", x, weight), self.weight(f"{name}.bias"))

    def embed(self, input_ids: str, n_inline: str) -> str:
        """See `GraphBuilder.embed`; half at the end."""
        return self.half(super().embed(input_ids, n_inline))

    def embed_inline(self, prompts: str) -> str:
        """See `GraphBuilder.embed_inline`; half at the end."""
        return self.half(super().embed_inline(prompts))

    def bias(self, mask: str) -> str:
        """Additive scores [1, N, 1, 1, T] for a bool ``mask`` [N, T]."""
        scores = self.one("Where", mask, self.half_constant(0.0), self.half_constant(_MASKED))
        return self.one("Unsqueeze", scores, self.ints(0, 2, 3))

    def layer(self, index: int, hidden: str, bias: str, prefix: tuple[str, str] | None) -> str:
        """[P, N, T, H] for hidden [P or 1, N, T, H] and a prefix, twice [P or 1, N or 1, h, m, d_h]."""
        config, name = self.config, f"layers.{index}"
        h, d, width = config.n_heads, config.head_size, config.hidden
        rows = self.one("Reshape", hidden, self.ints(-1, width))
        outer = self.one("Shape", hidden, start=0, end=3)  # P or 1, N, T
        heads = self.one("Concat", outer, self.ints(h, d), axis=0)
        query, key, value = (
            self.one("Transpose", self.one("Reshape", part, heads), perm=[0, 1, 3, 2, 4])
            for part in self.op(
                "Split", self.linear(rows, f"{name}.qkv"), n_outputs=3, axis=-1, num_outputs=3
            )
        )  # [P or 1, N, h, T, d_h] each
        if prefix is not None:
            ones = self.ints(1, 1, 1, 1)
            spread = self.one("Concat", self.one("Shape", prefix[0], start=0, end=1), ones, axis=0)
            query, key, value = (self.one("Expand", x, spread) for x in (query, key, value))
            pairs = self.one("Shape", query, start=0, end=2)  # P, N
            onto = self.one("Concat", pairs, self.ints(1, 1, 1), axis=0)
            keys, values = (self.one("Expand", self.half(x), onto) for x in prefix)
            key, value = (
                self.one("Concat", before, text, axis=3) for before, text in ((keys, key), (values, value))
            )
            room = self.one("Shape", keys, start=3, end=4)  # m
            shape = self.one("Concat", self.ints(1), self.one("Shape", hidden, start=1, end=2), axis=0)
            shape = self.one("Concat", shape, self.ints(1, 1), room, axis=0)
            bias = self.one("Concat", self.one("Expand", self.half_constant(0.0), shape), bias, axis=4)
        context = self._attend(query, key, value, bias)  # [P * N * T, H]
        projected = self.linear(context, f"{name}.attention_output")
        spread = self.one("Concat", self.ints(-1), self.one("Shape", hidden, start=1, end=4), axis=0)
        y = self.one("Add", self.full(self.one("Reshape", projected, spread)), self.full(hidden))
        y = self.half(self.norm(self.one("Reshape", y, self.ints(-1, width)), f"{name}.attention_norm"))
        down = self.linear(self.activate(self.linear(y, f"{name}.intermediate")), f"{name}.output")
        y = self.norm(self.one("Add", self.full(down), self.full(y)), f"{name}.output_norm")
        return self.one("Reshape", self.half(y), spread)

    def _attend(self, query: str, key: str, value: str, bias: str) -> str:
        """Rows [P * N * T, H]; query [P, N, h, T, d_h], key and value with S for T, bias [1, N, 1, 1, S]."""
        h, d = self.config.n_heads, self.config.head_size
        candidates = self.one("Shape", query, start=0, end=1)
        bias = self.one("Expand", bias, self.one("Concat", candidates, self.ints(1, 1, 1, 1), axis=0))

        def flat(x: str, inner: Sequence[int]) -> str:  # P and N become one batch axis
            sizes = self.one("Shape", x, start=3, end=4)
            parts = [self.ints(-1, inner[0]), sizes, self.ints(inner[1])]
            return self.one("Reshape", x, self.one("Concat", *parts, axis=0))

        query, key, value = (flat(x, (h, d)) for x in (query, key, value))
        length = self.one("Shape", bias, start=4, end=5)
        bias = self.one("Reshape", bias, self.one("Concat", self.ints(-1, 1, 1), length, axis=0))
        scores = self.one("MatMul", query, self.one("Transpose", key, perm=[0, 1, 3, 2]))
        weights = self.one("Softmax", self.one("Add", scores, bias), axis=-1)
        context = self.one("Transpose", self.one("MatMul", weights, value), perm=[0, 2, 1, 3])
        return self.one("Reshape", context, self.ints(-1, self.config.hidden))

    def head(self, hidden: str, weight: str, bias: str) -> str:
        """See `GraphBuilder.head`; float32 throughout."""
        return super().head(self.full(hidden), weight, bias)


def plain_layer_model(b: TypedGraphBuilder, index: int) -> onnx.ModelProto:
    """Hidden [P, N, T, H], mask [N, T] -> hidden [P, N, T, H], no prompt at this layer."""
    shape: Sequence[int | str] = ["P", "N", "T", b.config.hidden]
    hidden = b.input("hidden", b.hidden_type, shape)
    out = b.layer(index, hidden, b.bias(b.input("mask", TensorProto.BOOL, ["N", "T"])), None)
    return b.model(f"layer_{index:02d}_plain", [(out, "hidden_out", b.hidden_type, shape)])
