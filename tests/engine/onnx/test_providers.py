"""ONNX Runtime's providers: the binding path run on the CPU, the GPU providers' options by a double."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch

from mp2.backbone import Backbone
from mp2.engine import create_backend
from mp2.engine.onnx.backend import OnnxBackend
from mp2.engine.onnx.providers import PROVIDERS, Provider
from mp2.engine.tensorrt.profiles import Profile, TaskShapes, stretched
from mp2.errors import MismatchError, MissingDependencyError, Mp2Error
from mp2.export import compare_stages, export_engine

# onnxruntime's documentation and sources (cuda_ and tensorrt_execution_provider_info.cc)
DOCUMENTED = {
    "CUDAExecutionProvider": {
        "device_id",
        "user_compute_stream",
        "do_copy_in_default_stream",
        "gpu_mem_limit",
        "arena_extend_strategy",
        "cudnn_conv_algo_search",
        "enable_cuda_graph",
        "use_tf32",
        "prefer_nhwc",
        "use_ep_level_unified_stream",
    },
    "TensorrtExecutionProvider": {
        "device_id",
        "user_compute_stream",
        "trt_engine_cache_enable",
        "trt_engine_cache_path",
        "trt_engine_cache_prefix",
        "trt_max_workspace_size",
        "trt_fp16_enable",
        "trt_bf16_enable",
        "trt_int8_enable",
        "trt_layer_norm_fp32_fallback",
        "trt_cuda_graph_enable",
        "trt_builder_optimization_level",
        "trt_timing_cache_enable",
        "trt_timing_cache_path",
        "trt_profile_min_shapes",
        "trt_profile_opt_shapes",
        "trt_profile_max_shapes",
    },
    "CPUExecutionProvider": set(),
}
SHAPES = TaskShapes(candidates=4, examples=3, lengths=(8, 20), prompt_tokens=5)


@pytest.fixture(scope="module")
def half_dir(tiny_backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_engine(
        tiny_backbone, tmp_path_factory.mktemp("half") / "engine", precision="fp16", shapes=SHAPES
    ).path


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, dict[str, str]]]]:
    """The ``providers=`` of every session, which then runs on the CPU as if it were the GPU."""
    seen: list[list[tuple[str, dict[str, str]]]] = []
    real = ort.InferenceSession

    def session(
        model: Any, options: Any, providers: list[tuple[str, dict[str, str]]], enable_fallback: int
    ) -> ort.InferenceSession:
        assert not enable_fallback, "onnxruntime would try again without these options, and print on stdout"
        seen.append(providers)
        made = real(model, options, providers=["CPUExecutionProvider"])
        made.get_providers = lambda: [name for name, _ in providers]
        return made

    monkeypatch.setattr(ort, "InferenceSession", session)
    monkeypatch.setattr(ort, "get_available_providers", lambda: list(PROVIDERS.values()))
    return seen


def test_a_chain_hands_its_activations_on_where_they_lie(
    tiny_backbone: Backbone, half_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: list[tuple[str, int, tuple[int, ...]]] = []
    real = ort.IOBinding.bind_input

    def bind(self: Any, name: str, device: str, index: int, element: int, shape: list[int], at: int) -> None:
        bound.append((name, at, (element, *shape)))
        real(self, name, device, index, element, shape, at)

    monkeypatch.setattr(ort.IOBinding, "bind_input", bind)
    runtime = OnnxBackend(tiny_backbone, half_dir, precision="fp16", threads=1)
    config = tiny_backbone.config
    hidden = runtime.embed(torch.arange(10, 32).view(2, 11))
    assert hidden.dtype == torch.float16
    prefix = torch.randn(2, 4, 1, config.n_heads, 5, config.head_size)
    addresses = []
    for i in range(config.n_layers):
        addresses.append(hidden.data_ptr())
        hidden = runtime.layer(i, hidden, None, (prefix[0], prefix[1]))
    logits = runtime.head(hidden, torch.randn(2, config.hidden), torch.randn(2))
    assert logits.dtype == torch.float32
    given = [at for name, at, _ in bound if name == "hidden"]
    assert given == [*addresses, hidden.data_ptr()]
    assert {at for name, at, _ in bound if name == "prefix_keys"} == {prefix[0].data_ptr()}


def test_a_typed_folder_runs_on_onnxruntime_within_its_precision(
    tiny_backbone: Backbone, half_dir: Path
) -> None:
    runtime = OnnxBackend(tiny_backbone, half_dir, precision="fp16", threads=1)
    assert [c.line() for c in compare_stages(runtime, tiny_backbone) if not c.ok] == []


@pytest.mark.parametrize("kind", ["cuda", "tensorrt"])
def test_options_are_documented_ones_with_the_fallbacks_behind(kind: str, tmp_path: Path) -> None:
    provider = Provider(kind=kind, device="cuda:1", cache=tmp_path / "cache", precision="bf16", shapes=SHAPES)
    inputs = {"hidden": ["P", "N", "T", 24], "span_weight": [2, 24], "span_bias": [2]}
    arguments = provider.arguments("head.onnx", inputs, 4711)
    names = [name for name, _ in arguments]
    expected = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    assert names == (expected if kind == "tensorrt" else expected[1:])
    for name, options in arguments:
        assert set(options) <= DOCUMENTED[name]
        assert all(isinstance(value, str) for value in options.values())
    first = arguments[0][1]
    assert (first["device_id"], first["user_compute_stream"]) == ("1", "4711")
    if kind == "tensorrt":
        assert first["trt_engine_cache_enable"] == first["trt_timing_cache_enable"] == "True"
        assert first["trt_engine_cache_path"] == str(tmp_path / "cache")
        assert first["trt_engine_cache_prefix"] == "head-bf16"
        assert (first["trt_fp16_enable"], first["trt_bf16_enable"]) == ("False", "True")
        assert first["trt_profile_min_shapes"] == "hidden:1x1x1x24"
        assert first["trt_profile_opt_shapes"] == first["trt_profile_max_shapes"] == "hidden:4x3x20x24"
        assert (tmp_path / "cache").is_dir()
    else:
        assert first["use_tf32"] == "0"


@pytest.mark.parametrize(("precision", "flags"), [("fp32", "FF"), ("fp16", "TF"), ("bf16", "FT")])
def test_the_tensorrt_provider_may_choose_a_type_for_a_float32_folder(
    tiny_backbone: Backbone,
    engine_dir: Path,
    opened: list[list[tuple[str, dict[str, str]]]],
    precision: str,
    flags: str,
) -> None:
    runtime = OnnxBackend(tiny_backbone, engine_dir, provider="tensorrt", precision=precision)
    runtime.embed(torch.arange(10, 32).view(2, 11))
    options = opened[0][0][1]
    assert options["trt_fp16_enable"][0] + options["trt_bf16_enable"][0] == flags
    assert "trt_profile_min_shapes" not in options
    assert options["trt_engine_cache_path"] == str(engine_dir / "onnxruntime")
    with pytest.raises(MismatchError, match="holds fp32, expected fp8"):
        OnnxBackend(tiny_backbone, engine_dir, provider="tensorrt", precision="fp8")


def test_a_typed_folder_needs_no_flag_and_brings_its_profiles(
    tiny_backbone: Backbone, half_dir: Path, opened: list[list[tuple[str, dict[str, str]]]]
) -> None:
    runtime = OnnxBackend(tiny_backbone, half_dir, provider="tensorrt", precision="fp16")
    runtime.layer(0, runtime.embed(torch.arange(10, 32).view(2, 11)), None, None)
    options = opened[1][0][1]
    assert (options["trt_fp16_enable"], options["trt_bf16_enable"]) == ("False", "False")
    assert options["trt_engine_cache_prefix"] == "layer_00_plain-fp32"
    assert options["trt_profile_max_shapes"] == "hidden:4x3x20x24,mask:3x20"


def test_without_a_precision_the_folders_own_is_taken(tiny_backbone: Backbone, half_dir: Path) -> None:
    runtime = create_backend("onnxruntime", tiny_backbone, engine_dir=half_dir, precision="auto")
    assert runtime.precision == "fp16"


def test_a_missing_provider_says_what_to_install(tiny_backbone: Backbone, engine_dir: Path) -> None:
    for kind, extra in (("cuda", ""), ("tensorrt", " tensorrt")):
        with pytest.raises(MissingDependencyError, match=f"pip install onnxruntime-gpu{extra}"):
            OnnxBackend(tiny_backbone, engine_dir, provider=kind)


def test_a_provider_that_onnxruntime_leaves_out_is_an_error_when_the_runtime_is_made(
    tiny_backbone: Backbone,
    half_dir: Path,
    opened: list[list[tuple[str, dict[str, str]]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = ort.InferenceSession

    def without_libraries(*args: Any, **options: Any) -> ort.InferenceSession:
        made = session(*args, **options)
        made.get_providers = lambda: ["CPUExecutionProvider"]
        return made

    monkeypatch.setattr(ort, "InferenceSession", without_libraries)
    with pytest.raises(MissingDependencyError, match=r"left TensorrtExecutionProvider out .*CPUExec.* cuDNN"):
        OnnxBackend(tiny_backbone, half_dir, provider="tensorrt", precision="fp16")


def test_what_onnxruntime_refuses_says_so_and_what_to_do(
    tiny_backbone: Backbone,
    engine_dir: Path,
    opened: list[list[tuple[str, dict[str, str]]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("CUDA failure 35: driver version is insufficient\n(more)")

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(
        Mp2Error, match=r"cannot load embed\.onnx .*failure 35: driver version is insufficient; use --runtime"
    ):
        OnnxBackend(tiny_backbone, engine_dir, provider="tensorrt")
    assert capsys.readouterr().out == ""


def test_the_tensorrt_provider_has_the_name_by_which_it_is_made_again(
    tiny_backbone: Backbone, half_dir: Path, opened: list[list[tuple[str, dict[str, str]]]]
) -> None:
    runtime = OnnxBackend(tiny_backbone, half_dir, provider="tensorrt", precision="fp16")
    assert runtime.name == "onnxruntime-tensorrt"
    assert OnnxBackend(tiny_backbone, half_dir, precision="fp16").name == "onnxruntime"


def test_batches_beyond_the_profile_open_the_graph_again_with_a_larger_one(
    tiny_backbone: Backbone, half_dir: Path, opened: list[list[tuple[str, dict[str, str]]]]
) -> None:
    lines: list[str] = []
    runtime = OnnxBackend(tiny_backbone, half_dir, provider="tensorrt", precision="fp16", note=lines.append)
    small = runtime.embed(torch.arange(10, 32).view(2, 11))
    (own,) = opened
    assert lines == []
    ids = torch.arange(10, 10 + 11 * 33).view(11, 33) % tiny_backbone.config.vocab_size
    hidden = runtime.embed(ids)  # the profile ends at 3 examples of 20 tokens
    assert len(opened) == 2
    grown = opened[1][0][1]
    assert grown["trt_profile_min_shapes"] == "input_ids:1x1"
    assert grown["trt_profile_opt_shapes"] == own[0][1]["trt_profile_opt_shapes"] == "input_ids:3x20"
    assert grown["trt_profile_max_shapes"] == "input_ids:16x64"
    assert grown["trt_engine_cache_prefix"].startswith(own[0][1]["trt_engine_cache_prefix"] + "-")
    assert lines == [
        "building a larger TensorRT engine of embed.onnx (up to N 16, T 64): "
        "its profile does not cover {'N': 11, 'T': 33}"
    ]
    assert torch.equal(runtime.embed(torch.arange(10, 32).view(2, 11)), small)
    runtime.embed(ids[:, :40].repeat(1, 2)[:, :60])
    assert len(opened) == 2
    rng = torch.Generator().manual_seed(0)
    prefix = torch.randn(2, 1, 1, 4, 5, 6, generator=rng)
    runtime.layer(1, hidden, None, (prefix[0], prefix[1]))
    assert opened[-1][0][1]["trt_profile_max_shapes"] == (
        "hidden:4x16x64x24,mask:16x64,prefix_keys:4x1x4x5x6,prefix_values:4x1x4x5x6"
    )


def test_a_stretched_profile_covers_both_and_is_tuned_for_the_same() -> None:
    profile = Profile({"P": (1, 20, 20), "N": (1, 32, 32), "T": (1, 64, 64)})
    assert stretched(profile, {"P": 1, "N": 166, "T": 99}).ranges == {
        "P": (1, 20, 20),
        "N": (1, 32, 256),
        "T": (1, 64, 128),
    }
