"""Pre-training runs on the toy tasks, whole or cut off."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mp2.backbone import Backbone
from mp2.tasks import TaskCard
from mp2.training import PretrainConfig, PretrainResult, pretrain
from mp2.training.trainer import Trainer

SIZES = {"n_modules": 4, "prompt_tokens": 3, "intrinsic_dim": 8}


def tiny(**changes: Any) -> PretrainConfig:
    """Settings of a run of seconds."""
    settings = {
        **SIZES,
        "steps": 12,
        "batch_size": 8,
        "router_lr": 1e-2,
        "prompt_lr": 1e-2,
        "max_tokens": 64,
        "dev_limit": 8,
        "checkpoint_minutes": 0.0,  # a checkpoint a step
    }
    return PretrainConfig(**{**settings, **changes})


def run(
    world: tuple[list[TaskCard], Path], backbone: Backbone, config: PretrainConfig, out: Path, **more: Any
) -> PretrainResult:
    """Pre-train on all tasks of the world."""
    return pretrain(world[0], backbone, config, out, data=world[1], **more)


def losses(out: Path, journal: str = "losses.jsonl") -> list[float | None]:
    """The journal's losses; its steps must be 1, 2, 3 ..."""
    lines = [json.loads(line) for line in (out / journal).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


@contextmanager
def cut_at(trainer: type[Trainer[Any]], step: int, last_saved: int | None = None) -> Iterator[None]:
    """Within it, runs that save at every step save up to ``last_saved`` and stop at ``step`` as by Ctrl-C."""
    save = trainer.save

    def sometimes(self: Trainer[Any]) -> None:
        if last_saved is None or self.step <= last_saved:
            save(self)
        if self.step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "save", sometimes)
        yield


def kill_after(process: subprocess.Popen[Any], journal: Path, n_lines: int) -> None:
    """Kill a run (SIGKILL) as soon as its journal has ``n_lines``."""
    deadline = time.monotonic() + 60
    while not (journal.is_file() and journal.read_bytes().count(b"\n") >= n_lines):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
