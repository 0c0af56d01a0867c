"""The TensorRT runtime on a double of the library that computes on the CPU, at the addresses it is given."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mp2.backbone import Backbone
from mp2.engine import Objective, Scorer, create_backend, select
from mp2.engine.agreement import spearman
from mp2.engine.backend import Probe
from mp2.engine.chain import ChainBackend
from mp2.engine.cpu.backend import CpuBackend
from mp2.engine.cuda.backend import CudaBackend
from mp2.engine.folder import EngineFolder
from mp2.engine.select import layer_seconds
from mp2.engine.tensorrt import backend as backend_module
from mp2.engine.tensorrt.backend import TensorRTBackend
from mp2.engine.tensorrt.captures import Captures
from mp2.engine.tensorrt.plans import Gpu
from mp2.engine.tensorrt.profiles import TaskShapes
from mp2.errors import (
    FormatError,
    MismatchError,
    MissingDependencyError,
    Mp2Error,
    UnknownNameError,
    UsageError,
)
from mp2.export import build_plans, compare_stages, export_engine
from mp2.prompts import PromptSet
from mp2.tasks import MrcInput

from ..slow_reference import M
from .double import FakeDevice, FakeLibrary

P, N, T = 3, 2, 11
APART = 20.0  # standard deviation of candidates: prompts matter


@pytest.fixture(params=[10, 11])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """The double in TensorRT's place, and a CPU "GPU"."""
    library = FakeLibrary(request.param)
    monkeypatch.setattr(backend_module, "load_tensorrt", lambda: library)
    monkeypatch.setattr(backend_module, "resolve_device", torch.device)
    monkeypatch.setattr(backend_module, "CudaDevice", lambda name: FakeDevice(name, library))
    monkeypatch.setattr(Gpu, "current", classmethod(lambda cls, device: cls("NVIDIA H100", "9.0")))
    return library


@pytest.fixture(scope="module")
def folders(tiny_backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """(precision, shallow) -> an engine folder; plans of earlier tests lie in it."""
    made: dict[tuple[str, bool], Path] = {}

    def get(precision: str, shallow: bool = False) -> Path:
        if (precision, shallow) not in made:
            shapes = TaskShapes(candidates=4, examples=8, lengths=(12, 32), prompt_tokens=M, shallow=shallow)
            out = tmp_path_factory.mktemp("typed") / "engine"
            made[precision, shallow] = export_engine(
                tiny_backbone, out, precision=precision, shapes=shapes
            ).path
        return made[precision, shallow]

    return get


def open_runtime(
    backbone: Backbone, folder: Path, precision: str = "fp16", **options: object
) -> TensorRTBackend:
    return TensorRTBackend(
        backbone, folder, device="cpu", precision=precision, note=lambda line: None, **options
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8"])
def test_every_stage_equals_the_encoder_within_the_precision(
    tiny_backbone: Backbone, library: FakeLibrary, folders: Callable[..., Path], precision: str
) -> None:
    runtime = open_runtime(tiny_backbone, folders(precision), precision)
    comparisons = list(compare_stages(runtime, tiny_backbone))
    assert [c.line() for c in comparisons if not c.ok] == []
    assert len(comparisons) == 3 + 5 * tiny_backbone.config.n_layers + 2


def test_losses_of_populations_follow_the_reference(
    tiny_backbone: Backbone,
    library: FakeLibrary,
    folders: Callable[..., Path],
    deep: PromptSet,
    train: list[MrcInput],
) -> None:
    z = deep.fuse(torch.ones(deep.z.shape[:2])).numpy()
    populations = []
    for runtime in (CpuBackend(tiny_backbone), open_runtime(tiny_backbone, folders("fp16"))):
        objective = Objective(runtime.forward(deep), train)
        objective.set_incumbent(z)
        rng = np.random.default_rng(0)
        found = [objective.full_losses(z + APART * rng.standard_normal((12, *z.shape))).fetch()]
        for layer in (0, 2, 1):
            found.append(
                objective.layer_losses(
                    layer, z[layer] + APART * rng.standard_normal((12, z.shape[1]))
                ).fetch()
            )
            objective.commit(layer, z[layer] + APART * rng.standard_normal(z.shape[1]))
        populations.append(found)
    for exact, rough in zip(*populations, strict=True):
        check_close(rough, exact)


def check_close(rough: np.ndarray, exact: np.ndarray) -> None:
    """Errors are little of the population's spread: of the losses they are, whatever the prompts do."""
    np.testing.assert_allclose(rough, exact, rtol=0, atol=0.03 * np.ptp(exact))
    assert spearman(rough, exact) > 0.97


def test_shallow_prompts_run_without_prefix_inputs_but_in_the_last_layer(
    tiny_backbone: Backbone,
    library: FakeLibrary,
    folders: Callable[..., Path],
    shallow: PromptSet,
    train: list[MrcInput],
) -> None:
    z = APART * np.random.default_rng(1).standard_normal((12, *shallow.z.shape[::2]))
    runtime = open_runtime(tiny_backbone, folders("fp16", True))
    rough = Objective(runtime.forward(shallow), train).full_losses(z).fetch()
    exact = Objective(CpuBackend(tiny_backbone).forward(shallow), train).full_losses(z).fetch()
    check_close(rough, exact)
    used = {Path(args[0]).stem for args in library.named("OnnxParser.parse_from_file")}
    assert used == {"embed", "embed_inline", "layer_00_plain", "layer_01_plain", "layer_02"}


def test_the_probe_of_shallow_prompts_builds_only_plans_that_a_run_uses(
    tiny_backbone: Backbone,
    library: FakeLibrary,
    folders: Callable[..., Path],
    shallow: PromptSet,
    train: list[MrcInput],
) -> None:
    runtime = open_runtime(tiny_backbone, folders("fp16", True))
    probe = Probe(n_candidates=4, n_examples=8, n_tokens=14, prompt_tokens=M, inline=True)
    assert layer_seconds(runtime, probe) > 0
    probed = set(runtime._calls)
    objective = Objective(runtime.forward(shallow), train)
    z = APART * np.random.default_rng(1).standard_normal((4, *shallow.z.shape[::2]))
    objective.full_losses(z).fetch()
    Scorer(objective.forward).outputs(z[0], train[:2]).fetch()
    assert (
        probed
        <= set(runtime._calls)
        == {
            *("embed.onnx", "embed_inline.onnx", "layer_00_plain.onnx", "layer_01_plain.onnx"),
            "layer_02.onnx",
        }
    )


@pytest.mark.parametrize("built", [True, False], ids=["plans built", "graphs only"])
def test_auto_on_a_gpu_compares_what_the_folder_is_for_and_builds_nothing(
    tiny_backbone: Backbone,
    library: FakeLibrary,
    folders: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    built: bool,
) -> None:
    monkeypatch.setattr("mp2.engine.tensorrt.library.load_tensorrt", lambda: library)
    monkeypatch.setattr(select, "_is_gpu", lambda device: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        select, "CudaBackend", lambda *args, **options: CudaBackend(*args, **{**options, "precision": "fp32"})
    )
    order = ["tensorrt", "torch", "onnxruntime"]
    timed: list[str] = []

    def seconds(runtime: ChainBackend, probe: Probe) -> float:
        timed.append(runtime.name)
        layer_seconds(runtime, probe)
        return 1e-3 * (1 + order.index(runtime.name))

    monkeypatch.setattr(select, "layer_seconds", seconds)
    ignored = shutil.ignore_patterns("plans")
    folder = Path(shutil.copytree(folders("fp16"), tmp_path / "e", ignore=ignored))
    if built:
        open_runtime(tiny_backbone, folder).prepare()
    n_built = len(library.named("Builder.build_serialized_network"))
    chosen = create_backend("auto", tiny_backbone, engine_dir=folder, precision="auto")
    assert len(library.named("Builder.build_serialized_network")) == n_built
    if built:
        assert timed == ["torch", "onnxruntime", "tensorrt"]
        assert (chosen.name, chosen.precision) == ("tensorrt", "fp16")
        assert chosen.reason == (
            "auto: tensorrt, the fastest for one layer of 4 candidates x 8 x 32 tokens "
            "(torch 2.0 ms, onnxruntime 3.0 ms, tensorrt 1.0 ms)"
        )
    else:
        assert (chosen.name, timed) == ("torch", ["torch", "onnxruntime"])
        assert "; not tensorrt: there is no plan of embed.onnx for this GPU yet" in chosen.reason


def test_a_call_sets_shapes_and_addresses_and_queues_on_the_stream(
    tiny_backbone: Backbone, library: FakeLibrary, folders: Callable[..., Path]
) -> None:
    runtime = open_runtime(tiny_backbone, folders("fp16"), cuda_graphs=False)
    config = tiny_backbone.config
    hidden = torch.randn(1, N, T, config.hidden).half()
    prefix = torch.randn(2, P, 1, config.n_heads, M, config.head_size)
    runtime.layer(1, hidden, None, (prefix[0], prefix[1]))
    library.calls.clear()
    out = runtime.layer(1, hidden, None, (prefix[0], prefix[1]))
    assert (out.shape, out.dtype) == ((P, N, T, config.hidden), torch.float16)
    names = [name.removeprefix("IExecutionContext.") for name, _ in library.calls]
    assert names == [
        "ICudaEngine.get_device_memory_size_for_profile_v2",
        "set_device_memory",
        *["set_tensor_address"] * 5,
        "execute_async_v3",
    ]
    addresses = dict(library.named("IExecutionContext.set_tensor_address"))
    assert addresses["hidden"] == hidden.data_ptr()
    assert addresses["prefix_values"] == prefix[1].data_ptr()
    assert addresses["hidden_out"] == out.data_ptr()
    assert library.named("IExecutionContext.execute_async_v3") == [(7,)]
    library.calls.clear()
    runtime.layer(1, hidden[:, :1], None, (prefix[0], prefix[1]))
    assert library.named("IExecutionContext.set_input_shape") == [
        ("hidden", (1, 1, T, config.hidden)),
        ("mask", (1, T)),
        ("prefix_keys", tuple(prefix[0].shape)),
        ("prefix_values", tuple(prefix[1].shape)),
    ]


def test_repeated_calls_are_captured_and_replayed_wherever_their_tensors_lie(
    tiny_backbone: Backbone, library: FakeLibrary, folders: Callable[..., Path]
) -> None:
    runtime = open_runtime(tiny_backbone, folders("fp16"))
    device = runtime._on
    assert isinstance(device, FakeDevice)
    config = tiny_backbone.config
    hidden = torch.randn(P, N, T, config.hidden).half()
    prefix = torch.randn(2, 1, 1, config.n_heads, M, config.head_size)
    mask = torch.ones(N, T, dtype=torch.bool)
    kept = []  # results and inputs live on: every call has memory of its own
    for _ in range(5):
        x = hidden.clone()
        kept.append((x, runtime.layer(0, x, mask, (prefix[0], prefix[1]))))
    assert device.replays == 3
    assert len({x.data_ptr() for pair in kept for x in pair}) == 10
    for _, result in kept:  # no replay wrote over what an earlier one gave
        torch.testing.assert_close(result, kept[0][1], rtol=0, atol=0)
    contexts = library.named("ICudaEngine.create_execution_context")
    assert len(contexts) == 2  # the captured graph has one of its own
    assert not torch.equal(runtime.layer(0, hidden + 1, mask, (prefix[0], prefix[1])), kept[0][1])
    assert device.replays == 4


def test_captured_calls_of_all_layers_share_their_fixed_memory_and_disturb_no_other(
    tiny_backbone: Backbone, library: FakeLibrary, folders: Callable[..., Path]
) -> None:
    runtime = open_runtime(tiny_backbone, folders("fp16"))
    plain = open_runtime(tiny_backbone, folders("fp16"), cuda_graphs=False)
    config, device = tiny_backbone.config, runtime._on
    assert isinstance(device, FakeDevice)
    prefix = torch.randn(2, 1, 1, config.n_heads, M, config.head_size)
    texts = [torch.randn(P, N, t, config.hidden).half() for t in (11, 9, 12)]  # the last one needs more
    for _ in range(6):
        for text in texts:
            found, expected = text, text
            for layer in range(config.n_layers):
                found = runtime.layer(layer, found, None, (prefix[0], prefix[1]))
                expected = plain.layer(layer, expected, None, (prefix[0], prefix[1]))
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert device.replays == (4 + 2 + 2) * config.n_layers  # the graphs of the first two went, and came again
    assert set(runtime._scratch._fixed) == {"hidden", "mask", "prefix_keys", "prefix_values", "hidden_out"}
    assert runtime._scratch._fixed["hidden"].numel() == texts[2].nbytes


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: operation failed due to a previous error during capture"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_a_call_that_cannot_be_captured_runs_on_uncaptured(
    tiny_backbone: Backbone,
    library: FakeLibrary,
    folders: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    runtime = open_runtime(tiny_backbone, folders("fp16"))
    n_tried = 0

    def capture(work: Callable[[int], None]) -> Callable[[], None]:
        nonlocal n_tried
        n_tried += 1
        raise error

    monkeypatch.setattr(runtime._on, "capture", capture)
    ids = torch.arange(10, 10 + N * T).view(N, T)
    first = runtime.embed(ids)
    for _ in range(5):
        torch.testing.assert_close(runtime.embed(ids), first, rtol=0, atol=0)
    assert n_tried == 1
    assert capsys.readouterr().err == (
        f"mp2: embed.onnx: not recorded as a CUDA graph, runs call by call ({error})\n"
    )


def test_tensorrt_builds_loads_and_runs_while_its_device_is_the_current_one(
    tiny_backbone: Backbone,
    library: FakeLibrary,
    folders: Callable[..., Path],
    deep: PromptSet,
    train: list[MrcInput],
    tmp_path: Path,
) -> None:
    ignored = shutil.ignore_patterns("plans")
    folder = Path(shutil.copytree(folders("fp16"), tmp_path / "e", ignore=ignored))
    for prepared in (True, False):
        runtime = open_runtime(tiny_backbone, folder)
        if prepared:
            runtime.prepare()
        z = np.random.default_rng(0).standard_normal((3, deep.z.shape[0], deep.z.shape[-1]))
        for _ in range(4):  # captured, too
            Objective(runtime.forward(deep), train).full_losses(z).fetch()
    assert library.named("Builder.build_serialized_network")
    assert library.named("IExecutionContext.execute_async_v3")
    assert library.elsewhere == []
    assert library.device is None


def test_more_calls_in_a_round_than_there_is_room_for_are_not_captured_again_and_again() -> None:
    captures = Captures(kept=8, idle_calls=1000)
    n_captured = 0

    def call(key: int) -> None:
        nonlocal n_captured
        if captures.find(key) is None and captures.wants(key):
            n_captured += 1
            captures.add(key, None, lambda: None)

    for _ in range(50):
        for key in range(20):
            call(key)
    assert (n_captured, len(captures)) == (8, 8)
    for _ in range(101):  # other calls: those of before have gone
        for key in range(100, 112):
            call(key)
    assert (n_captured, len(captures)) == (16, 8)


def test_rounds_through_all_layers_capture_each_call_once(
    tiny_backbone: Backbone,
    library: FakeLibrary,
    folders: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = open_runtime(tiny_backbone, folders("fp16"))
    device, config = runtime._on, tiny_backbone.config
    assert isinstance(device, FakeDevice)
    prefix = torch.randn(2, 1, 1, config.n_heads, M, config.head_size)
    texts = [torch.randn(P, 1, t, config.hidden).half() for t in range(32, 4, -1)]
    n_captured = 0
    capture = device.capture

    def counted(work: Callable[[int], None]) -> Callable[[], None]:
        nonlocal n_captured
        n_captured += 1
        return capture(work)

    monkeypatch.setattr(device, "capture", counted)
    for _ in range(5):
        for layer in range(config.n_layers):
            for text in texts:
                runtime.layer(layer, text, None, (prefix[0], prefix[1]))
    assert n_captured == len(texts) * config.n_layers  # more than 64
    assert device.replays == 3 * n_captured


def test_a_larger_working_memory_ends_the_graphs_that_write_to_the_old(
    tiny_backbone: Backbone, library: FakeLibrary, folders: Callable[..., Path]
) -> None:
    runtime = open_runtime(tiny_backbone, folders("fp16"))
    scratch = runtime._scratch
    first, size = scratch.reserve(1000)
    assert first % 256 == 0
    assert size >= 1000
    scratch.graphs.add("a", None, lambda: None)
    assert scratch.reserve(900)[0] == first
    assert scratch.graphs
    assert scratch.reserve(5000)[1] >= 5000
    assert not scratch.graphs


def test_prepare_builds_the_plans_of_a_run_and_no_call_builds_more(
    tiny_backbone: Backbone, library: FakeLibrary, folders: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders("bf16"), tmp_path / "e", ignore=shutil.ignore_patterns("plans")))
    runtime = open_runtime(tiny_backbone, folder, "bf16")
    runtime.prepare()
    n_layers = tiny_backbone.config.n_layers
    assert len(library.named("Builder.build_serialized_network")) == n_layers + 2
    hidden = runtime.embed(torch.arange(10, 10 + N * T).view(N, T))
    prefix = torch.randn(2, 4, 1, tiny_backbone.config.n_heads, M, tiny_backbone.config.head_size)
    for i in range(n_layers):
        hidden = runtime.layer(i, hidden, None, (prefix[0], prefix[1]))
    runtime.head(hidden, torch.randn(2, tiny_backbone.config.hidden), torch.randn(2))
    assert len(library.named("Builder.build_serialized_network")) == n_layers + 2


def test_build_plans_compares_what_they_compute(
    tiny_backbone: Backbone, library: FakeLibrary, folders: Callable[..., Path]
) -> None:
    seen = []
    folder = EngineFolder.open(folders("fp16"))
    runtime = build_plans(tiny_backbone, folder, device="cpu", report=seen.append)
    assert runtime.name == "tensorrt"
    assert len(seen) > 10


@pytest.mark.parametrize(
    ("reason", "kind"), [("no kernel image", Mp2Error), ("CUDA error: out of memory", MemoryError)]
)
def test_a_failed_run_carries_tensorrts_words_and_out_of_memory_halves_the_batch(
    tiny_backbone: Backbone, library: FakeLibrary, folders: Callable[..., Path], reason: str, kind: type
) -> None:
    runtime = open_runtime(tiny_backbone, folders("fp16"))
    ids = torch.arange(10, 10 + N * T).view(N, T)
    runtime.embed(ids)
    library.refuse["run"] = reason
    with pytest.raises(kind, match=rf"embed\.onnx: TensorRT did not run \({reason}\)"):
        runtime.embed(ids)


def test_folders_that_do_not_fit_are_refused(
    tiny_backbone: Backbone,
    library: FakeLibrary,
    folders: Callable[..., Path],
    engine_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(MismatchError, match="is for runtime 'onnxruntime', expected 'tensorrt'"):
        open_runtime(tiny_backbone, engine_dir)
    with pytest.raises(MismatchError, match="holds fp16, expected bf16; pass --precision fp16"):
        open_runtime(tiny_backbone, folders("fp16"), "bf16")
    with pytest.raises(FormatError, match=r"manifest\.json"):
        open_runtime(tiny_backbone, engine_dir / "nowhere")
    runtime = open_runtime(tiny_backbone, folders("fp16"))
    with pytest.raises(UsageError, match="90 tokens and 10 inline"):
        runtime.embed(torch.zeros(1, 90, dtype=torch.long), 10)
    monkeypatch.setattr("mp2.engine.tensorrt.library.load_tensorrt", lambda: library)
    with pytest.raises(UnknownNameError, match="precision 'fp32'"):
        create_backend("tensorrt", tiny_backbone)
    with pytest.raises(UsageError, match="mp2 export --runtime tensorrt"):
        create_backend("tensorrt", tiny_backbone, precision="bf16")


def test_without_tensorrt_the_error_says_what_to_install(tiny_backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"pip install 'mp2\[gpu\]'"):
        TensorRTBackend(tiny_backbone, tmp_path)
