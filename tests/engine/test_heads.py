"""The heads that need no pre-trained prompts, on every backend, against slow float64 hidden states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from slow_encoder import slow_hidden

from mp2.backbone import Backbone
from mp2.backbone.mlm_head import MlmHead, MlmTransform
from mp2.engine import Backend, Objective, Scorer
from mp2.engine.cpu.backend import CpuBackend
from mp2.engine.cuda.backend import CudaBackend
from mp2.engine.onnx.backend import OnnxBackend
from mp2.heads import Head, LabelWordHead, RidgeHead, RidgePart, RidgeSettings
from mp2.prompts import PromptSet
from mp2.tasks import MrcInput

from .slow_reference import D

LABELS = 3
WORDS = [[7, 8], [9], [10]]


@pytest.fixture(params=["torch", "onnxruntime", "packed"])
def backend(request: pytest.FixtureRequest, tiny_backbone: Backbone, engine_dir: Path) -> Backend:
    if request.param == "packed":
        return CudaBackend(tiny_backbone, device="cpu", precision="fp32")
    if request.param == "torch":
        return CpuBackend(tiny_backbone)
    return OnnxBackend(tiny_backbone, engine_dir, threads=1)


@pytest.fixture(scope="session")
def mlm(tiny_backbone: Backbone) -> MlmHead:
    rng = torch.Generator().manual_seed(4)
    h, v = tiny_backbone.config.hidden, tiny_backbone.config.vocab_size
    transform = MlmTransform(
        dense_weight=torch.randn(h, h, generator=rng),
        dense_bias=torch.randn(h, generator=rng),
        norm_weight=torch.ones(h),
        norm_bias=torch.zeros(h),
        activation="gelu",
        norm_eps=1e-12,
    )
    words = tiny_backbone.encoder.word_embeddings.weight.detach()
    return MlmHead(transform=transform, decoder=words, bias=torch.randn(v, generator=rng), tied=True)


def labelled(train: list[MrcInput]) -> list[MrcInput]:
    """The inputs with a label, and the middle of each as its field."""
    return [
        replace(item, label=i % LABELS, segments=np.array([[1, item.n_tokens - 2]]))
        for i, item in enumerate(train)
    ]


def cloze(train: list[MrcInput]) -> list[MrcInput]:
    """Each input twice: with one [MASK] and with two."""
    return [
        replace(item, label=i % LABELS, segments=np.array([[1, n]]))
        for i, item in enumerate(train)
        for n in (1, 2)
    ]


def states(backbone: Backbone, prompts: PromptSet, z: np.ndarray, item: MrcInput) -> np.ndarray:
    """Last hidden states [T, H] under intrinsic prompts z [L', D]."""
    a = prompts.projection.double().numpy()
    rows = [(z[i].astype(np.float64) @ a[i]).reshape(-1, backbone.config.hidden) for i in range(len(z))]
    if prompts.kind == "deep":
        return slow_hidden(backbone, item.input_ids, prefix_prompts=rows)
    return slow_hidden(backbone, item.input_ids, inline=rows[0])


def slow_cloze_loss(
    backbone: Backbone, mlm: MlmHead, prompts: PromptSet, z: np.ndarray, inputs: list[MrcInput]
) -> float:
    scores: dict[int, np.ndarray] = {}
    for item in inputs:
        hidden = torch.from_numpy(states(backbone, prompts, z, item))
        first, last = item.segments[0]
        for label, word in enumerate(WORDS):
            if len(word) != last - first + 1:
                continue
            logits = [mlm_double(mlm, hidden[first + slot]) for slot in range(len(word))]
            log_probs = [torch.log_softmax(x, -1)[token] for x, token in zip(logits, word, strict=True)]
            scores.setdefault(item.example, np.full(LABELS, -np.inf))[label] = float(sum(log_probs)) / len(
                word
            )
    labels = {item.example: item.label for item in inputs}
    return float(np.mean([np.logaddexp.reduce(row) - row[labels[i]] for i, row in scores.items()]))


def mlm_double(mlm: MlmHead, hidden: torch.Tensor) -> torch.Tensor:
    t = mlm.transform
    assert t is not None
    inner = torch.nn.functional.gelu(hidden @ t.dense_weight.double().T + t.dense_bias.double())
    inner = (inner - inner.mean()) / torch.sqrt(inner.var(unbiased=False) + t.norm_eps)
    return inner @ mlm.decoder.double().T + mlm.bias.double()


def prompt_candidates(n: int, prompts: PromptSet) -> np.ndarray:
    rng = np.random.default_rng(5)
    return rng.standard_normal((n, prompts.z.shape[0], D)).astype(np.float32)


@pytest.mark.parametrize("kind", ["deep", "shallow"])
def test_label_words_losses_equal_slow_float64(
    kind: str,
    request: pytest.FixtureRequest,
    backend: Backend,
    tiny_backbone: Backbone,
    mlm: MlmHead,
    train: list[MrcInput],
) -> None:
    prompts, inputs = request.getfixturevalue(kind), cloze(train[:4])
    head = LabelWordHead(mlm, WORDS, inputs)
    z = prompt_candidates(3, prompts)
    got = Objective(backend.forward(prompts, head), inputs).full_losses(z).fetch()
    expected = [slow_cloze_loss(tiny_backbone, mlm, prompts, one, inputs) for one in z]
    assert np.std(expected) > 1e-3  # prompts matter
    assert_allclose(got, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["deep", "shallow"])
@pytest.mark.parametrize("ngrams", [False, True])
def test_ridge_scores_and_losses_equal_those_of_slow_states(
    kind: str,
    ngrams: bool,
    request: pytest.FixtureRequest,
    backend: Backend,
    tiny_backbone: Backbone,
    train: list[MrcInput],
) -> None:
    prompts, inputs = request.getfixturevalue(kind), labelled(train)
    layers = tiny_backbone.config.n_layers
    shares = (0.15, 0.5) if ngrams else (1.0,)
    parts = tuple(RidgePart(share=share, penalty=0.5, weight=4.0 * share) for share in shares)
    settings = RidgeSettings(layer=layers, ngrams=ngrams, parts=parts)
    head = RidgeHead(inputs, LABELS, settings)
    z = prompt_candidates(2, prompts)
    pooled = np.stack(
        [[states(tiny_backbone, prompts, one, item)[1:-1].mean(0) for item in inputs] for one in z]
    )
    forward = backend.forward(prompts, head)
    objective = Objective(forward, inputs)
    expected = head.losses(pooled)
    assert abs(expected[0] - expected[1]) > 1e-3
    assert_allclose(objective.full_losses(z).fetch(), expected, rtol=0, atol=2e-4)
    reader = objective.reader(z[0])
    outputs = Scorer(forward).outputs(z[0], inputs).fetch()
    slow = head.fit(lambda: pooled[0])
    for item, output, row in zip(inputs, outputs, pooled[0], strict=True):
        assert_allclose(reader.scores(item, output), slow.scores(item, row), rtol=0, atol=2e-3)


@pytest.mark.parametrize("read", [1, 2, 3])
def test_visits_of_a_layer_equal_full_losses_whatever_layer_is_read(
    read: int, backend: Backend, deep: PromptSet, train: list[MrcInput]
) -> None:
    inputs = labelled(train)
    parts = (RidgePart(share=1.0, penalty=1.0, weight=4.0),)
    head: Head = RidgeHead(inputs, LABELS, RidgeSettings(layer=read, ngrams=False, parts=parts))
    objective = Objective(backend.forward(deep, head), inputs)
    incumbent = prompt_candidates(1, deep)[0]
    objective.set_incumbent(incumbent)
    for layer in range(len(incumbent)):
        z = prompt_candidates(4, deep)[:, layer]
        whole = np.repeat(incumbent[None], 4, 0)
        whole[:, layer] = z
        visited = objective.layer_losses(layer, z).fetch()
        assert_allclose(visited, objective.full_losses(whole).fetch(), rtol=0, atol=2e-5)
        assert (np.ptp(visited) > 1e-4) == (layer < read)  # prompts above what is read change nothing
