"""Shallow prompts after the embedding norm, and none at all: against a BertModel with hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from mp2.backbone import Backbone
from mp2.engine import Objective
from mp2.engine.cuda.backend import CudaBackend
from mp2.errors import FormatError
from mp2.prompts import ModularPrompts, PromptSet
from mp2.tasks import MrcInput

from .test_deep_inline import by_hand, candidates

Make = Callable[..., Objective]


@pytest.fixture
def added(shallow: PromptSet) -> PromptSet:
    return replace(shallow, meta=replace(shallow.meta, injection="added"))


@pytest.fixture
def none(shallow: PromptSet) -> PromptSet:
    """A head alone."""
    meta = replace(shallow.meta, prompt_tokens=0)
    return replace(shallow, meta=meta, projection=shallow.projection[..., :0])


@pytest.mark.parametrize("limit", [1, 100, None])
def test_losses_equal_a_bert_model_with_additions_after_the_norm(
    make_objective: Make,
    tiny_backbone: Backbone,
    added: PromptSet,
    shallow: PromptSet,
    train: list[MrcInput],
    limit: int | None,
) -> None:
    z = candidates(3, added)
    objective = make_objective(added, micro_batch_tokens=limit)
    expected = by_hand(tiny_backbone, added, train, z)
    np.testing.assert_allclose(objective.full_losses(z).fetch(), expected, rtol=1e-5)
    objective.set_incumbent(z[0])
    np.testing.assert_allclose(objective.layer_losses(0, z[:, 0]).fetch(), expected, rtol=1e-5)
    before = make_objective(shallow).full_losses(z).fetch()
    assert (np.abs(before - expected) > 1e-3 * expected).all()  # before the norm it is another loss


def test_the_packed_engine_of_gpus_has_the_same_losses(
    tiny_backbone: Backbone, added: PromptSet, train: list[MrcInput]
) -> None:
    runtime = CudaBackend(tiny_backbone, device="cpu", precision="fp32")
    z = candidates(3, added)
    got = Objective(runtime.forward(added), train).full_losses(z).fetch()
    np.testing.assert_allclose(got, by_hand(tiny_backbone, added, train, z), rtol=1e-5)


def test_training_has_the_same_forward(
    tiny_backbone: Backbone, added: PromptSet, make_objective: Make, train: list[MrcInput]
) -> None:
    z = candidates(1, added)[0]
    prompts = ModularPrompts(added.meta, torch.Generator())
    rows = (torch.from_numpy(z) @ added.projection[0]).view(1, -1, added.meta.hidden)
    prompts.span_weight.data, prompts.span_bias.data = added.span_weight, added.span_bias
    losses = []
    with torch.no_grad():
        for item in train:
            ids = torch.from_numpy(item.input_ids)[None]
            logits = prompts.logits(tiny_backbone.encoder, ids, torch.ones_like(ids, dtype=torch.bool), rows)
            start, end = (x.log_softmax(-1)[0] for x in logits)
            losses.append(-(start[item.start] + end[item.end]) / 2)
    expected = make_objective(added).full_losses(z[None]).fetch()[0]
    assert float(torch.stack(losses).mean()) == pytest.approx(expected, rel=1e-5)


def test_without_rows_the_text_is_alone(
    make_objective: Make, tiny_backbone: Backbone, none: PromptSet, train: list[MrcInput]
) -> None:
    z = candidates(2, none)
    got = make_objective(none).full_losses(z).fetch()
    np.testing.assert_allclose(got, by_hand(tiny_backbone, none, train, z), rtol=1e-5)
    assert got[0] == got[1]  # there is nothing that a candidate could change
    runtime = CudaBackend(tiny_backbone, device="cpu", precision="fp32")
    packed = Objective(runtime.forward(none), train).full_losses(z).fetch()
    np.testing.assert_allclose(packed, got, rtol=1e-5)


def test_the_way_in_is_kept_in_the_file_and_in_its_hash(added: PromptSet, shallow: PromptSet) -> None:
    assert added.meta.injection == "added"
    assert added.meta.n_inline == added.meta.prompt_tokens
    assert added.sha256 != shallow.sha256
    with pytest.raises(FormatError, match="expected one of prefix, inline"):
        replace(added.meta, kind="deep")
    with pytest.raises(FormatError, match="expected a positive integer"):
        replace(added.meta, prompt_tokens=0)
