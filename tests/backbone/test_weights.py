"""Weights are compared before they are read, and read only from files that are what they seem."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mp2.backbone import Backbone, Encoder, load_backbone, save_backbone
from mp2.errors import FormatError, UsageError

WORDS = "embeddings.word_embeddings.weight"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064d}\nsize 1302674\n"


@pytest.fixture
def folder(tiny_backbone: Backbone, tmp_path: Path) -> Path:
    save_backbone(tiny_backbone, tmp_path / "tiny")
    return tmp_path / "tiny"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}


def rewrite(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata)


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ---- sizes before memory


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("vocab_size", 2**63, rf"'{WORDS}' has shape \(\d+, 24\), expected \({2**63}, 24\)"),
        ("hidden_size", 2**31, rf"'{WORDS}' has shape \(\d+, 24\), expected \(\d+, {2**31}\)"),
        ("num_hidden_layers", 10**6, r"'num_hidden_layers': is 1000000, but model\.safetensors has 3 layers"),
        ("num_hidden_layers", 10**30, "but model.safetensors has 3 layers"),
        ("intermediate_size", 2**40, rf"has shape \(40, 24\), expected \({2**40}, 24\)"),
        ("max_position_embeddings", 10**18, r"position_embeddings.weight' has shape \(96, 24\)"),
        ("type_vocab_size", 2**62, r"token_type_embeddings.weight' has shape \(2, 24\)"),
    ],
)
def test_sizes_are_compared_with_the_tensors_before_anything_is_built(
    folder: Path, field: str, value: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("an encoder was built")

    monkeypatch.setattr(Encoder, "__init__", never)
    change_config(folder, **{field: value})
    with pytest.raises(FormatError, match=expected):
        load_backbone(folder)


def test_the_largest_token_id_is_compared_with_the_embedding_rows(folder: Path) -> None:
    lines = (folder / "vocab.txt").read_text("utf-8").splitlines()
    rows = len(lines)
    (folder / "vocab.txt").write_text("\n".join([*lines[:-1], lines[5], "新"]) + "\n", "utf-8")
    with pytest.raises(FormatError, match=rf"'vocab_size': is {rows}, but .* token ids up to {rows}: "):
        load_backbone(folder)  # as many tokens as rows, one of them repeated


def test_a_tensor_that_is_larger_than_its_storage_is_refused(folder: Path) -> None:
    tensors = tensors_of(folder)
    tensors[WORDS] = torch.zeros(1, 1).expand(2**40, 24)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    change_config(folder, vocab_size=2**40)
    with pytest.raises(FormatError, match=r"shape \(1099511627776, 24\), more than the file has numbers for"):
        load_backbone(folder)


# ---- values


@pytest.mark.parametrize(
    "kind", [torch.float64, torch.int32, torch.uint8, torch.complex64, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_other_types_are_refused_and_not_cast(folder: Path, kind: torch.dtype, form: str) -> None:
    tensors = tensors_of(folder)
    tensors[WORDS] = tensors[WORDS].to(kind)
    if form == "safetensors":
        rewrite(folder, tensors)
    else:
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(FormatError, match=rf"'{WORDS}' is \w+, expected one of F32, F16, BF16"):
        load_backbone(folder)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite_are_refused_by_name(folder: Path, value: str) -> None:
    tensors = tensors_of(folder)
    name = "encoder.layer.1.output.dense.bias"
    tensors[name][7] = float(value)
    rewrite(folder, tensors)
    with pytest.raises(FormatError, match=rf"'{name}' holds {'NaN' if value == 'nan' else 'infinity'}"):
        load_backbone(folder)


# ---- names


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "module._orig_mod.bert.",
        "student.",
        "a.b.c.",
        "_orig_mod.module.model.encoder.",
    ],
)
def test_wrapped_names_and_any_single_prefix_are_read(
    tiny_backbone: Backbone, folder: Path, prefix: str
) -> None:
    rewrite(folder, {prefix + name: t for name, t in tensors_of(folder).items()})
    assert load_backbone(folder).sha256 == tiny_backbone.sha256


def test_a_compiled_part_of_a_model_is_read(tiny_backbone: Backbone, folder: Path) -> None:
    tensors = tensors_of(folder)
    rewrite(folder, {f"bert.{n.replace('encoder.', 'encoder._orig_mod.')}": t for n, t in tensors.items()})
    assert load_backbone(folder).sha256 == tiny_backbone.sha256


def test_of_two_bodies_the_usual_one_is_read_and_two_unusual_ones_are_refused(
    tiny_backbone: Backbone, folder: Path
) -> None:
    tensors = tensors_of(folder)
    other = {f"teacher.{n}": t + 1 for n, t in tensors.items()}
    rewrite(folder, {**{f"bert.{n}": t for n, t in tensors.items()}, **other})
    assert load_backbone(folder).sha256 == tiny_backbone.sha256
    rewrite(folder, {**{f"student.{n}": t for n, t in tensors.items()}, **other})
    with pytest.raises(FormatError, match=r"2 bodies, under 'student\.', 'teacher\.'; expected one"):
        load_backbone(folder)


def test_names_in_the_metadata_stand_for_shared_tensors(tiny_backbone: Backbone, folder: Path) -> None:
    tensors = {f"bert.{n}": t for n, t in tensors_of(folder).items()}
    tensors["cls.decoder.weight"] = tensors.pop(f"bert.{WORDS}")
    rewrite(folder, tensors, {"format": "pt", f"bert.{WORDS}": "cls.decoder.weight"})
    assert load_backbone(folder).sha256 == tiny_backbone.sha256


# ---- files


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "vocab.txt", "config.json"])
def test_git_lfs_pointers_are_named(folder: Path, name: str) -> None:
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(POINTER)
    with pytest.raises(FormatError, match=rf"{name}: is a git-lfs pointer, .*git lfs pull"):
        load_backbone(folder)


def test_a_shard_that_is_a_git_lfs_pointer_is_named(folder: Path) -> None:
    index_of(folder, {WORDS: "model-1.safetensors"})
    (folder / "model-1.safetensors").write_text(POINTER)
    with pytest.raises(FormatError, match=r"model-1\.safetensors: is a git-lfs pointer"):
        load_backbone(folder)


def index_of(folder: Path, weight_map: dict[str, Any]) -> None:
    """The folder's weights as one shard, ``model-0.safetensors``; the index says ``weight_map`` too."""
    (folder / "model.safetensors").rename(folder / "model-0.safetensors")
    full = {**dict.fromkeys(load_file(folder / "model-0.safetensors"), "model-0.safetensors"), **weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": full}))


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/hostname", "sub/x.safetensors", "..", "", "a\\b", 3, None]
)
def test_an_index_names_files_of_its_own_folder_only(folder: Path, name: Any) -> None:
    (folder.parent / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index_of(folder, {WORDS: name})
    with pytest.raises(FormatError, match=r"'weight_map': tensor .* expected the name of a file in the same"):
        load_backbone(folder)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
@pytest.mark.parametrize("name", ["model-1.safetensors", "model.safetensors", "vocab.txt", "config.json"])
def test_pipes_folders_and_devices_are_not_opened(folder: Path, name: str, kind: str) -> None:
    if name == "model-1.safetensors":
        index_of(folder, {WORDS: name})
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(FormatError, match=rf"{name}: is no regular file"):
        load_backbone(folder)


def test_links_to_files_are_followed_as_the_hub_cache_has_them(tiny_backbone: Backbone, folder: Path) -> None:
    index_of(folder, {})
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(i))
        path.symlink_to(Path("..") / "blobs" / str(i))
    assert load_backbone(folder).sha256 == tiny_backbone.sha256


def test_a_revision_is_of_hub_checkpoints_only(folder: Path) -> None:
    for name in ("mini", str(folder)):
        with pytest.raises(UsageError, match=r"revision 'v1' was given, and backbone .* is not from the hub"):
            load_backbone(name, revision="v1")
