"""Links, pipes and full disks: nothing is written elsewhere, nothing half, and one line says why."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz.test_run_files import META

from mp2.commands.paths import checked_path
from mp2.errors import FormatError, MismatchError, Mp2Error, RunLockedError, UsageError
from mp2.files import open_to_append, whole_file, write_all, write_bytes, write_tensors
from mp2.folder_lock import folder_lock
from mp2.runs.journal import open_journal
from mp2.runs.series import sigterm_exits
from mp2.runs.tuned import load_tuned, run_card, save_tuned
from mp2.tasks import load_card
from mp2.tasks.record import is_blank
from mp2.training.ranks import StopSignals


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("precious")
    for name in ("result.json", "journal.jsonl", "lock", "losses.jsonl"):
        (tmp_path / name).symlink_to(theirs)
    write_bytes(tmp_path / "result.json", b"ours")  # takes the link's place
    assert (tmp_path / "result.json").read_bytes() == b"ours"
    assert not (tmp_path / "result.json").is_symlink()
    with pytest.raises(UsageError, match="is a symbolic link"):
        open_journal(tmp_path / "journal.jsonl", {})
    with pytest.raises(UsageError, match="is a symbolic link"):
        open_to_append(tmp_path / "losses.jsonl")
    with pytest.raises(UsageError, match="is a symbolic link"), folder_lock(tmp_path, "taken"):
        pass
    assert theirs.read_text() == "precious"


def test_a_name_that_was_guessed_is_not_used(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("precious")
    (tmp_path / "result.json.part").symlink_to(theirs)
    names = set()
    for _ in range(2):
        with whole_file(tmp_path / "result.json") as partial:
            assert partial.is_file()
            names.add(partial.name)
            partial.write_text("x")
    assert len(names) == 2
    assert theirs.read_text() == "precious"


def test_what_a_killed_process_left_is_taken_away_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    left = tmp_path / f".a.json.{'0' * 16}.part"
    left.write_text("half")
    with whole_file(path) as outer:
        outer.write_text("outer")
        with whole_file(path) as inner:
            inner.write_text("inner")
        assert outer.exists()
    assert path.read_text() == "outer"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.json"]


def test_pipes_and_devices_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "journal.jsonl")
    with pytest.raises(FormatError, match="is no regular file"):
        open_journal(tmp_path / "journal.jsonl", {})
    (tmp_path / "prompt.safetensors").symlink_to("/dev/zero")
    with pytest.raises(FormatError, match="is no regular file"):
        load_tuned(tmp_path / "prompt.safetensors")


def test_a_second_process_is_refused_and_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        folder_lock(tmp_path, "taken"),
        pytest.raises(RunLockedError, match="taken"),
        folder_lock(tmp_path, "taken"),
    ):
        pass

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with folder_lock(tmp_path, "taken"):
        assert "has no locks" in capsys.readouterr().err
    write_bytes(tmp_path / "a", b"x")


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file may grow beyond 2,000 bytes in this process."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    monkeypatch.setattr("os.fsync", os.fsync)
    yield  # type: ignore[misc]
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_leaves_what_was_there_and_names_the_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a.json", b"old")
    with pytest.raises(OSError, match="too large") as error:
        write_bytes(tmp_path / "a.json", b"x" * 5000)
    assert error.value.filename == str(tmp_path / "a.json")
    assert (tmp_path / "a.json").read_bytes() == b"old"
    with pytest.raises(OSError, match="too large") as error, open_to_append(tmp_path / "j") as file:
        write_all(file, b"x" * 5000)
    assert str(error.value.filename) == str(tmp_path / "j")
    with pytest.raises(Mp2Error, match=r"cannot write .*w\.safetensors"):
        write_tensors(tmp_path / "w.safetensors", {"w": torch.zeros(5000)})
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.json", "j"]


def test_output_to_a_full_device_is_one_line_and_exit_1() -> None:
    for words in (["tasks"], ["doctor", "--json"]):
        with Path("/dev/full").open("wb") as full:
            done = subprocess.run(
                [sys.executable, "-m", "mp2", *words], stdout=full, stderr=subprocess.PIPE, text=True
            )
        assert (done.returncode, done.stderr) == (1, "mp2: standard output: No space left on device\n")


def test_closed_streams_are_answered(tmp_path: Path) -> None:
    command = f"{sys.executable} -m mp2 predict --run {tmp_path} --input - <&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "standard input is closed" in done.stderr
    done = subprocess.run(["sh", "-c", f"{sys.executable} -m mp2 tasks >&-"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_sighup_is_like_sigterm_and_nohup_is_respected() -> None:
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        pytest.skip("the tests themselves were started with nohup")
    with pytest.raises(SystemExit) as left, sigterm_exits():
        os.kill(os.getpid(), signal.SIGHUP)
    assert left.value.code == 128 + signal.SIGHUP
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received == signal.SIGHUP
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with sigterm_exits(), StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_card_that_was_changed_after_tuning_is_refused(tmp_path: Path) -> None:
    text = load_card("demo_topic").path.read_text("utf-8")
    (tmp_path / "card.toml").write_text(text, "utf-8")
    meta = META.__class__(**{**META.__dict__, "card": text})
    assert run_card(tmp_path, meta).task == "demo_topic"
    (tmp_path / "card.toml").write_text(text.replace("version = 1", "version = 2"), "utf-8")
    with pytest.raises(MismatchError, match=r"card\.toml is not the card that the prompt was tuned with"):
        run_card(tmp_path, meta)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_prompt_with_nan_is_refused(tmp_path: Path, value: float) -> None:
    z = np.zeros((2, 3), np.float32)
    z[1, 2] = value
    save_tuned(tmp_path / "p.safetensors", z, META)
    with pytest.raises(FormatError, match="field 'z': holds NaN or infinity"):
        load_tuned(tmp_path / "p.safetensors")


def test_texts_without_a_visible_character_are_blank() -> None:
    for text in ("", " ", "\0", "\u200b\u200d", "\ufeff", "\u3000\t\n", "\ufe0f", "\u00ad", "\ufffd"):
        assert is_blank(text), repr(text)
    for text in ("a", "\u200b好", "🎸", "。", "\u0301"):
        assert not is_blank(text), repr(text)


def test_paths_are_looked_at_when_they_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    assert checked_path("~/x", "--data") == "/somebody/x"
    assert checked_path("a/~", "--data") == "a/~"
    for text in ("好" * 86, "a/" * 3000, "x" * 300 + "/y"):
        with pytest.raises(UsageError, match=r"--data: .* too long for a path"):
            checked_path(text, "--data")
    with pytest.raises(UsageError, match="zero byte"):
        checked_path("a\0b", "--data")


def test_a_tilde_in_mp2_data_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mp2.tasks.place import tasks_in

    (tmp_path / "d" / "mood").mkdir(parents=True)
    (tmp_path / "d" / "mood" / "train.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MP2_DATA", "~/d")
    assert tasks_in() == {"mood"}
