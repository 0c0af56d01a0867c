from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from mp2.backbone import Backbone, save_backbone
from mp2.cli import main
from mp2.engine.folder import EngineFolder, read_manifest
from mp2.errors import FormatError, Mp2Error, UsageError
from mp2.export import Comparison, export_engine
from mp2.export import parity as parity_module


@pytest.fixture(scope="module")
def engine(tiny_backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> EngineFolder:
    return export_engine(tiny_backbone, tmp_path_factory.mktemp("engine") / "tiny")


@pytest.fixture
def copy(engine: EngineFolder, tmp_path: Path) -> Path:
    """A copy of the engine folder that a test may damage."""
    target = tmp_path / "copy"
    target.mkdir()
    for file in engine.path.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_every_graph_is_compared_padded_and_not_with_prompts_and_without(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    seen: list[Comparison] = []
    export_engine(tiny_backbone, tmp_path / "e", report=seen.append)
    names = [c.name for c in seen]
    assert all(c.ok for c in seen)
    for graph in (
        "embed",
        "embed_inline",
        "layer_00",
        "layer_01",
        "layer_02",
        "head",
        "whole chain",
    ):
        assert any(name.startswith(graph) for name in names), graph
    for case in ("no prompt, padded", "P prefixes, one text, padded", "one prefix, P texts, padded"):
        assert f"layer_02, {case}" in names


def test_manifest_lists_every_file_with_its_hash_and_origin(
    engine: EngineFolder, tiny_backbone: Backbone
) -> None:
    manifest = read_manifest(engine.path / "manifest.json")
    assert manifest == engine.manifest
    assert set(manifest.files) == {p.name for p in engine.path.iterdir()} - {"manifest.json"}
    assert manifest.backbone.sha256 == tiny_backbone.sha256
    assert (manifest.backbone.n_layers, manifest.backbone.hidden, manifest.backbone.n_heads) == (3, 24, 4)
    assert (manifest.precision, manifest.max_tokens) == ("fp32", 96)
    assert set(manifest.versions) == {"mp2", "python", "torch", "onnx", "onnxruntime"}
    EngineFolder.open(engine.path, tiny_backbone)


def test_weights_are_stored_once_and_graphs_only_point_at_them(
    engine: EngineFolder, tiny_backbone: Backbone
) -> None:
    n_floats = sum(p.numel() for p in tiny_backbone.encoder.parameters())
    n_floats -= tiny_backbone.config.hidden  # the token type that no sequence has
    used: dict[tuple[str, int], str] = {}
    stored = 0
    for path in engine.path.glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                assert np.prod(tensor.dims) < 16, tensor.name
                continue
            entry = {item.key: item.value for item in tensor.external_data}
            place = (entry["location"], int(entry["offset"]))
            if place not in used:
                stored += int(entry["length"]) // 4
            assert used.setdefault(place, tensor.name) == tensor.name
    assert stored == n_floats


def test_a_difference_from_torch_fails_and_leaves_nothing(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity_module.STAGE_TOLERANCE, "fp32", 0.0)
    with pytest.raises(Mp2Error, match="differ from torch, first '") as caught:
        export_engine(tiny_backbone, tmp_path / "e")
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_nan_is_a_difference() -> None:
    assert not Comparison("x", float("nan"), float("nan"), 1.0).ok


def test_a_killed_export_leaves_no_folder_and_the_next_one_cleans_up(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / ".e.partial"
    partial.mkdir()
    (partial / "layer_00.bin").write_bytes(b"half a layer")  # what SIGKILL leaves
    with pytest.raises(FormatError, match="not an engine folder"):
        EngineFolder.open(tmp_path / "e")
    with pytest.raises(FormatError, match="export did not finish"):
        EngineFolder.open(partial)
    export_engine(tiny_backbone, tmp_path / "e")
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_an_older_engine_gives_way_only_to_a_whole_one(
    tiny_backbone: Backbone, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (copy / "manifest.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setitem(parity_module.STAGE_TOLERANCE, "fp32", 0.0)
        with pytest.raises(Mp2Error):
            export_engine(tiny_backbone, copy)
    assert (copy / "manifest.json").read_bytes() == before
    (copy / "layer_00.bin").write_bytes(b"")
    export_engine(tiny_backbone, copy)
    EngineFolder.open(copy, tiny_backbone)


def test_other_peoples_folders_and_files_are_not_overwritten(tiny_backbone: Backbone, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not empty and not an engine folder"):
        export_engine(tiny_backbone, tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        export_engine(tiny_backbone, tmp_path / "thesis.tex")


def test_somebody_elses_manifest_does_not_make_an_engine_folder(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "a web page", "icons": []}')
    with pytest.raises(UsageError, match="not empty and not an engine folder"):
        export_engine(tiny_backbone, tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["name"] == "a web page"


@pytest.mark.parametrize("out", [".", "..", "sub/.."])
def test_the_working_directory_and_those_above_it_are_not_replaced(
    tiny_backbone: Backbone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    out: str,
) -> None:
    here = tmp_path / "above" / "here"
    (here / "sub").mkdir(parents=True)
    monkeypatch.chdir(here)
    with pytest.raises(
        UsageError, match=rf"--out {re.escape(out)} is the working directory or a folder above"
    ):
        export_engine(tiny_backbone, out)
    assert list(here.iterdir()) == [here / "sub"]


def test_a_relative_target_is_written_beside_the_working_directory(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert export_engine(tiny_backbone, "../there/.").path == tmp_path / "there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "there"]


def _set(**changes: object) -> Callable[[dict[str, object]], None]:
    return lambda raw: raw.update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(schema_version=99), r"field 'schema_version': 99, expected 3"),
        (_set(max_tokens="many"), r"field 'max_tokens': is 'many', expected a whole number"),
        (lambda raw: raw.pop("precision"), r"field 'precision': missing; export"),
        (
            lambda raw: raw["backbone"].update(hidden=None),
            r"field 'backbone.hidden': is None",
        ),
        (
            lambda raw: raw["files"].update({"head.onnx": 5}),
            r"field 'files.head.onnx': is 5",
        ),
        (lambda raw: raw["files"].pop("layer_01.onnx"), r"field 'files': no entry for 'layer_01.onnx'"),
        (
            lambda raw: raw["files"].update({"../x": "0" * 64}),
            r"'../x' is not a plain file name",
        ),
    ],
)
def test_a_damaged_manifest_names_the_field(
    copy: Path, change: Callable[[dict[str, object]], None], message: str
) -> None:
    path = copy / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(FormatError, match=message):
        EngineFolder.open(copy)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]"])
def test_a_manifest_that_is_no_json_object_is_named(copy: Path, content: bytes) -> None:
    (copy / "manifest.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"manifest\.json: "):
        EngineFolder.open(copy)


@pytest.mark.parametrize("name", ["layer_01.bin", "embed.onnx", "layer_02_plain.onnx"])
def test_a_changed_or_missing_file_is_found_before_a_runtime_sees_it(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(FormatError, match=f"{name}: sha256 is .* expected .*export the engine again"):
        EngineFolder.open(copy)
    (copy / name).unlink()
    with pytest.raises(FormatError, match=f"'{name}' is listed but missing"):
        EngineFolder.open(copy)


def test_the_command_prints_the_report_and_json(tiny_backbone: Backbone, tmp_path: Path) -> None:
    save_backbone(tiny_backbone, tmp_path / "tiny")
    command = ["export", "--backbone", str(tmp_path / "tiny")]
    result = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "e")])
    assert result.exit_code == 0, result.output
    assert "max rel" in result.output
    assert "DIFFERS" not in result.output
    assert "outputs equal torch's within tolerance" in result.output
    result = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "e"), "--json"])
    summary = json.loads(result.output)
    assert summary["manifest"] == json.loads((tmp_path / "e" / "manifest.json").read_text())
    assert all(c["ok"] for c in summary["parity"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--backbone", "cpt-larg"], 2, "Did you mean 'cpt-large'"),
        (["--backbone", "TINY", "--runtime", "onxruntime"], 2, "Did you mean 'onnxruntime'"),
        (["--backbone", "TINY", "--precision", "fp17"], 2, "unknown precision 'fp17'"),
        (["--backbone", "TINY", "--runtime", "tensorrt"], 2, "builds plans of a bundle: give --run RUN"),
        (["--backbone", "TINY", "--prompts", "mini-deep"], 2, "are for --precision fp16, bf16, fp8"),
        (
            ["--backbone", "TINY", "--precision", "fp16", "--prompts", "nowhere.safetensors"],
            2,
            "nowhere.safetensors",
        ),
    ],
)
def test_wrong_commands_exit_2(
    tiny_backbone: Backbone, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    save_backbone(tiny_backbone, tmp_path / "tiny")
    arguments = [str(tmp_path / "tiny") if a == "TINY" else a for a in arguments]
    result = CliRunner().invoke(main, ["export", "--out", str(tmp_path / "e"), *arguments])
    assert result.exit_code == code
    assert message in result.output
    assert not (tmp_path / "e").exists()
