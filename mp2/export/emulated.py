"""A typed graph on a CPU: float32 arithmetic, rounded after every node to the type that the graph names.

That is what a matrix unit does (products summed in float32, results rounded), so the emulated numbers show
what a precision costs where no GPU is at hand. Fused kernels round less often, never more. A float32 graph is
what it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper

from mp2.backbone import Backbone
from mp2.engine.onnx.session import OnnxSession
from mp2.engine.onnx.stages import GraphStages

_NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_FLOAT = TensorProto.FLOAT


def emulated(path: Path) -> onnx.ModelProto:
    """Return the float32 model, weights inside, that rounds where the typed graph at ``path`` does.

    Inputs and outputs of a narrow type become float32 (with values of the narrow type). float8 tensors stay
    float8 between QuantizeLinear and DequantizeLinear.
    """
    model = onnx.shape_inference.infer_shapes(
        onnx.load(path, load_external_data=True), strict_mode=True, data_prop=True
    )
    graph = model.graph
    infos = (*graph.input, *graph.value_info, *graph.output)
    types = {info.name: info.type.tensor_type.elem_type for info in infos}
    outputs = {info.name for info in graph.output}
    nodes: list[onnx.NodeProto] = []
    for tensor in graph.initializer:
        if tensor.data_type in _NARROW:
            wide = onnx.numpy_helper.to_array(tensor).astype("float32")
            tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))
    for node in graph.node:
        narrow = [name for name in node.output if types[name] in _NARROW and name not in outputs]
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in _NARROW:
                attribute.i = _FLOAT
        exact = {name: f"{name}_exact" for name in narrow}
        node.output[:] = [exact.get(name, name) for name in node.output]
        nodes.append(node)
        for name in narrow:
            nodes.append(helper.make_node("Cast", [exact[name]], [f"{name}_narrow"], to=types[name]))
            nodes.append(helper.make_node("Cast", [f"{name}_narrow"], [name], to=_FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    for info in (*graph.input, *graph.output):
        if info.type.tensor_type.elem_type in _NARROW:
            info.type.tensor_type.elem_type = _FLOAT
    return model


class EmulatedBackend(GraphStages):
    """The chain of a ``folder`` of any precision on the CPU; for comparisons only.

    Hidden states are float32 with values of the precision's type.
    """

    name = "emulated"

    def __init__(self, backbone: Backbone, folder: Path, precision: str) -> None:
        """Read graphs when they are first used; ``folder`` may be an export that is not finished."""
        super().__init__(backbone, device="cpu", precision=precision, reason="a comparison without a GPU")
        self._folder = folder
        self._sessions: dict[str, OnnxSession] = {}

    def _run(
        self, graph: str, feeds: Mapping[str, torch.Tensor], shape: Sequence[int], output: str = "hidden_out"
    ) -> torch.Tensor:
        if graph not in self._sessions:
            self._sessions[graph] = OnnxSession(emulated(self._folder / graph).SerializeToString())
        return self._sessions[graph].run(feeds, {output: shape})[0]
