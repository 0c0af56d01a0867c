"""Objectives of several runs on one device: each on its lane, none touches what is another's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from lanes_double import Device

from mp2.backbone import Backbone
from mp2.engine import Objective, Scorer
from mp2.engine.cpu.backend import CpuBackend
from mp2.engine.cuda.backend import CudaBackend
from mp2.engine.cuda.forward import PackedForward
from mp2.engine.cuda.lanes import CudaLane, HostLane
from mp2.engine.cuda.replays import CudaCapture, Graphs
from mp2.errors import OutOfMemoryError
from mp2.prompts import PromptSet
from mp2.tasks import MrcInput

from ..slow_reference import D, SlowReference, make_inputs

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def runtime_on(device: Device, backbone: Backbone, n_lanes: int, **options: Any) -> CudaBackend:
    made = options.pop("runtime", CudaBackend)(backbone, device="cpu", precision="fp32")
    made.lanes = device.make_lanes()
    made.lanes.spread(n_lanes)
    return made


def make_runs(runtime: CudaBackend, backbone: Backbone, prompts: PromptSet, n: int = 3) -> list[Objective]:
    """Objectives as of several seeds: other examples, and of other lengths, each."""
    sets = [make_inputs((9, 14, 5 + k, 11), backbone.config.vocab_size, seed=k) for k in range(n)]
    return [Objective(runtime.forward(prompts), inputs) for inputs in sets]


def shape_of(objective: Objective) -> tuple[int, int]:
    """L', d."""
    z = objective.forward.prompts.z
    return z.shape[0], z.shape[-1]


def drive(objective: Objective, seed: int, rounds: int = 2) -> list[np.ndarray]:
    """What a run asks for, one thing after another."""
    rng = np.random.default_rng(seed)
    n_layers, scorer = shape_of(objective)[0], Scorer(objective.forward)
    found: list[np.ndarray] = []
    for _ in range(3):
        found.append(objective.full_losses(rng.standard_normal((4, n_layers, D)).astype(np.float32)).fetch())
    objective.set_incumbent(rng.standard_normal((n_layers, D)).astype(np.float32))
    for visit in range(rounds * n_layers):
        z = rng.standard_normal((5, D)).astype(np.float32)
        found.append(objective.layer_losses(visit % n_layers, z).fetch())
        objective.commit(visit % n_layers, z[1])
        prompt = rng.standard_normal((n_layers, D)).astype(np.float32)
        found += scorer.outputs(prompt, objective._train).fetch()
    return found


def equal(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_runs_whose_work_interleaves_have_the_bits_of_runs_alone(
    tiny_backbone: Backbone, request: pytest.FixtureRequest, kind: str
) -> None:
    """Each lane is a thread here, as a stream is on a GPU: whatever lanes share would be torn."""
    prompts = request.getfixturevalue(kind)
    alone = []
    for k in range(3):
        runtime = runtime_on(Device(), tiny_backbone, 1)
        alone.append(drive(make_runs(runtime, tiny_backbone, prompts)[k], k))
    device = Device(one_thread=False)
    runs = make_runs(runtime_on(device, tiny_backbone, 3), tiny_backbone, prompts)
    for run in runs:  # weights are made by the first; on a GPU, one thread launches
        run.full_losses(np.zeros((4, *shape_of(run)), np.float32)).fetch()
        run.forward.graphs.restart(run.forward._lane.record)  # type: ignore[union-attr]
    together: dict[int, list[np.ndarray]] = {}
    threads = [
        threading.Thread(target=lambda k=k, run=run: together.update({k: drive(run, k)}))  # type: ignore[misc]
        for k, run in enumerate(runs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(device.lanes) == 3
    assert all(equal(together[k], alone[k]) for k in range(3))


def buffers(objective: Objective) -> set[int]:
    """Addresses of all memory that the objective's evaluations write to and that outlives them."""
    forward = objective.forward
    assert isinstance(forward, PackedForward)
    tensors = [x for _, held, output in forward.graphs._recorded.values() for x in (*held, output)]
    tensors += [x for prefix in forward._incumbent.values() for x in prefix]
    tensors += [x for kept in forward.cache._inputs.values() for x in kept.values()]
    return {x.untyped_storage().data_ptr() for x in tensors}


def test_no_buffer_belongs_to_two_objectives(tiny_backbone: Backbone, deep: PromptSet) -> None:
    for n_lanes in (3, 1):
        runs = make_runs(runtime_on(Device(), tiny_backbone, n_lanes), tiny_backbone, deep)
        for k, run in enumerate(runs):
            drive(run, k)
            assert run.forward.graphs.n_recorded > 5
        own = [buffers(run) for run in runs]
        assert len(set.union(*own)) == sum(map(len, own)) > 40


def test_projections_and_weights_are_shared(tiny_backbone: Backbone, deep: PromptSet) -> None:
    runtime = runtime_on(Device(), tiny_backbone, 3)
    first, second, *_ = make_runs(runtime, tiny_backbone, deep)
    assert first.forward.project is second.forward.project


def test_what_lanes_share_is_complete_before_it_is_shared(
    tiny_backbone: Backbone, deep: PromptSet, shallow: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that was made lazily is seen by another lane before the making lane was waited for."""
    settled: list[tuple[int, ...]] = []

    class Watched(CudaBackend):
        def settle(self) -> None:
            made = self._projectors.values() if hasattr(self, "_projectors") else []
            settled.append((len(self._packed), sum(len(p._folded) for p in made)))

    runtime = runtime_on(Device(), tiny_backbone, 1, runtime=Watched)
    run = make_runs(runtime, tiny_backbone, deep, 1)[0]
    settled.clear()
    run.full_losses(np.zeros((2, *shape_of(run)), np.float32)).fetch()
    run.full_losses(np.ones((2, *shape_of(run)), np.float32)).fetch()
    # layer 0: projection folded, then weights packed; and so on: each is waited for while not yet there
    assert settled == [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 3)]


def test_an_incumbent_changes_without_work_on_the_device(tiny_backbone: Backbone, deep: PromptSet) -> None:
    """A run commits in its own thread, perhaps while a graph is captured: the double allows no work there."""
    (run,) = make_runs(runtime_on(Device(), tiny_backbone, 1), tiny_backbone, deep, 1)
    z = np.random.default_rng(0).standard_normal((4, *shape_of(run))).astype(np.float32)

    def in_a_run() -> None:
        run.set_incumbent(z[0])
        run.commit(1, z[1, 1])

    thread = threading.Thread(target=in_a_run)
    thread.start()
    thread.join()
    assert not run.forward._incumbent
    whole = np.repeat(z[:1], 4, 0)
    whole[:, 1] = z[1, 1]
    whole[:, 2] = z[:, 2]
    np.testing.assert_allclose(
        run.layer_losses(2, z[:, 2]).fetch(), run.full_losses(whole).fetch(), rtol=1e-5
    )


def test_all_are_launched_before_any_is_fetched_and_fetched_in_any_order(
    tiny_backbone: Backbone, deep: PromptSet
) -> None:
    device = Device()
    runs = make_runs(runtime_on(device, tiny_backbone, 3), tiny_backbone, deep)
    scorers = [Scorer(run.forward) for run in runs]
    z = np.random.default_rng(0).standard_normal((3, 4, *shape_of(runs[0]))).astype(np.float32)
    expected = [run.full_losses(x).fetch() for run, x in zip(runs, z, strict=True)]
    for _ in range(3):  # run, recorded, replayed
        device.events.clear()
        pending = [run.router_losses(np.ones((2, *deep.z.shape[:2]), bool)) for run in runs]
        assert device.events == [("send", k) for k in range(3)]
        routed = [p.fetch() for p in pending[::-1]]
        scored = [s.outputs(x[0], r._train) for s, r, x in zip(scorers, runs, z, strict=True)]
        assert all(len(p.fetch()) == 4 for p in scored[::-1])
        pending = [run.full_losses(x) for run, x in zip(runs, z, strict=True)]
        assert equal([p.fetch() for p in pending[::-1]][::-1], expected)
        assert len({float(x[0]) for x in routed}) == 3
    assert [run.n_evaluations for run in runs] == [4 + 3 * 6] * 3


class SmallMemory(CudaBackend):
    """Cannot hold more than ``limit`` slots at once, over all lanes whose memory has not been given back."""

    limit = 10**9
    held: dict[int, int]

    def packed_layer(self, index, hidden, pack, prefix):  # type: ignore[no-untyped-def]
        slots = max(len(hidden), 1 if prefix is None else len(prefix[0])) * hidden.shape[1]
        lane = self.device_double.check().number
        self.held[lane] = max(self.held.get(lane, 0), slots)
        if sum(self.held.values()) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        return super().packed_layer(index, hidden, pack, prefix)


def small_memory(backbone: Backbone, limit: int, n_lanes: int) -> tuple[Device, SmallMemory]:
    device = Device()
    runtime = runtime_on(device, backbone, n_lanes, runtime=SmallMemory)
    assert isinstance(runtime, SmallMemory)
    runtime.limit, runtime.held, runtime.device_double = limit, {}, device  # type: ignore[attr-defined]
    runtime.lanes._free_memory = runtime.held.clear
    return device, runtime


def test_out_of_memory_with_several_on_the_device_ends_the_sharing_and_no_batch_is_halved(
    tiny_backbone: Backbone, deep: PromptSet
) -> None:
    runtime = runtime_on(Device(), tiny_backbone, 3)
    z = np.random.default_rng(0).standard_normal((3, 4, *deep.z.shape[::2])).astype(np.float32)
    runs = make_runs(runtime, tiny_backbone, deep)
    expected = [run.full_losses(x).fetch() for run, x in zip(runs, z, strict=True)]
    slots = [4 * sum(len(x.input_ids) for x in run._train) for run in runs]

    device, small = small_memory(tiny_backbone, limit=slots[0] + slots[1], n_lanes=3)
    runs = make_runs(small, tiny_backbone, deep)
    before = [run.forward.micro_batch_tokens for run in runs]
    for _ in range(3):
        pending = [run.full_losses(x) for run, x in zip(runs, z, strict=True)]
        assert equal([p.fetch() for p in pending], expected), "what was under way is not lost"
        assert small.lanes.n_lanes == 1
    assert [run.forward.micro_batch_tokens for run in runs] == before
    assert device.notes == ["out of memory with 3 runs side by side; from here on one after another"]
    assert all(run.forward._lane is device.lanes[-1] or run.forward._lane is device.lanes[0] for run in runs)
    assert len({id(run.forward._lane) for run in runs}) == 1

    small.limit = slots[2] // 2  # now there is not enough for one
    small.held.clear()
    np.testing.assert_allclose(runs[2].full_losses(z[2]).fetch(), expected[2], rtol=1e-5)
    assert runs[2].forward.micro_batch_tokens < before[2]
    assert len(device.notes) == 1


def test_an_example_that_fits_no_memory_is_an_error_of_its_run_after_the_sharing_ended(
    tiny_backbone: Backbone, deep: PromptSet
) -> None:
    _, small = small_memory(tiny_backbone, limit=30, n_lanes=2)
    first, second = (
        Objective(small.forward(deep), make_inputs(lengths, tiny_backbone.config.vocab_size))
        for lengths in ((5,), (31,))
    )
    z = np.zeros((4, *shape_of(first)), np.float32)
    launched = first.full_losses(z)
    with pytest.raises(OutOfMemoryError, match="one example of 31 tokens does not fit"):
        second.full_losses(z).fetch()
    assert small.lanes.n_lanes == 1
    assert np.isfinite(launched.fetch()).all()
    assert np.isfinite(first.full_losses(z).fetch()).all()


class Someone:
    left = 0

    def leave_lane(self) -> None:
        self.left += 1


def test_members_come_to_the_emptiest_lane_and_those_that_are_gone_do_not_count() -> None:
    lanes = Device().make_lanes()
    lanes.spread(2)
    members = [Someone() for _ in range(3)]
    taken = [lanes.take(member) for member in members]
    assert [lane.number for lane in taken] == [0, 1, 0]  # type: ignore[attr-defined]
    del members[0], members[1]  # those on lane 0
    assert lanes.take(other := Someone()) is taken[0]
    assert lanes.n_lanes == 2
    assert lanes.merge()
    assert (members[0].left, other.left) == (1, 1)
    assert not lanes.merge()
    assert [lanes.take(x) for x in (other, members[0])] == [taken[0]] * 2


def test_only_the_cuda_backend_computes_runs_side_by_side(
    tiny_backbone: Backbone, deep: PromptSet, train: list[MrcInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Objective(CpuBackend(tiny_backbone).forward(deep), train)
    assert plain.side_by_side() == 1
    z = np.zeros((1, *shape_of(plain)), np.float32)
    assert plain.full_losses(z).ready  # nothing has to be waited for
    backend = runtime_on(Device(), tiny_backbone, 1)
    runs = make_runs(backend, tiny_backbone, deep)
    assert not runs[0].full_losses(z).ready
    assert runs[0].side_by_side() == 1  # a CPU's cores are busy with one
    backend = runtime_on(Device(), tiny_backbone, 1)
    runs = make_runs(backend, tiny_backbone, deep)
    asked: list[int] = []

    def side_by_side(tokens: int) -> int:
        asked.append(tokens)
        return 4

    monkeypatch.setattr(backend, "side_by_side", side_by_side)
    assert [run.side_by_side() for run in runs] == [4, 4, 4]
    assert asked == [20 * (9 + 14 + 5 + k + 11) for k in range(3)]
    backend.share(3)
    for run in runs:
        run.full_losses(z).fetch()
    assert backend.lanes.n_lanes == 3


def test_what_the_host_sends_is_a_copy() -> None:
    x = torch.ones(2)
    arrive = HostLane().send(x)
    x.zero_()
    assert arrive().tolist() == [1, 1]
    assert HostLane().upload(x) is x


class FakeCuda:
    """torch.cuda as far as recorders and lanes use it; says in what order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.n_pools = self.n_streams = 0
        self.capturing = False
        calls = self.calls

        class Stream:
            def __init__(stream, device: torch.device) -> None:
                self.n_streams += 1
                stream.name = f"stream{self.n_streams}"

        class Event:
            def __init__(event, blocking: bool) -> None:
                assert blocking  # a run that waits must not burn a core

            def record(event, stream: Any) -> None:
                assert not self.capturing
                calls.append(f"mark {stream.name}")

            def synchronize(event) -> None:
                calls.append("wait")

        class Graph:
            def replay(graph) -> None:
                calls.append("replay")

        @contextmanager
        def graph(graph: Graph, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
            assert capture_error_mode == "thread_local"  # other threads wait for events meanwhile
            calls.append(f"capture {stream.name} {pool}")
            self.capturing = True
            try:
                yield
            finally:
                self.capturing = False
                if "broken" in calls:
                    raise RuntimeError("operation failed due to a previous error during capture")

        @contextmanager
        def within(x: Any) -> Iterator[None]:
            yield

        def new_pool() -> str:
            self.n_pools += 1
            return f"pool{self.n_pools}"

        for name, value in {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": graph,
            "graph_pool_handle": new_pool,
            "device": within,
            "stream": within,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_graphs_are_captured_on_their_lanes_own_stream_and_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS has a workspace a stream, and a captured graph keeps it: one stream for all would be a race."""
    cuda = FakeCuda(monkeypatch)
    lanes = [CudaLane(torch.device("cpu")) for _ in range(2)]
    graphs = [Graphs(lanes[k].record) for k in (0, 1, 0)]
    x = torch.ones(2)

    def work(held: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return held[0] * 2

    for own in graphs:
        own("key", (x,), work)
    assert cuda.calls == []
    for own in graphs:
        own("key", (x,), work)
    captures = [call for call in cuda.calls if call != "replay"]
    assert captures == ["capture stream1 pool1", "capture stream2 pool2", "capture stream1 pool1"]


def test_a_pool_ends_with_its_last_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    record = CudaCapture(torch.device("cpu"), CudaLane(torch.device("cpu"))._stream)
    kept = [record(lambda: torch.ones(1))[0] for _ in range(2)]
    del kept[0]
    kept.append(record(lambda: torch.ones(1))[0])
    assert cuda.n_pools == 1
    kept.clear()
    record(lambda: torch.ones(1))
    assert cuda.n_pools == 2


def test_a_capture_that_runs_out_of_memory_says_so_whatever_ending_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)
    record = CudaCapture(torch.device("cpu"), CudaLane(torch.device("cpu"))._stream)

    def work() -> torch.Tensor:
        cuda.calls.append("broken")
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        record(work)


def test_pinned_memory_is_the_lanes_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    n_made = 0
    empty: Callable[..., torch.Tensor] = torch.empty

    def pinned(size: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        nonlocal n_made
        assert pin_memory
        n_made += 1
        return empty(size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", pinned)
    lane = CudaLane(torch.device("cpu"))
    first, second = torch.arange(6.0).view(2, 3), torch.full((1000,), 7.0, dtype=torch.float64)
    arrivals = [lane.send(first), lane.send(second)]
    assert cuda.calls == ["mark stream1", "mark stream1"]
    found = [arrive() for arrive in arrivals]
    assert n_made == 2
    later = [lane.send(torch.zeros(6)), lane.send(torch.zeros(2000))]  # both blocks again
    assert n_made == 2
    assert not any(arrive().any() for arrive in later)
    for got, sent in zip(found, (first, second), strict=True):  # not overwritten by what came later
        np.testing.assert_array_equal(got, sent.numpy())


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_runs_side_by_side_have_the_bits_of_runs_alone_on_cuda(
    tiny_backbone: Backbone, request: pytest.FixtureRequest, kind: str, precision: str
) -> None:
    prompts = request.getfixturevalue(kind)
    found = []
    for n_lanes in (1, 4):
        runtime = CudaBackend(tiny_backbone, device="cuda", precision=precision)
        runtime.lanes.spread(n_lanes)
        runs = make_runs(runtime, tiny_backbone, prompts, 4)
        rng = np.random.default_rng(0)
        losses: list[np.ndarray] = []
        for run in runs:
            run.set_incumbent(np.zeros(shape_of(run), np.float32))
        for step in range(24):
            z = rng.standard_normal((4, 5, *shape_of(runs[0]))).astype(np.float32)
            layer = step % z.shape[2]
            pending = [run.layer_losses(layer, x[:, layer]) for run, x in zip(runs, z, strict=True)]
            losses += [p.fetch() for p in pending]
            for run, x in zip(runs, z, strict=True):
                run.commit(layer, x[0, layer])
            losses += [p.fetch() for p in [run.full_losses(x) for run, x in zip(runs, z, strict=True)]]
        assert runtime.lanes.n_lanes == n_lanes
        found.append(losses)
    assert equal(*found)


@pytest.mark.cuda
@needs_cuda
def test_losses_side_by_side_are_right_on_cuda(
    tiny_backbone: Backbone, deep: PromptSet, slow_deep: SlowReference
) -> None:
    runtime = CudaBackend(tiny_backbone, device="cuda", precision="fp32")
    runtime.lanes.spread(3)
    runs = make_runs(runtime, tiny_backbone, deep)
    z = np.random.default_rng(0).standard_normal((3, 4, *shape_of(runs[0]))).astype(np.float32)
    for _ in range(3):
        pending = [run.full_losses(x) for run, x in zip(runs, z, strict=True)]
        for run, x, p in zip(runs, z, pending, strict=True):
            np.testing.assert_allclose(p.fetch(), slow_deep.losses(x, run._train), rtol=2e-4)
