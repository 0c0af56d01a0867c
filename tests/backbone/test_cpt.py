"""CPT's format: token type 1, tables longer or shorter than the configuration says, a head of two parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_words import tiny_vocab
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from mp2.backbone import load_backbone, save_backbone
from mp2.errors import FormatError

IDS = torch.tensor([[2, 9, 10, 30, 3], [2, 50, 7, 8, 3]])


def write_cpt(
    folder: Path, *, positions: int, vocab: int, extra: dict[str, Tensor] | None = None, **config: Any
) -> BertModel:
    """One BERT body with token type rows that differ, as CPT publishes it; returns the body."""
    shape = BertConfig(
        vocab_size=vocab,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=positions,
    )
    model = BertModel(shape, add_pooling_layer=False)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "LayerNorm.weight" in name else 0.0, 0.1, generator=generator)
    tensors = {f"model.encoder.{n}": t.clone() for n, t in model.state_dict().items()}
    tensors["model.decoder.embed_positions.weight"] = torch.zeros(1026, 24)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({**tensors, **(extra or {})}, folder / "pytorch_model.bin")
    raw = {
        "model_type": "bart",
        "d_model": 24,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 40,
        "activation_function": "gelu",
        "max_position_embeddings": 1024,
        "vocab_size": 21128,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    words = [*tiny_vocab(), *("" for _ in range(vocab - len(tiny_vocab())))]  # as published: empty lines
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")
    return model.eval()


def of_type(model: BertModel, token_type: int) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = model(IDS, token_type_ids=torch.full_like(IDS, token_type)).last_hidden_state
    return hidden


def test_every_token_has_token_type_1_as_in_pre_training(tmp_path: Path) -> None:
    model = write_cpt(tmp_path, positions=32, vocab=160)
    backbone = load_backbone(tmp_path)
    assert backbone.config.token_type == 1
    assert (backbone.encoder(IDS) - of_type(model, 1)).abs().max() <= 1e-5
    assert (backbone.encoder(IDS) - of_type(model, 0)).abs().max() > 0.01  # the rows differ


def test_prompt_rows_have_the_token_type_too(tmp_path: Path) -> None:
    encoder = write_and_load(tmp_path).encoder
    rows = torch.tensor([[9, 11, 12]])
    whole = encoder.embed(torch.cat([IDS[:1, :1], rows, IDS[:1, 1:]], 1))
    assert torch.equal(encoder.embed_inline(encoder.word_embeddings(rows)), whole[:, 1:4])


def write_and_load(folder: Path, **changes: Any) -> Any:
    write_cpt(folder, **{"positions": 32, "vocab": 160, **changes})
    return load_backbone(folder)


def test_the_configuration_may_say_another_token_type(tmp_path: Path) -> None:
    model = write_cpt(tmp_path, positions=32, vocab=160, token_type=0)
    backbone = load_backbone(tmp_path)
    assert (backbone.encoder(IDS) - of_type(model, 0)).abs().max() <= 1e-5
    for wrong, expected in ((2, "is 2, but there are 2 token types"), (-1, "is -1"), (True, "is True")):
        write_cpt(tmp_path, positions=32, vocab=160, token_type=wrong)
        with pytest.raises(FormatError, match=f"field 'token_type': {expected}"):
            load_backbone(tmp_path)


def test_the_token_type_is_in_the_hash_and_kept_when_saved(tmp_path: Path) -> None:
    one = write_and_load(tmp_path / "1")
    zero = write_and_load(tmp_path / "0", token_type=0)
    assert one.sha256 != zero.sha256
    save_backbone(one, tmp_path / "saved")
    again = load_backbone(tmp_path / "saved")
    assert again.config.token_type == 1
    assert again.sha256 == one.sha256
    assert torch.equal(again.encoder(IDS), one.encoder(IDS))


@pytest.mark.parametrize(("positions", "vocab"), [(512, 160), (1024, 200)], ids=["first", "second"])
def test_both_generations_are_read_as_their_tables_are(tmp_path: Path, positions: int, vocab: int) -> None:
    """The configuration says 1,024 positions (the decoder's) and 21,128 tokens in both."""
    model = write_cpt(tmp_path, positions=positions, vocab=vocab)
    backbone = load_backbone(tmp_path)
    assert (backbone.config.max_positions, backbone.config.vocab_size) == (positions, vocab)
    assert (backbone.encoder(IDS) - of_type(model, 1)).abs().max() <= 1e-5


@pytest.mark.parametrize("prefix", ["model.", ""], ids=["as published", "as its converter writes"])
def test_its_head_is_the_word_embeddings_and_a_bias_on_the_understanding_side(
    tmp_path: Path, prefix: str
) -> None:
    bias = torch.randn(1, 160, generator=torch.Generator().manual_seed(4))
    model = write_cpt(tmp_path, positions=32, vocab=160, extra={"final_logits_bias": bias})
    if not prefix:
        tensors = torch.load(tmp_path / "pytorch_model.bin")
        torch.save({n.removeprefix("model."): t for n, t in tensors.items()}, tmp_path / "pytorch_model.bin")
    head = load_backbone(tmp_path).mlm_head
    assert head is not None
    assert head.tied
    assert head.transform is None
    hidden = of_type(model, 1)
    expected = F.linear(hidden, model.embeddings.word_embeddings.weight) + bias  # CPTForMaskedLM.forward
    assert (head.logits(hidden) - expected).abs().max() <= 1e-5


def test_its_head_without_a_bias_or_untied(tmp_path: Path) -> None:
    head = write_and_load(tmp_path / "tied").mlm_head
    assert head.tied
    assert not head.bias.any()
    own = torch.randn(160, 24, generator=torch.Generator().manual_seed(4))
    untied = write_and_load(tmp_path / "own", extra={"lm_head.weight": own}, tie_word_embeddings=False)
    assert torch.equal(untied.mlm_head.decoder, own)
    assert write_and_load(tmp_path / "none", tie_word_embeddings=False).mlm_head is None
    save_backbone(untied, tmp_path / "saved")
    again = load_backbone(tmp_path / "saved").mlm_head
    assert again is not None
    assert again.sha256() == untied.mlm_head.sha256() != head.sha256()
