from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper
from tiny_words import tiny_vocab

from mp2.backbone import Backbone, BackboneConfig, random_backbone
from mp2.backbone.mlm_head import MlmHead
from mp2.engine.folder import FOLDER_PRECISIONS, TYPED_PRECISIONS, EngineFolder
from mp2.engine.tensorrt.plans import read_shapes
from mp2.engine.tensorrt.profiles import TaskShapes, grown
from mp2.errors import FormatError, Mp2Error, UnknownNameError, UsageError
from mp2.export import export_engine
from mp2.export import parity as parity_module
from mp2.export.emulated import emulated
from mp2.export.graphs import INLINE_GRAPH, PREFIX_GRAPH
from mp2.export.input_maxima import calibration_inputs, input_maxima, random_inputs, task_inputs
from mp2.export.parity import compare_whole, emulated_graph
from mp2.export.stored_arrays import FP8_MAX, fp8_scale, quantize

TABLE = json.loads(Path(__file__).with_name("tensorrt_operators.json").read_text())
NARROW = {"fp16": "FLOAT16", "bf16": "BFLOAT16", "fp8": "FLOAT16"}
Typed = Callable[[str], EngineFolder]


def inferred(path: Path) -> tuple[onnx.GraphProto, dict[str, str]]:
    """A graph and the type name of each of its tensors."""
    model = onnx.load(path, load_external_data=False)
    low, high = TABLE["opsets"]
    assert low <= model.opset_import[0].version <= high
    assert {entry.domain for entry in model.opset_import} == {""}, "standard operators only"
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for info in (*graph.input, *graph.value_info, *graph.output):
        types[info.name] = info.type.tensor_type.elem_type
    return graph, {name: TensorProto.DataType.Name(code) for name, code in types.items()}


@pytest.mark.parametrize("precision", FOLDER_PRECISIONS)
def test_every_operator_and_type_is_one_that_tensorrt_documents(
    typed: Typed, whole: Callable[[str], Path], precision: str
) -> None:
    for path in (*sorted(typed(precision).path.glob("*.onnx")), *sorted(whole(precision).glob("*.onnx"))):
        graph, types = inferred(path)
        constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            allowed = TABLE["operators"][node.op_type]
            name = node.output[0] if node.op_type == "Cast" else node.input[0]
            if node.op_type == "Where":
                name = node.input[1]
                assert types[name] == "FLOAT", "onnxruntime has no Where of bfloat16 on CUDA"
            assert TABLE["types"][types[name]] in allowed, (path.name, node.name, types[name])
            for index in TABLE["constant_inputs"].get(node.op_type, []):
                assert node.input[index] in constants, (path.name, node.name, index)
            if (index := TABLE["zero_inputs"].get(node.op_type)) is not None:
                zero = numpy_helper.to_array(constants[node.input[index]])
                assert float(zero) == 0.0


@pytest.mark.parametrize("precision", TYPED_PRECISIONS)
def test_products_are_narrow_and_norms_sums_and_logits_are_float32(typed: Typed, precision: str) -> None:
    folder = typed(precision)
    graph, types = inferred(folder.path / "layer_01.onnx")
    found = {(node.op_type, types[node.output[0]]) for node in graph.node}
    narrow = NARROW[precision]
    assert {op for op, kind in found if kind == narrow} >= {"MatMul", "Softmax", "Gelu"}
    assert ("LayerNormalization", "FLOAT") in found
    assert ("MatMul", "FLOAT") not in found
    assert [types[i.name] for i in graph.input] == [narrow, "BOOL", "FLOAT", "FLOAT"]
    residual = {
        node.output[0] for node in graph.node if node.op_type == "Add" and types[node.output[0]] == "FLOAT"
    }
    assert len(residual) == 2
    _, types = inferred(folder.path / "head.onnx")
    assert types["logits"] == "FLOAT"


def test_fp8_quantizes_both_sides_of_the_four_linear_layers_and_nothing_else(typed: Typed) -> None:
    graph, types = inferred(typed("fp8").path / "layer_00.onnx")
    maker = {output: node for node in graph.node for output in node.output}
    quantized = [
        [maker[name].op_type if name in maker else "" for name in node.input]
        for node in graph.node
        if node.op_type == "MatMul"
    ]
    assert quantized.count(["DequantizeLinear", "DequantizeLinear"]) == 4
    assert len(quantized) == 6  # and two products of the attention
    weights = [t for t in graph.initializer if t.data_type == TensorProto.FLOAT8E4M3FN and t.dims]
    assert len(weights) == 4
    scales = [node.input[1] for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(set(scales)) == 8  # one a tensor: four inputs, four weights
    assert {types[name] for name in scales} == {"FLOAT16"}


def test_quantized_weights_are_what_onnxruntime_makes_of_them() -> None:
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)) * 3
    scale = fp8_scale(float(x.abs().max()) / 2)  # half of the range: the rest is clamped
    node = onnx.helper.make_node("QuantizeLinear", ["x", "s"], ["y"], output_dtype=TensorProto.FLOAT8E4M3FN)
    back = onnx.helper.make_node("Cast", ["y"], ["z"], to=TensorProto.FLOAT)
    make = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node, back],
        "q",
        [make("x", TensorProto.FLOAT, [40, 24]), make("s", TensorProto.FLOAT, [])],
        [make("z", TensorProto.FLOAT, [40, 24])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": x.numpy(), "s": scale.float().numpy()})[0]
    np.testing.assert_array_equal(quantize(x, scale).float().numpy(), expected)
    assert np.abs(expected).max() == FP8_MAX


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_emulation_rounds_as_onnxruntime_does_on_the_typed_graph(typed: Typed, precision: str) -> None:
    path = typed(precision).path / "layer_02.onnx"
    rng = np.random.default_rng(0)
    feeds = {
        "hidden": rng.standard_normal((1, 3, 7, 24)).astype(np.float16),
        "mask": np.arange(7)[None] < np.array([[7], [5], [3]]),
        "prefix_keys": rng.standard_normal((2, 1, 4, 5, 6)).astype(np.float32),
        "prefix_values": rng.standard_normal((2, 1, 4, 5, 6)).astype(np.float32),
    }
    native = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    model = emulated(path).SerializeToString()
    feeds["hidden"] = feeds["hidden"].astype(np.float32)
    emulation = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    np.testing.assert_allclose(emulation, native.astype(np.float32), atol=4e-3)


@pytest.mark.parametrize("precision", FOLDER_PRECISIONS)
@pytest.mark.parametrize("graph", [PREFIX_GRAPH, INLINE_GRAPH])
def test_deployment_graphs_answer_as_the_encoder_does_whatever_a_batch_mixes(
    tiny_backbone: Backbone, tiny_mlm: MlmHead, whole: Callable[[str], Path], graph: str, precision: str
) -> None:
    comparisons = list(
        compare_whole(emulated_graph(whole(precision) / graph), tiny_backbone, precision, graph, tiny_mlm)
    )
    assert [c.line() for c in comparisons if not c.ok] == []
    assert len(comparisons) == 3 * 5


def test_a_typed_folder_is_verified_like_any_other(typed: Typed, tiny_backbone: Backbone) -> None:
    folder = typed("bf16")
    assert folder.manifest.precision == "bf16"
    EngineFolder.open(folder.path, tiny_backbone)
    assert {"layer_02_plain.onnx", "shapes.json"} <= set(folder.manifest.files)
    assert read_shapes(folder).lengths == (8, 20)


def test_damaged_shapes_are_named(typed: Typed, tmp_path: Path) -> None:
    folder = EngineFolder(tmp_path, typed("fp16").manifest)
    (tmp_path / "shapes.json").write_text('{"lengths": [3, 2]}')
    with pytest.raises(FormatError, match=r"shapes\.json: lengths are \(3, 2\), expected ascending"):
        read_shapes(folder)


def test_a_rough_graph_fails_and_leaves_nothing(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity_module.STAGE_TOLERANCE, "fp16", 1e-7)
    with pytest.raises(Mp2Error, match=r"of runtime 'emulated' in fp16 differ from torch, first 'embed"):
        export_engine(tiny_backbone, tmp_path / "e", precision="fp16")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UnknownNameError, match="unknown precision 'int8'"):
        export_engine(tiny_backbone, tmp_path / "e", precision="int8")


def test_maxima_are_those_of_the_inputs_of_every_linear_layer(tiny_backbone: Backbone) -> None:
    inputs = random_inputs(tiny_backbone, 2)
    maxima = input_maxima(tiny_backbone, inputs)
    assert len(maxima) == 4 * tiny_backbone.config.n_layers
    hidden = [tiny_backbone.encoder.embed(torch.from_numpy(item.input_ids)[None]) for item in inputs]
    largest = max(float(x.abs().max()) for x in hidden)
    assert maxima["layers.0.qkv"] == pytest.approx(2 * largest)
    assert not tiny_backbone.encoder.layers[0].query._forward_pre_hooks  # type: ignore[union-attr]


def test_calibration_reads_real_text_where_it_fits(
    tiny_backbone: Backbone, tiny_config: BackboneConfig
) -> None:
    inputs = calibration_inputs(tiny_backbone)
    tasks = ("demo_sentiment", "demo_topic")
    assert len(inputs) == sum(len(task_inputs(tiny_backbone, task)) for task in tasks)
    short = random_backbone(replace(tiny_config, max_positions=20), tiny_vocab(), seed=7)
    assert len(calibration_inputs(short)) == 16  # random tokens


def test_shapes_of_a_task_are_few_classes_that_hold_every_length() -> None:
    shapes = TaskShapes.of_lengths([17, 30, 31, 90, 91, 100], candidates=20, prompt_tokens=50)
    assert shapes.lengths == (32, 96, 112)
    layer, whole = shapes.chain_profile("layer_05.onnx"), shapes.whole_profiles()
    assert [profile.ranges["T"] for profile in whole] == [(1, 32, 32), (33, 96, 96), (97, 112, 112)]
    for length in (17, 30, 31, 90, 91, 100):
        visit = {"P_hidden": 1, "P_prefix": 20, "N": 6, "N_prefix": 1, "T": length, "m": 50}
        assert layer.covers(visit)
        assert layer.covers({**visit, "P_hidden": 20, "P_prefix": 1})
        assert not layer.covers({**visit, "m": 51})
        row = {"N": 6, "P": 6, "T": length, "m": 50, "S": 2}
        assert sum(profile.covers(row) for profile in whole) == 1


def test_a_grown_plan_holds_what_is_likely_to_come_next() -> None:
    profile = TaskShapes(candidates=4, examples=3, lengths=(8, 90), prompt_tokens=5).chain_profile(
        "head.onnx"
    )
    old, new = grown([profile], {"P": 1, "N": 33, "T": 20})
    assert old == profile
    assert new.ranges == {"P": (1, 1, 1), "N": (1, 33, 64), "T": (1, 20, 90)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": 0}, "candidates is 0, expected at least 1"),
        ({"lengths": ()}, "lengths are"),
        ({"lengths": (64, 32)}, r"lengths are \(64, 32\), expected ascending"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TaskShapes(**change)  # type: ignore[arg-type]
