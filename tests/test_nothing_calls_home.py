"""Every command with an empty home folder, on no test machine: what is written, and who is called."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_TEST_MACHINE = re.compile(
    r"CI|GITHUB_|TF_BUILD|ORT_DISABLE_TELEMETRY|XDG_|HF_HUB|TRANSFORMERS|DO_NOT_TRACK|MPLCONFIGDIR"
)
OURS = (".cache/mp2/", ".cache/matplotlib/", ".config/matplotlib")
"""What may be written at home (docs/security.md): compiled kernels; matplotlib's list of the fonts here."""

PROGRAM = """
import json, socket, sys
from pathlib import Path
asked = []
lookup, connect = socket.getaddrinfo, socket.socket.connect
def named(host, *rest, **more):
    asked.append(str(host))
    return lookup(host, *rest, **more)
def connected(self, address):
    asked.append(str(address))
    return connect(self, address)
socket.getaddrinfo, socket.socket.connect = named, connected

from click.testing import CliRunner
from mp2.cli import main

def mp2(*words):
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, (words, done.output, done.exception)

short = ["--iters", 20, "--router-iters", 10, "--no-test", "--no-baselines", "--out", "runs"]
few = ["--modules", 2, "--prompt-tokens", 4, "--intrinsic-dim", 8, "--max-tokens", 64, "--dev-limit", 4]
tiny = ["--layers", 1, "--hidden", 16, "--heads", 2, "--vocab-size", 150, "--steps", 2, "--length", 32]
mp2("tasks")
mp2("tasks", "check", "demo_topic")
mp2("bbt", "--task", "demo_sentiment", *short, "--log", "tensorboard")
run = next(Path("runs").iterdir())
Path("in.txt").write_text("好吃\\n")
mp2("predict", "--run", run, "--input", "in.txt")
mp2("compare", run)
mp2("export", "--backbone", "mini", "--out", "engine")
mp2("export", "--run", run, "--out", "bundle")
mp2("bbt", "--task", "demo_sentiment", *short, "--runtime", "onnxruntime", "--engine", "engine")
mp2("pretrain", "--tasks", "demo_topic", "--steps", 2, *few, "--out", "pretrained")
mp2("tune", "--task", "demo_topic", "--epochs", 2, "--no-test", "--no-baselines", "--out", "tuned")
Path("corpus").mkdir()
Path("corpus/a.txt").write_text("天地人你我他上下来去大小多少好坏新旧。\\n\\n" * 60)
mp2("pretrain-backbone", "--corpus", "corpus", "--out", "backbone", *tiny)
mp2("doctor")
print(json.dumps(asked))
"""


@pytest.mark.slow
def test_no_command_calls_home_or_writes_there_unasked(tmp_path: Path) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    kept = {name: value for name, value in os.environ.items() if not _TEST_MACHINE.match(name)}
    paths = {"HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=kept | paths, cwd=work, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    asked = json.loads(done.stdout.splitlines()[-1])
    assert asked == []
    written = [path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()]
    assert [name for name in written if not name.startswith(OURS)] == []
