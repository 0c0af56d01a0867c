"""Deep inline injection, as the authors' code has it: against a BertModel with hooks, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.speed.plain_loop import PlainLoop
from mp2.backbone import Backbone
from mp2.engine import Objective
from mp2.engine.cpu.backend import CpuBackend
from mp2.engine.cpu.differences import DifferenceBackend
from mp2.engine.cuda.backend import CudaBackend
from mp2.engine.endpoint.backend import EndpointBackend
from mp2.errors import UsageError
from mp2.prompts import PromptSet
from mp2.tasks import MrcInput

from .slow_reference import D, log_probs

Make = Callable[..., Objective]


@pytest.fixture
def inline(deep: PromptSet) -> PromptSet:
    return replace(deep, meta=replace(deep.meta, injection="inline"))


def candidates(n: int, prompts: PromptSet, seed: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (4 * rng.standard_normal((n, prompts.z.shape[0], D))).astype(np.float32)


def by_hand(backbone: Backbone, prompts: PromptSet, train: list[MrcInput], z: np.ndarray) -> np.ndarray:
    loop = PlainLoop(backbone, prompts, train)
    loop.model.double()
    loop.projection, loop.span = loop.projection.double(), tuple(x.double() for x in loop.span)
    return np.array([loop.loss(one.astype(np.float64)) for one in z])


@pytest.mark.parametrize("limit", [1, 100, None])
def test_losses_equal_a_bert_model_with_additions_before_every_layer(
    make_objective: Make,
    tiny_backbone: Backbone,
    inline: PromptSet,
    deep: PromptSet,
    train: list[MrcInput],
    limit: int | None,
) -> None:
    z = candidates(3, inline)
    objective = make_objective(inline, micro_batch_tokens=limit)
    expected = by_hand(tiny_backbone, inline, train, z)
    np.testing.assert_allclose(objective.full_losses(z).fetch(), expected, rtol=1e-5)
    as_prefix = make_objective(deep).full_losses(z).fetch()
    assert (np.abs(as_prefix - expected) > 1e-3 * expected).all()  # another injection is another loss


def test_visits_of_layers_with_commits_equal_whole_forwards(
    make_objective: Make, tiny_backbone: Backbone, inline: PromptSet, train: list[MrcInput]
) -> None:
    z = candidates(1, inline)[0]
    objective = make_objective(inline)
    objective.set_incumbent(z)
    z = z.copy()
    for visit, layer in enumerate([0, 2, 1]):
        trial = candidates(2, inline, seed=visit)[:, layer]
        whole = np.repeat(z[None], 2, 0)
        whole[:, layer] = trial
        expected = by_hand(tiny_backbone, inline, train, whole)
        np.testing.assert_allclose(objective.layer_losses(layer, trial).fetch(), expected, rtol=1e-5)
        objective.commit(layer, trial[1])
        z[layer] = trial[1]
    assert objective.n_evaluations == 6


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_layers_below_a_visited_one_are_computed_once_for_all_candidates(
    tiny_backbone: Backbone,
    inline: PromptSet,
    train: list[MrcInput],
    layer: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend, plain = CpuBackend(tiny_backbone), CpuBackend.layer
    computed: list[tuple[int, int]] = []

    def counted(self: CpuBackend, index: int, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        computed.append((index, len(hidden)))
        return plain(self, index, hidden, *rest)

    monkeypatch.setattr(CpuBackend, "layer", counted)
    objective = Objective(backend.forward(inline), train)
    objective.set_incumbent(candidates(1, inline)[0])
    objective.layer_losses(layer, candidates(3, inline, seed=1)[:, layer]).fetch()
    assert set(computed) == {(index, 1 if index < layer else 3) for index in range(3)}
    computed.clear()
    alike = objective.full_losses(np.repeat(candidates(1, inline), 2, 0)).fetch()
    assert len(alike) == 2
    assert alike[0] == alike[1]


def test_log_probs_are_of_the_text_alone_and_give_the_loss(
    make_objective: Make, inline: PromptSet, train: list[MrcInput]
) -> None:
    z = candidates(1, inline)
    objective = make_objective(inline)
    logp = log_probs(objective.forward, z[0], train)
    start, end = [x[:, 0] for x in logp], [x[:, 1] for x in logp]
    for item, s, e in zip(train, start, end, strict=True):
        assert len(s) == len(e) == item.n_tokens
        assert np.exp(s).sum() == pytest.approx(1)
    losses = [-(s[i.start] + e[i.end]) / 2 for i, s, e in zip(train, start, end, strict=True)]
    assert np.mean(losses) == pytest.approx(objective.full_losses(z).fetch()[0], rel=1e-5)


def test_int8_differences_stay_close_to_float32(
    tiny_backbone: Backbone, inline: PromptSet, train: list[MrcInput]
) -> None:
    try:
        runtime = DifferenceBackend(tiny_backbone, precision="int8")
    except UsageError as error:
        pytest.skip(str(error))
    near = candidates(1, inline) + 0.05 * candidates(8, inline, seed=4)
    exact = Objective(CpuBackend(tiny_backbone).forward(inline), train).full_losses(near).fetch()
    got = Objective(runtime.forward(inline), train).full_losses(near).fetch()
    assert np.abs(got - exact).max() < 0.1 * np.ptp(exact)


def test_engines_that_have_prefixes_only_refuse_with_one_line(
    tiny_backbone: Backbone, inline: PromptSet, train: list[MrcInput]
) -> None:
    named = CpuBackend(tiny_backbone)
    named.name, named.deep_inline = "endpoint", False
    for backend in (CudaBackend(tiny_backbone, device="cpu", precision="fp32"), named):
        refusal = f"^[^\n]*inline injection, runtime '{backend.name}' on cpu has prefixes only[^\n]*$"
        with pytest.raises(UsageError, match=refusal):
            backend.forward(inline)
    assert not EndpointBackend.deep_inline


def test_encoder_equals_the_engine(
    tiny_backbone: Backbone, inline: PromptSet, train: list[MrcInput], make_objective: Make
) -> None:
    z = candidates(1, inline)[0]
    added = torch.einsum("ld,ldx->lx", torch.from_numpy(z), inline.projection)
    added = added.view(len(z), inline.meta.prompt_tokens, -1)
    item = train[1]
    hidden = tiny_backbone.encoder(torch.from_numpy(item.input_ids)[None], added=added)
    logp = (hidden @ inline.span_weight.T + inline.span_bias).log_softmax(1)[0].double().numpy()
    start = [x[:, 0] for x in log_probs(make_objective(inline).forward, z, [item])]
    np.testing.assert_allclose(start[0], logp[:, 0], rtol=1e-4, atol=1e-5)
