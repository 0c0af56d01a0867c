"""The encoder against transformers' BertModel and against float64 loops."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_encoder import slow_hidden
from tiny_words import tiny_vocab
from transformers import BertConfig, BertModel

from mp2.backbone import Backbone, BackboneConfig, Encoder, load_backbone, random_backbone
from mp2.prompts import prefix_of

N_WORDS = len(tiny_vocab())
SHAPES = {
    "small": {"num_hidden_layers": 3, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40},
    "wide": {"num_hidden_layers": 2, "hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 130},
}


def bert(folder: Path, **config: object) -> BertModel:
    """A random BertModel, written to ``folder`` as transformers writes it, every bias and gain random."""
    model = BertModel(
        BertConfig(vocab_size=N_WORDS, max_position_embeddings=64, **config), add_pooling_layer=False
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "LayerNorm.weight" in name else 0.0, 0.1, generator=generator)
    model.eval().save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(tiny_vocab()) + "\n", "utf-8")
    return model


def random_ids(n: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, N_WORDS, (n, length), generator=torch.Generator().manual_seed(seed))


def mask_of(lengths: list[int]) -> torch.Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_prompts_equals_transformers_bert_model(tmp_path: Path, shape: str, padded: bool) -> None:
    model = bert(tmp_path, **SHAPES[shape])
    backbone = load_backbone(tmp_path)
    ids = random_ids(3, 17)
    mask = mask_of([17, 9, 4]) if padded else None
    with torch.no_grad():
        expected = model(ids, attention_mask=None if mask is None else mask.long()).last_hidden_state
    got = backbone.encoder(ids, mask)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    assert (got - expected)[real].abs().max() <= 1e-5


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "relu"])
def test_other_activations_equal_transformers(tmp_path: Path, activation: str) -> None:
    model = bert(tmp_path, hidden_act=activation, **SHAPES["small"])
    ids = random_ids(2, 11)
    with torch.no_grad():
        expected = model(ids).last_hidden_state
    assert (load_backbone(tmp_path).encoder(ids) - expected).abs().max() <= 1e-5


def with_activation(activation: str) -> Backbone:
    config = BackboneConfig(
        name="loops",
        n_layers=2,
        hidden=12,
        n_heads=3,
        ffn=20,
        vocab_size=N_WORDS,
        max_positions=40,
        activation=activation,
    )
    return random_backbone(config, tiny_vocab(), seed=5)


def soft_prompts(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("prompt", ["none", "prefix", "inline"])
@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-12), (False, 1e-5)], ids=["fp64", "fp32"])
def test_equals_a_slow_float64_loop(activation: str, prompt: str, double: bool, tolerance: float) -> None:
    backbone = with_activation(activation)
    encoder = copy.deepcopy(backbone.encoder).double() if double else backbone.encoder
    lengths = [9, 5, 1]
    ids, mask = random_ids(3, 9), mask_of(lengths)
    deep = soft_prompts(2, 3, 4, 12)  # layer, sequence, m, H
    inline = soft_prompts(3, 4, 12, seed=2)
    kind = torch.float64 if double else torch.float32
    prefixes = [prefix_of(encoder, i, p.to(kind)) for i, p in enumerate(deep)] if prompt == "prefix" else None
    got = encoder(ids, mask, prefixes, inline.to(kind) if prompt == "inline" else None)
    for row, length in enumerate(lengths):
        expected = slow_hidden(
            backbone,
            ids[row, :length].tolist(),
            prefix_prompts=[p[row].double().numpy() for p in deep] if prompt == "prefix" else None,
            inline=inline[row].double().numpy() if prompt == "inline" else None,
        )
        assert np.abs(got[row, :length].numpy() - expected).max() <= tolerance


def test_a_prefix_shared_by_the_batch_equals_the_same_prefix_for_each(tiny_backbone: Backbone) -> None:
    encoder, ids = tiny_backbone.encoder, random_ids(3, 8)
    prompts = soft_prompts(3, 1, 5, 24)
    shared = [prefix_of(encoder, i, p) for i, p in enumerate(prompts)]
    repeated = [prefix_of(encoder, i, p.expand(3, -1, -1)) for i, p in enumerate(prompts)]
    assert (encoder(ids, None, shared) - encoder(ids, None, repeated)).abs().max() <= 1e-6


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=5),
    extra=st.integers(0, 9),
    prompt=st.sampled_from(["none", "prefix", "inline"]),
    seed=st.integers(0, 99),
)
def test_padding_and_batch_composition_change_nothing(
    tiny_backbone: Backbone, lengths: list[int], extra: int, prompt: str, seed: int
) -> None:
    encoder = tiny_backbone.encoder
    width = max(lengths) + extra
    ids = random_ids(len(lengths), width, seed)  # padding holds arbitrary tokens
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    prompts = soft_prompts(3, 1, 4, 24, seed=seed)
    prefixes = [prefix_of(encoder, i, p) for i, p in enumerate(prompts)] if prompt == "prefix" else None
    inline = prompts[0] if prompt == "inline" else None
    together = encoder(ids, mask, prefixes, inline)
    for row, length in enumerate(lengths):
        alone = encoder(ids[row : row + 1, :length], None, prefixes, inline)
        assert (together[row, :length] - alone[0]).abs().max() <= 5e-6


def test_layer_by_layer_from_any_layer_equals_forward(tiny_backbone: Backbone) -> None:
    encoder, ids, mask = tiny_backbone.encoder, random_ids(2, 7), mask_of([7, 4])
    prefixes = [prefix_of(encoder, i, p) for i, p in enumerate(soft_prompts(3, 1, 4, 24))]
    inputs = [encoder.embed(ids)]
    for i in range(3):
        inputs.append(encoder.layer(i, inputs[-1], mask, prefixes[i]))
    full = encoder(ids, mask, prefixes)
    assert torch.equal(inputs[-1], full)
    for start in range(3):
        hidden = inputs[start]
        for i in range(start, 3):
            hidden = encoder.layer(i, hidden, mask, prefixes[i])
        assert torch.equal(hidden, full)


def test_inline_rows_take_positions_1_to_m_and_shift_the_text(tiny_backbone: Backbone) -> None:
    encoder = tiny_backbone.encoder
    ids = random_ids(1, 4)
    prompts = encoder.word_embeddings(random_ids(1, 3, seed=9))
    rows = torch.cat([ids[:, :1], random_ids(1, 3, seed=9), ids[:, 1:]], 1)  # the same rows as real tokens
    embedded = encoder.embed(rows)
    assert torch.equal(encoder.embed_inline(prompts), embedded[:, 1:4])
    shifted = encoder.embed(ids, n_inline=3)
    assert torch.equal(shifted[:, :1], embedded[:, :1])
    assert torch.equal(shifted[:, 1:], embedded[:, 4:])
    full = encoder(rows)
    assert (encoder(ids, inline=prompts) - full[:, [0, 4, 5, 6]]).abs().max() <= 1e-6


def test_the_encoder_is_frozen_and_without_dropout_even_in_training_mode(tiny_backbone: Backbone) -> None:
    encoder: Encoder = copy.deepcopy(tiny_backbone.encoder)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.training
    ids = random_ids(1, 6)
    assert torch.equal(encoder(ids), encoder.train()(ids))


def test_more_tokens_than_positions_are_refused_with_both_numbers(tiny_backbone: Backbone) -> None:
    encoder = tiny_backbone.encoder
    assert encoder(random_ids(1, 96)).shape == (1, 96, 24)
    with pytest.raises(ValueError, match=r"97 tokens and 0 inline.*at most 96 positions"):
        encoder(random_ids(1, 97))
    with pytest.raises(ValueError, match="90 tokens and 7 inline"):
        encoder(random_ids(1, 90), inline=torch.zeros(1, 7, 24))
    with pytest.raises(ValueError, match="96 inline prompt rows, expected at most 95"):
        encoder.embed_inline(torch.zeros(1, 96, 24))
