"""``config.json`` of a checkpoint, in BERT form or in CPT's: read against the tensors that are there.

Not by ``transformers``: its ``AutoConfig`` costs 1.4 s of CPU at each start (torch takes 1.8), has no CPT,
and takes what is wrong: a missing size is BERT-base's, any activation and a negative size are fine. All
checks of this file would stay.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mp2.backbone.config import BackboneConfig
from mp2.errors import FormatError
from mp2.files import write_text
from mp2.json_files import read_object

READABLE = "a BERT-family encoder (BERT, RoBERTa-wwm, MacBERT, ERNIE) or CPT"
CPT_TOKEN_TYPE = 1  # FudanNLP/CPT, modeling_cpt.py: torch.ones_like(input_ids), in pre-training and since

_BERT_NAMES = {
    "n_layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "n_heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
}
_CPT_NAMES = {  # BART's form; tables may be longer or shorter than it says: vocabulary, positions and types
    "n_layers": "encoder_layers",
    "hidden": "d_model",
    "n_heads": "encoder_attention_heads",
    "ffn": "encoder_ffn_dim",
}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
_SUPPORTED = {  # field -> the value that transformers takes where it is not given
    "position_embedding_type": "absolute",
    "is_decoder": False,
}


@dataclass(frozen=True)
class ConfigFile:
    """What ``config.json`` says of a body; ``sizes`` are ``BackboneConfig``'s, by its names."""

    path: Path
    is_cpt: bool
    sizes: dict[str, int]
    layer_norm_eps: float
    activation: str
    token_type: int
    task_types: bool  # ERNIE 3: a constant row of another table is added to every token
    tied_head: bool  # the masked-language-model head's matrix is the word embeddings

    def field(self, name: str) -> str:
        """The file's own name for one of ``BackboneConfig``'s sizes."""
        return {"type_vocab_size": "type_vocab_size", **_BERT_NAMES, **(_CPT_NAMES if self.is_cpt else {})}[
            name
        ]

    def shape(self, name: str, tables: dict[str, int]) -> BackboneConfig:
        """The backbone's shape; ``tables`` are the rows of the embedding tables that are there.

        CPT's configuration does not say how long the encoder's tables are: its vocabulary grew from 21,128
        to 51,271 tokens, its positions are the decoder's. Of BERT's, ``type_vocab_size`` may be left out.

        Raises:
            FormatError: the token type is not one of the table's.
        """
        sizes = {**self.sizes, **tables} if self.is_cpt else {**tables, **self.sizes}
        if self.token_type >= sizes["type_vocab_size"]:
            raise FormatError(
                f"is {self.token_type}, but there are {sizes['type_vocab_size']} token types",
                path=self.path,
                field="token_type",
            )
        return BackboneConfig(
            name=name,
            **sizes,
            layer_norm_eps=self.layer_norm_eps,
            activation=self.activation,
            token_type=self.token_type,
        )


def read_config(folder: Path) -> ConfigFile:
    """Read ``config.json`` of a checkpoint folder.

    Raises:
        FormatError: no such file, not JSON, a missing field, an unsupported architecture.
    """
    path = folder / "config.json"
    if not path.exists():
        raise FormatError("no such file, expected the configuration of " + READABLE, path=path)
    raw = read_object(path)
    for name, value in _SUPPORTED.items():
        if raw.get(name, value) != value:
            raise FormatError(f"is {_short(raw[name])}, expected {value!r}", path=path, field=name)
    is_cpt = "encoder_layers" in raw and "d_model" in raw
    model_type = raw.get("model_type", "bert")
    if not is_cpt and model_type not in ("bert", "ernie", "roberta-wwm"):
        raise FormatError(
            f"model type {_short(model_type)} is not supported, expected {READABLE}",
            path=path,
            field="model_type",
        )
    sizes = {
        ours: _size(raw, theirs, path) for ours, theirs in (_CPT_NAMES if is_cpt else _BERT_NAMES).items()
    }
    if not is_cpt and "type_vocab_size" in raw:
        sizes["type_vocab_size"] = _size(raw, "type_vocab_size", path)
    eps = raw.get("layer_norm_eps", 1e-12)
    if not isinstance(eps, int | float) or isinstance(eps, bool) or not 0 <= eps < 1:
        raise FormatError(
            f"is {_short(eps)}, expected a small positive number", path=path, field="layer_norm_eps"
        )
    activation_field = "activation_function" if is_cpt else "hidden_act"
    activation = raw.get(activation_field, "gelu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise FormatError(
            f"{_short(activation)} is not supported, expected one of {', '.join(_ACTIVATIONS)}",
            path=path,
            field=activation_field,
        )
    token_type = raw.get("token_type", CPT_TOKEN_TYPE if is_cpt else 0)
    if not isinstance(token_type, int) or isinstance(token_type, bool) or token_type < 0:
        raise FormatError(f"is {_short(token_type)}, expected 0 or more", path=path, field="token_type")
    return ConfigFile(
        path=path,
        is_cpt=is_cpt,
        sizes=sizes,
        layer_norm_eps=float(eps),
        activation=_ACTIVATIONS[activation],
        token_type=token_type,
        task_types=raw.get("use_task_id") is True,
        tied_head=raw.get("tie_word_embeddings") is not False,
    )


def _size(raw: dict[str, Any], name: str, path: Path) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FormatError(f"is {_short(value)}, expected a positive integer", path=path, field=name)
    return value


def _short(value: object) -> str:
    return repr(value)[:80]


def write_config(config: BackboneConfig, folder: Path, *, architecture: str, tied_head: bool) -> None:
    """Write ``config.json`` in BERT form, so that ``transformers`` reads the folder as ``architecture``.

    ``token_type`` is ours: ``transformers`` keeps it and does not use it, so other types than 0 must be
    passed to it with every text.
    """
    activation = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}[config.activation]
    raw: dict[str, Any] = {
        "model_type": "bert",
        "architectures": [architecture],
        "num_hidden_layers": config.n_layers,
        "hidden_size": config.hidden,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.ffn,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.layer_norm_eps,
        "hidden_act": activation,
    }
    if config.token_type:
        raw["token_type"] = config.token_type
    if not tied_head:
        raw["tie_word_embeddings"] = False
    write_text(folder / "config.json", json.dumps(raw, indent=1) + "\n")
