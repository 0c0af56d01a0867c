"""Layers as ONNX Runtime's CPU provider runs them: fused as intended, and equal to the standard operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from mp2.backbone import Backbone, random_backbone
from mp2.doctor import as_text, examine
from mp2.engine import OnnxRuntime, create_runtime
from mp2.engine.folder import layer_file
from mp2.engine.onnx import session as onnx_session
from mp2.engine.onnx.session import WEIGHTS_FOLDER, OnnxSession
from mp2.export import export_engine, onnx_cpu_graphs, onnx_cpu_probe
from mp2.export.onnx_cpu_graphs import cpu_layer_model, roomy
from mp2.export.onnx_cpu_probe import cpu_graphs_problem

P, N, T, M = 3, 2, 11, 5
GPU = ["CUDAExecutionProvider", "TensorrtExecutionProvider"]


@pytest.fixture(scope="module")
def engine_dir(tiny_backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_engine(tiny_backbone, tmp_path_factory.mktemp("engine") / "tiny").path


@pytest.fixture
def fresh_probe() -> Iterator[None]:
    cpu_graphs_problem.cache_clear()
    yield
    cpu_graphs_problem.cache_clear()


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes_of(attribute.g)


def optimised(model: onnx.ModelProto, weights: Path, out: Path) -> onnx.GraphProto:
    """The graph as onnxruntime runs it on the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = str(out)
    options.add_session_config_entry(WEIGHTS_FOLDER, str(weights))
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(out, load_external_data=False).graph


def inputs(backbone: Backbone) -> Iterable[tuple[str, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]]:
    """What a layer can be given: (name, hidden, prefix)."""
    config, rng = backbone.config, torch.Generator().manual_seed(0)
    for name, texts, prefixes, examples, m in (
        ("texts without a prefix", P, 1, 1, 0),
        ("texts, one prefix", P, 1, 1, M),
        ("texts, a prefix each", P, P, N, M),
        ("one text, P prefixes", 1, P, 1, M),
        ("one text, a prefix for each example", 1, P, N, M),
    ):
        hidden = torch.randn(texts, N, T, config.hidden, generator=rng)
        shape = (2, prefixes, examples, config.n_heads, m, config.head_size)
        keys, values = torch.randn(shape, generator=rng)
        yield name, hidden, (keys, values)


def assert_equals_the_encoder(runtime: OnnxRuntime, backbone: Backbone) -> None:
    for mask in (torch.ones(N, T, dtype=torch.bool), torch.arange(T)[None] < torch.tensor([[T], [T - 4]])):
        for name, hidden, prefix in inputs(backbone):
            got = runtime.layer(1, hidden, mask, prefix)
            for p in range(P):
                own = tuple(x[p % len(x)].expand(N, -1, -1, -1) for x in prefix)
                expected = backbone.encoder.layer(1, hidden[p % len(hidden)], mask, own)
                torch.testing.assert_close(
                    got[p][mask], expected[mask], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                )


def test_what_is_meant_to_be_fused_is_fused_and_nothing_else(
    engine_dir: Path, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    fused = cpu_layer_model(engine_dir / layer_file(1, "onnx"), tiny_backbone.config, 1)
    graph = optimised(fused, engine_dir, tmp_path / "optimised.onnx")
    found = Counter(node.op_type for node in nodes_of(graph))
    expected = {
        "MultiHeadAttention": 2,  # padded and not
        "Gemm": 4,  # query, key and value in one
        "FusedMatMul": 2,  # keys are not transposed beforehand: text and prefix
        "MatMul": 2,
        "Softmax": 2,
        "LayerNormalization": 2,
        "Gelu": 1,
        "If": 2,
        "Identity": 0,
    }
    assert {kind: found[kind] for kind in expected} == expected
    # slower on the CPU provider than what they stand for
    assert not {"SkipLayerNormalization", "BiasGelu", "FastGelu", "BiasSoftmax"} & set(found)


def test_the_standard_graphs_of_the_folder_stay_standard(engine_dir: Path) -> None:
    for path in engine_dir.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        assert {entry.domain for entry in model.opset_import} == {""}
        assert {node.domain for node in nodes_of(model.graph)} == {""}


def test_weights_stay_in_the_folder(engine_dir: Path, tiny_backbone: Backbone) -> None:
    fused = cpu_layer_model(engine_dir / layer_file(1, "onnx"), tiny_backbone.config, 1)
    held = [t for t in fused.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert len(fused.graph.initializer) - len(held) == 12  # four linear layers, two norms
    assert all(np.prod(tensor.dims) <= tiny_backbone.config.head_size + 1 for tensor in held)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_widened_rows_give_the_same(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activation: str
) -> None:
    config = replace(tiny_backbone.config, activation=activation)
    backbone = random_backbone(config, tiny_backbone.tokenizer.tokens(), seed=3)
    engine = export_engine(backbone, tmp_path / "e").path
    assert_equals_the_encoder(OnnxRuntime(backbone, engine, threads=1), backbone)
    monkeypatch.setattr(onnx_cpu_graphs, "_ALIASED", config.hidden)
    fused = cpu_layer_model(engine / layer_file(1, "onnx"), config, 1)
    graph = optimised(fused, engine, tmp_path / "optimised.onnx")
    width, ffn = config.hidden, config.ffn
    assert roomy(width) == width + 16
    made = {tuple(t.dims) for t in graph.initializer}
    assert {
        (width + 16, 3 * width),
        (width + 16, width),
        (width + 16, roomy(ffn)),
        (roomy(ffn), width),
    } <= made
    # before three linear layers and around a prefix; not one around a weight is left to be done at every call
    assert Counter(node.op_type for node in nodes_of(graph))["Pad"] == 5
    assert_equals_the_encoder(OnnxRuntime(backbone, engine, threads=1), backbone)


@pytest.mark.parametrize("rows", [1, T, 2 * N * T])
def test_blocks_of_rows_give_the_same(
    tiny_backbone: Backbone, engine_dir: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    whole = OnnxRuntime(tiny_backbone, engine_dir, threads=1)
    monkeypatch.setattr("mp2.engine.onnx.runtime._BLOCK_ROWS", rows // 2)
    sizes: list[int] = []
    real = OnnxSession.run

    def run(self: Any, feeds: Any, outputs: dict[str, torch.Tensor]) -> Any:
        sizes.append(outputs["hidden_out"].shape[:3].numel())
        return real(self, feeds, outputs)

    monkeypatch.setattr(OnnxSession, "run", run)
    blocks = OnnxRuntime(tiny_backbone, engine_dir, threads=1)
    assert_equals_the_encoder(blocks, tiny_backbone)
    assert max(sizes) <= max(rows, N * T)  # one candidate at least
    sizes.clear()
    text = torch.randn(1, N, T, tiny_backbone.config.hidden, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(blocks.layer(0, text, None, None), whole.layer(0, text, None, None))
    assert max(sizes[:-1]) <= max(rows, T)  # of one candidate, one example


def test_only_rows_of_whole_pages_are_widened() -> None:
    assert [roomy(width) for width in (128, 512, 768, 1024, 3072, 4096)] == [128, 512, 768, 1040, 3088, 4112]


def test_without_the_operators_the_standard_graphs_run_and_it_says_so(
    tiny_backbone: Backbone, engine_dir: Path, monkeypatch: pytest.MonkeyPatch, fresh_probe: None
) -> None:
    monkeypatch.setattr(onnx_cpu_graphs, "CONTRIB", "com.nobody")
    monkeypatch.setattr(onnx_cpu_graphs.CpuGraphBuilder, "domains", {"": 20, "com.nobody": 1})
    runtime = OnnxRuntime(tiny_backbone, engine_dir, threads=1)
    assert "standard operators only: no fused attention here (" in runtime.reason
    assert "\n" not in runtime.reason
    assert_equals_the_encoder(runtime, tiny_backbone)
    monkeypatch.setattr(
        "mp2.engine.select.layer_seconds", lambda runtime, backbone, probe: float(runtime.name == "torch")
    )
    chosen = create_runtime("auto", tiny_backbone, engine_dir=engine_dir)
    assert chosen.name == "onnxruntime"
    assert "standard operators only" in chosen.reason


def test_an_onnxruntime_that_gets_it_wrong_is_found_out(
    tiny_backbone: Backbone, engine_dir: Path, monkeypatch: pytest.MonkeyPatch, fresh_probe: None
) -> None:
    real = onnx_cpu_graphs.CpuGraphBuilder.contrib

    def other_heads(self: Any, kind: str, *names: str, **attributes: Any) -> str:
        if "num_heads" in attributes:
            attributes["num_heads"] = 1
        return real(self, kind, *names, **attributes)

    monkeypatch.setattr(onnx_cpu_graphs.CpuGraphBuilder, "contrib", other_heads)
    assert "wrong here by" in OnnxRuntime(tiny_backbone, engine_dir, threads=1).reason


def test_it_is_used_on_the_cpu_in_float32_unless_told_otherwise(
    tiny_backbone: Backbone, engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path | bytes] = []
    real = ort.InferenceSession

    def session(model: Path | bytes, options: Any, providers: Any, **other: Any) -> ort.InferenceSession:
        opened.append(model)
        made = real(model, options, providers=["CPUExecutionProvider"], **other)
        made.get_providers = lambda: [name for name, _ in providers]
        return made

    cpu_graphs_problem()
    monkeypatch.setattr(onnx_session.ort, "InferenceSession", session)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider", *GPU])
    for options, fused in (({}, True), ({"fused": False}, False), ({"provider": "tensorrt"}, False)):
        runtime = OnnxRuntime(tiny_backbone, engine_dir, **options)  # type: ignore[arg-type]
        opened.clear()
        runtime.layer(1, torch.zeros(1, 1, 3, tiny_backbone.config.hidden), None, None)
        assert isinstance(opened[0], bytes) == fused


def test_the_doctor_says_which_operators_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu_graphs_problem() == ""
    assert "; CPU: fused attention" in as_text(examine())
    monkeypatch.setattr(onnx_cpu_probe, "cpu_graphs_problem", lambda: "no luck")
    assert "; CPU: standard operators only: no luck" in as_text(examine())
