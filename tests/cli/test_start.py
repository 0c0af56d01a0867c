"""How the command line is started: as a module, and without loading what a command does not need."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
from command_line import mp2 as mp2_typed

import mp2

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "cma", "nevergrad", "matplotlib", "numpy")


def _python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, timeout=120)


def test_the_package_is_a_command() -> None:
    done = _python("-m", "mp2", "--version")
    assert (done.returncode, done.stdout) == (0, f"mp2, version {mp2.__version__}\n")
    usage = _python("-m", "mp2", "--help").stdout
    assert usage.startswith("Usage: python -m mp2 ")
    assert "predict" in usage


def test_the_module_exits_as_the_command_does() -> None:
    done = _python("-m", "mp2", "tasks", "show", "tnewz")
    assert done.returncode == 2
    assert done.stderr.startswith("mp2: unknown task 'tnewz'. Did you mean 'tnews'")


def test_help_lists_the_commands_in_whole_lines() -> None:
    text, end = _python("-m", "mp2", "--help").stdout.split("Commands:\n")[1].split("\n\n", 1)
    assert end.strip().startswith("Exit status: 0 done, ")
    listed = text.splitlines()
    assert [line.split()[0] for line in listed][:3] == ["tasks", "bbt", "predict"]
    assert all(line.endswith(".") and not line.endswith("...") for line in listed)


@pytest.mark.parametrize(
    ("work", "words"),
    [
        ("mp2.export.export_command", "export --backbone mini --out y"),
        ("mp2.training.tune_run.start_tunes", "tune --task demo_sentiment"),
        ("mp2.runs.predict.predict_file", "predict --run x --input y"),
    ],
)
def test_ctrl_c_is_130_and_one_line(monkeypatch: pytest.MonkeyPatch, work: str, words: str) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, interrupted)
    done = mp2_typed(*words.split())
    assert (done.exit_code, done.stdout) == (130, "")
    assert done.stderr.splitlines()[-1] == "mp2: stopped"
    assert ("begin it again" in done.stderr) == words.startswith("tune")


def test_what_the_machine_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int, *file: str) -> None:
        def full(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number), *file)

        monkeypatch.setattr("mp2.runs.predict.predict_file", full)

    words = ["predict", "--run", "x", "--input", "y"]
    for number in (errno.ENOSPC, errno.EACCES):
        refuse(number, "some/file")
        done = mp2_typed(*words)
        assert (done.exit_code, done.stderr) == (1, f"mp2: some/file: {os.strerror(number)}\n")
    refuse(errno.ENOSPC)
    done = mp2_typed(*words)
    assert (done.exit_code, done.stderr) == (1, f"mp2: standard output: {os.strerror(errno.ENOSPC)}\n")
    refuse(errno.ENAMETOOLONG, "x" * 5000)
    done = mp2_typed(*words)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert len(done.stderr) < 402
    refuse(errno.ENOENT, "some/file")  # a mistake of ours
    assert isinstance(mp2_typed(*words).exception, OSError)


def test_help_loads_nothing_heavy() -> None:
    loaded = _python("-c", f"import mp2.cli, sys; print(*({{*{HEAVY!r}}} & set(sys.modules)))")
    assert loaded.stdout.strip() == "", loaded
