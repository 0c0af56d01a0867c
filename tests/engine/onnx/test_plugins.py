"""Plugin providers: the calls that are made, checked against the installed onnxruntime, by stand-ins."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from mp2 import doctor
from mp2.backbone import Backbone, load_backbone
from mp2.engine import create_backend
from mp2.engine.onnx import plugins
from mp2.engine.onnx.plugins import PLUGINS, add_plugin, installed, plugin_devices
from mp2.errors import MissingDependencyError
from mp2.export import compare_stages, export_engine
from mp2.export.graphs import PREFIX_GRAPH
from mp2.export.parity import compare_whole
from mp2.serve.model import ServedBundle

KIND = "tensorrt-rtx"


def stand_in(
    monkeypatch: pytest.MonkeyPatch, library: str, name: str = "NvTensorRTRTXExecutionProvider"
) -> None:
    """A package of that name whose library is ``library``."""
    module: Any = ModuleType(PLUGINS[KIND].module)
    module.__spec__ = importlib.machinery.ModuleSpec(PLUGINS[KIND].module, None)
    module.get_ep_name, module.get_library_path = (lambda: name), (lambda: library)
    monkeypatch.setitem(sys.modules, PLUGINS[KIND].module, module)
    monkeypatch.setattr(plugins, "_registered", {})


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "_registered", {})
    monkeypatch.setitem(sys.modules, PLUGINS[KIND].module, None)
    with pytest.raises(MissingDependencyError, match="pip install onnxruntime-ep-nv-tensorrt-rtx"):
        plugin_devices(KIND)


def test_a_library_that_cannot_be_loaded_is_said_with_onnxruntimes_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The installed onnxruntime takes name and path, and refuses what is no library."""
    stand_in(monkeypatch, str(tmp_path / "libnothing.so"))
    assert installed(KIND)
    with pytest.raises(
        MissingDependencyError, match=r"cannot load onnxruntime-ep-nv-tensorrt-rtx: .*libnothing\.so"
    ):
        plugin_devices(KIND)
    (tmp_path / "libnothing.so").write_bytes(b"no library")
    with pytest.raises(MissingDependencyError, match="it needs an RTX card"):
        plugin_devices(KIND)


def test_a_machine_without_a_device_of_it_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "x.so")
    monkeypatch.setattr(ort, "register_execution_provider_library", lambda name, path: None)
    with pytest.raises(MissingDependencyError, match="finds no device here"):
        plugin_devices(KIND)


def test_its_device_is_added_to_real_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's own device stands for the plugin's; the settings have the types that are asked for."""
    stand_in(monkeypatch, "x.so", name="CPUExecutionProvider")
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(
        ort, "register_execution_provider_library", lambda name, path: asked.append((name, path))
    )
    options = ort.SessionOptions()
    assert add_plugin(options, KIND, {}) == "CPUExecutionProvider"
    assert add_plugin(ort.SessionOptions(), KIND, {}) == "CPUExecutionProvider"
    assert asked == [("CPUExecutionProvider", "x.so")]  # once a process
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    session = ort.InferenceSession(model.SerializeToString(), options)
    assert session.get_providers()[0] == "CPUExecutionProvider"
    assert session.run(None, {"x": [1.0]})[0].tolist() == [-1.0]


def test_a_run_computes_on_it(
    monkeypatch: pytest.MonkeyPatch, tiny_backbone: Backbone, engine_dir: Path
) -> None:
    """The CPU's own device stands for the plugin's: every stage, tensors from the host's memory."""
    stand_in(monkeypatch, "x.so", name="CPUExecutionProvider")
    monkeypatch.setattr(ort, "register_execution_provider_library", lambda name, path: None)
    given: list[dict[str, str]] = []
    real = ort.SessionOptions.add_provider_for_devices

    def add(self: Any, devices: Any, settings: dict[str, str]) -> None:
        given.append(settings)
        real(self, devices, settings)

    monkeypatch.setattr(ort.SessionOptions, "add_provider_for_devices", add)
    backend = create_backend(f"onnxruntime-{KIND}", tiny_backbone, engine_dir=engine_dir, device="auto")
    assert (backend.name, backend.device, backend.precision) == (f"onnxruntime-{KIND}", "cpu", "fp32")
    comparisons = list(compare_stages(backend, tiny_backbone))
    assert [c.line() for c in comparisons if not c.ok] == []
    assert len(comparisons) == 3 + 5 * tiny_backbone.config.n_layers + 2
    assert given
    assert all(settings == {} for settings in given)


def test_openvino_is_told_to_compute_in_float32_and_on_how_many_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By what it reads: the threads of a session's options are not passed on to it."""
    given: list[dict[str, str]] = []
    monkeypatch.setattr(plugins, "plugin_devices", lambda kind: ["a device"])
    monkeypatch.setitem(plugins._registered, "openvino", "OpenVINOExecutionProvider")
    for threads in (3, 0):
        options = SimpleNamespace(
            intra_op_num_threads=threads,
            add_provider_for_devices=lambda devices, settings: given.append(settings),
        )
        add_plugin(options, "openvino")
    assert [json.loads(settings["load_config"]) for settings in given] == [
        {"CPU": {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 3}},
        {"CPU": {"INFERENCE_PRECISION_HINT": "f32"}},
    ]


@pytest.mark.skipif(not installed("openvino"), reason="onnxruntime-ep-openvino is not installed")
def test_openvino_computes_float32_on_as_many_threads_as_it_is_told(tmp_path: Path) -> None:
    """As the server opens it: torch's logits, and processor time that is the clock's."""
    backbone = load_backbone("mini")
    served = ServedBundle(export_engine(backbone, tmp_path / "engine").path, device="openvino", threads=1)
    compared = list(
        compare_whole(
            lambda feeds, outputs: [
                torch.from_numpy(x)
                for x in served.run(
                    "backbone", {k: x.numpy() for k, x in feeds.items()}, list(outputs)
                ).values()
            ],
            backbone,
            "fp32",
            PREFIX_GRAPH,
        )
    )
    assert [c.line() for c in compared if not c.ok] == []
    config, n, t = backbone.config, 64, 64
    keys = np.zeros((1, config.n_layers, config.n_heads, 16, config.head_size), np.float32)
    feeds = {
        "input_ids": np.ones((n, t), np.int64),
        "attention_mask": np.ones((n, t), np.int64),
        "segments": np.zeros((n, 1, 2), np.int64),
        "prompt_length": np.array([16]),
        "prompt_keys": keys,
        "prompt_values": keys,
        "span_weight": np.zeros((1, 2, config.hidden), np.float32),
        "span_bias": np.zeros((1, 2), np.float32),
    }
    served.run("backbone", feeds, ["start_logits"])
    clock, processor = time.perf_counter(), time.process_time()
    for _ in range(20):
        served.run("backbone", feeds, ["start_logits"])
    assert time.process_time() - processor < 1.2 * (time.perf_counter() - clock)


def test_doctor_shows_each_plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, str(tmp_path / "libnothing.so"))
    found = doctor.examine()
    lines = dict(doctor.rows(found))
    assert "cannot load onnxruntime-ep-nv-tensorrt-rtx" in lines["plugin tensorrt-rtx"]
    assert "plugin openvino" in lines


def test_the_server_takes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from command_line import mp2

    engine = export_engine(load_backbone("mini"), tmp_path / "engine").path
    stand_in(monkeypatch, str(tmp_path / "libnothing.so"))
    done = mp2("serve", "--bundle", engine, "--device", "tensorrt-rtx")
    assert done.exit_code == 2
    assert "cannot load onnxruntime-ep-nv-tensorrt-rtx" in done.stderr
