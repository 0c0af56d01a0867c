"""Compiled kernels: made once, made again when damaged, never loaded from where others can write."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mp2.backbone import Backbone
from mp2.doctor import examine, rows
from mp2.engine.cpu import native
from mp2.engine.cpu.backend import CpuBackend
from mp2.engine.cpu.native.private_folder import NoPrivateFolderError, private_folder

needs_compiler = pytest.mark.skipif(native.load() is None, reason="no C compiler here")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home of our own without a cache yet; the next `native.load` begins afresh."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    # nothing is computed here: a second instead of some
    monkeypatch.setattr(native, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in native.FLAGS))
    native.load.cache_clear()
    yield tmp_path
    native.load.cache_clear()


@pytest.fixture
def kept(home: Path) -> Path:
    """The folder of the kernels."""
    return home / ".cache" / "mp2" / "kernels"


def again() -> bool:
    native.load.cache_clear()
    return native.load() is not None


def library(folder: Path) -> Path:
    (path,) = folder.glob("*.so")
    return path


def plant(folder: Path, source: str) -> Path:
    """Put another library under the name of ours, with the hash that fits; returns what loading it writes."""
    path, sign = library(folder), folder.parent / "it-was-loaded"
    code = folder / "planted.c"
    code.write_text(source.replace("SIGN", str(sign)), "ascii")
    path.unlink()
    subprocess.run([*native.compiler(), "-shared", "-fPIC", str(code), "-o", str(path)], check=True)
    path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest(), "ascii")
    return sign


PLANTED = """#include <stdio.h>
__attribute__((constructor)) static void run(void) { fclose(fopen("SIGN", "w")); }
"""


@needs_compiler
def test_the_folder_is_made_for_us_alone(home: Path, kept: Path) -> None:
    assert native.load() is not None
    made = [kept, *kept.parents[:2]]
    assert [path.stat().st_mode & 0o777 for path in made] == [0o700] * 3
    assert sorted(path.suffix for path in kept.iterdir()) == [".sha256", ".so"]


@needs_compiler
def test_library_is_made_once_and_again_for_other_flags(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.load() is not None
    before = library(kept).stat().st_mtime_ns
    assert again()
    assert library(kept).stat().st_mtime_ns == before
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-DANOTHER"))
    assert again()
    assert len(list(kept.glob("*.so"))) == 2


@needs_compiler
@pytest.mark.parametrize("damage", ["empty", "cut", "hash missing", "hash of another", "hash no text"])
def test_a_damaged_library_is_made_again(kept: Path, damage: str) -> None:
    assert native.load() is not None
    path = library(kept)
    whole, sidecar = path.read_bytes(), path.with_suffix(".sha256")
    if damage == "hash missing":
        sidecar.unlink()
    elif damage.startswith("hash"):
        sidecar.write_bytes(b"0" * 64 if damage == "hash of another" else b"\xff\xfe")
    else:
        # not in place: that would pull the pages from under what is loaded
        path.unlink()
        path.write_bytes(b"" if damage == "empty" else whole[: len(whole) // 2])
    assert again()
    assert native.unfit() == ""
    assert library(kept).stat().st_size == len(whole)
    assert "C kernels" in dict(rows(examine()))


@needs_compiler
@pytest.mark.parametrize("what", ["no library", "a library without our functions"])
def test_what_does_not_load_or_lacks_a_function_is_made_again(kept: Path, what: str) -> None:
    assert native.load() is not None
    size = library(kept).stat().st_size
    plant(kept, "int mp2_attend(void) { return 0; }")
    if what == "no library":
        path = library(kept)
        path.write_bytes(b"no library")
        path.with_suffix(".sha256").write_text(hashlib.sha256(b"no library").hexdigest(), "ascii")
    assert again()
    assert library(kept).stat().st_size == size


@needs_compiler
def test_a_compiler_whose_library_lacks_a_function_is_told_in_a_line(
    home: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "empty.c").write_text("int nothing;", "ascii")
    monkeypatch.setattr(native, "_HERE", home)
    monkeypatch.setattr(native, "_SOURCES", ("empty.c",))
    monkeypatch.setattr(native, "_HEADERS", ())
    assert native.load() is None
    assert "cannot be used" in native.unfit()
    assert "mp2_" in native.unfit()
    assert "\n" not in native.unfit()
    assert not list(kept.iterdir())


@needs_compiler
@pytest.mark.parametrize("open_to_others", ["kernels", "mp2", ".cache", "home"])
def test_a_library_planted_where_others_can_write_is_never_loaded(
    home: Path, kept: Path, open_to_others: str
) -> None:
    assert native.load() is not None
    sign = plant(kept, PLANTED)
    opened = {path.name: path for path in (kept, *kept.parents[:2])}.get(open_to_others, home)
    opened.chmod(0o777)
    assert not again()
    assert not sign.exists()
    assert str(opened) in native.unfit()
    assert "mode 777" in native.unfit()


@needs_compiler
def test_the_planted_library_would_have_told(kept: Path) -> None:
    """So that the test above can fail: in a folder that is ours alone, it is loaded, and then made again."""
    assert native.load() is not None
    sign = plant(kept, PLANTED)
    assert again()
    assert sign.exists()


@pytest.mark.parametrize("owner", ["kernels", "mp2", ".cache", "home"])
def test_a_folder_of_another_user_is_never_used(
    home: Path, kept: Path, monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    assert private_folder() == kept
    theirs = {path.name: path for path in (kept, *kept.parents[:2])}.get(owner, home)
    original = Path.stat

    def stat(path: Path, **options: bool) -> os.stat_result:
        found = list(original(path, **options))
        if path == theirs:
            found[4] = os.geteuid() + 1
        return os.stat_result(found)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(NoPrivateFolderError, match=rf"{theirs} belongs to user {os.geteuid() + 1}"):
        private_folder()


def test_xdg_cache_home_is_taken_if_it_is_absolute_and_ours(
    home: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, shared = home / "own", home / "shared"
    shared.mkdir()
    shared.chmod(0o1777)  # as /tmp
    monkeypatch.chdir(home)
    for named, expected in (
        (str(own), own / "mp2" / "kernels"),
        ("own", kept),
        ("", kept),
        (str(shared), kept),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", named)
        assert private_folder() == expected, named
    assert not list(shared.iterdir())


def test_a_link_is_judged_by_where_it_leads(home: Path, kept: Path) -> None:
    shared = home / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    kept.parent.mkdir(parents=True, mode=0o700)
    kept.symlink_to(shared)
    with pytest.raises(NoPrivateFolderError, match="shared has mode 777, expected 700"):
        private_folder()


@pytest.mark.parametrize("way", ["switched off", "compiler missing", "compiler fails", "no command"])
def test_without_a_compiler_there_is_no_library_and_no_error(
    home: Path, monkeypatch: pytest.MonkeyPatch, tiny_backbone: Backbone, way: str
) -> None:
    if way == "switched off":
        monkeypatch.setenv("MP2_NATIVE", "0")
    else:
        monkeypatch.setenv(
            "CC", {"compiler missing": "/nowhere/cc", "compiler fails": "false", "no command": "'gcc"}[way]
        )
    assert native.load() is None
    assert not list(home.rglob("*.so"))
    said = {
        "switched off": "MP2_NATIVE=0",
        "compiler missing": "/nowhere/cc",
        "compiler fails": "false",
        "no command": "expected a command",
    }[way]
    assert said in native.unfit()
    assert f"; no C kernels: {native.unfit()}" in CpuBackend(tiny_backbone).reason
    assert f"none: {native.unfit()}" in dict(rows(examine()))["C kernels"]


def test_without_a_home_there_is_no_library_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    assert native.load() is None
    if native.compiler():
        assert "there is no home" in native.unfit()
        assert "set XDG_CACHE_HOME" in native.unfit()


@needs_compiler
def test_a_compiler_can_have_arguments_and_a_front(
    home: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = shlex.join(native.compiler())
    front = home / "a front"
    front.write_text('#!/bin/sh\nexec "$@"\n', "ascii")
    front.chmod(0o700)
    for number, command in enumerate((plain, f"{plain} -O2", f"'{front}' {plain}"), 1):
        monkeypatch.setenv("CC", command)
        assert again(), native.unfit()
        assert len(list(kept.glob("*.so"))) == number
