"""Published checkpoint formats, and what is said about those that cannot be read."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_words import tiny_vocab
from tokenizers import Tokenizer as Fast
from tokenizers.normalizers import BertNormalizer
from torch import Tensor
from transformers import BertConfig, BertModel, ErnieConfig, ErnieModel

from mp2.backbone import (
    Backbone,
    BackboneConfig,
    load_backbone,
    random_backbone,
    save_backbone,
    weights_sha256,
)
from mp2.errors import FormatError, MissingDependencyError, UnknownNameError, UsageError


@pytest.fixture
def folder(tiny_backbone: Backbone, tmp_path: Path) -> Path:
    """The tiny backbone as a BERT-form checkpoint folder."""
    save_backbone(tiny_backbone, tmp_path / "tiny")
    return tmp_path / "tiny"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}


def rewrite(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


def random_like(model: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "LayerNorm.weight" in name else 0.0, 0.1, generator=generator)
    model.eval()


IDS = torch.tensor([[2, 9, 10, 30, 3], [2, 50, 7, 8, 3]])


# ---- what can be read


def test_save_and_load_round_trip_keeps_shape_weights_hash_and_words(
    tiny_backbone: Backbone, folder: Path
) -> None:
    loaded = load_backbone(folder)
    assert loaded.config == tiny_backbone.config
    assert loaded.sha256 == tiny_backbone.sha256 == weights_sha256(loaded.encoder)
    assert loaded.tokenizer.tokens() == tiny_backbone.tokenizer.tokens()
    assert torch.equal(loaded.encoder(IDS), tiny_backbone.encoder(IDS))
    assert not any(p.requires_grad for p in loaded.encoder.parameters())


def test_a_backbone_can_be_saved_over_the_folder_it_was_loaded_from(
    tiny_backbone: Backbone, folder: Path
) -> None:
    loaded = load_backbone(folder)
    save_backbone(loaded, folder)
    assert weights_sha256(loaded.encoder) == load_backbone(folder).sha256 == tiny_backbone.sha256


def test_transformers_reads_what_save_backbone_writes(tiny_backbone: Backbone, folder: Path) -> None:
    model, info = BertModel.from_pretrained(folder, add_pooling_layer=False, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        got = model.eval()(IDS).last_hidden_state
    assert (got - tiny_backbone.encoder(IDS)).abs().max() <= 1e-5


def test_half_precision_storage_is_read_as_float32(tiny_backbone: Backbone, tmp_path: Path) -> None:
    save_backbone(tiny_backbone, tmp_path, dtype=torch.float16)
    assert {t.dtype for t in tensors_of(tmp_path).values()} == {torch.float16}
    loaded = load_backbone(tmp_path)
    for name, tensor in loaded.encoder.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tiny_backbone.encoder.state_dict()[name].half().float())
    assert loaded.sha256 != tiny_backbone.sha256


@pytest.mark.parametrize("prefix", ["", "bert.", "ernie.", "encoder."])
def test_body_prefixes_and_heads_beside_the_body_do_not_matter(
    tiny_backbone: Backbone, folder: Path, prefix: str
) -> None:
    body = {prefix + name: t for name, t in tensors_of(folder).items()}
    heads = {"cls.predictions.bias": torch.ones(3), "cls.seq_relationship.weight": torch.ones(2, 24)}
    rewrite(folder, {**body, **heads, prefix + "pooler.dense.weight": torch.ones(24, 24)})
    assert load_backbone(folder).sha256 == tiny_backbone.sha256


def old_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as in conversions from TensorFlow."""
    return {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors.items()
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-zip"])
def test_bins_load_with_gamma_and_beta_as_roberta_wwm_and_macbert_publish_them(
    tiny_backbone: Backbone, folder: Path, zipped: bool
) -> None:
    tensors = old_names({f"bert.{n}": t for n, t in tensors_of(folder).items()})
    assert "bert.embeddings.LayerNorm.gamma" in tensors
    tensors["bert.embeddings.position_ids"] = torch.arange(96)
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (folder / "model.safetensors").unlink()
    change_config(folder, architectures=["BertForMaskedLM"], directionality="bidi")
    assert load_backbone(folder).sha256 == tiny_backbone.sha256


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_sharded_weights_are_put_together(tiny_backbone: Backbone, folder: Path, kind: str) -> None:
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    stem, suffix = kind.split(".")
    names = sorted(tensors)
    weight_map = {}
    for i in range(3):
        shard = f"{stem}-{i + 1:05d}-of-00003.{suffix}"
        part = {name: tensors[name] for name in names[i::3]}
        if suffix == "bin":
            torch.save(part, folder / shard)
        else:
            save_file(part, folder / shard)
        weight_map.update(dict.fromkeys(part, shard))
    (folder / f"{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert load_backbone(folder).sha256 == tiny_backbone.sha256
    (folder / shard).unlink()
    with pytest.raises(FormatError, match=rf"'weight_map': there is no file .*00003-of-00003\.{suffix}'"):
        load_backbone(folder)


@pytest.mark.parametrize("task_types", [True, False])
def test_ernie_equals_transformers_ernie_model(tmp_path: Path, task_types: bool) -> None:
    config = ErnieConfig(
        vocab_size=len(tiny_vocab()),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=32,
        type_vocab_size=4,
        task_type_vocab_size=3,
        use_task_id=task_types,
    )
    model = ErnieModel(config, add_pooling_layer=False)
    random_like(model)
    model.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(tiny_vocab()) + "\n", "utf-8")
    has_task_types = any("task_type" in name for name in tensors_of(tmp_path))
    assert has_task_types == task_types
    with torch.no_grad():
        expected = model(IDS).last_hidden_state
    assert (load_backbone(tmp_path).encoder(IDS) - expected).abs().max() <= 1e-5


def write_cpt(folder: Path) -> BertModel:
    """CPT's published form: BART-form config, one BERT body, a generation decoder that is not for us."""
    model = BertModel(
        BertConfig(
            vocab_size=len(tiny_vocab()),
            hidden_size=24,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=40,
            max_position_embeddings=48,
        ),
        add_pooling_layer=False,
    )
    random_like(model, seed=2)
    tensors = {f"model.encoder.{n}": t.clone() for n, t in model.state_dict().items()}
    for name, shape in {
        "model.shared.weight": (len(tiny_vocab()), 24),
        "model.decoder.embed_tokens.weight": (len(tiny_vocab()), 24),
        "model.decoder.embed_positions.weight": (50, 24),
        "model.decoder.layers.0.self_attn.k_proj.weight": (24, 24),
        "model.decoder.layers.0.fc1.weight": (96, 24),
        "model.decoder.layernorm_embedding.weight": (24,),
        "lm_head.weight": (len(tiny_vocab()), 24),
    }.items():
        tensors[name] = torch.full(shape, torch.nan)
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "pytorch_model.bin")
    config = {
        "model_type": "bart",
        "architectures": ["CPTForConditionalGeneration"],
        "activation_function": "gelu",
        "d_model": 24,
        "encoder_layers": 4,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 40,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 96,
        "num_hidden_layers": 4,
        "max_position_embeddings": 48,
        "vocab_size": len(tiny_vocab()),
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(tiny_vocab()) + "\n", "utf-8")
    return model


def test_cpt_loads_its_encoder_and_ignores_the_generation_decoder(tmp_path: Path) -> None:
    model = write_cpt(tmp_path / "cpt")
    backbone = load_backbone(tmp_path / "cpt")
    with torch.no_grad():
        expected = model(IDS, token_type_ids=torch.ones_like(IDS)).last_hidden_state
    assert (backbone.encoder(IDS) - expected).abs().max() <= 1e-5
    config = backbone.config
    assert (config.n_layers, config.hidden, config.n_heads, config.ffn) == (4, 24, 4, 40)
    assert (config.name, config.max_positions, config.layer_norm_eps) == ("cpt", 48, 1e-12)


def test_tokenizer_json_serves_where_there_is_no_vocab_txt(tiny_backbone: Backbone, folder: Path) -> None:
    tiny_backbone.tokenizer._tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.txt").unlink()
    assert load_backbone(folder).tokenizer.encode("这个东西ab") == tiny_backbone.tokenizer.encode(
        "这个东西ab"
    )


@pytest.mark.parametrize("form", ["vocab.txt", "cased vocab.txt", "tokenizer.json"])
def test_a_saved_backbone_has_the_tokenizer_it_was_loaded_with(
    tiny_backbone: Backbone, folder: Path, tmp_path: Path, form: str
) -> None:
    if form == "cased vocab.txt":
        (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    if form == "tokenizer.json":
        tokenizer = tiny_backbone.tokenizer._tokenizer
        cased = Fast.from_str(tokenizer.to_str())
        cased.normalizer = BertNormalizer(lowercase=False)
        cased.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    loaded, text = load_backbone(folder), "这个A东西a [SEP]"
    save_backbone(tiny_backbone, tmp_path / "copy")  # files of another tokenizer are there already
    save_backbone(loaded, tmp_path / "copy")
    copy = load_backbone(tmp_path / "copy")
    assert copy.tokenizer.encode(text) == loaded.tokenizer.encode(text)
    same_as_lowercase = loaded.tokenizer.encode(text) == tiny_backbone.tokenizer.encode(text)
    assert same_as_lowercase == (form == "vocab.txt")


def test_random_backbones_depend_on_their_seed_alone(tiny_config: BackboneConfig) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(123)
        first = random_backbone(tiny_config, tiny_vocab(), seed=1)
        state = torch.random.get_rng_state()
        same = random_backbone(tiny_config, tiny_vocab(), seed=1)
    other = random_backbone(tiny_config, tiny_vocab(), seed=2)
    assert first.sha256 == same.sha256 != other.sha256
    assert len(state)
    for name, parameter in first.encoder.named_parameters():
        assert parameter.std() > 0.005, name  # biases and gains are random too


# ---- what cannot


def test_an_unknown_name_gets_the_nearest_names() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown backbone 'cpt-larg'\. Did you mean 'cpt-large'"):
        load_backbone("cpt-larg")
    with pytest.raises(UnknownNameError, match=r"'nothing-like-it'.*Known: mini, cpt-large.*hub id"):
        load_backbone("nothing-like-it")


def test_an_impossible_hub_id_is_an_unknown_name() -> None:
    with pytest.raises(UnknownNameError, match=r"'no folder/here'.*no possible hub id"):
        load_backbone("no folder/here")


def test_offline_the_message_names_both_ways() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(MissingDependencyError) as caught:
        load_backbone("mp2-tests/no-such-model")
    message = str(caught.value)
    for part in (
        "'mp2-tests/no-such-model'",
        "cannot be reached",
        "local checkpoint folder",
        "--backbone mini",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("model_type", "gpt2", r"field 'model_type': model type 'gpt2' is not supported.*BERT-family.*CPT"),
        ("model_type", "roberta", r"'roberta' is not supported"),
        ("position_embedding_type", "relative_key", r"'relative_key', expected 'absolute'"),
        ("hidden_act", "silu", r"field 'hidden_act': 'silu' is not supported, expected one of gelu"),
        ("hidden_size", None, r"field 'hidden_size': is None, expected a positive integer"),
        ("num_hidden_layers", "3", r"field 'num_hidden_layers': is '3', expected a positive"),
        ("num_hidden_layers", 0, r"field 'num_hidden_layers': is 0"),
        ("type_vocab_size", "two", r"field 'type_vocab_size': is 'two'"),
        ("layer_norm_eps", "tiny", r"field 'layer_norm_eps': is 'tiny'"),
        ("num_attention_heads", 5, r"hidden size 24 is not a multiple of 5 heads"),
        ("num_hidden_layers", 4, r"'num_hidden_layers': is 4, but model\.safetensors has 3 layers"),
        (
            "max_position_embeddings",
            97,
            r"'embeddings.position_embeddings.weight' has shape \(96, 24\), expected \(97, 24\)",
        ),
        ("vocab_size", 20, r"'embeddings.word_embeddings.weight' has shape \(\d+, 24\), expected \(20, 24\)"),
    ],
)
def test_a_bad_configuration_names_file_field_and_value(
    folder: Path, name: str, value: object, expected: str
) -> None:
    change_config(folder, **{name: value})
    with pytest.raises(UsageError, match=expected):
        load_backbone(folder)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", r"config\.json: not JSON"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b"[1]", "is a JSON list, expected an object"),
    ],
)
def test_a_damaged_configuration_is_a_format_error(folder: Path, content: bytes, expected: str) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(FormatError, match=expected):
        load_backbone(folder)


@pytest.mark.parametrize(
    ("gone", "expected"),
    [
        ("config.json", r"config\.json: no such file, expected the configuration of a BERT-family"),
        ("vocab.txt", r"no vocab\.txt and no tokenizer\.json"),
        ("model.safetensors", r"no weights found, expected model\.safetensors or pytorch_model\.bin"),
    ],
)
def test_a_missing_file_is_named(folder: Path, gone: str, expected: str) -> None:
    (folder / gone).unlink()
    with pytest.raises(FormatError, match=expected):
        load_backbone(folder)


def test_a_missing_and_an_odd_shaped_tensor_are_named(folder: Path) -> None:
    tensors = tensors_of(folder)
    name = "encoder.layer.1.attention.self.key.weight"
    rewrite(folder, {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(FormatError, match=rf"1 tensors are missing, the first is '{name}'"):
        load_backbone(folder)
    rewrite(folder, {**tensors, name: torch.zeros(24, 23)})
    with pytest.raises(FormatError, match=rf"'{name}' has shape \(24, 23\), expected \(24, 24\)"):
        load_backbone(folder)


def test_weights_of_another_architecture_are_refused(folder: Path) -> None:
    rewrite(folder, {"transformer.wte.weight": torch.zeros(5, 5)})
    with pytest.raises(FormatError, match=r"no tensor 'embeddings\.word_embeddings\.weight'.*BERT-family"):
        load_backbone(folder)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "before-zip"])
def test_a_damaged_weights_file_is_a_format_error_that_names_it(folder: Path, kind: str, damage: str) -> None:
    path = folder / "model.safetensors"
    if kind != "safetensors":
        tensors = tensors_of(folder)
        path.unlink()
        path = folder / "pytorch_model.bin"
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "garbage": b"garbage" * 99, "empty": b""}[damage]
    )
    with pytest.raises(FormatError, match=rf"{path.name}: (not a readable weights file|holds more)"):
        load_backbone(folder)


class Code:
    """A pickle that would run code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("form", ["zip", "before-zip", "bare pickle"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(folder: Path, tmp_path: Path, form: str) -> None:
    proof = tmp_path / "was-run"
    tensors = {**tensors_of(folder), "extra": Code(proof)}
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    if form == "bare pickle":
        path.write_bytes(pickle.dumps({"extra": Code(proof)}, protocol=2))
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin") as caught:
        load_backbone(folder)
    assert not proof.exists()
    assert "weights_only" not in str(caught.value)  # no advice to open it all the same
    if form != "bare pickle":
        assert "system" in str(caught.value)


def test_a_whole_model_in_a_bin_is_refused_and_its_class_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(torch.nn.Bilinear(2, 2, 2), folder / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"code torch\.nn\.modules\.linear\.Bilinear; .*save_pretrained"):
        load_backbone(folder)


def test_a_state_dict_inside_a_training_checkpoint_is_told_of(folder: Path) -> None:
    state = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"epoch": 3, "state_dict": state}, folder / "pytorch_model.bin")
    with pytest.raises(FormatError, match="no tensors at its top, but epoch, state_dict"):
        load_backbone(folder)


def test_quantised_weights_are_not_taken_for_weights(folder: Path) -> None:
    rewrite(folder, {name: (100 * t).to(torch.int8) for name, t in tensors_of(folder).items()})
    with pytest.raises(FormatError, match="is I8, expected one of F32, F16, BF16: quantised"):
        load_backbone(folder)


def test_a_file_in_place_of_its_folder_is_called_that(folder: Path) -> None:
    with pytest.raises(FormatError, match=r"model\.safetensors: is a file, expected the checkpoint folder"):
        load_backbone(folder / "model.safetensors")


def test_a_bin_that_is_no_dictionary_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save([torch.zeros(2)], folder / "pytorch_model.bin")
    with pytest.raises(FormatError, match="holds a list, expected a dictionary of tensors"):
        load_backbone(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"metadata": {}}', "field 'weight_map': is not there or empty"),
        ("[]", "is a JSON list, expected an object"),
        ('{"weight_map": {"a": 3}}', "field 'weight_map': tensor 'a' is in 3, expected the name of a file"),
        ("{", "not JSON"),
    ],
)
def test_an_index_without_a_weight_map_is_refused(folder: Path, text: str, expected: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FormatError, match=rf"index\.json: {expected}"):
        load_backbone(folder)
