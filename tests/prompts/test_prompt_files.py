"""Prompt files: round trip, hash, and every way in which one can be wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mp2.backbone import Backbone, BackboneConfig, random_backbone
from mp2.errors import FormatError, MismatchError, UnknownNameError
from mp2.prompts import PromptSet, load_prompts, random_prompts, save_prompts
from mp2.runs.tuned import load_tuned
from mp2.training.checkpoint import checkpoint_state


@pytest.fixture
def prompts(tiny_backbone: Backbone) -> PromptSet:
    return random_prompts(
        tiny_backbone, "deep", n_modules=4, prompt_tokens=3, intrinsic_dim=5, tasks=("天气", "b")
    )


def tensors_of(prompts: PromptSet) -> dict[str, Tensor]:
    return {name: getattr(prompts, name) for name in prompts.meta.shapes()}


def write(path: Path, prompts: PromptSet, tensors: dict[str, Tensor] | None = None, **meta: Any) -> Path:
    """A prompt file with some metadata fields or tensors changed (None: left out)."""
    raw = {**dataclasses.asdict(prompts.meta), **meta}
    raw = {name: value for name, value in raw.items() if value is not None}
    kept = {n: t for n, t in {**tensors_of(prompts), **(tensors or {})}.items() if t is not None}
    save_file(kept, path, {"mp2_prompts": json.dumps(raw)})
    return path


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_round_trip_keeps_every_bit_and_all_metadata(
    tiny_backbone: Backbone, tmp_path: Path, kind: Any
) -> None:
    prompts = random_prompts(tiny_backbone, kind, prompt_tokens=3, intrinsic_dim=5, tasks=("天气", "b"))
    save_prompts(prompts, tmp_path / "new" / "p.safetensors")
    loaded = load_prompts(tmp_path / "new" / "p.safetensors", tiny_backbone)
    assert loaded.meta == prompts.meta
    assert loaded.sha256 == prompts.sha256
    for name, tensor in tensors_of(prompts).items():
        assert torch.equal(getattr(loaded, name), tensor)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["p.safetensors"]  # no part file is left


def test_the_file_says_what_it_is(prompts: PromptSet, tmp_path: Path, tiny_backbone: Backbone) -> None:
    save_prompts(prompts, tmp_path / "p.safetensors")
    with safe_open(tmp_path / "p.safetensors", framework="pt") as file:
        meta = json.loads(file.metadata()["mp2_prompts"])
    assert meta["backbone_sha256"] == tiny_backbone.sha256
    sizes = ("n_layers", "hidden", "n_heads", "n_modules", "prompt_tokens", "intrinsic_dim", "schema_version")
    assert [meta[name] for name in sizes] == [3, 24, 4, 4, 3, 5, 1]
    assert meta["tasks"] == ["天气", "b"]
    assert (meta["router_inference"], meta["router_normalisation"]) == ("hard", "count")


def test_half_precision_storage_is_read_as_float32(prompts: PromptSet, tmp_path: Path) -> None:
    save_prompts(prompts, tmp_path / "p.safetensors", dtype=torch.float16)
    loaded = load_prompts(tmp_path / "p.safetensors")
    for name, tensor in tensors_of(prompts).items():
        assert getattr(loaded, name).dtype == torch.float32
        assert torch.equal(getattr(loaded, name), tensor.half().float())


def test_the_hash_tells_any_change_of_tensor_or_router_convention(prompts: PromptSet) -> None:
    hashes = {prompts.sha256}
    for name, tensor in tensors_of(prompts).items():
        changed = tensor.clone()
        changed.view(-1)[0] += 1e-3
        hashes.add(dataclasses.replace(prompts, **{name: changed}).sha256)
    for field, value in {"router_inference": "soft", "router_normalisation": "sum"}.items():
        meta = dataclasses.replace(prompts.meta, **{field: value})
        hashes.add(dataclasses.replace(prompts, meta=meta).sha256)
    assert len(hashes) == 8
    assert dataclasses.replace(prompts, z=prompts.z.clone()).sha256 == prompts.sha256


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"schema_version": 2}, r"field 'schema_version': is 2, this mp2 reads version 1"),
        ({"schema_version": None}, r"field 'schema_version': is None"),
        ({"colour": "red"}, r"field 'colour': unknown field"),
        ({"kind": "wide"}, r"field 'kind': is 'wide', expected one of deep, shallow"),
        ({"router_inference": "odd"}, r"field 'router_inference': is 'odd', expected one of hard, soft"),
        ({"router_normalisation": "max"}, r"'router_normalisation': is 'max', expected one of count, sum"),
        ({"kind": None}, r"field 'kind': missing"),
        ({"prompt_tokens": 0}, r"field 'prompt_tokens': is 0, expected a positive integer"),
        ({"n_modules": "4"}, r"field 'n_modules': is '4'"),
        ({"hidden": None}, r"field 'hidden': missing"),
        ({"tasks": 5}, r"field 'tasks': is 5, expected a list"),
        ({"n_modules": 5}, r"field 'z': has shape \(3, 4, 5\), expected \(3, 5, 5\)"),
        ({"tasks": ["a"]}, r"field 'routers': has shape \(2, 3, 4\), expected \(1, 3, 4\)"),
    ],
)
def test_bad_metadata_names_file_field_and_value(
    prompts: PromptSet, tmp_path: Path, meta: dict[str, Any], expected: str
) -> None:
    path = write(tmp_path / "bad.safetensors", prompts, **meta)
    with pytest.raises(FormatError, match=rf"bad\.safetensors: .*{expected}"):
        load_prompts(path)


def test_a_tensor_that_is_missing_or_has_another_shape_is_named(prompts: PromptSet, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.safetensors", prompts, {"projection": None})  # type: ignore[dict-item]
    with pytest.raises(FormatError, match=r"field 'projection': no tensor 'projection'"):
        load_prompts(path)
    write(path, prompts, {"span_bias": torch.zeros(3)})
    with pytest.raises(FormatError, match=r"field 'span_bias': has shape \(3,\), expected \(2,\)"):
        load_prompts(path)


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "3"])
def test_metadata_that_is_no_json_object_is_a_format_error(
    prompts: PromptSet, tmp_path: Path, text: str
) -> None:
    save_file(tensors_of(prompts), tmp_path / "bad.safetensors", {"mp2_prompts": text})
    with pytest.raises(FormatError, match=r"field 'mp2_prompts': (not JSON|is a JSON)"):
        load_prompts(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_damaged_file_is_a_format_error_that_names_it(
    prompts: PromptSet, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "p.safetensors"
    save_prompts(prompts, path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-7], "garbage": b"\x07" * 100, "empty": b""}[damage])
    with pytest.raises(FormatError, match=r"p\.safetensors: not a safetensors file"):
        load_prompts(path)


def test_other_safetensors_files_are_no_prompt_files(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(FormatError, match="no 'mp2_prompts' metadata: this is not a prompt file"):
        load_prompts(tmp_path / "weights.safetensors")


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"'mini-dep'\. Did you mean 'mini-deep'"):
        load_prompts("mini-dep")


def test_a_backbone_of_another_shape_is_refused_with_both_shapes(prompts: PromptSet, tmp_path: Path) -> None:
    save_prompts(prompts, tmp_path / "p.safetensors")
    config = BackboneConfig(
        name="bigger", n_layers=4, hidden=32, n_heads=2, ffn=8, vocab_size=9, max_positions=9
    )
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcd"]
    with pytest.raises(MismatchError) as caught:
        load_prompts(tmp_path / "p.safetensors", random_backbone(config, words, seed=0))
    for part in (
        "3-layer backbone of hidden size 24 with 4 heads ('tiny')",
        "'bigger' has 4 layers, hidden size 32, 2 heads",
        "pass --backbone tiny",
    ):
        assert part in str(caught.value)


def test_a_backbone_of_the_same_shape_but_other_weights_is_refused_with_both_hashes(
    prompts: PromptSet, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    save_prompts(prompts, tmp_path / "p.safetensors")
    other = random_backbone(tiny_backbone.config, tiny_backbone.tokenizer.tokens(), seed=8)
    with pytest.raises(MismatchError) as caught:
        load_prompts(tmp_path / "p.safetensors", other)
    for part in (tiny_backbone.sha256[:12], other.sha256[:12], "another training", "--backbone tiny"):
        assert part in str(caught.value)


def test_a_pretrained_router_is_found_by_task_and_an_unknown_one_gets_the_known(prompts: PromptSet) -> None:
    assert torch.equal(prompts.router("b"), (prompts.routers[1] > 0).float())
    with pytest.raises(UnknownNameError, match=r"unknown pre-trained router 'c'.*Known: 天气, b"):
        prompts.router("c")


def test_a_prompt_set_with_a_wrong_shape_cannot_be_made(prompts: PromptSet) -> None:
    with pytest.raises(FormatError, match=r"field 'z': has shape \(3, 4, 4\), expected \(3, 4, 5\)"):
        dataclasses.replace(prompts, z=prompts.z[..., :4])


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064d}\nsize 1302674\n"


def test_a_git_lfs_pointer_is_named_in_prompts_tuned_prompts_and_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    path.write_text(POINTER)
    for load in (load_prompts, load_tuned, checkpoint_state):
        with pytest.raises(FormatError, match=r"p\.safetensors: is a git-lfs pointer, .*git lfs pull"):
            load(path)


@pytest.mark.parametrize(
    "kind", [torch.int8, torch.int32, torch.uint8, torch.float64, torch.complex64, torch.float8_e4m3fn]
)
def test_tensors_of_other_types_are_refused_and_not_cast(
    prompts: PromptSet, tmp_path: Path, kind: torch.dtype
) -> None:
    path = write(tmp_path / "p.safetensors", prompts, {"z": prompts.z.to(kind)})
    with pytest.raises(FormatError, match=r"tensor 'z' is \w+, expected one of F32, F16, BF16"):
        load_prompts(path)
