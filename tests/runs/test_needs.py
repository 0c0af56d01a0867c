"""A run folder on another machine: what it needs is named, and found where the options say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import mp2, mp2_json
from tuning_world import World, make_world

from mp2.backbone import Backbone
from mp2.runs.needs import located
from mp2.runs.run_folder import read_config

SHORT = ("--iters", "20", "--router-iters", "8", "--popsize", "6", "--shots", "4")


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> tuple[Path, World, Any]:
    """A run whose backbone, prompts and data are elsewhere now; the world there; the run's result."""
    here, there = (tmp_path_factory.mktemp(name) for name in ("here", "there"))
    world = make_world(here, tiny_backbone)
    result = mp2_json("bbt", *world.options(), *SHORT)
    run_dir = tmp_path_factory.mktemp("run") / "run"
    shutil.copytree(result["run_dir"], run_dir)
    shutil.rmtree(here)
    return run_dir, make_world(there, tiny_backbone), result


def test_predict_names_what_it_needs(moved: tuple[Path, World, Any], tmp_path: Path) -> None:
    run_dir, world, _ = moved
    words: list[object] = ["predict", "--run", run_dir, "--input", world.data / "mood" / "test.jsonl"]
    for option, name, place in (
        ("--backbone", "backbone", world.backbone),
        ("--prompts", "modular prompts", world.deep),
    ):
        done = mp2(*words)
        assert done.exit_code == 2
        assert f"needs the {name} /" in done.stderr
        assert f"there is nothing there now; say with {option} where it is" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        words += [option, place]
    done = mp2(*words)
    assert done.exit_code == 0, done.stderr
    assert len(done.stdout.splitlines()) == 12


def test_export_names_what_it_needs(moved: tuple[Path, World, Any], tmp_path: Path) -> None:
    run_dir, world, _ = moved
    words: list[object] = ["export", "--run", run_dir, "--out", tmp_path / "bundle"]
    for option, name, place in (
        ("--backbone", "backbone", world.backbone),
        ("--prompts", "modular prompts", world.deep),
    ):
        done = mp2(*words)
        assert done.exit_code == 2
        assert f"needs the {name} /" in done.stderr
        words += [option, place]
    assert mp2(*words).exit_code == 0


def test_a_run_is_resumed_where_everything_has_moved(moved: tuple[Path, World, Any], tmp_path: Path) -> None:
    run_dir, world, result = moved
    cut = tmp_path / "cut"
    shutil.copytree(run_dir, cut)
    for name in ("result.json", "prompt.safetensors"):
        (cut / name).unlink()
    words: list[object] = ["bbt", "--resume", cut]
    for option, place in (
        ("--backbone", world.backbone),
        ("--prompts", world.deep),
        ("--data", world.data),
    ):
        done = mp2(*words)
        assert done.exit_code == 2
        assert f"say with {option} where it is" in done.stderr
        words += [option, place]
    resumed = mp2_json(*words)
    times = ("seconds", "run_dir")
    assert {k: v for k, v in resumed.items() if k not in times} == {
        k: v for k, v in result.items() if k not in times
    }
    assert (cut / "prompt.safetensors").read_bytes() == (run_dir / "prompt.safetensors").read_bytes()


def test_what_is_found_elsewhere_must_be_the_same(moved: tuple[Path, World, Any]) -> None:
    run_dir, world, _ = moved
    source = world.data / "mood" / "test.jsonl"
    words = ("predict", "--run", run_dir, "--input", source, "--backbone", world.backbone)
    done = mp2(*words, "--prompts", world.shallow)
    assert done.exit_code == 2
    assert "the prompt was tuned on prompts" in done.stderr


def test_a_hub_backbone_is_the_commit_that_the_run_found(
    moved: tuple[Path, World, Any], tmp_path: Path
) -> None:
    copied = tmp_path / "run"
    shutil.copytree(moved[0], copied)
    stored = json.loads((copied / "config.json").read_text())
    stored["config"] |= {"backbone": "cpt-large", "prompts": "mini-deep"}
    (copied / "config.json").write_text(json.dumps(stored | {"backbone_revision": "abc123"}))
    config = read_config(copied)
    assert located(copied, config, {}).revision == "abc123"
    assert located(copied, config, {"revision": "main"}).revision == "main"
    assert located(copied, config, {"backbone": "cpt-base"}).revision is None
    (copied / "config.json").write_text(json.dumps(stored | {"backbone_revision": None}))
    assert located(copied, config, {}).revision is None


def test_what_a_run_names_and_nobody_typed_is_said(moved: tuple[Path, World, Any], tmp_path: Path) -> None:
    """A stranger's folder chooses no hub ids and no paths in silence: predict, export, resume, pretrain."""
    run_dir, world, _ = moved
    theirs = tmp_path / "theirs"
    shutil.copytree(run_dir, theirs)
    config = json.loads((theirs / "config.json").read_text())
    config["config"] |= {"backbone": "somebody/model", "prompts": str(world.deep), "data": str(world.data)}
    (theirs / "config.json").write_text(json.dumps(config))
    for name in ("result.json", "prompt.safetensors"):
        shutil.copy(theirs / name, tmp_path / name)
    label = ("predict", "--run", theirs, "--input", world.data / "mood" / "test.jsonl")
    bundle = ("export", "--run", theirs, "--out", tmp_path / "bundle")
    for words in (label, bundle, ("bbt", "--resume", theirs)):
        if words[0] == "bbt":
            (theirs / "prompt.safetensors").unlink()
        said = mp2(*words).stderr
        assert "loading backbone somebody/model, which is not on this machine: a name of the hub" in said
        assert f"loading prompts {world.deep} (" in said
        assert all(len(line) <= 400 for line in said.splitlines())
        typed = mp2(*words, "--backbone", world.backbone, "--prompts", world.deep).stderr
        assert "loading backbone" not in typed
        assert "loading prompts" not in typed


def test_what_a_pretraining_names_is_said(tmp_path: Path) -> None:
    inputs = {"tasks": ["demo_topic"], "backbone": "somebody/model", "init": "/nowhere/prompts.safetensors"}
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(json.dumps({"inputs": inputs, "steps": 5}))
    said = mp2("pretrain", "--resume", out).stderr
    assert "loading backbone somebody/model, which is not on this machine" in said
    assert "loading init /nowhere/prompts.safetensors" in said
