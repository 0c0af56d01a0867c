"""A stranger's folder: links, pipes, sockets and folders where our files go; nothing outside is touched."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import mp2, mp2_json
from tuning_world import World

from mp2.errors import UsageError
from mp2.files import open_to_append, own_folder, write_all, write_bytes

PRECIOUS = "precious\n" * 50
SHORT = ("--iters", "20", "--router-iters", "8", "--popsize", "6", "--shots", "4", "--no-baselines")
PRETRAIN = ("--steps", 3, "--modules", 2, "--prompt-tokens", 4, "--intrinsic-dim", 8, "--max-tokens", 64)
BACKBONE = ("--layers", 1, "--hidden", 16, "--heads", 2, "--vocab-size", 150, "--steps", 3, "--length", 32)


@pytest.fixture(autouse=True)
def _ends() -> Iterator[None]:
    """A pipe that nobody writes to would be waited for."""
    signal.alarm(120)
    yield
    signal.alarm(0)


def symbolic(path: Path, theirs: Path) -> None:
    path.symlink_to(theirs)


def hard(path: Path, theirs: Path) -> None:
    os.link(theirs, path)


def dangling(path: Path, theirs: Path) -> None:
    path.symlink_to(theirs.with_name("made-by-mp2"))


def pipe(path: Path, theirs: Path) -> None:
    os.mkfifo(path)


def socket_file(path: Path, theirs: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path has at most 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def folder(path: Path, theirs: Path) -> None:
    path.mkdir()


Put = Callable[[Path, Path], None]
KINDS: tuple[Put, ...] = (symbolic, hard, dangling, pipe, socket_file, folder)


def put(run: Path, names: tuple[str, ...], kind: Put, theirs: Path) -> None:
    theirs.write_text(PRECIOUS)
    for name in names:
        path = run / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        kind(path, theirs)


def check(theirs: Path) -> None:
    assert theirs.read_text() == PRECIOUS
    assert not theirs.with_name("made-by-mp2").exists()


@pytest.fixture(scope="module")
def tuned(world: World) -> Path:
    return Path(mp2_json("bbt", *world.options(), *SHORT)["run_dir"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_resumed_writes_in_its_folder_only(tuned: Path, tmp_path: Path, kind: Put) -> None:
    run, theirs = tmp_path / "run", tmp_path / "theirs"
    for names in (("prompt.safetensors", "result.json", "curve.png"), ("journal.jsonl",), ("lock",)):
        shutil.copytree(tuned, run)
        (run / "result.json").unlink()
        put(run, names, kind, theirs)
        done = mp2("bbt", "--resume", run)
        assert isinstance(done.exception, SystemExit | None), (names, done.exception)
        assert done.exit_code in (0, 1, 2), names
        check(theirs)
        refused = kind not in (hard, folder)
        if names == ("prompt.safetensors", "result.json", "curve.png") and kind is not folder:
            assert done.exit_code == 0, done.stderr
            assert all((run / name).is_file() and not (run / name).is_symlink() for name in names)
        elif refused:
            assert done.exit_code == 2, done.stderr
        assert done.exit_code == 0 or len(done.stderr.splitlines()[-1]) <= 400
        shutil.rmtree(run)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pretraining_writes_in_its_folder_only(world: World, tmp_path: Path, kind: Put) -> None:
    theirs, card = tmp_path / "theirs", ("--tasks", world.card, "--data", world.data)
    ends = ("prompts.safetensors", "scores.json", "routers.csv", "curves.png", "result.json", "model_card.md")
    for names in (
        (*ends, "checkpoint.safetensors"),
        ("losses.jsonl",),
        ("dev_scores.jsonl",),
        ("tensorboard",),
    ):
        out = tmp_path / "out"
        out.mkdir()
        put(out, names, kind, theirs)
        words = ("pretrain", *card, "--backbone", world.backbone, *PRETRAIN, "--dev-limit", 4, "--out", out)
        done = mp2(*words, "--threads", 1)
        assert isinstance(done.exception, SystemExit | None), (names, done.exception)
        assert done.exit_code in (0, 1, 2), names
        check(theirs)
        shutil.rmtree(out)


@pytest.mark.parametrize("kind", [symbolic, hard, dangling, pipe])
def test_a_backbone_is_written_in_its_folder_only(tmp_path: Path, kind: Put) -> None:
    corpus, theirs = tmp_path / "corpus", tmp_path / "theirs"
    corpus.mkdir()
    (corpus / "a.txt").write_text("天地人你我他上下来去大小多少好坏新旧。\n\n" * 60, "utf-8")
    for names in (
        ("model.safetensors", "config.json", "vocab_source.json", "result.json", "curves.png"),
        ("mlm_losses.jsonl",),
    ):
        out = tmp_path / "out"
        out.mkdir()
        put(out, names, kind, theirs)
        done = mp2("pretrain-backbone", "--corpus", corpus, "--out", out, *BACKBONE, "--threads", 1)
        assert isinstance(done.exception, SystemExit | None), (names, done.exception)
        check(theirs)
        shutil.rmtree(out)


def test_a_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "corpus").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="corpus is a symbolic link, and mp2 writes through none"):
        own_folder(tmp_path / "corpus")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="file is a file, expected a folder"):
        own_folder(tmp_path / "file")
    assert own_folder(tmp_path / "new").is_dir()
    assert own_folder(tmp_path / "new").is_dir()


def test_a_file_that_a_backup_shares_is_copied_before_it_grows(tmp_path: Path) -> None:
    write_bytes(tmp_path / "journal.jsonl", b"a\n")
    os.link(tmp_path / "journal.jsonl", tmp_path / "backup")
    with open_to_append(tmp_path / "journal.jsonl") as file:
        write_all(file, b"b\n")
    assert (tmp_path / "journal.jsonl").read_bytes() == b"a\nb\n"
    assert (tmp_path / "backup").read_bytes() == b"a\n"
    with open_to_append(tmp_path / "new") as file:
        write_all(file, b"c\n")
    assert (tmp_path / "new").read_bytes() == b"c\n"
