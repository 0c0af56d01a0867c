"""Two processes of one run, killed or told to stop at any moment, and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from mp2.backbone import save_backbone
from training.rank_processes import LIMIT_S, Moment, RankProcesses
from training.toy_tasks import lively_backbone, write_tasks

STEPS = 12
JOURNALS = {"pretrain": "losses.jsonl", "pretrain-backbone": "mlm_losses.jsonl"}
CHECKPOINTS = {"pretrain": "checkpoint.safetensors", "pretrain-backbone": "mlm_checkpoint.safetensors"}
OUTPUTS = {"pretrain": "prompts.safetensors", "pretrain-backbone": "model.safetensors"}
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with cards, data, a backbone and a corpus."""
    root = tmp_path_factory.mktemp("world")
    write_tasks(root)
    save_backbone(lively_backbone(), root / "lively")
    (root / "corpus").mkdir()
    rng = np.random.default_rng(0)
    lines = rng.choice(["天气今日晴有雨！", "这个东西真的很好，不错。", "旅游美食体育科技"], 150)
    (root / "corpus" / "a.txt").write_text("\n".join(lines), "utf-8")
    return root


def arguments(world: Path, command: str, out: Path, *more: object) -> list[object]:
    if command == "pretrain":
        cards = [world / f"{task}.toml" for task in ("mood", "find", "pick")]
        inputs = ["--tasks", *cards, "--data", world / "data", "--backbone", world / "lively"]
        sizes = ["--modules", 4, "--prompt-tokens", 3, "--intrinsic-dim", 8, "--max-tokens", 64]
        rates = ["--router-lr", 0.01, "--prompt-lr", 0.01, "--dev-limit", 6, "--eval-every", 5]
    else:
        inputs = ["--corpus", world / "corpus"]
        sizes = ["--layers", 2, "--hidden", 16, "--heads", 2, "--vocab-size", 200, "--max-positions", 32]
        rates = ["--length", 16, "--precision", "fp32"]
    run = ["--steps", STEPS, "--batch-size", 8, "--threads", 1, "--checkpoint-minutes", 0, "--out", out]
    return [command, *inputs, *sizes, *rates, *run, *more]


def results(command: str, out: Path) -> list[bytes]:
    """Losses, dev scores and the trained weights."""
    names = [JOURNALS[command], OUTPUTS[command], *(["dev_scores.jsonl"] if command == "pretrain" else [])]
    return [(out / name).read_bytes() for name in names]


def steps(command: str, out: Path) -> tuple[int, int]:
    """Step of the checkpoint, and lines of the journal."""
    with safe_open(out / CHECKPOINTS[command], framework="pt") as file:
        step = json.loads(file.metadata()["state"])["step"]
    return step, len((out / JOURNALS[command]).read_text().splitlines())


@pytest.fixture(scope="module")
def unbroken(world: Path) -> dict[str, list[bytes]]:
    """Results of each command, made by two processes that nobody stopped."""
    found = {}
    for command in JOURNALS:
        out = world / "unbroken" / command
        out.mkdir(parents=True)
        statuses, outputs = RankProcesses(out, arguments(world, command, out)).wait()
        assert statuses == [0, 0], outputs
        assert len((out / JOURNALS[command]).read_text().splitlines()) == STEPS
        found[command] = results(command, out)
    return found


def finish(world: Path, command: str, out: Path, expected: list[bytes]) -> None:
    """Start the same command again; it must end like one never stopped."""
    statuses, outputs = RankProcesses(out, arguments(world, command, out)).wait()
    assert statuses == [0, 0], outputs
    assert results(command, out) == expected
    assert not outputs[1]  # only the first process speaks


@pytest.mark.parametrize("command", JOURNALS)
@pytest.mark.parametrize(
    "moments",
    [
        {0: Moment("after_step", 5), 1: Moment("after_step", 5)},
        {0: Moment("saving", 7), 1: Moment("loss", 8)},
        {0: Moment("saved", 3), 1: Moment("loss", 4)},
    ],
    ids=["after-a-step", "checkpoint-half-written", "checkpoint-just-written"],
)
def test_two_processes_killed_go_on_bit_for_bit(
    world: Path, unbroken: dict[str, list[bytes]], tmp_path: Path, command: str, moments: dict[int, Moment]
) -> None:
    statuses, outputs = RankProcesses(tmp_path, arguments(world, command, tmp_path), moments).wait()
    assert statuses == [-KILL, -KILL], outputs
    finish(world, command, tmp_path, unbroken[command])


@pytest.mark.parametrize("command", JOURNALS)
@pytest.mark.parametrize("place", ["loss", "after_step"])
@pytest.mark.parametrize("killed", [0, 1])
def test_one_of_two_killed_ends_the_other_in_one_line_and_the_run_goes_on(
    world: Path, unbroken: dict[str, list[bytes]], tmp_path: Path, command: str, killed: int, place: str
) -> None:
    moments = {killed: Moment(place, 5)}
    statuses, outputs = RankProcesses(tmp_path, arguments(world, command, tmp_path), moments).wait()
    assert statuses[killed] == -KILL, outputs
    assert statuses[1 - killed] == 1, outputs
    assert "Traceback" not in outputs[1 - killed]
    assert "another of the 2 processes of this run ended" in outputs[1 - killed].splitlines()[-1]
    finish(world, command, tmp_path, unbroken[command])


def test_the_main_process_saves_what_is_done_when_another_is_lost(world: Path, tmp_path: Path) -> None:
    moments = {1: Moment("loss", 7)}
    rare = ["--checkpoint-minutes", 60]
    RankProcesses(tmp_path, arguments(world, "pretrain", tmp_path, *rare), moments).wait()
    assert steps("pretrain", tmp_path) == (7, 7)


@pytest.mark.parametrize("command", JOURNALS)
@pytest.mark.parametrize(
    "moments",
    [
        {1: Moment("loss", 5, TERM)},
        {0: Moment("loss", 5, INT)},
        {0: Moment("after_step", 5, TERM, 2), 1: Moment("loss", 5, TERM, 2)},
        {0: Moment("saving", 6, TERM), 1: Moment("loss", 5, TERM)},
    ],
    ids=["the-second-told", "the-first-told", "both-told-twice", "told-again-while-saving"],
)
def test_a_signal_stops_both_at_the_same_step_with_a_whole_checkpoint(
    world: Path, unbroken: dict[str, list[bytes]], tmp_path: Path, command: str, moments: dict[int, Moment]
) -> None:
    statuses, outputs = RankProcesses(tmp_path, arguments(world, command, tmp_path), moments).wait()
    told = {128 + m.number for m in moments.values()} | {128 + TERM}
    assert None not in statuses
    assert set(statuses) <= told, outputs
    step, lines = steps(command, tmp_path)
    assert step == lines < STEPS
    assert f"stopped at step {step}" in outputs[0]
    assert not outputs[1]
    finish(world, command, tmp_path, unbroken[command])


def test_a_process_that_never_comes_is_waited_for_only_so_long(world: Path, tmp_path: Path) -> None:
    run = RankProcesses(
        tmp_path, arguments(world, "pretrain", tmp_path), {1: Moment("start", -1)}, join_s=2.0
    )
    statuses, outputs = run.wait()
    assert statuses == [1, -KILL]
    assert "not all of the 2 processes of this run came within 0:00:02" in outputs[0].splitlines()[-1]
    assert "Traceback" not in outputs[0]


def test_sigterm_to_torchrun_stops_the_run_with_a_whole_checkpoint(
    world: Path, unbroken: dict[str, list[bytes]], tmp_path: Path
) -> None:
    endless = [str(a) for a in arguments(world, "pretrain", tmp_path, "--steps", 1_000_000)]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*run, "-m", "mp2", *endless],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    journal, end = tmp_path / JOURNALS["pretrain"], time.monotonic() + LIMIT_S
    try:
        while not (journal.is_file() and journal.read_bytes().count(b"\n") >= 3):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.02)
        process.terminate()
        output = process.communicate(timeout=LIMIT_S)[0]
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends its processes
            process.wait(LIMIT_S)
    step, lines = steps("pretrain", tmp_path)
    assert process.returncode != 0
    assert f"stopped at step {step}; the same command goes on from there" in output
    assert step == lines >= 3
    n_both = min(step, STEPS)
    expected = unbroken["pretrain"][0].splitlines()[:n_both]
    assert journal.read_bytes().splitlines()[:n_both] == expected
