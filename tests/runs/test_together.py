"""Runs whose evaluations are only launched: all are under way at once, and each ends as it would alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lanes_double import Device
from tuning_world import World

from mp2.backbone import load_backbone
from mp2.engine import Pending
from mp2.engine.cuda.backend import CudaBackend
from mp2.errors import LossError
from mp2.prompts import load_prompts
from mp2.runs import BbtConfig, LayerConfig, RouterConfig, resume_series, start_series
from mp2.runs.few_shot_problem import FewShotProblem
from mp2.runs.frozen_model import FrozenModel
from mp2.runs.journal import Journal
from mp2.runs.recorder import timed
from mp2.runs.run_folder import locked
from mp2.runs.series import find_runs
from mp2.runs.together import Server

from .test_series import comparable

PATIENCE_S = 60.0  # of what must not hang


def no_run_is_left() -> bool:
    return not [t for t in threading.enumerate() if t.name.startswith("mp2-run")]


def test_every_run_is_launched_before_any_is_waited_for() -> None:
    """Each waits for all: a server that fetched before it launched the others would wait for ever."""
    server, everybody = Server(), threading.Barrier(4)

    def work(number: int) -> list[int]:
        found = []
        for step in range(5):

            def fetch(step: int = step) -> int:
                everybody.wait(PATIENCE_S)
                return 10 * number + step

            found.append(server.timed(lambda fetch=fetch: Pending(fetch))[0])  # type: ignore[misc]
        return found

    works = [lambda n=n: work(n) for n in range(4)]  # type: ignore[misc]
    assert sorted(server.run(works)) == [(n, [10 * n + k for k in range(5)]) for n in range(4)]


def test_launches_are_the_servers_and_fetching_is_the_runs() -> None:
    server, launched, fetched = Server(), set(), []

    def work() -> None:
        def launch() -> Pending[None]:
            launched.add(threading.current_thread())
            return Pending(lambda: fetched.append(threading.current_thread()))

        for _ in range(3):
            server.timed(launch)
        assert fetched[-1] is threading.current_thread()

    list(server.run([work] * 3))
    assert launched == {threading.current_thread()}
    assert len(set(fetched)) == 3


def test_a_run_that_is_waited_for_keeps_nobody() -> None:
    """The first run's device work does not end before the second run has ended."""
    server, other_ended = Server(), threading.Event()

    def slow() -> bool:
        return server.timed(lambda: Pending(lambda: other_ended.wait(PATIENCE_S)))[0]

    def quick() -> int:
        total = sum(server.timed(lambda: Pending(lambda: 1))[0] for _ in range(10))
        other_ended.set()
        return total

    assert sorted(server.run([slow, quick])) == [(0, True), (1, 10)]


def test_seconds_are_from_launch_to_result() -> None:
    server = Server()

    def launch() -> Pending[int]:
        return Pending(lambda: time.sleep(0.05) or 3)

    def work() -> tuple[int, float]:
        return server.timed(launch)

    begun = threading.Event()

    def behind() -> tuple[int, float]:
        begun.wait(PATIENCE_S)
        return server.timed(lambda: Pending.of(4))

    def ahead() -> tuple[int, float]:
        return server.timed(lambda: (begun.set(), time.sleep(0.1), Pending.of(5))[2])

    for value, seconds in (timed(launch), next(server.run([work]))[1]):
        assert value == 3
        assert seconds >= 0.05
    results = dict(server.run([behind, ahead]))
    assert results[1][1] >= 0.1
    assert results[0][1] < results[1][1], "what others took before is not a run's own time"


def test_what_fails_when_it_is_fetched_fails_in_its_run() -> None:
    server = Server()

    def work() -> str:
        with pytest.raises(ZeroDivisionError):
            server.timed(lambda: Pending(lambda: 1 // 0))
        return f"went on with {server.timed(lambda: Pending(lambda: 5))[0]}"

    def fails() -> str:
        server.timed(lambda: Pending(lambda: [][0]))
        return "not reached"

    assert sorted(server.run([work, work])) == [(n, "went on with 5") for n in range(2)]
    with pytest.raises(IndexError):
        list(server.run([work, fails]))
    assert no_run_is_left()


def test_ctrl_c_while_evaluations_are_under_way_leaves_no_run_behind() -> None:
    server, under_way = Server(), threading.Barrier(3)

    def endless() -> None:
        def fetch() -> None:
            under_way.wait(PATIENCE_S)
            time.sleep(0.05)

        server.timed(lambda: Pending(fetch))
        while True:
            server.timed(lambda: Pending(lambda: None))

    def interrupts() -> None:
        under_way.wait(PATIENCE_S)

        def launch() -> None:
            raise KeyboardInterrupt

        server.timed(launch)

    with pytest.raises(KeyboardInterrupt):
        list(server.run([endless, endless, interrupts]))
    assert no_run_is_left()


def test_a_result_is_changed_now_or_when_it_is_fetched() -> None:
    calls: list[int] = []

    def change(x: int) -> str:
        calls.append(x)
        return str(x)

    there = Pending.of(1).then(change)
    assert (there.ready, calls) == (True, [1])
    pending = Pending(lambda: 2).then(change)
    assert (pending.ready, calls) == (False, [1])
    assert (pending.fetch(), there.fetch()) == ("2", "1")
    assert calls == [1, 2]


def configs(world: World, kind: str = "deep") -> list[BbtConfig]:
    """Two tasks of two seeds."""
    one = BbtConfig(
        task=str(world.card),
        head="span",
        data=str(world.data),
        backbone=str(world.backbone),
        prompts=str(world.deep if kind == "deep" else world.shallow),
        iters=39,
        router=RouterConfig(iterations=9),
        layers=LayerConfig(popsize=5),
        shots=2,
        test_limit=4,
        runtime="torch",
        threads=1,
    )
    cards = (world.card, world.choice_card)
    return [replace(one, task=str(card), seed=seed) for card in cards for seed in (8, 13)]


def model(world: World, n_lanes: int, kind: str = "deep") -> tuple[FrozenModel, Device]:
    """The CUDA engine on doubled lanes; ``n_lanes`` is what its memory is said to hold."""
    backbone = load_backbone(str(world.backbone))
    prompts = load_prompts(str(world.deep if kind == "deep" else world.shallow), backbone)
    runtime, device = CudaBackend(backbone, device="cpu", precision="fp32"), Device()
    runtime.lanes = device.make_lanes()
    runtime.side_by_side = lambda tokens: n_lanes  # type: ignore[method-assign]
    return FrozenModel(backbone, prompts, runtime), device


@pytest.fixture(scope="module")
def alone(world: World) -> list[tuple[object, ...]]:
    return [
        comparable(next(start_series([config], world.root / "alone", model=model(world, 1)[0])))
        for config in configs(world)
    ]


def test_runs_on_lanes_of_their_own_have_the_bits_of_runs_alone(
    world: World, tmp_path: Path, alone: list[tuple[object, ...]]
) -> None:
    frozen, device = model(world, 3)
    said: list[str] = []
    results = start_series(configs(world), tmp_path, model=frozen, say=said.append)
    assert [comparable(r) for r in results] == alone
    assert len(device.lanes) == 3
    assert said[-1] == "mp2: 4 runs share the device; 3 side by side, each on its own CUDA stream"
    assert len({number for event, number in device.events if event == "send"}) == 3


def test_the_same_holds_for_shallow_prompts(world: World, tmp_path: Path) -> None:
    wanted = configs(world, "shallow")[:2]
    found = [
        [comparable(r) for r in start_series(part, tmp_path / name, model=model(world, n, "shallow")[0])]
        for name, n, part in (("a", 1, wanted[:1]), ("b", 1, wanted[1:]), ("together", 2, wanted))
    ]
    assert found[0] + found[1] == found[2]


def test_evaluations_of_all_runs_are_under_way_together(world: World, tmp_path: Path) -> None:
    """The first result of each of four runs arrives only when all four were launched."""
    frozen, device = model(world, 4)
    everybody, seen = threading.Barrier(4), set()

    def wait_for_all(lane: int) -> None:
        if lane not in seen:
            seen.add(lane)
            everybody.wait(PATIENCE_S)

    device.before_arrival = wait_for_all
    assert len(list(start_series(configs(world), tmp_path, model=frozen))) == 4
    assert seen == {0, 1, 2, 3}


def test_all_killed_and_resumed_have_the_bits_of_runs_alone(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: list[tuple[object, ...]]
) -> None:
    write, lock, left = Journal._write, threading.Lock(), 20

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

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_write", dies)
        with pytest.raises(KeyboardInterrupt):
            list(start_series(configs(world), tmp_path, model=model(world, 4)[0]))
    assert no_run_is_left()
    monkeypatch.setattr("mp2.runs.series.load_model", lambda config: model(world, 4)[0])
    resumed = [comparable(r) for r in resume_series(find_runs(tmp_path))]
    assert sorted(map(repr, resumed)) == sorted(map(repr, alone))


def test_a_run_without_finite_losses_ends_alone(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: list[tuple[object, ...]]
) -> None:
    make = FewShotProblem.__init__

    def spoilt(self: FewShotProblem, config: BbtConfig, *rest: Any) -> None:
        make(self, config, *rest)
        if config.seed == 8 and config.task == str(world.card):
            nothing = lambda layer, z: Pending(lambda: z[:, 0] * float("nan"))  # noqa: E731
            self.objective.layer_losses = nothing  # type: ignore[method-assign]

    monkeypatch.setattr(FewShotProblem, "__init__", spoilt)
    found: list[tuple[object, ...]] = []
    with pytest.raises(LossError, match="all 5 losses of iterations 10 to 14"):
        found.extend(map(comparable, start_series(configs(world), tmp_path, model=model(world, 4)[0])))
    assert found == alone[1:]


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[FrozenModel], None]]:
    """Make memory run out with the 40th layer that is computed while more than one lane is in use."""

    def spoil(frozen: FrozenModel) -> None:
        runtime: Any = frozen.backend
        layer, n_left = runtime.packed_layer, 40

        def packed_layer(*arguments: Any) -> torch.Tensor:
            nonlocal n_left
            n_left -= runtime.lanes.n_lanes > 1
            if n_left <= 0 and runtime.lanes.n_lanes > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
            return layer(*arguments)  # type: ignore[no-any-return]

        monkeypatch.setattr(runtime, "packed_layer", packed_layer)

    yield spoil
    assert no_run_is_left()


def test_runs_that_do_not_fit_together_go_on_one_after_another_with_the_same_bits(
    world: World,
    tmp_path: Path,
    alone: list[tuple[object, ...]],
    crowded: Callable[[FrozenModel], None],
) -> None:
    frozen, device = model(world, 4)
    crowded(frozen)
    assert [comparable(r) for r in start_series(configs(world), tmp_path, model=frozen)] == alone
    assert device.notes == ["out of memory with 4 runs side by side; from here on one after another"]
    first_free = device.events.index(("free", -1))
    assert {number for event, number in device.events[first_free:] if event == "send"} == {0}


def test_ctrl_c_in_a_launch_ends_all_and_their_folders_are_free(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen, _ = model(world, 4)
    runtime: Any = frozen.backend
    layer, n_left = runtime.packed_layer, 60

    def interrupted(*arguments: Any) -> torch.Tensor:
        nonlocal n_left
        n_left -= 1
        if n_left <= 0:
            raise KeyboardInterrupt
        return layer(*arguments)  # type: ignore[no-any-return]

    monkeypatch.setattr(runtime, "packed_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(start_series(configs(world), tmp_path, model=frozen))
    assert no_run_is_left()
    assert "stopped 4 of 4 runs" in capsys.readouterr().err
    for run_dir in find_runs(tmp_path):
        with locked(run_dir):
            pass
