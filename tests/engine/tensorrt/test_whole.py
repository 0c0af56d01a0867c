"""A bundle's graph as a plan, on the double of TensorRT: names, shapes, values, rebuilt where it must be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mp2.backbone import Backbone, BackboneConfig
from mp2.engine.bundle import Bundle
from mp2.engine.tensorrt import whole
from mp2.engine.tensorrt.plans import Gpu
from mp2.engine.tensorrt.whole import PlannedGraph
from mp2.errors import FormatError, MissingDependencyError, Mp2Error
from mp2.export.bundle import build_bundle_plans
from mp2.export.graphs import INLINE_GRAPH, PREFIX_GRAPH

from .double import FakeDevice, FakeLibrary


@pytest.fixture(params=[10, 11])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    library = FakeLibrary(request.param)
    monkeypatch.setattr(whole, "load_tensorrt", lambda: library)
    monkeypatch.setattr(whole, "resolve_device", torch.device)
    monkeypatch.setattr(whole, "CudaDevice", lambda name: FakeDevice(name, library))
    monkeypatch.setattr(Gpu, "current", classmethod(lambda cls, device: cls("NVIDIA H100", "9.0")))
    return library


def feeds(config: BackboneConfig, n: int, t: int, m: int) -> dict[str, torch.Tensor]:
    keys, values = torch.randn(2, n, config.n_layers, config.n_heads, m, config.head_size)
    return {
        "input_ids": torch.arange(10, 10 + n * t).view(n, t) % config.vocab_size,
        "attention_mask": torch.ones(n, t, dtype=torch.int64),
        "prompt_length": torch.full((n,), m),
        "prompt_keys": keys,
        "prompt_values": values,
        "span_weight": torch.randn(n, 2, config.hidden),
        "span_bias": torch.randn(n, 2),
        "segments": torch.tensor([[[0, 2]]]).expand(n, 1, 2),
    }


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_plans_of_whole_graphs_equal_torch_whatever_a_batch_mixes(
    tiny_backbone: Backbone, library: FakeLibrary, bundle: Callable[[str], Bundle], precision: str
) -> None:
    seen = []
    plans = build_bundle_plans(bundle(precision), tiny_backbone, device="cpu", report=seen.append)
    assert set(plans) == {PREFIX_GRAPH, INLINE_GRAPH}
    assert len(seen) == 2 * 3 * 4
    assert [c.line() for c in seen if not c.ok] == []
    assert library.elsewhere == []


def test_a_plan_is_found_again_and_grows_for_larger_batches(
    tiny_backbone: Backbone, library: FakeLibrary, bundle: Callable[[str], Bundle]
) -> None:
    folder, notes = bundle("fp16"), list[str]()
    config = tiny_backbone.config

    first = PlannedGraph(folder.path, PREFIX_GRAPH, device="cpu", note=notes.append)
    first.prepare()
    (profile, _) = [call for (call,) in library.named("IBuilderConfig.add_optimization_profile")]
    assert profile._behaviour.shapes["prompt_keys"] == [[1, 3, 4, 1, 6], [4, 3, 4, 5, 6], [4, 3, 4, 5, 6]]
    got = first.run(feeds(config, 3, 7, 5))
    assert {name: tuple(x.shape) for name, x in got.items()} == {
        "start_logits": (3, 7),
        "end_logits": (3, 7),
        "hidden": (3, 7, config.hidden),
        "pooled": (3, 1, config.n_layers + 1, config.hidden),
    }
    without = feeds(config, 2, 9, 0)
    nothing = first.run(without)
    zeros = torch.zeros(2, config.n_layers, config.n_heads, 4, config.head_size)
    padded = first.run({**without, "prompt_keys": zeros, "prompt_values": zeros})
    torch.testing.assert_close(nothing["hidden"], padded["hidden"])
    again = PlannedGraph(folder.path, PREFIX_GRAPH, device="cpu", note=notes.append)
    again.run(feeds(config, 4, 20, 5))
    assert notes == [f"building a TensorRT plan of {PREFIX_GRAPH}: there is none yet"]
    again.run(feeds(config, 5, 20, 5))
    assert "no profile of its plan covers {'N': 5, 'T': 20, 'P': 5, 'm': 5, 'S': 1}" in notes[1]


def test_a_damaged_bundle_is_refused(library: FakeLibrary, bundle: Callable[[str], Bundle]) -> None:
    folder = bundle("fp32")
    (folder.path / "embed.bin").write_bytes(b"")
    with pytest.raises(FormatError, match=r"embed\.bin: sha256 is .* write the bundle again"):
        PlannedGraph(folder.path, PREFIX_GRAPH, device="cpu")


def test_a_call_sets_shapes_and_addresses_and_queues_on_the_stream(
    tiny_backbone: Backbone, library: FakeLibrary, bundle: Callable[[str], Bundle]
) -> None:
    planned = PlannedGraph(bundle("fp32").path, PREFIX_GRAPH, device="cpu", note=lambda line: None)
    given = feeds(tiny_backbone.config, 3, 7, 5)
    planned.run(given)
    library.calls.clear()
    out = planned.run(given)
    names = [name.removeprefix("IExecutionContext.") for name, _ in library.calls]
    assert names == [
        *["set_input_shape"] * 8,
        *["get_tensor_shape"] * 4,
        "ICudaEngine.get_device_memory_size_for_profile_v2",
        "set_device_memory",
        *["set_tensor_address"] * 12,
        "execute_async_v3",
    ]
    assert ("prompt_keys", tuple(given["prompt_keys"].shape)) in library.named(
        "IExecutionContext.set_input_shape"
    )
    addresses = dict(library.named("IExecutionContext.set_tensor_address"))
    assert addresses["input_ids"] == given["input_ids"].data_ptr()
    assert addresses["hidden"] == out["hidden"].data_ptr()
    assert library.named("IExecutionContext.execute_async_v3") == [(7,)]


@pytest.mark.parametrize(
    ("reason", "kind"), [("no kernel image", Mp2Error), ("CUDA error: out of memory", MemoryError)]
)
def test_a_failed_run_carries_tensorrts_words_and_is_out_of_memory_if_it_is_that(
    tiny_backbone: Backbone,
    library: FakeLibrary,
    bundle: Callable[[str], Bundle],
    reason: str,
    kind: type[Exception],
) -> None:
    planned = PlannedGraph(bundle("fp32").path, PREFIX_GRAPH, device="cpu", note=lambda line: None)
    planned.prepare()
    library.refuse["run"] = reason
    with pytest.raises(kind, match=rf"backbone\.onnx: TensorRT did not run \({reason}\)"):
        planned.run(feeds(tiny_backbone.config, 1, 4, 5))


def test_a_plan_is_built_of_what_was_read_and_checked(
    tiny_backbone: Backbone, library: FakeLibrary, bundle: Callable[[str], Bundle]
) -> None:
    folder = bundle("fp32")
    planned = PlannedGraph(folder.path, PREFIX_GRAPH, device="cpu", note=lambda line: None)
    planned.prepare()
    ((parsed,),) = library.named("OnnxParser.parse_from_file")
    assert not parsed.startswith(str(folder.path))
    planned = PlannedGraph(folder.path, INLINE_GRAPH, device="cpu", note=lambda line: None)
    weights = folder.path / "embed.bin"
    data = bytearray(weights.read_bytes())
    data[0] ^= 1  # behind the check of the whole folder
    weights.write_bytes(data)
    with pytest.raises(FormatError, match=r"embed\.bin: sha256 is"):
        planned.prepare()


def test_without_tensorrt_the_error_says_what_to_install(bundle: Callable[[str], Bundle]) -> None:
    with pytest.raises(MissingDependencyError, match=r"pip install 'mp2\[gpu\]'"):
        PlannedGraph(bundle("fp32").path, PREFIX_GRAPH)
