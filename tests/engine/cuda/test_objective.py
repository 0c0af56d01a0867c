"""The CUDA path's losses, run on a CPU through the same code, against slow float64.

Tests marked ``cuda`` run where there is a GPU: the same losses there, and half precision beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from lanes_double import Device

from mp2.backbone import Backbone
from mp2.engine import Objective, Scorer
from mp2.engine.agreement import spearman
from mp2.engine.cpu.backend import CpuBackend
from mp2.engine.cuda.backend import CudaBackend
from mp2.engine.cuda.forward import PackedForward
from mp2.errors import MismatchError, OutOfMemoryError, UsageError
from mp2.prompts import PromptSet
from mp2.tasks import MrcInput

from ..slow_reference import D, SlowReference, log_probs, make_inputs

CLOSE = {"rtol": 1e-5, "atol": 0}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def runtime(tiny_backbone: Backbone) -> CudaBackend:
    return CudaBackend(tiny_backbone, device="cpu", precision="fp32")


@pytest.fixture(params=[False, True], ids=["plain", "replayed"])
def make(
    request: pytest.FixtureRequest, runtime: CudaBackend, tiny_backbone: Backbone, train: list[MrcInput]
) -> Callable[..., Objective]:
    runtime.lanes = Device(records=request.param).make_lanes()

    def make(prompts: PromptSet, **options: int) -> Objective:
        return Objective(runtime.forward(prompts, **options), train)

    return make


def candidates(n: int, prompts: PromptSet, seed: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (4 * rng.standard_normal((n, prompts.z.shape[0], D))).astype(np.float32)


@pytest.mark.parametrize("limit", [1, 40, 100, None])
@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_full_losses_equal_slow_float64(
    make: Callable[..., Objective],
    request: pytest.FixtureRequest,
    train: list[MrcInput],
    kind: str,
    limit: int | None,
) -> None:
    prompts, slow = request.getfixturevalue(kind), request.getfixturevalue(f"slow_{kind}")
    objective = make(prompts, micro_batch_tokens=limit)
    for seed in range(3):  # run, recorded, replayed
        z = candidates(7, prompts, seed)
        np.testing.assert_allclose(objective.full_losses(z).fetch(), slow.losses(z, train), **CLOSE)
    assert objective.n_evaluations == 21
    assert objective.seconds > 0


@pytest.mark.parametrize("limit", [30, 300])
def test_visits_in_any_order_with_commits_equal_slow_float64(
    make: Callable[..., Objective],
    deep: PromptSet,
    slow_deep: SlowReference,
    train: list[MrcInput],
    limit: int,
) -> None:
    objective = make(deep, micro_batch_tokens=limit)
    z = candidates(1, deep)[0]
    for _ in range(2):
        objective.set_incumbent(z)
        z = z.copy()
        for visit, layer in enumerate([0, 1, 2, 0, 2, 1, 1, 0, 1, 2, 0]):
            trial = candidates(3, deep, seed=visit)[:, layer]
            whole = np.repeat(z[None], 3, 0)
            whole[:, layer] = trial
            got = objective.layer_losses(layer, trial).fetch()
            np.testing.assert_allclose(got, slow_deep.losses(whole, train), **CLOSE)
            if visit % 3 != 2:
                objective.commit(layer, trial[-1])
                z[layer] = trial[-1]


def test_shallow_visits_equal_slow_float64(
    make: Callable[..., Objective],
    shallow: PromptSet,
    slow_shallow: SlowReference,
    train: list[MrcInput],
) -> None:
    objective = make(shallow)
    z = candidates(3, shallow)
    objective.set_incumbent(z[0])
    for _ in range(3):
        got = objective.layer_losses(0, z[:, 0]).fetch()
        np.testing.assert_allclose(got, slow_shallow.losses(z, train), **CLOSE)
        objective.commit(0, z[1, 0])


def test_work_is_recorded_when_it_comes_again(
    runtime: CudaBackend, tiny_backbone: Backbone, deep: PromptSet, train: list[MrcInput]
) -> None:
    runtime.lanes = Device().make_lanes()
    objective = Objective(runtime.forward(deep), train)
    z = candidates(4, deep)
    counts = []
    for n in (4, 4, 4, 3):  # a smaller, last generation is never worth recording
        objective.full_losses(z[:n]).fetch()
        counts.append(objective.forward.graphs.n_recorded)
    assert counts == [0, 1, 1, 1]
    assert objective.forward.graphs.record_s > 0


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_log_probs_keep_order_and_equal_slow_float64(
    runtime: CudaBackend, request: pytest.FixtureRequest, tiny_backbone: Backbone, kind: str
) -> None:
    prompts, slow = request.getfixturevalue(kind), request.getfixturevalue(f"slow_{kind}")
    inputs = make_inputs((4, 21, 20, 19, 4, 40), tiny_backbone.config.vocab_size, seed=9)
    runtime.lanes = Device().make_lanes()
    for limit in (50, None):  # several packs; one, which is recorded
        scorer = Scorer(runtime.forward(prompts, micro_batch_tokens=limit))
        for z in candidates(3, prompts):
            outputs = scorer.outputs(z, inputs).fetch()
            for item, output in zip(inputs, outputs, strict=True):
                expected = slow.log_probs(z, item.input_ids)
                np.testing.assert_allclose(output[: len(item.input_ids)], expected, rtol=1e-5, atol=1e-5)
        assert scorer.forward.graphs.n_recorded == (limit is None)


def test_a_nan_candidate_spoils_no_other(
    make: Callable[..., Objective], deep: PromptSet, slow_deep: SlowReference, train: list[MrcInput]
) -> None:
    z = candidates(3, deep)
    expected = slow_deep.losses(z, train)
    z[1, 1, 0] = np.nan
    objective = make(deep)
    objective.set_incumbent(z[0])
    for _ in range(3):
        losses = objective.full_losses(z).fetch()
        assert np.isnan(losses[1])
        np.testing.assert_allclose(losses[[0, 2]], expected[[0, 2]], **CLOSE)
        losses = objective.layer_losses(1, z[:, 1]).fetch()
        assert np.isnan(losses[1])
        assert np.isfinite(losses[[0, 2]]).all()


class SmallMemory(CudaBackend):
    """Cannot hold more than ``limit`` slots at once."""

    limit = 100
    largest = 0

    def packed_layer(self, index, hidden, pack, prefix):  # type: ignore[no-untyped-def]
        slots = max(len(hidden), 1 if prefix is None else len(prefix[0])) * hidden.shape[1]
        if slots > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        self.largest = max(self.largest, slots)
        return super().packed_layer(index, hidden, pack, prefix)


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_out_of_memory_halves_the_batch_and_keeps_it(
    tiny_backbone: Backbone, train: list[MrcInput], request: pytest.FixtureRequest, kind: str
) -> None:
    prompts, slow = request.getfixturevalue(kind), request.getfixturevalue(f"slow_{kind}")
    runtime = SmallMemory(tiny_backbone, device="cpu", precision="fp32")
    objective = Objective(runtime.forward(prompts, micro_batch_tokens=10_000), train)
    z = candidates(7, prompts)
    np.testing.assert_allclose(objective.full_losses(z).fetch(), slow.losses(z, train), **CLOSE)
    assert 36 <= objective.forward.micro_batch_tokens <= 100
    assert runtime.largest <= 100
    kept = objective.forward.micro_batch_tokens
    objective.set_incumbent(z[0])
    objective.layer_losses(0, z[:, 0]).fetch()
    Scorer(objective.forward).outputs(z[0], train).fetch()
    assert objective.forward.micro_batch_tokens == kept


def test_one_example_that_does_not_fit_is_an_error(
    tiny_backbone: Backbone, train: list[MrcInput], deep: PromptSet
) -> None:
    runtime = SmallMemory(tiny_backbone, device="cpu", precision="fp32")
    runtime.limit = 20
    objective = Objective(runtime.forward(deep), train)
    with pytest.raises(OutOfMemoryError, match="one example of 30 tokens does not fit"):
        objective.full_losses(candidates(2, deep)).fetch()


def test_what_cannot_be_asked_for_is_refused(
    runtime: CudaBackend, tiny_backbone: Backbone, train: list[MrcInput], deep: PromptSet
) -> None:
    objective = Objective(runtime.forward(deep), train)
    with pytest.raises(UsageError, match=r"shape \(2, 3, 4\), expected \(P, 3, 10\)"):
        objective.full_losses(np.zeros((2, 3, 4), np.float32)).fetch()
    with pytest.raises(UsageError, match="no incumbent"):
        objective.layer_losses(0, np.zeros((2, D), np.float32)).fetch()
    objective.set_incumbent(np.zeros((3, D), np.float32))
    with pytest.raises(UsageError, match="layer 3, expected 0 to 2"):
        objective.layer_losses(3, np.zeros((2, D), np.float32)).fetch()
    with pytest.raises(UsageError, match="no training examples"):
        Objective(runtime.forward(deep), [])
    other = replace(deep, meta=replace(deep.meta, backbone_sha256="0" * 64))
    with pytest.raises(MismatchError, match="000000000000"):
        Objective(runtime.forward(other), train)


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_both_objectives_are_the_same_at_the_edges(
    runtime: CudaBackend,
    request: pytest.FixtureRequest,
    tiny_backbone: Backbone,
    train: list[MrcInput],
    kind: str,
) -> None:
    prompts = request.getfixturevalue(kind)
    z, room = candidates(1, prompts)[0], tiny_backbone.config.max_positions - prompts.meta.n_inline
    longest, longer = (make_inputs((n, 5), tiny_backbone.config.vocab_size) for n in (room, room + 1))
    for objective in (
        Objective(runtime.forward(prompts), train),
        Objective(CpuBackend(tiny_backbone).forward(prompts), train),
    ):
        objective.set_incumbent(z)
        for none in (objective.full_losses(z[None][:0]).fetch(), objective.layer_losses(0, z[:0]).fetch()):
            assert (none.shape, none.dtype) == ((0,), np.float64)
        assert Scorer(objective.forward).outputs(z, []).fetch() == []
        assert [len(x) for x in log_probs(objective.forward, z, longest)] == [room, 5]
        too_long = rf"sequence of {room + 1} tokens and {prompts.meta.n_inline} inline prompt rows"
        with pytest.raises(UsageError, match=too_long):
            log_probs(objective.forward, z, longer)
        with pytest.raises(UsageError, match=r"routers have shape \(3, 4\), expected"):
            objective.router_losses(np.ones((3, 4), bool)).fetch()
        assert objective.n_evaluations == 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_cuda])])
@pytest.mark.parametrize(
    ("precision", "tolerance", "share", "ranks"),
    [("fp32", 2e-4, 0.01, 0.99), ("fp16", 2e-2, 0.03, 0.97), ("bf16", 5e-2, 0.2, 0.9)],
)
@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_losses_of_a_precision_differ_from_slow_float64_by_little_of_the_populations_spread(
    tiny_backbone: Backbone,
    train: list[MrcInput],
    request: pytest.FixtureRequest,
    kind: str,
    precision: str,
    tolerance: float,
    share: float,
    ranks: float,
    device: str,
) -> None:
    def check(got: np.ndarray, whole: np.ndarray) -> None:
        exact = slow.losses(whole, train)
        np.testing.assert_allclose(got, exact, rtol=tolerance)
        # of the spread: losses of a population that were all the same would be within the tolerance
        np.testing.assert_allclose(got, exact, rtol=0, atol=share * np.ptp(exact))
        assert spearman(got, exact) > ranks

    prompts, slow = request.getfixturevalue(kind), request.getfixturevalue(f"slow_{kind}")
    runtime = CudaBackend(tiny_backbone, device=device, precision=precision)
    objective = Objective(runtime.forward(prompts), train)
    assert isinstance(objective.forward, PackedForward)
    for seed in range(3):  # run, recorded, replayed
        z = 5 * candidates(12, prompts, seed)  # so far apart that prompts matter
        check(objective.full_losses(z).fetch(), z)
        objective.set_incumbent(z[0])
        for layer in range(z.shape[1]):
            whole = np.repeat(z[:1], len(z), 0)
            whole[:, layer] = z[:, layer]
            check(objective.layer_losses(layer, z[:, layer]).fetch(), whole)
    assert objective.forward.graphs.n_recorded > 0 or device == "cpu"
