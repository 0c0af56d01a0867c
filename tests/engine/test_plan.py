"""Predictions add up what was timed; what is timed is a shorter model of the same kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from tiny_words import tiny_vocab

from mp2.backbone import Backbone, BackboneConfig, random_backbone
from mp2.engine import Objective, Prefix, TorchRuntime
from mp2.engine.batches import group_by_length
from mp2.engine.layer_timer import (
    LayerTimer,
    Stopwatch,
    extrapolate,
    extrapolate_visits,
    first_layers,
    sample_batches,
)
from mp2.engine.plan import Costs, Workload, measure, predict, target_tokens
from mp2.prompts import PromptSet, random_prompts
from mp2.tasks import MrcInput

from .slow_reference import SlowReference, make_inputs


def costs(**values: object) -> Costs:
    known = {
        "prepare_s": 0.0,
        "full_s": {},
        "visit_s": (),
        "dev_s": 0.0,
        "test_s": 0.0,
        "n_timed_layers": 3,
        "timed_share": 1.0,
        "spent_s": 0.0,
    }
    return Costs(**{**known, **values})  # type: ignore[arg-type]


def test_a_prediction_is_the_sum_of_what_the_run_will_do() -> None:
    work = Workload(populations=(1, 4, 10, 20), layer_iterations=7 * 20 + 5, popsize=20, n_dev=3, n_test=2)
    found = predict(
        work,
        costs(prepare_s=1.5, full_s={4: 8.0, 10: 14.0}, visit_s=(4.0, 2.0, 1.0), dev_s=0.5, test_s=10.0),
    )
    assert found.stage1_s == pytest.approx(2.0 + 8.0 + 14.0 + 28.0)  # 1 of 4, 4, 10, twice 10
    # layers 0 1 2, 0 1 2, 0 are visited whole, then layer 1 with a quarter of a population
    assert found.stage2_s == pytest.approx(2 * 7.0 + 4.0 + 2.0 / 4)
    assert (found.prepare_s, found.dev_s, found.test_s) == (1.5, 1.5, 20.0)
    assert found.total_s == pytest.approx(1.5 + 52.0 + 18.5 + 1.5 + 20.0)


def test_without_stage_two_nothing_of_it_is_predicted() -> None:
    work = Workload(populations=(5,), layer_iterations=0, popsize=20, n_dev=2, n_test=0)
    assert predict(work, costs(full_s={5: 1.0})).stage2_s == 0.0


def test_times_between_depths_lie_on_a_line() -> None:
    assert extrapolate({1: 5.0, 3: 9.0}, 24) == pytest.approx(5.0 + 23 * 2.0)
    assert extrapolate({1: 5.0, 3: 9.0}, 3) == 9.0
    assert extrapolate({1: 5.0}, 1) == 5.0
    assert extrapolate({1: 5.0, 3: 4.0}, 24) == 4.0  # noise never makes depth cheaper


def test_visits_further_down_cost_the_layers_above_them() -> None:
    first, layer = 3.0, 2.0
    whole = [first + (6 - 1 - i) * layer for i in range(6)]
    assert extrapolate_visits(whole[-3:], 6) == pytest.approx(whole)
    assert extrapolate_visits(whole[-3:], 3) == pytest.approx(whole[-3:])


def test_first_layers_are_the_same_layers_and_leave_the_backbone_alone(
    tiny_backbone: Backbone, deep: PromptSet, train: list[MrcInput]
) -> None:
    body, prompts = first_layers(tiny_backbone, deep, 2)
    assert [len(b.encoder.layers) for b in (body, tiny_backbone)] == [2, 3]
    assert body.encoder.layers[1] is tiny_backbone.encoder.layers[1]
    z = np.random.default_rng(0).standard_normal((4, 2, prompts.z.shape[-1])).astype(np.float32)
    got = Objective(TorchRuntime(tiny_backbone), body, prompts, train).full_losses(z)
    np.testing.assert_allclose(got, SlowReference(body, prompts).losses(z, train), rtol=1e-5)


@pytest.mark.parametrize("target", [0, 300, 900, 10**9])
def test_a_sample_is_whole_batches_of_about_the_tokens_asked_for(target: int) -> None:
    lengths = tuple(np.random.default_rng(1).integers(5, 60, 64).tolist())
    inputs = make_inputs(lengths, 100)
    part = sample_batches(inputs, 2, 128, target)
    ids = [id(x) for x in part]
    assert len(set(ids)) == len(ids)
    groups = [{id(inputs[i]) for i in group} for group in group_by_length(list(lengths), 2, 128)]
    assert all(group <= set(ids) or not group & set(ids) for group in groups)
    tokens, largest = 2 * sum(x.n_tokens for x in part), 128
    assert tokens >= min(target, 2 * sum(lengths)) - largest
    assert tokens <= min(max(target, largest) + 2 * largest, 2 * sum(lengths))


def test_a_stopwatch_takes_the_median_and_keeps_what_the_first_time_cost() -> None:
    ticks = iter([0.0, 0.9, 1.0, 1.1, 2.0, 2.5, 3.0, 3.2])
    watch = Stopwatch("cpu", clock=lambda: next(ticks))
    assert watch.medians({"work": lambda: None}) == {"work": pytest.approx(0.2)}
    assert watch.extra_s == pytest.approx(0.7)


def test_long_work_is_not_repeated() -> None:
    ticks = iter([0.0, 9.0, 10.0, 14.0])
    watch = Stopwatch("cpu", clock=lambda: next(ticks))
    assert watch.medians({"work": lambda: None}) == {"work": pytest.approx(4.0)}


def test_a_moment_of_disturbance_meets_no_median() -> None:
    now = 0.0
    runs = 0

    def work(seconds: float) -> None:
        nonlocal now, runs
        runs += 1
        now += seconds * (10 if 5 <= runs <= 7 else 1)  # three runs in a row, in two rounds

    watch = Stopwatch("cpu", clock=lambda: now)
    works = {n: lambda s=s: work(s) for n, s in (("a", 0.01), ("b", 0.02), ("c", 0.04))}  # type: ignore[misc]
    assert watch.medians(works) == {
        "a": pytest.approx(0.01),
        "b": pytest.approx(0.02),
        "c": pytest.approx(0.04),
    }


@pytest.mark.parametrize("kind", ["deep", "shallow"])
@pytest.mark.parametrize("target", [0.0, 1e9])
def test_every_kind_of_work_is_timed(
    request: pytest.FixtureRequest,
    tiny_backbone: Backbone,
    train: list[MrcInput],
    kind: str,
    target: float,
) -> None:
    prompts = request.getfixturevalue(kind)
    runtime = TorchRuntime(tiny_backbone)
    timer = LayerTimer(runtime, tiny_backbone, prompts, train, population=20, target_tokens=target)
    found = measure(timer, populations=[1, 5], popsize=4, dev=train[:2], test=train)
    assert set(found.full_s) == {1, 5}
    assert len(found.visit_s) == (3 if kind == "deep" else 1)
    assert min(*found.full_s.values(), *found.visit_s, found.dev_s, found.test_s) > 0
    assert 0 < found.timed_share <= 1
    assert (found.timed_share == 1) == (target > 1)


class Counting(TorchRuntime):
    """Counts the tokens that its layers see; a clock that reads the count measures work in place of time."""

    work = 0.0

    def layer(
        self, index: int, hidden: torch.Tensor, mask: torch.Tensor | None, prefix: Prefix | None
    ) -> torch.Tensor:
        p = max(hidden.shape[0], 1 if prefix is None else prefix[0].shape[0])
        self.work += p * hidden.shape[1] * hidden.shape[2]
        return super().layer(index, hidden, mask, prefix)


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_three_layers_predict_the_work_of_seven(
    tiny_config: BackboneConfig, train: list[MrcInput], kind: Literal["deep", "shallow"]
) -> None:
    backbone = random_backbone(replace(tiny_config, n_layers=7), tiny_vocab(), seed=1)
    prompts = random_prompts(backbone, kind, prompt_tokens=4, intrinsic_dim=3)
    runtime = Counting(backbone)
    timer = LayerTimer(runtime, backbone, prompts, train, population=20, target_tokens=1e9)
    timer.watch = Stopwatch("cpu", clock=lambda: runtime.work)
    found = measure(timer, populations=[20], popsize=20, dev=train)

    objective = Objective(runtime, backbone, prompts, train)
    z = np.zeros((20, *prompts.z.shape[::2]), np.float32)

    def work(run: Callable[[], object]) -> float:
        before = runtime.work
        run()
        return runtime.work - before

    assert found.full_s[20] == pytest.approx(work(lambda: objective.full_losses(z)))
    assert found.dev_s == pytest.approx(work(lambda: objective.log_probs(z[0], train)))
    objective.set_incumbent(z[0])
    visits = []
    for layer in range(prompts.z.shape[0]):
        visits.append(work(lambda layer=layer: objective.layer_losses(layer, z[:, layer])))  # type: ignore[misc]
        objective.commit(layer, z[0, layer])
    assert found.visit_s == pytest.approx(visits, rel=0.04)


def test_a_larger_budget_times_more() -> None:
    assert target_tokens(2.0, 1e-5) == 2 * target_tokens(1.0, 1e-5)
