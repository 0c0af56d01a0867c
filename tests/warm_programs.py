"""``mp2`` and ``python`` for scripts that tests run: forks of one process that has loaded the libraries.

Loading torch takes two seconds of a core, and a script of docs/ or recipes/ starts up to thirty programs.
Words, folder, environment, streams, signals and exit status are those of a process of its own. Tests of how
processes start, stop and die do not use this.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("mp2", "python")
ADDRESS = "MP2_TESTS_WARM"
LOADED = (
    *("matplotlib.pyplot", "onnx", "onnxruntime", "scipy.stats", "sklearn.linear_model"),
    *("torch._dynamo", "torch.utils.tensorboard"),  # which training loads
    *("mp2.cli", "mp2.runs.run", "mp2.runs.predict", "mp2.export.by_name"),
    *("mp2.training.pretrain_run", "mp2.training.mlm_trainer"),
)


@contextlib.contextmanager
def warm_programs() -> Iterator[dict[str, str]]:
    """The environment in which ``mp2`` and ``python`` are such forks, as long as this lasts."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        for name in PROGRAMS:
            program = Path(folder, name)
            words = shlex.join([sys.executable, "-IS", __file__, name])
            program.write_text(f'#!/bin/sh\nexec {words} "$@"\n', "utf-8")
            program.chmod(0o755)
        path = os.pathsep.join([folder, str(Path(sys.executable).parent), os.environ["PATH"]])
        warm = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", ADDRESS: f"{folder}/socket"}
        listener.bind(warm[ADDRESS])
        listener.listen()
        server = subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno())],
            env={**os.environ, **warm},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
        )
        try:
            yield warm
        finally:
            server.kill()
            server.wait()


def run_script(warm: dict[str, str], *words: str | Path, cwd: Path, **environment: str) -> str:
    """What ``bash WORD ...`` prints in the folder ``cwd``; raises ``AssertionError`` where it fails."""
    done = subprocess.run(
        ["bash", *words],
        cwd=cwd,
        env={**os.environ, **warm, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ask() -> int:
    """The program that a script starts: hand over what it was given; its exit status."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ[ADDRESS])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda received, frame: server.sendall(bytes([received])))
        asked = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(server, [len(asked).to_bytes(4, "big")], [0, 1, 2])
        server.sendall(asked)
        status = server.recv(1)
    return status[0] if status else 1


def serve(listener: socket.socket) -> list[str]:
    """Fork for every program that asks; returns, in the fork alone, the words that it was started with."""
    for module in LOADED:
        import_module(module)
    gc.freeze()
    signal.signal(signal.SIGCHLD, _reap)
    while True:
        asking, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return _become(asking)
        asking.close()


def _reap(*_: object) -> None:
    """Wait for forks that have ended: their time is this process's, too."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _become(asking: socket.socket) -> list[str]:
    """Fork again: the words, with the streams, folder and environment of the program that asked."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(asking, 4, 3)
    asked = b""
    while len(asked) < int.from_bytes(size, "big"):
        asked += asking.recv(1 << 16)
    if process := os.fork():
        for stream in streams:
            os.close(stream)
        _pass_on(asking, process)
    asking.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    words, folder, environment = json.loads(asked)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return list(words)


def _pass_on(asking: socket.socket, process: int) -> None:
    """Signals to the process, which dies with the program that asked; its exit status back. Never returns."""
    ended = os.pidfd_open(process)
    while ended not in (ready := select.select([ended, asking], [], [])[0]):
        assert ready
        os.kill(process, (asking.recv(1) or bytes([signal.SIGKILL]))[0])
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with contextlib.suppress(OSError):
        asking.sendall(bytes([status if status >= 0 else 128 - status]))
    os._exit(0)


def run(words: list[str]) -> Any:
    """What ``mp2 WORD ...`` or ``python -m MODULE``, ``-c CODE``, ``-`` or ``FILE`` does."""
    import runpy

    program, *sys.argv = words
    if program == "mp2":
        from mp2.cli import main

        sys.argv.insert(0, program)
        return main()
    sys.path[0] = ""
    how = sys.argv[0]
    if how == "-m":
        del sys.argv[0]
        return runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    if how == "-c":
        code = sys.argv.pop(1)
    elif how == "-":
        code = sys.stdin.read()
    else:
        sys.path[0] = str(Path(how).parent)
        return runpy.run_path(how, run_name="__main__")
    exec(compile(code, how, "exec"), {"__name__": "__main__"})
    return None


if __name__ == "__main__":
    if sys.argv[1] in PROGRAMS:
        sys.exit(ask())
    run(serve(socket.socket(fileno=int(sys.argv[1]))))
