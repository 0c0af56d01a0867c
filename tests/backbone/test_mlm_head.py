"""The checkpoint's own masked-language-model head against transformers' models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_words import tiny_vocab
from transformers import BertConfig, BertForMaskedLM, ErnieConfig, ErnieForMaskedLM, PreTrainedModel

from mp2.backbone import MlmHead, load_backbone, save_backbone
from mp2.errors import FormatError

IDS = torch.tensor([[2, 9, 10, 30, 3], [2, 50, 7, 8, 3]])
SHAPE = {
    "vocab_size": len(tiny_vocab()),
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
}


def save(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "LayerNorm.weight" in name else 0.0, 0.1, generator=generator)
    model.eval().save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(tiny_vocab()) + "\n", "utf-8")
    return model


def logits(folder: Path) -> torch.Tensor:
    backbone = load_backbone(folder)
    assert backbone.mlm_head is not None
    return backbone.mlm_head.logits(backbone.encoder(IDS))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_logits_equal_bert_for_masked_lm(tmp_path: Path, activation: str, tied: bool) -> None:
    config = BertConfig(**SHAPE, hidden_act=activation, layer_norm_eps=1e-5, tie_word_embeddings=tied)
    model = save(BertForMaskedLM(config), tmp_path)
    with torch.no_grad():
        expected = model(IDS).logits
    assert expected.std() > 0.1
    assert (logits(tmp_path) - expected).abs().max() <= 1e-5
    head = load_backbone(tmp_path).mlm_head
    assert head is not None
    assert head.tied == tied


def test_logits_equal_ernie_for_masked_lm(tmp_path: Path) -> None:
    model = save(ErnieForMaskedLM(ErnieConfig(**SHAPE, task_type_vocab_size=3, use_task_id=True)), tmp_path)
    with torch.no_grad():
        expected = model(IDS).logits
    assert (logits(tmp_path) - expected).abs().max() <= 1e-5


def test_a_bin_with_old_names_and_a_copy_of_the_tied_decoder_as_roberta_wwm_publishes_it(
    tmp_path: Path,
) -> None:
    model = save(BertForMaskedLM(BertConfig(**SHAPE)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors.items()
    }
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    old["cls.seq_relationship.weight"] = torch.zeros(2, 24)
    torch.save({f"module.{n}": t for n, t in old.items()}, tmp_path / "pytorch_model.bin")
    with torch.no_grad():
        expected = model(IDS).logits
    assert (logits(tmp_path) - expected).abs().max() <= 1e-5
    backbone = load_backbone(tmp_path)
    assert backbone.mlm_head is not None
    assert backbone.mlm_head.tied
    words = backbone.encoder.word_embeddings.weight
    assert backbone.mlm_head.decoder.data_ptr() == words.data_ptr()  # not kept twice


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_backbone_keeps_its_head_and_transformers_reads_it(tmp_path: Path, tied: bool) -> None:
    save(BertForMaskedLM(BertConfig(**SHAPE, tie_word_embeddings=tied)), tmp_path / "theirs")
    backbone = load_backbone(tmp_path / "theirs")
    save_backbone(backbone, tmp_path / "ours")
    again = load_backbone(tmp_path / "ours")
    assert isinstance(backbone.mlm_head, MlmHead)
    assert isinstance(again.mlm_head, MlmHead)
    assert again.sha256 == backbone.sha256
    assert again.mlm_head.sha256() == backbone.mlm_head.sha256()
    model, info = BertForMaskedLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert (model.eval()(IDS).logits - logits(tmp_path / "theirs")).abs().max() <= 1e-5


def test_a_body_alone_has_no_head(tmp_path: Path) -> None:
    save(BertForMaskedLM(BertConfig(**SHAPE)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n.startswith("bert.")}, tmp_path / "model.safetensors")
    assert load_backbone(tmp_path).mlm_head is None
    assert load_backbone("mini").tokenizer.mask_id == 4


def test_a_head_of_another_model_in_the_file_is_not_taken(tmp_path: Path) -> None:
    save(BertForMaskedLM(BertConfig(**SHAPE)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    moved = {(n if n.startswith("bert.") else f"teacher.{n}"): t for n, t in tensors.items()}
    save_file(moved, tmp_path / "model.safetensors")
    assert load_backbone(tmp_path).mlm_head is None


def test_a_head_of_which_a_part_is_missing_or_odd_is_refused(tmp_path: Path) -> None:
    save(BertForMaskedLM(BertConfig(**SHAPE)), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "cls.predictions.transform.LayerNorm.bias"
    save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=f"the first is '{name}'"):
        load_backbone(tmp_path)
    save_file({**tensors, "cls.predictions.bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"'cls\.predictions\.bias' has shape \(3,\)"):
        load_backbone(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == SHAPE["vocab_size"]
