from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from mp2.backbone import Backbone
from mp2.engine import Objective, Scorer
from mp2.engine.backend import PopulationPrefix, is_out_of_memory
from mp2.engine.cpu.backend import CpuBackend
from mp2.engine.forward import Evaluation
from mp2.errors import MismatchError, OutOfMemoryError, UsageError
from mp2.prompts import PrefixProjector, PromptSet, random_prompts
from mp2.tasks import MrcInput

from .slow_reference import D, SlowReference, log_probs, make_inputs

Make = Callable[..., Objective]
CLOSE = {"rtol": 1e-5, "atol": 0}


def candidates(n: int, prompts: PromptSet, seed: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (4 * rng.standard_normal((n, prompts.z.shape[0], D))).astype(np.float32)


@pytest.mark.parametrize("n_candidates", [1, 3, 7])
@pytest.mark.parametrize("limit", [1, 40, 100, None])
def test_full_losses_equal_slow_float64_for_any_population_and_batch(
    make_objective: Make,
    deep: PromptSet,
    slow_deep: SlowReference,
    train: list[MrcInput],
    n_candidates: int,
    limit: int | None,
) -> None:
    z = candidates(n_candidates, deep)
    objective = make_objective(deep, micro_batch_tokens=limit)
    np.testing.assert_allclose(objective.full_losses(z).fetch(), slow_deep.losses(z, train), **CLOSE)
    assert objective.n_evaluations == n_candidates
    assert objective.seconds > 0


@pytest.mark.parametrize("limit", [1, 100, None])
def test_inline_losses_equal_slow_float64(
    make_objective: Make,
    shallow: PromptSet,
    slow_shallow: SlowReference,
    train: list[MrcInput],
    limit: int | None,
) -> None:
    z = candidates(3, shallow)
    objective = make_objective(shallow, micro_batch_tokens=limit)
    expected = slow_shallow.losses(z, train)
    np.testing.assert_allclose(objective.full_losses(z).fetch(), expected, **CLOSE)
    objective.set_incumbent(z[0])
    np.testing.assert_allclose(objective.layer_losses(0, z[:, 0]).fetch(), expected, **CLOSE)
    objective.commit(0, z[1, 0])
    np.testing.assert_allclose(objective.layer_losses(0, z[2:, 0]).fetch(), expected[2:], **CLOSE)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_cached_visits_in_any_order_with_commits_equal_slow_float64(
    make_objective: Make, deep: PromptSet, slow_deep: SlowReference, train: list[MrcInput], cache_bytes: int
) -> None:
    rng = np.random.default_rng(5)
    z = candidates(1, deep)[0]
    objective = make_objective(deep, micro_batch_tokens=200, cache_bytes=cache_bytes)
    objective.set_incumbent(z)
    z = z.copy()
    for visit, layer in enumerate([0, 1, 2, 0, 2, 1, 1, 0]):
        trial = candidates(int(rng.integers(1, 5)), deep, seed=visit)[:, layer]
        whole = np.repeat(z[None], len(trial), 0)
        whole[:, layer] = trial
        got = objective.layer_losses(layer, trial).fetch()
        np.testing.assert_allclose(got, slow_deep.losses(whole, train), **CLOSE)
        if visit % 3 != 2:
            objective.commit(layer, trial[-1])
            z[layer] = trial[-1]


def test_prompts_matter_enough_for_these_tests_to_mean_something(
    deep: PromptSet,
    shallow: PromptSet,
    slow_deep: SlowReference,
    slow_shallow: SlowReference,
    train: list[MrcInput],
) -> None:
    for prompts, slow in ((deep, slow_deep), (shallow, slow_shallow)):
        losses = slow.losses(candidates(4, prompts), train)
        assert np.ptp(losses) > 3e-3 * losses.mean()  # 300 times the tolerance


def test_set_incumbent_drops_the_cache(make_objective: Make, deep: PromptSet) -> None:
    z, other = candidates(2, deep)
    objective, fresh = make_objective(deep), make_objective(deep)
    objective.set_incumbent(other)
    objective.layer_losses(2, z[2:3]).fetch()
    for o in (objective, fresh):
        o.set_incumbent(z)
    np.testing.assert_array_equal(
        objective.layer_losses(2, z[2:3]).fetch(), fresh.layer_losses(2, z[2:3]).fetch()
    )


def test_router_losses_are_those_of_the_fused_prompts(
    make_objective: Make, deep: PromptSet, slow_deep: SlowReference, train: list[MrcInput]
) -> None:
    routers = np.random.default_rng(0).random((3, *deep.z.shape[:2])) < 0.5
    fused = np.einsum("plk,lkd->pld", routers / deep.z.shape[1], deep.z.double().numpy())  # eq. 1 on z
    got = make_objective(deep).router_losses(routers).fetch()
    np.testing.assert_allclose(got, slow_deep.losses(fused, train), **CLOSE)


def test_same_call_returns_the_same_bits(make_objective: Make, deep: PromptSet) -> None:
    z = candidates(5, deep)
    objective, again = make_objective(deep), make_objective(deep)
    first = objective.full_losses(z).fetch()
    np.testing.assert_array_equal(objective.full_losses(z).fetch(), first)
    for o in (objective, again):
        o.set_incumbent(z[0])
    objective.layer_losses(2, z[:, 2]).fetch()  # a cache grown in another order
    for layer in range(3):
        one, two = (
            objective.layer_losses(layer, z[:, layer]).fetch(),
            again.layer_losses(layer, z[:, layer]).fetch(),
        )
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(objective.layer_losses(layer, z[:, layer]).fetch(), one)


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_log_probs_keep_order_and_equal_slow_float64(
    make_objective: Make, request: pytest.FixtureRequest, tiny_backbone: Backbone, kind: str
) -> None:
    prompts, slow = request.getfixturevalue(kind), request.getfixturevalue(f"slow_{kind}")
    inputs = make_inputs((4, 21, 20, 19, 4, 40), tiny_backbone.config.vocab_size, seed=9)
    z = candidates(1, prompts)[0]
    objective = make_objective(prompts)
    for item, logp in zip(inputs, log_probs(objective.forward, z, inputs), strict=True):
        np.testing.assert_allclose(logp, slow.log_probs(z, item.input_ids), rtol=1e-5, atol=1e-5)
    assert objective.n_evaluations == 0


def test_a_prompt_is_prepared_once_and_another_one_replaces_it(
    make_objective: Make, deep: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = make_objective(deep).forward
    made = []
    every_layer = forward.every_layer

    def counted(z: torch.Tensor, *, scoring: bool = False) -> Evaluation:
        made.append(z)
        return every_layer(z, scoring=scoring)

    monkeypatch.setattr(forward, "every_layer", counted)
    first, second = candidates(2, deep)
    inputs = make_inputs((9, 5), 50)
    scorer = Scorer(forward)
    scorer.prepare(first)
    for z in (first, first.copy(), second, first):
        for got, expected in zip(
            scorer.outputs(z, inputs).fetch(), log_probs(forward, z, inputs), strict=True
        ):
            np.testing.assert_array_equal(got[: len(expected)], expected)
    assert len(made) == 3 + 4  # each change of prompt, and each of the four fresh scorers
    forward.forget()  # as where memory has run out
    scorer.outputs(first, inputs).fetch()
    assert len(made) == 8


def test_populations_whose_prefixes_do_not_fit_at_once_take_turns(
    make_objective: Make, deep: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = candidates(5, deep)
    expected = make_objective(deep).full_losses(z).fetch()
    monkeypatch.setattr("mp2.engine.chain._PREFIX_BYTES", 2 * 4 * 2 * 3 * 6 * 24)  # two candidates
    np.testing.assert_allclose(make_objective(deep).full_losses(z).fetch(), expected, **CLOSE)


def test_non_finite_losses_are_returned_as_they_are(make_objective: Make, deep: PromptSet) -> None:
    z = candidates(3, deep)
    z[1, 1, 0] = np.nan
    objective = make_objective(deep)
    losses = objective.full_losses(z).fetch()
    assert np.isnan(losses[1])
    assert np.isfinite(losses[[0, 2]]).all()
    objective.set_incumbent(z[0])
    losses = objective.layer_losses(1, z[:, 1]).fetch()
    assert np.isnan(losses[1])
    assert np.isfinite(losses[[0, 2]]).all()


class SmallMemory(CpuBackend):
    """A torch runtime that cannot hold more than ``limit`` tokens at once."""

    limit = 100
    largest = 0

    def layer(
        self, index: int, hidden: torch.Tensor, mask: torch.Tensor | None, prefix: PopulationPrefix | None
    ) -> torch.Tensor:
        p = max(hidden.shape[0], 1 if prefix is None else prefix[0].shape[0])
        tokens = p * hidden.shape[1] * hidden.shape[2]
        if tokens > self.limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")
        self.largest = max(self.largest, tokens)
        return super().layer(index, hidden, mask, prefix)


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_out_of_memory_halves_the_micro_batch_and_keeps_it(
    tiny_backbone: Backbone, train: list[MrcInput], request: pytest.FixtureRequest, kind: str
) -> None:
    prompts = request.getfixturevalue(kind)
    z = candidates(7, prompts)
    runtime = SmallMemory(tiny_backbone)
    objective = Objective(runtime.forward(prompts, micro_batch_tokens=10_000), train)
    expected = Objective(CpuBackend(tiny_backbone).forward(prompts), train).full_losses(z).fetch()
    np.testing.assert_allclose(objective.full_losses(z).fetch(), expected, **CLOSE)
    kept = objective.forward.micro_batch_tokens
    assert runtime.largest <= runtime.limit
    assert 36 <= kept < 10_000
    objective.set_incumbent(z[0])
    objective.layer_losses(0, z[:, 0]).fetch()
    np.testing.assert_allclose(objective.full_losses(z).fetch(), expected, **CLOSE)
    assert objective.forward.micro_batch_tokens == kept


def test_a_single_example_that_does_not_fit_is_an_error(
    tiny_backbone: Backbone, deep: PromptSet, train: list[MrcInput]
) -> None:
    runtime = SmallMemory(tiny_backbone)
    runtime.limit = 20
    objective = Objective(runtime.forward(deep), train)
    with pytest.raises(OutOfMemoryError, match="one example of 30 tokens"):
        objective.full_losses(candidates(2, deep)).fetch()


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "Failed to allocate memory for requested buffer of size 1024",
    ],
)
def test_every_librarys_words_for_lack_of_memory_are_known(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(UsageError(text))


def test_out_of_memory_drops_cached_inputs_before_it_halves_the_batch(
    tiny_backbone: Backbone, deep: PromptSet, slow_deep: SlowReference, train: list[MrcInput]
) -> None:
    class Failing(CpuBackend):
        armed = False

        def layer(
            self, index: int, hidden: torch.Tensor, mask: torch.Tensor | None, prefix: PopulationPrefix | None
        ) -> torch.Tensor:
            if self.armed and index == 2:
                self.armed = False
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().layer(index, hidden, mask, prefix)

    runtime = Failing(tiny_backbone)
    objective = Objective(runtime.forward(deep), train)
    z = candidates(4, deep)
    objective.set_incumbent(z[0])
    before = objective.forward.micro_batch_tokens
    whole = np.repeat(z[:1], 4, 0)
    whole[:, 1] = z[:, 1]
    runtime.armed = True
    np.testing.assert_allclose(
        objective.layer_losses(1, z[:, 1]).fetch(), slow_deep.losses(whole, train), **CLOSE
    )
    assert not runtime.armed
    assert objective.forward.micro_batch_tokens == before
    objective.set_incumbent(z[0])  # nothing is cached: there is only the batch to be made smaller
    runtime.armed = True
    objective.full_losses(z).fetch()
    assert objective.forward.micro_batch_tokens < before


def test_other_errors_are_not_taken_for_lack_of_memory(
    tiny_backbone: Backbone, deep: PromptSet, train: list[MrcInput], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(CpuBackend, "layer", broken)
    objective = Objective(CpuBackend(tiny_backbone).forward(deep), train)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        objective.full_losses(candidates(2, deep)).fetch()


def test_wrong_calls_say_what_was_expected(
    tiny_backbone: Backbone, deep: PromptSet, train: list[MrcInput]
) -> None:
    runtime = CpuBackend(tiny_backbone)
    with pytest.raises(UsageError, match="no training examples"):
        Objective(runtime.forward(deep), [])
    objective = Objective(runtime.forward(deep), train)
    with pytest.raises(UsageError, match=r"shape \(2, 10\), expected \(P, 3, 10\)"):
        objective.full_losses(np.zeros((2, 10))).fetch()
    with pytest.raises(UsageError, match=r"routers have shape \(3, 4\), expected \(P, L', K\)"):
        objective.router_losses(np.ones((3, 4), bool)).fetch()
    n_modules = deep.z.shape[1]
    with pytest.raises(
        UsageError, match=rf"router has shape \(2, 3, {n_modules + 1}\), expected \(\.\.\., 3, "
    ):
        objective.router_losses(np.ones((2, 3, n_modules + 1), bool)).fetch()
    with pytest.raises(UsageError, match="no incumbent"):
        objective.layer_losses(0, np.zeros((2, 10))).fetch()
    objective.set_incumbent(np.zeros((3, 10)))
    with pytest.raises(UsageError, match=r"layer 3, expected 0 to 2"):
        objective.layer_losses(3, np.zeros((2, 10))).fetch()


def test_prompts_of_another_backbone_are_refused(
    tiny_backbone: Backbone, train: list[MrcInput], deep: PromptSet
) -> None:
    from dataclasses import replace

    other = replace(tiny_backbone, sha256="0" * 64)
    prompts = random_prompts(other, "deep", prompt_tokens=3, intrinsic_dim=D)
    with pytest.raises(MismatchError, match="0000"):
        Objective(CpuBackend(tiny_backbone).forward(prompts), train)


def test_keys_and_values_are_made_on_the_device_where_there_is_one(
    tiny_backbone: Backbone, deep: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = CpuBackend(tiny_backbone)
    z = torch.from_numpy(candidates(3, deep))[:, 1]
    expected = backend.forward(deep).prefix(1, z)
    backend.device = "meta"  # torch's device that computes shapes only
    there = backend.forward(deep)
    found = there.prefix(1, z)
    assert [(x.device.type, x.dtype, x.shape) for x in found] == [
        ("meta", torch.float32, x.shape) for x in expected
    ]
    on_device = PrefixProjector._fold

    def full(self: PrefixProjector, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._device.type == "meta":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return on_device(self, layer)

    monkeypatch.setattr(PrefixProjector, "_fold", full)
    there = backend.forward(deep)
    assert there.prefix(1, z)[0].shape == expected[0].shape  # from the host, then
    assert there._projector._device.type == "cpu"


def test_the_last_layers_weights_are_converted_once(
    tiny_backbone: Backbone, shallow: PromptSet, train: list[MrcInput]
) -> None:
    weight = tiny_backbone.encoder.body(tiny_backbone.config.n_layers - 1).key.weight
    converted = 0

    class Counting(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal converted
            converted += function is torch.Tensor.to and args[0] is weight
            return function(*args, **(kwargs or {}))

    runtime = CpuBackend(tiny_backbone)
    objective = Objective(runtime.forward(shallow, micro_batch_tokens=60), train)
    objective.full_losses(candidates(1, shallow)).fetch()  # prepares the runtime's own
    objective = Objective(runtime.forward(shallow, micro_batch_tokens=60), train)
    with Counting():
        for seed in range(3):
            objective.full_losses(candidates(4, shallow, seed)).fetch()
    assert converted == 1
