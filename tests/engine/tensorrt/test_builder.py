"""The builder's and the plan store's calls, on a double that is specified from the real bindings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from mp2.engine.bundle import Bundle
from mp2.engine.folder import file_sha256
from mp2.engine.tensorrt.builder import BuildSettings, build_plan
from mp2.engine.tensorrt.library import check_version, load_tensorrt
from mp2.engine.tensorrt.plans import Gpu, PlanStore
from mp2.engine.tensorrt.profiles import Profile
from mp2.errors import MissingDependencyError, Mp2Error

from .double import FakeLibrary

GPU = Gpu("NVIDIA H100", "9.0")
SIZES = {"N": 3, "P": 3, "T": 20, "m": 5, "S": 1}
PROFILE = Profile({"P": (1, 4, 4), "N": (1, 2, 4), "T": (1, 8, 20), "m": (1, 5, 5), "S": (1, 1, 4)})
GRAPH = "backbone.onnx"


@pytest.fixture(params=[10, 11])
def library(request: pytest.FixtureRequest) -> FakeLibrary:
    return FakeLibrary(request.param)


@pytest.fixture
def folder(bundle: Callable[[str], Bundle]) -> Bundle:
    return bundle("fp16")


def store(folder: Bundle, library: FakeLibrary, notes: list[str] | None = None) -> PlanStore:
    note = (lambda line: None) if notes is None else notes.append
    return PlanStore(folder, library, GPU, note=note)  # type: ignore[arg-type]


def test_the_build_is_strongly_typed_with_profiles_cache_and_no_tf32(
    folder: Bundle, library: FakeLibrary
) -> None:
    graph = folder.file(GRAPH)
    built = build_plan(library, graph, [PROFILE], settings=BuildSettings(), timing_cache=b"old")  # type: ignore[arg-type]
    names = [name for name, _ in library.calls]
    assert names == [
        "Builder.__init__",
        "Builder.create_network",
        "OnnxParser.__init__",
        "OnnxParser.parse_from_file",
        "Builder.create_builder_config",
        "IBuilderConfig.clear_flag",
        "IBuilderConfig.set_memory_pool_limit",
        "IBuilderConfig.builder_optimization_level=",
        "IBuilderConfig.create_timing_cache",
        "IBuilderConfig.set_timing_cache",
        "Builder.create_optimization_profile",
        *["IOptimizationProfile.set_shape"] * 8,
        "IBuilderConfig.add_optimization_profile",
        "Builder.build_serialized_network",
        "ITimingCache.serialize",
    ]
    (flags,) = library.named("Builder.create_network")
    bit = int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert flags == (1 << bit,)
    assert bit == {"10": 1, "11": 0}[library.__version__[:2]]
    assert library.named("OnnxParser.parse_from_file") == [(str(graph),)]
    assert library.named("IBuilderConfig.clear_flag")[0][0] == library.BuilderFlag.TF32
    assert library.named("IBuilderConfig.create_timing_cache") == [(b"old",)]
    assert {name: shapes for name, *shapes in library.named("IOptimizationProfile.set_shape")} == {
        "input_ids": [(1, 1), (2, 8), (4, 20)],
        "attention_mask": [(1, 1), (2, 8), (4, 20)],
        "prompt_length": [(1,), (4,), (4,)],
        "prompt_keys": [(1, 3, 4, 1, 6), (4, 3, 4, 5, 6), (4, 3, 4, 5, 6)],
        "prompt_values": [(1, 3, 4, 1, 6), (4, 3, 4, 5, 6), (4, 3, 4, 5, 6)],
        "span_weight": [(1, 2, 24), (4, 2, 24), (4, 2, 24)],
        "span_bias": [(1, 2), (4, 2), (4, 2)],
        "segments": [(1, 1, 2), (2, 1, 2), (4, 4, 2)],
    }
    assert built.timing_cache == b"timings:old"
    assert json.loads(built.plan)["graph"] == str(graph)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("parse", r"cannot parse backbone\.onnx: why not \| no such operator \(node Foo_3, Foo\)"),
        ("profile", r"refused profile .*of backbone\.onnx: why not"),
        ("build", r"built no plan of backbone\.onnx: why not"),
    ],
)
def test_a_refusal_carries_tensorrts_own_words(
    folder: Bundle, library: FakeLibrary, step: str, message: str
) -> None:
    library.refuse[step] = "why not"
    with pytest.raises(Mp2Error, match=message):
        build_plan(library, folder.file(GRAPH), [PROFILE], settings=BuildSettings())  # type: ignore[arg-type]


def test_a_timing_cache_of_another_device_is_replaced(folder: Bundle) -> None:
    library, notes = FakeLibrary(11, capability_mismatch=True), list[str]()
    built = build_plan(
        library,  # type: ignore[arg-type]
        folder.file(GRAPH),
        [PROFILE],
        settings=BuildSettings(),
        timing_cache=b"old",
        note=notes.append,
    )
    assert built.timing_cache == b"timings:"
    assert notes == ["the timing cache is of another device or TensorRT release: starting a new one"]


def test_a_plan_is_built_once_and_found_again(folder: Bundle, library: FakeLibrary) -> None:
    notes: list[str] = []
    first = store(folder, library, notes).get(GRAPH, SIZES)
    again = store(folder, library, notes).get(GRAPH, {**SIZES, "T": 5})
    assert again == first
    assert notes == ["building a TensorRT plan of backbone.onnx: there is none yet"]
    assert len(library.named("Builder.build_serialized_network")) == 1
    assert len(first.profiles) == 2  # classes of lengths
    files = sorted(path.suffix for path in (folder.path / "plans").iterdir())
    assert files == [".cache", ".json", ".plan"]


def test_the_next_plan_starts_from_the_timings_of_the_last(folder: Bundle, library: FakeLibrary) -> None:
    plans = store(folder, library)
    plans.get(GRAPH)
    plans.get("backbone_inline.onnx")
    assert library.named("IBuilderConfig.create_timing_cache") == [(b"",), (b"timings:",)]


def test_sizes_that_no_profile_covers_add_one_and_keep_the_others(
    folder: Bundle, library: FakeLibrary
) -> None:
    notes: list[str] = []
    plans = store(folder, library, notes)
    before = plans.get(GRAPH)
    after = plans.get(GRAPH, {**SIZES, "T": 33})
    assert after.profiles[: len(before.profiles)] == before.profiles
    assert after.profiles[-1].ranges["T"] == (1, 33, 64)
    assert "no profile of its plan covers" in notes[-1]
    assert plans.get(GRAPH, {**SIZES, "T": 60}) == after  # and the old plan gave way
    assert len(list((folder.path / "plans").glob("*.plan"))) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("gpu", r"is stale: gpu is 9\.0, NVIDIA H100, now 8\.9, NVIDIA L4"),
        ("graph", r"is stale: graph is [0-9a-f]+\.\.\., now"),
        ("release", r"is stale: tensorrt is 10\.16\.1\.11, now 10\.17\.0\.1"),
        ("settings", r"is stale: settings is 4, 4294967296, now 5, 4294967296"),
        ("bytes", r"backbone-[0-9a-f]+\.plan is damaged"),
        ("missing", r"backbone-[0-9a-f]+\.plan is missing"),
        ("sidecar", r"backbone-[0-9a-f]+\.json is damaged"),
    ],
)
def test_a_stale_or_damaged_plan_is_rebuilt_with_the_reason(folder: Bundle, change: str, reason: str) -> None:
    library, notes = FakeLibrary(10), list[str]()
    store(folder, library).get(GRAPH)
    plan, sidecar = next((folder.path / "plans").glob("*.plan")), next((folder.path / "plans").glob("*.json"))
    gpu, settings = GPU, BuildSettings()
    if change == "gpu":
        gpu = Gpu("NVIDIA L4", "8.9")
    elif change == "graph":
        (folder.path / GRAPH).write_bytes(folder.read(GRAPH) + b"\x12\x05again")  # another producer
        files = {**folder.files, GRAPH: file_sha256(folder.path / GRAPH)}
        folder = Bundle(folder.path, {**folder.manifest, "files": files})
    elif change == "release":
        library.__version__ = "10.17.0.1"
    elif change == "settings":
        settings = BuildSettings(optimization_level=5)
    elif change == "bytes":
        plan.write_bytes(plan.read_bytes()[:-1])
    elif change == "missing":
        plan.unlink()
    else:
        sidecar.write_text(sidecar.read_text().replace('"sha256"', '"sha"'))
    PlanStore(folder, library, gpu, settings=settings, note=notes.append).get(GRAPH)  # type: ignore[arg-type]
    assert len(notes) == 1
    assert re.search(reason, notes[0]), notes
    assert len(library.named("Builder.build_serialized_network")) == 2


def test_plans_of_two_gpus_live_side_by_side(folder: Bundle) -> None:
    library = FakeLibrary(11)
    store(folder, library).get(GRAPH)
    other = PlanStore(folder, library, Gpu("NVIDIA L4", "8.9"))  # type: ignore[arg-type]
    other.get(GRAPH)
    store(folder, library).get(GRAPH)
    assert len(library.named("Builder.build_serialized_network")) == 2
    assert len(list((folder.path / "plans").glob("*.plan"))) == 2


@pytest.mark.parametrize("version", ["10.16.1.11", "10.17", "11.4.0.106"])
def test_known_releases_are_taken(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["8.6.1", "10.15.9", "12.0", "unknown"])
def test_unknown_releases_are_refused(version: str) -> None:
    with pytest.raises(MissingDependencyError, match=f"TensorRT {version} is installed, expected 10.16"):
        check_version(version)


def test_without_the_library_the_error_says_what_to_install() -> None:
    with pytest.raises(MissingDependencyError, match=r"pip install 'mp2\[gpu\]'"):
        load_tensorrt()
