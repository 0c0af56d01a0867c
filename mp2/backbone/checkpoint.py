"""Published checkpoint formats -> the encoder's own parameter names.

Two layouts are read: the BERT family's (BERT, RoBERTa-wwm, MacBERT, ERNIE) and CPT's (Shao et al., 2021),
where one 24-layer (12-layer) BERT body lies under ``model.encoder.*`` and the generation decoder beside it is
ignored.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mp2.backbone.config import BackboneConfig
from mp2.errors import FormatError

# encoder's own name -> name below the body's prefix in a checkpoint
_EMBEDDING_NAMES = {
    "word_embeddings.weight": "embeddings.word_embeddings.weight",
    "position_embeddings.weight": "embeddings.position_embeddings.weight",
    "token_type_embeddings.weight": "embeddings.token_type_embeddings.weight",
    "embedding_norm.weight": "embeddings.LayerNorm.weight",
    "embedding_norm.bias": "embeddings.LayerNorm.bias",
}
_LAYER_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
_PREFIXES = ("", "bert.", "ernie.", "model.encoder.", "encoder.")
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_READABLE = "a BERT-family encoder (BERT, RoBERTa-wwm, MacBERT, ERNIE) or CPT"


def checkpoint_names(n_layers: int) -> dict[str, str]:
    """Encoder parameter name -> name in a BERT-family checkpoint (without the body's prefix)."""
    names = dict(_EMBEDDING_NAMES)
    for i in range(n_layers):
        for ours, theirs in _LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                names[f"layers.{i}.{ours}.{kind}"] = f"encoder.layer.{i}.{theirs}.{kind}"
    return names


def read_config(folder: Path, name: str) -> BackboneConfig:
    """Read the shape from ``config.json`` in BERT form or in CPT's (BART) form.

    Raises:
        FormatError: no such file, not JSON, a missing field, an unsupported architecture.
    """
    path = folder / "config.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise FormatError("no such file, expected the configuration of " + _READABLE, path=path) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"not JSON: {error}", path=path) from error
    if not isinstance(raw, dict):
        raise FormatError(f"is a JSON {type(raw).__name__}, expected an object", path=path)
    if raw.get("position_embedding_type", "absolute") != "absolute":
        raise FormatError(
            f"'{raw['position_embedding_type']}' positions are not supported, expected 'absolute'",
            path=path,
            field="position_embedding_type",
        )
    keys = {
        "n_layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "n_heads": "num_attention_heads",
        "ffn": "intermediate_size",
    }
    activation_key = "hidden_act"
    if "encoder_layers" in raw and "d_model" in raw:  # CPT's configuration has BART's form
        keys = {
            "n_layers": "encoder_layers",
            "hidden": "d_model",
            "n_heads": "encoder_attention_heads",
            "ffn": "encoder_ffn_dim",
        }
        activation_key = "activation_function"
    elif raw.get("model_type", "bert") not in ("bert", "ernie", "roberta-wwm"):
        raise FormatError(
            f"model type '{raw['model_type']}' is not supported, expected {_READABLE}",
            path=path,
            field="model_type",
        )
    values = {}
    for ours, theirs in {
        **keys,
        "vocab_size": "vocab_size",
        "max_positions": "max_position_embeddings",
    }.items():
        value = raw.get(theirs)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise FormatError(f"is {value!r}, expected a positive integer", path=path, field=theirs)
        values[ours] = value
    type_vocab_size, eps = raw.get("type_vocab_size", 2), raw.get("layer_norm_eps", 1e-12)
    if not isinstance(type_vocab_size, int) or isinstance(type_vocab_size, bool) or type_vocab_size < 1:
        raise FormatError(
            f"is {type_vocab_size!r}, expected a positive integer", path=path, field="type_vocab_size"
        )
    if not isinstance(eps, int | float) or isinstance(eps, bool) or not 0 <= eps < 1:
        raise FormatError(f"is {eps!r}, expected a small positive number", path=path, field="layer_norm_eps")
    activation = str(raw.get(activation_key, "gelu"))
    if activation not in _ACTIVATIONS:
        raise FormatError(
            f"'{activation}' is not supported, expected one of {', '.join(_ACTIVATIONS)}",
            path=path,
            field=activation_key,
        )
    return BackboneConfig(
        name=name,
        **values,
        type_vocab_size=type_vocab_size,
        layer_norm_eps=float(eps),
        activation=_ACTIVATIONS[activation],
    )


def write_config(config: BackboneConfig, folder: Path) -> None:
    """Write ``config.json`` in BERT form, so that ``transformers`` reads the folder too."""
    activation = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}[config.activation]
    raw = {
        "model_type": "bert",
        "architectures": ["BertModel"],
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
    (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n", "utf-8")


def read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Read all tensors of a checkpoint folder: safetensors (whole or sharded) or a ``weights_only`` bin.

    Returns the file that was read (the index, if sharded) and the tensors by name.
    """
    for file_name in ("model.safetensors", "pytorch_model.bin"):
        whole, index = folder / file_name, folder / f"{file_name}.index.json"
        if whole.is_file():
            return whole, _read_file(whole)
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
                files = [folder / shard for shard in shards]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise FormatError(
                    f"not an index of shards: {error}", path=index, field="weight_map"
                ) from error
            tensors: dict[str, Tensor] = {}
            for file in files:
                tensors.update(_read_file(file))
            return index, tensors
    raise FormatError("no weights found, expected model.safetensors or pytorch_model.bin", path=folder)


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        zipped = zipfile.is_zipfile(path)  # many published bins are older than torch's zip format
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except FileNotFoundError:
        raise FormatError("no such file, but the index of shards names it", path=path) from None
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise FormatError(
                f"holds more than tensors and was not opened: it names the code {code[1].rstrip('.')}; where "
                "the model can be loaded, model.save_pretrained(FOLDER) writes safetensors",
                path=path,
            ) from None
        last = [line.strip() for line in str(error).splitlines() if line.strip()][-1:] or ["not a pickle"]
        raise FormatError(f"not a readable weights file: {last[0].rstrip('.')}", path=path) from error
    except (
        SafetensorError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        AttributeError,
    ) as error:
        raise FormatError(f"not a readable weights file: {error}", path=path) from error
    if not isinstance(loaded, Mapping):
        raise FormatError(f"holds a {type(loaded).__name__}, expected a dictionary of tensors", path=path)
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        names = ", ".join(map(str, list(loaded)[:5])) or "nothing"
        raise FormatError(f"has no tensors at its top, but {names}; expected a state dict alone", path=path)
    return tensors


def encoder_state(config: BackboneConfig, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Pick the encoder's parameters out of a checkpoint, as float32 under the encoder's own names.

    Raises:
        FormatError: a tensor is missing or has another shape than the configuration says.
    """
    modern = {re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name): t for name, t in tensors.items()}
    modern = {re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name): t for name, t in modern.items()}
    names = checkpoint_names(config.n_layers)
    anchor = names["word_embeddings.weight"]
    prefix = next((p for p in _PREFIXES if p + anchor in modern), None)
    if prefix is None:
        raise FormatError(f"no tensor '{anchor}' under any known prefix, expected {_READABLE}", path=path)
    missing = [prefix + name for name in names.values() if prefix + name not in modern]
    if missing:
        raise FormatError(
            f"{len(missing)} tensors are missing, the first is '{missing[0]}'; "
            f"the configuration says {config.n_layers} layers",
            path=path,
        )
    shapes = expected_shapes(config)
    state = {}
    for ours, theirs in names.items():
        tensor = modern[prefix + theirs]
        if tuple(tensor.shape) != shapes[ours]:
            raise FormatError(
                f"tensor '{prefix + theirs}' has shape {tuple(tensor.shape)}, expected {shapes[ours]} "
                "from config.json",
                path=path,
            )
        if tensor.dtype not in _DTYPES:
            raise FormatError(
                f"tensor '{prefix + theirs}' is {str(tensor.dtype).removeprefix('torch.')}, "
                "expected float32, float16 or bfloat16: quantised checkpoints are not read",
                path=path,
            )
        state[ours] = tensor.to(torch.float32)
    task_types = modern.get(prefix + "embeddings.task_type_embeddings.weight")
    if (
        task_types is not None
    ):  # ERNIE 3: every token has task type 0 unless told otherwise, a constant like type 0
        state["token_type_embeddings.weight"] = state["token_type_embeddings.weight"] + task_types[0].float()
    return state


def expected_shapes(config: BackboneConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each encoder parameter."""
    h, f = config.hidden, config.ffn
    shapes: dict[str, tuple[int, ...]] = {
        "word_embeddings.weight": (config.vocab_size, h),
        "position_embeddings.weight": (config.max_positions, h),
        "token_type_embeddings.weight": (config.type_vocab_size, h),
        "embedding_norm.weight": (h,),
        "embedding_norm.bias": (h,),
    }
    sizes = {"intermediate": (f, h), "output": (h, f)}
    for i in range(config.n_layers):
        for name in _LAYER_NAMES:
            norm = name.endswith("norm")
            weight = (h,) if norm else sizes.get(name, (h, h))
            shapes[f"layers.{i}.{name}.weight"] = weight
            shapes[f"layers.{i}.{name}.bias"] = weight[:1]
    return shapes
