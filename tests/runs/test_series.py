"""Several runs as one: each has the result that it has alone, also when all were killed and resumed."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tuning_world import World

from mp2.cli import main
from mp2.engine import Pending
from mp2.errors import LossError, UsageError
from mp2.runs import BbtConfig, LayerConfig, RouterConfig, resume_series, start_run, start_series
from mp2.runs.few_shot_problem import FewShotProblem
from mp2.runs.journal import Journal, read_journal
from mp2.runs.recorder import timed
from mp2.runs.series import find_runs
from mp2.runs.together import Server

TIMES = {"forward_s", "suggest_s", "hidden_s", "journal_s", "other_s", "seconds"}


def configs(world: World, kind: str = "deep", method: str = "bits") -> list[BbtConfig]:
    """Two tasks of two seeds."""
    one = BbtConfig(
        task=str(world.card),
        head="span",
        data=str(world.data),
        backbone=str(world.backbone),
        prompts=str(world.deep if kind == "deep" else world.shallow),
        iters=30,
        router=RouterConfig(method=method, iterations=9),
        layers=LayerConfig(popsize=6),
        shots=2,
        test_limit=4,
        runtime="torch",
        threads=1,
    )
    return [
        replace(one, task=str(card), seed=seed)
        for card in (world.card, world.choice_card)
        for seed in (8, 13)
    ]


def comparable(result: dict[str, Any]) -> tuple[object, ...]:
    """Everything that a run leaves but times and places."""
    run_dir = Path(result["run_dir"])
    _, records, _ = read_journal(run_dir / "journal.jsonl")
    lines = [{k: v for k, v in line.items() if k not in TIMES} for r in records for line in r.lines]
    kept = {k: v for k, v in result.items() if k not in ("seconds", "run_dir")}
    return kept, lines, (run_dir / "prompt.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(world: World) -> list[tuple[object, ...]]:
    return [comparable(start_run(config, world.root / "alone")) for config in configs(world)]


def test_runs_together_have_the_bits_of_runs_alone(
    world: World, tmp_path: Path, alone: list[tuple[object, ...]]
) -> None:
    assert [comparable(r) for r in start_series(configs(world), tmp_path)] == alone


def test_the_same_holds_for_shallow_prompts_and_searches_that_ask_for_one(
    world: World, tmp_path: Path
) -> None:
    wanted = configs(world, "shallow", "nevergrad:DiscreteOnePlusOne")[:2]
    alone = [comparable(start_run(config, tmp_path / "alone")) for config in wanted]
    assert [comparable(r) for r in start_series(wanted, tmp_path / "together")] == alone


def test_all_killed_at_a_journal_write_and_resumed_have_the_bits_of_runs_alone(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: list[tuple[object, ...]]
) -> None:
    """The n-th write of any run is torn, as if the process had died there: nobody writes any more."""
    write, lock = Journal._write, threading.Lock()
    left = 0

    def dies(self: Journal, data: bytes) -> None:
        nonlocal left
        with lock:
            left -= 1
            if left > 0:
                write(self, data)
            elif left == 0:
                write(self, data[: len(data) // 2])
        if left <= 0:
            raise KeyboardInterrupt

    for n_writes in (3, 17, 33):
        left, out = n_writes, tmp_path / str(n_writes)
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "_write", dies)
            with pytest.raises(KeyboardInterrupt):
                list(start_series(configs(world), out))
        folders = find_runs(out)
        assert len(folders) == 4, "every folder is there before the first forward"
        resumed = {Path(r["run_dir"]).name: comparable(r) for r in resume_series(folders)}
        assert sorted(map(repr, resumed.values())) == sorted(map(repr, alone)), f"killed at write {n_writes}"


def test_a_run_without_finite_losses_ends_alone(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: list[tuple[object, ...]]
) -> None:
    make = FewShotProblem.__init__

    def spoilt(self: FewShotProblem, config: BbtConfig, *rest: Any) -> None:
        make(self, config, *rest)
        if config.seed == 8 and config.task == str(world.card):
            nothing = lambda layer, z: Pending.of(z[:, 0] * float("nan"))  # noqa: E731
            self.objective.layer_losses = nothing  # type: ignore[method-assign]

    monkeypatch.setattr(FewShotProblem, "__init__", spoilt)
    found: list[tuple[object, ...]] = []
    with pytest.raises(LossError, match="all 6 losses of iterations 10 to 15"):
        found.extend(map(comparable, start_series(configs(world), tmp_path)))
    assert found == alone[1:]


def test_ctrl_c_names_all_runs_that_go_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: FewShotProblem, z: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FewShotProblem, "dev_scores", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(start_series(configs(world)[:2], tmp_path))
    message = capsys.readouterr().err
    assert "stopped 2 of 2 runs" in message
    for run_dir in find_runs(tmp_path):
        assert f"--resume {run_dir}" in message
    assert not [t for t in threading.enumerate() if t.name.startswith("mp2-run")]


def test_the_command_line_takes_seeds_tasks_and_a_folder_to_resume(world: World, tmp_path: Path) -> None:
    options = ["--data", world.data, "--backbone", world.backbone, "--prompts", world.deep]
    options += ["--runtime", "torch", "--threads", "1", "--out", tmp_path / "runs", "--no-test"]
    options += ["--iters", "12", "--router-iters", "6", "--popsize", "4", "--shots", "2", "--seeds", "8,13"]
    options += ["--head", "span"]  # a mean is over runs of one head

    def mp2(*arguments: object) -> Any:
        done = CliRunner().invoke(main, ["bbt", *map(str, arguments)])
        assert done.exit_code == 0, (done.output, done.exception)
        return done

    done = mp2("--task", world.card, "--task", world.choice_card, *options)
    assert done.stdout.count("mean of 2") == 2
    results = json.loads(mp2("--resume", tmp_path / "runs", "--json").stdout)
    assert sorted((r["task"], r["seed"]) for r in results) == [
        ("mood", 8),
        ("mood", 13),
        ("pick", 8),
        ("pick", 13),
    ]
    twice = CliRunner().invoke(main, ["bbt", "--task", "tnews,lcqmc,tnews"])
    assert (twice.exit_code, "'tnews' was given twice" in twice.stderr) == (2, True)


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a run folder"):
        find_runs(tmp_path)


def test_the_server_runs_everything_in_one_thread_and_answers_in_order() -> None:
    server, threads = Server(), set()

    def work(number: int) -> list[int]:
        def compute() -> Pending[int]:
            threads.add(threading.current_thread())
            return Pending.of(number)

        return [server.timed(compute)[0] for _ in range(20)]

    works = [lambda n=n: work(n) for n in range(5)]  # type: ignore[misc]
    assert sorted(server.run(works, at_once=3)) == [(n, [n] * 20) for n in range(5)]
    assert threads == {threading.current_thread()}


def test_an_error_of_a_computation_is_raised_where_it_was_asked_for() -> None:
    server = Server()

    def work() -> str:
        with pytest.raises(ZeroDivisionError):
            server.timed(lambda: 1 // 0)
        return "went on"

    assert sorted(server.run([work, work])) == [(0, "went on"), (1, "went on")]


def test_a_bug_in_one_work_stops_all() -> None:
    server = Server()

    def endless() -> None:
        while True:
            server.timed(lambda: Pending.of(None))

    def broken() -> None:
        server.timed(lambda: Pending.of(None))
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        list(server.run([endless, broken]))
    assert not [t for t in threading.enumerate() if t.name.startswith("mp2-run")]


def test_seconds_are_those_of_the_computation() -> None:
    value, seconds = timed(lambda: Pending.of(3))
    assert value == 3
    assert 0 <= seconds < 1
