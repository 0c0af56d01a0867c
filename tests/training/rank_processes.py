"""Processes of one run, as torchrun starts them, but forked from one that has imported torch already."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LIMIT_S = 120.0  # a run takes two seconds or so; one that hangs is killed and fails

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["mp2.cli", "mp2.training", "torch._dynamo", "torch.utils.tensorboard", "matplotlib.backends.backend_agg"]
)


@dataclass(frozen=True)
class Moment:
    """When a process sends itself a signal: in a place of its program, at a step (counted from 0)."""

    place: str  # start (step -1), loss, after_step, saving (checkpoint written, not in place yet), saved
    step: int
    number: int = signal.SIGKILL
    times: int = 1


@dataclass
class RankProcesses:
    """Two processes that run an ``mp2`` command as one run; what they print goes to files in ``folder``."""

    folder: Path
    arguments: Sequence[object]
    moments: dict[int, Moment] = field(default_factory=dict)
    join_s: float = 60.0

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [str(a) for a in self.arguments]
        self.processes: list[BaseProcess] = [
            _CONTEXT.Process(
                target=_run, args=(rank, port, words, self._log(rank), self.moments.get(rank), self.join_s)
            )
            for rank in range(2)
        ]
        for process in self.processes:
            process.start()

    def _log(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.txt"

    def wait(self) -> tuple[list[int | None], list[str]]:
        """Exit statuses and outputs; fails where a process does not end by itself."""
        end = time.monotonic() + LIMIT_S
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        hung = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        for rank in hung:
            self.processes[rank].kill()
            self.processes[rank].join()
        outputs = [self._log(rank).read_text() if self._log(rank).exists() else "" for rank in range(2)]
        assert not hung, f"processes {hung} had to be killed after {LIMIT_S} s:\n" + "\n".join(outputs)
        return [process.exitcode for process in self.processes], outputs


def _run(rank: int, port: int, words: list[str], log: Path, moment: Moment | None, join_s: float) -> None:
    """One process."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank)
    )
    sys.argv = ["mp2", *words]
    import faulthandler

    import torch

    from mp2.cli import main
    from mp2.training import ranks

    faulthandler.dump_traceback_later(LIMIT_S - 20, file=sys.stderr)
    torch.set_num_threads(1)
    ranks.JOIN_TIMEOUT = timedelta(seconds=join_s)  # type: ignore[misc]
    if moment is not None:
        _arm(moment)
    main(words)


def _arm(moment: Moment) -> None:
    """Make this process signal itself at ``moment``."""
    from mp2 import files
    from mp2.training.mlm_trainer import MlmTrainer
    from mp2.training.pretrainer import Pretrainer

    at = -1  # the step of the last loss

    def fire(place: str) -> None:
        if (place, at) == (moment.place, moment.step):
            for _ in range(moment.times):
                os.kill(os.getpid(), moment.number)

    def arm(kind: Any) -> None:
        plain_loss, plain_after = kind.loss, kind.after_step

        def loss(self: Any, batch: Any) -> Any:
            nonlocal at
            at = self.step
            fire("loss")
            return plain_loss(self, batch)

        def after_step(self: Any) -> None:
            fire("after_step")
            plain_after(self)

        kind.loss, kind.after_step = loss, after_step

    def put_in_place(source: Path, target: Path) -> None:
        tensors = target.suffix == ".safetensors"
        if tensors:
            fire("saving")
        os.replace(source, target)
        if tensors:
            fire("saved")

    arm(MlmTrainer)
    arm(Pretrainer)
    files.os = SimpleNamespace(**vars(os) | {"replace": put_in_place})  # type: ignore[assignment]
    fire("start")
