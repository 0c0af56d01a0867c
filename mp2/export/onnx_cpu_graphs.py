"""A layer's graph as ONNX Runtime's CPU provider runs it fastest, made from the folder's when it is opened.

Same inputs, outputs and stored weights as `mp2.export.graphs.layer_model`, whose standard operators other
runtimes read; attention is another:

- texts of their own: prefix and text go through one ``com.microsoft.MultiHeadAttention``;
- one text under P prefixes: the text's attention is computed once and enters each candidate's softmax as one
  further key, whose score is the log-sum-exp of the text's scores and whose value is the text's context
  (the same weights, exactly); nothing of T x T numbers is spread over the candidates.

Which of the two, and whether anything is padded, is found in the graph (``If``), so that weights are packed
once. What else ONNX Runtime has fused (SkipLayerNormalization, BiasGelu) is slower on its CPU provider than
the standard operators (6 and 1.3 times on AVX-512) and is kept out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from mp2.backbone import BackboneConfig
from mp2.export.graphs import MASKED, OPSET, GraphBuilder

CONTRIB = "com.microsoft"
_ALIASED = 1024  # floats: 4,096 bytes
_ROOM = 16  # floats: a cache line


def cpu_layer_model(standard: Path, config: BackboneConfig, index: int) -> onnx.ModelProto:
    """Return layer ``index``'s graph for the CPU provider, from the folder's at ``standard``.

    Its weights stay in the folder's files.
    """
    loaded = onnx.load(standard, load_external_data=False)
    initializers = {tensor.name: tensor for tensor in loaded.graph.initializer}
    return cpu_layer(CpuGraphBuilder(config, standard.parent, initializers), index)


def cpu_layer(b: CpuGraphBuilder, index: int) -> onnx.ModelProto:
    """Hidden, mask [N, T], prefix_keys, prefix_values -> hidden [P, N, T, H]; m may be 0."""
    width = b.config.hidden
    hidden = b.input("hidden", TensorProto.FLOAT, ["P_hidden", "N", "T", width])
    mask = b.input("mask", TensorProto.BOOL, ["N", "T"])
    shape: list[int | str] = ["P_prefix", "N_prefix", b.config.n_heads, "m", b.config.head_size]
    keys, values = (b.input(f"prefix_{kind}", TensorProto.FLOAT, shape) for kind in ("keys", "values"))
    out = b.whole_layer(index, hidden, mask, (keys, values))
    return b.model(f"layer_{index:02d}_cpu", [(out, "hidden_out", TensorProto.FLOAT, ["P", "N", "T", width])])


def roomy(width: int) -> int:
    """Return ``width``, or some more where rows of so many floats would all begin in one set of the cache.

    ONNX Runtime's matrix product reads a dozen rows of its left factor at once, where they lie. At a distance
    of a multiple of 4,096 bytes they drive each other out of the nearest cache, and a product is 12 % slower.
    """
    return width + _ROOM if width % _ALIASED == 0 else width


class CpuGraphBuilder(GraphBuilder):
    """`GraphBuilder` with ONNX Runtime's own operators."""

    domains: Mapping[str, int] = {"": OPSET, CONTRIB: 1}

    def __init__(
        self, config: BackboneConfig, folder: Path, initializers: Mapping[str, onnx.TensorProto]
    ) -> None:
        """Build for ``config`` with ``initializers`` that point at files in ``folder``."""
        super().__init__(config, {})
        self._folder = folder
        self._given = initializers

    def weight(self, name: str) -> str:
        """Point at a stored array, as the other graph does."""
        self._initializers.setdefault(name, self._given[name])
        return name

    def widened(self, name: str, shape: Sequence[int]) -> str:
        """Return a stored array with zeros behind it up to ``shape``; made once, as the session is opened."""
        stored = self.weight(name)
        more = [new - old for new, old in zip(shape, self._given[name].dims, strict=True)]
        return self.one("Pad", stored, self.ints(*[0] * len(more), *more)) if any(more) else stored

    def linear(self, x: str, name: str, *, is_roomy: bool = False, wants_room: bool = False) -> str:
        """``x W + b`` for rows ``x`` [rows, in] and the stored W [in, out].

        ``is_roomy``: ``x`` already has `roomy` (in) columns, zeros in the last. ``wants_room``: so has the
        result.
        """
        n_in, n_out = self._given[f"{name}.weight"].dims
        rows, columns = roomy(n_in), roomy(n_out) if wants_room else n_out
        if rows > n_in and not is_roomy:
            x = self.one("Pad", x, self.ints(0, rows - n_in), "", self.ints(1))
        weight = self.widened(f"{name}.weight", (rows, columns))
        return self.one("Gemm", x, weight, self.widened(f"{name}.bias", (columns,)))

    def contrib(self, kind: str, *inputs: str, **attributes: object) -> str:
        """Add a node of ONNX Runtime's own with one output."""
        return self.one(kind, *inputs, domain=CONTRIB, **attributes)

    def choose(self, condition: str, then: Callable[[], str], otherwise: Callable[[], str]) -> str:
        """Run one of two pieces of graph, each of which returns a float tensor's name."""
        outer, branches = self._nodes, {}
        for name, piece in (("then_branch", then), ("else_branch", otherwise)):
            self._nodes = []
            info = helper.make_tensor_value_info(piece(), TensorProto.FLOAT, None)
            branches[name] = helper.make_graph(self._nodes, name, [], [info])
        self._nodes = outer
        return self.one("If", condition, **branches)

    def whole_layer(self, index: int, hidden: str, mask: str, prefix: tuple[str, str]) -> str:
        """[P, N, T, H] for hidden [P or 1, N, T, H], mask [N, T], prefix [P or 1, N or 1, h, m, d_h] each."""
        width, name = self.config.hidden, f"layers.{index}"
        outer = self.one("Shape", hidden, start=1, end=4)  # N, T, H
        spread = self.one("Concat", self.ints(-1), outer, axis=0)
        rows = self.one("Reshape", hidden, self.ints(-1, width))
        qkv = self.linear(rows, f"{name}.qkv")  # query weights already hold the 1 / sqrt(d_h)
        texts, candidates = (self.one("Shape", x, start=0, end=1) for x in (hidden, prefix[0]))
        shared = self.one("Squeeze", self.one("Greater", candidates, texts), self.ints(0))
        context = self.choose(
            shared,
            lambda: self._shared_text(qkv, hidden, mask, prefix),
            lambda: self._own_texts(qkv, hidden, mask, prefix),
        )
        context = self.one("Reshape", context, self.ints(-1, width))
        projected = self.linear(context, f"{name}.attention_output")
        y = self.one("Add", self.one("Reshape", projected, spread), hidden)
        y = self.norm(self.one("Reshape", y, self.ints(-1, width)), f"{name}.attention_norm")
        # each activation leaves zeros zero
        up = self.activate(self.linear(y, f"{name}.intermediate", wants_room=True))
        y = self.one("Add", self.linear(up, f"{name}.output", is_roomy=True), y)
        return self.norm(self.one("Reshape", y, spread), f"{name}.output_norm")

    def _own_texts(self, qkv: str, hidden: str, mask: str, prefix: tuple[str, str]) -> str:
        """[P * N, T, H]: every text's queries over its prefix and itself."""
        width = self.config.hidden
        pairs, length = self.one("Shape", hidden, start=0, end=2), self.one("Shape", hidden, start=2, end=3)
        texts = self.one("ReduceProd", pairs, self.ints(0), keepdims=1)  # P * N
        sequences = self.one("Concat", texts, length, self.ints(width), axis=0)
        query, key, value = (
            self.one("Reshape", part, sequences)
            for part in self.op("Split", qkv, n_outputs=3, axis=-1, num_outputs=3)
        )
        room = self.one("Shape", prefix[0], start=3, end=4)  # m
        spread = self.one("Concat", pairs, self.ints(1, 1, 1), axis=0)
        before = self.one("Concat", texts, room, self.ints(width), axis=0)

        def with_prefix(part: str, text: str) -> str:  # [P * N, m + T, H]
            part = self.one("Expand", self.one("Transpose", part, perm=[0, 1, 3, 2, 4]), spread)
            part = self.one("Reshape", part, before, allowzero=1)  # m may be 0
            return self.one("Concat", part, text, axis=1)

        key, value = with_prefix(prefix[0], key), with_prefix(prefix[1], value)

        def attend(padding: str) -> str:
            attributes = {"num_heads": self.config.n_heads, "scale": 1.0, "mask_filter_value": MASKED}
            inputs = (query, key, value, *(("", padding) if padding else ()))
            return self.contrib("MultiHeadAttention", *inputs, **attributes)

        def padded() -> str:
            n = self.one("Shape", mask, start=0, end=1)
            seen = self.one(
                "Expand", self.constant(np.array([[1]], np.int32)), self.one("Concat", n, room, axis=0)
            )
            text = self.one("Cast", mask, to=TensorProto.INT32)
            seen = self.one("Unsqueeze", self.one("Concat", seen, text, axis=1), self.ints(0))
            seen = self.one("Expand", seen, self.one("Concat", pairs, self.ints(1), axis=0))
            total = self.one("Add", room, length)
            return attend(self.one("Reshape", seen, self.one("Concat", texts, total, axis=0)))

        least = self.one("ReduceMin", self.one("Cast", mask, to=TensorProto.INT32), keepdims=0)
        all_real = self.one("Cast", least, to=TensorProto.BOOL)
        return self.choose(all_real, lambda: attend(""), padded)

    def _shared_text(self, qkv: str, hidden: str, mask: str, prefix: tuple[str, str]) -> str:
        """[P, N, T, h, d_h]: one text's queries over each candidate's prefix and the text's own attention."""
        h, d = self.config.n_heads, self.config.head_size
        outer = self.one("Shape", hidden, start=0, end=3)  # 1, N, T
        heads = self.one("Concat", outer, self.ints(h, d), axis=0)
        query, key, value = (
            self.one("Transpose", self.one("Reshape", part, heads), perm=[0, 1, 3, 2, 4])
            for part in self.op("Split", qkv, n_outputs=3, axis=-1, num_outputs=3)
        )  # [1, N, h, T, d_h] each
        scores = self.one("Add", self.contrib("FusedMatMul", query, key, transB=1), self.bias(mask))
        total = self.one("ReduceLogSumExp", scores, self.ints(-1), keepdims=1)  # [1, N, h, T, 1]
        text = self.one("MatMul", self.one("Softmax", scores, axis=-1), value)

        # the text as a further key: the last one below, for queries that end in their log-sum-exp
        query = self.one("Concat", query, total, axis=-1)  # [1, N, h, T, d_h + 1]
        shape = self.one("Concat", self.one("Shape", prefix[0], start=0, end=3), self.ints(1, 1), axis=0)
        unit = np.eye(1, d + 1, d, dtype=np.float32).reshape(1, 1, 1, 1, d + 1)
        unit_key = self.one("Expand", self.constant(unit), shape)
        keys = self.one("Concat", self._padded(prefix[0], 4), unit_key, axis=3)
        weights = self.contrib("FusedMatMul", query, keys, transB=1)
        weights = self.one("Softmax", weights, axis=-1)  # [P, N, h, T, m + 1]
        rest = self.one("Slice", weights, self.ints(-1), self.ints(2**62), self.ints(4))
        context = self.one(
            "Add",
            self.one("MatMul", weights, self._padded(prefix[1], 3)),
            self.one("Mul", rest, text),
        )
        return self.one("Transpose", context, perm=[0, 1, 3, 2, 4])

    def _padded(self, x: str, axis: int) -> str:
        """``x`` with one more zero at the end of ``axis``."""
        return self.one("Pad", x, self.ints(0, 1), "", self.ints(axis))
