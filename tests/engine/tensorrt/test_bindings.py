"""What mp2 touches of TensorRT exists as it is touched, in the real Python bindings of 10.x and 11.x."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from .api import Use, fault, parse_signature, touched_members, touched_uses, unresolved
from .record import RECORD, VERSIONS, CannotRecordError, fetch_bindings, record

RECORDED = {entry["version"]: entry["classes"] for entry in json.loads(RECORD.read_text())}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the bindings are kept: MP2_TEST_CACHE, or for this session only."""
    given = os.environ.get("MP2_TEST_CACHE")
    return Path(given) if given else tmp_path_factory.mktemp("bindings")


def test_the_source_touches_what_a_builder_and_a_runtime_need() -> None:
    touched = touched_members()
    assert "STRONGLY_TYPED" in touched["NetworkDefinitionCreationFlag"]
    assert {"parse_from_file", "get_error"} <= set(touched["OnnxParser"])
    assert {"set_shape"} <= set(touched["IOptimizationProfile"])
    assert {"set_timing_cache", "add_optimization_profile"} <= set(touched["IBuilderConfig"])
    assert {"set_input_shape", "set_tensor_address", "execute_async_v3"} <= set(touched["IExecutionContext"])


@pytest.mark.parametrize("version", VERSIONS)
def test_every_use_fits_the_recorded_bindings(version: str) -> None:
    faults = [found for use in touched_uses() if (found := fault(use, RECORDED[version]))]
    assert faults == [], "after a new use: python tests/export/record_tensorrt.py"


@pytest.mark.parametrize("version", VERSIONS)
def test_no_object_of_tensorrt_is_touched_without_its_class_being_known(version: str) -> None:
    members = {
        name for entry in RECORDED[version].values() if entry for name in entry["members"] if "_" in name
    }
    assert unresolved(members) == [], "annotate the object with its class, trt.X"


def test_no_precision_is_chosen_by_flag_since_eleven_has_none() -> None:
    flags = {use.member for use in touched_uses() if use.owner == "BuilderFlag"}
    assert flags == {"TF32"}
    assert {"FP16", "BF16", "FP8"}.isdisjoint(RECORDED[VERSIONS[1]]["BuilderFlag"]["members"])


@pytest.mark.parametrize("version", VERSIONS)
def test_the_real_bindings_are_as_recorded(version: str, cache: Path) -> None:
    try:
        found = record(fetch_bindings(version, cache), touched_members())
    except CannotRecordError as error:
        pytest.skip(str(error))
    assert found["version"] == version
    assert found["classes"] == RECORDED[version]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (Use("", "Refitter", "call"), "no class Refitter"),
        (Use("Builder", "platform_has_fast_fp8", "read"), "has no member 'platform_has_fast_fp8'"),
        (Use("IBuilderConfig", "set_timing_cache", "call", 1), "not 1"),
        (Use("IBuilderConfig", "set_timing_cache", "call", 1, ("strict",)), "'strict'"),
        (Use("OnnxParser", "num_errors", "call"), "is no method"),
        (Use("OnnxParser", "num_errors", "set"), "cannot be set"),
        (Use("OnnxParser", "get_error", "read"), "must be called"),
        (Use("Builder", "create_network", "call", 1, (), "IBuilderConfig"), "returns"),
    ],
)
def test_a_wrong_use_is_found(use: Use, message: str) -> None:
    for version in VERSIONS:
        assert message in (fault(use, RECORDED[version]) or "")


def test_signatures_are_read_with_their_defaults() -> None:
    found = parse_signature("f(self: X, a: A[int, str], b: B = <B.C: 0>, c: int = 0) -> list[Y]")
    assert list(found.signature.parameters) == ["a", "b", "c"]
    assert found.accepts(1, ())
    assert found.accepts(2, ("c",))
    assert not found.accepts(0, ("c",))
    assert not found.accepts(4, ())
    assert found.returns == "list[Y]"
