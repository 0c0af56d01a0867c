"""Files as people have them: links into a cache, byte order marks, types that are no weights, no locks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from command_line import mp2, mp2_json
from safetensors.torch import load_file, save_file
from tuning_world import World

from mp2.backbone import Backbone, load_backbone
from mp2.engine.folder import EngineFolder
from mp2.engine.onnx.backend import OnnxBackend
from mp2.errors import FormatError
from mp2.prompts import load_prompts
from mp2.runs.tuned import load_tuned
from mp2.tasks import load_card

SHORT = ("--iters", "20", "--router-iters", "8", "--popsize", "6", "--shots", "4", "--no-baselines")
BOM = b"\xef\xbb\xbf"


def linked(folder: Path, root: Path) -> Path:
    """The folder as the hub's cache has one: each file a link to a blob that its hash names."""
    (root / "blobs").mkdir(parents=True)
    snapshot = root / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_an_engine_folder_of_links_is_one(engine_dir: Path, tiny_backbone: Backbone, tmp_path: Path) -> None:
    states = torch.zeros(1, 1, 4, 24), torch.ones(1, 4, dtype=torch.bool)
    prefix = torch.zeros(1, 1, 4, 2, 6), torch.zeros(1, 1, 4, 2, 6)
    found = [
        OnnxBackend(tiny_backbone, folder, threads=1).layer(1, *states, prefix)
        for folder in (engine_dir, linked(engine_dir, tmp_path))
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", ".", "", "weights/../../x"])
def test_a_manifest_names_files_of_its_folder_only(engine_dir: Path, tmp_path: Path, name: str) -> None:
    theirs = Path(shutil.copytree(engine_dir, tmp_path / "engine"))
    (tmp_path / "x").write_text("theirs")
    manifest = json.loads((theirs / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256(b"theirs").hexdigest()
    (theirs / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match="is not a plain file name"):
        EngineFolder.open(theirs)


@pytest.mark.parametrize(
    "name", ["config.json", "vocab.txt", "tokenizer_config.json", "model.safetensors.index.json"]
)
def test_a_byte_order_mark_changes_nothing(world: World, tmp_path: Path, name: str) -> None:
    theirs = Path(shutil.copytree(world.backbone, tmp_path / "tiny"))
    if name == "tokenizer_config.json":
        (theirs / name).write_text('{"do_lower_case": true}')
    elif name.endswith("index.json"):
        tensors = load_file(theirs / "model.safetensors")
        (theirs / "model.safetensors").rename(theirs / "part.safetensors")
        (theirs / name).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "part.safetensors")}))
    expected = load_backbone(theirs)
    (theirs / name).write_bytes(BOM + (theirs / name).read_bytes())
    found = load_backbone(theirs)
    assert found.sha256 == expected.sha256
    assert found.tokenizer.tokens() == expected.tokenizer.tokens()
    assert found.tokenizer.encode("好吃 abc").ids == expected.tokenizer.encode("好吃 abc").ids


def test_a_card_and_a_runs_card_with_a_byte_order_mark_are_read(world: World, tmp_path: Path) -> None:
    card = tmp_path / "mood.toml"
    card.write_bytes(BOM + world.card.read_bytes())
    assert load_card(card).labels == load_card(world.card).labels
    result = mp2_json("bbt", *world.options(card=card), *SHORT)
    done = mp2("predict", "--run", result["run_dir"], "--input", world.data / "mood" / "test.jsonl")
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize("dtype", ["F4", "I8", "U32", "C64", "I64", "BOOL", "F8_E4M3"])
def test_prompts_of_types_that_are_no_floats_are_refused_not_cast(
    world: World, tmp_path: Path, dtype: str
) -> None:
    """In modular prompts and in a tuned one: the header says the type, the bytes fit it."""
    bits = {"F4": 4, "I8": 8, "U32": 32, "C64": 64, "I64": 64, "BOOL": 8, "F8_E4M3": 8}[dtype]
    for name, kept in (("z", world.deep), ("z", tmp_path / "tuned")):
        if not kept.exists():
            save_file({"z": torch.zeros(2, 4)}, kept, {"mp2": "{}"})
        data = kept.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        metadata = header.get("__metadata__", {})
        shape = [2, 4] if kept != world.deep else header[name]["shape"]
        n_bytes = -(-int(torch.tensor(shape).prod()) * bits // 8)
        text = json.dumps(
            {"__metadata__": metadata, name: {"dtype": dtype, "shape": shape, "data_offsets": [0, n_bytes]}}
        )
        path = tmp_path / "odd.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + b"\1" * n_bytes)
        with pytest.raises(FormatError, match=r"odd\.safetensors"):
            load_tuned(path) if kept != world.deep else load_prompts(path)


def test_a_git_lfs_pointer_is_named_as_one_wherever_a_file_is_read(
    world: World, engine_dir: Path, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    """Data in every format, cards, corpora, texts to label, graphs and weights of an engine."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064d}\nsize 1302674\n"
    run = mp2_json("bbt", *world.options(), *SHORT)["run_dir"]
    asked: list[tuple[object, ...]] = []
    for ending in ("jsonl", "json", "csv", "tsv", "parquet"):
        (tmp_path / ending / "mood").mkdir(parents=True)
        data = tmp_path / ending / "mood" / f"train.{ending}"
        data.write_text(pointer)
        asked.append(("tasks", "check", world.card, "--data", tmp_path / ending))
        asked.append(("predict", "--run", run, "--input", data))
        asked.append(("tasks", "new", data, "--out", tmp_path / "new.toml"))
    (tmp_path / "card.toml").write_text(pointer)
    asked.append(("tasks", "check", tmp_path / "card.toml"))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(pointer)
    asked.append(("pretrain-backbone", "--corpus", tmp_path / "corpus", "--out", tmp_path / "out"))
    for words in asked:
        done = mp2(*words)
        assert done.exit_code == 2, (words, done.output)
        assert "is a git-lfs pointer, not the file itself" in done.output, (words, done.output)
    for name in ("layer_01.onnx", "embed.bin"):
        theirs = Path(shutil.copytree(engine_dir, tmp_path / f"engine-{name}"))
        (theirs / name).write_text(pointer)
        with pytest.raises(FormatError, match="is a git-lfs pointer"):
            EngineFolder.open(theirs, tiny_backbone)


def test_weights_below_a_folder_that_is_no_utf_8_are_refused_for_that(world: World, tmp_path: Path) -> None:
    """A folder named in GBK; prompts and backbones are read by a library that opens no such path."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xca\xfd\xbe\xdd"))
    shutil.copytree(world.backbone, folder)
    shutil.copy(world.deep, folder / "p.safetensors")
    for words in (
        ("tasks", "check", "demo_topic", "--backbone", folder),
        ("bbt", "--task", "demo_topic", "--prompts", folder / "p.safetensors", "--explain"),
    ):
        done = mp2(*words)
        assert done.exit_code == 2, done.output
        assert "the package safetensors opens no path whose name is not UTF-8" in done.stderr


def test_a_run_on_a_file_system_without_locks(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):

        def no_locks(*_: object, number: int = number) -> None:
            raise OSError(number, "no locks")

        monkeypatch.setattr("fcntl.flock", no_locks)
        done = mp2("bbt", *world.options(), *SHORT, "--no-test")
        assert done.exit_code == 0, done.output
        assert done.stderr.count("has no locks: nothing would stop a second process there") == 1
