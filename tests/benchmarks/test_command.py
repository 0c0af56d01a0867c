"""Benchmarks end in one line where something is wrong."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks.command import one_line_errors
from mp2.errors import LossError, UnknownNameError

FOLDER = Path(benchmarks.__path__[0])
COMMANDS = sorted(
    ".".join(path.relative_to(FOLDER).with_suffix("").parts)
    for path in FOLDER.rglob("*.py")
    if re.search(r"^def main\(", path.read_text("utf-8"), re.MULTILINE)
)


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (
            UnknownNameError("task", "tnewz", ["tnews"]),
            2,
            "unknown task 'tnewz'. Did you mean 'tnews'? Known: tnews.",
        ),
        (LossError("all 20 losses are NaN"), 1, "all 20 losses are NaN"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_errors_of_ours_are_one_line_and_their_exit_status(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str, goes_on: bool
) -> None:
    @one_line_errors(goes_on=goes_on)
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == status
    told = capsys.readouterr().err
    more = "; the same command goes on from here" if goes_on and status == 130 else ""
    assert told == f"test_command: {line}{more}\n"


def test_a_package_says_its_own_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.paper", "tabel3"])
    with pytest.raises(SystemExit):
        importlib.import_module("benchmarks.paper.__main__").main()
    assert capsys.readouterr().err.startswith(
        "paper: unknown table or figure 'tabel3'. Did you mean 'table3'"
    )


def test_errors_that_are_not_ours_keep_their_traceback() -> None:
    @one_line_errors()
    def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        main()


def test_the_benchmarks_are_found() -> None:
    assert {"speed.throughput", "paper.__main__", "results_page"} <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_ends_so(name: str) -> None:
    main = importlib.import_module(f"benchmarks.{name}").main
    assert main.__wrapped__.__name__ == "main"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_tensorrt_benchmark_without_a_gpu_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.speed.tensorrt_engine", "--work", str(tmp_path / "work")])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("benchmarks.speed.tensorrt_engine").main()
    assert ended.value.code == 2
    assert "sees no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
