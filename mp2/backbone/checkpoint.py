"""Published checkpoint formats -> the encoder's own parameter names.

Two layouts are read: the BERT family's (BERT, RoBERTa-wwm, MacBERT, ERNIE) and CPT's (Shao et al., 2021),
where one 24-layer (12-layer) BERT body lies under ``model.encoder.*`` and the generation decoder beside it is
ignored.
"""

from __future__ import annotations

from torch import Tensor

from mp2.backbone.config import BackboneConfig
from mp2.backbone.config_file import READABLE, ConfigFile
from mp2.backbone.weights import Weights
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
_TABLES = {"vocab_size": "word", "max_positions": "position", "type_vocab_size": "token_type"}
_TASK_TYPES = "embeddings.task_type_embeddings.weight"
_PREFIXES = ("", "bert.", "ernie.", "model.encoder.", "encoder.")


def checkpoint_names(n_layers: int) -> dict[str, str]:
    """Encoder parameter name -> name in a BERT-family checkpoint (without the body's prefix)."""
    names = dict(_EMBEDDING_NAMES)
    for i in range(n_layers):
        for ours, theirs in _LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                names[f"layers.{i}.{ours}.{kind}"] = f"encoder.layer.{i}.{theirs}.{kind}"
    return names


def body_prefix(weights: Weights) -> str:
    """What stands before the names of the body: the only such prefix, or of several a usual one.

    Raises:
        FormatError: there is no body, or several and none at a usual place.
    """
    anchor = _EMBEDDING_NAMES["word_embeddings.weight"]
    found = weights.prefixes(anchor)
    if not found:
        raise FormatError(f"no tensor '{anchor}' under any prefix, expected {READABLE}", path=weights.path)
    if len(found) == 1:
        return found[0]
    usual = [prefix for prefix in _PREFIXES if prefix in found]
    if not usual:
        raise FormatError(
            f"{len(found)} bodies, under {', '.join(map(repr, found[:4]))}; expected one, or one of them "
            f"under {', '.join(map(repr, _PREFIXES))}",
            path=weights.path,
        )
    return usual[0]


def read_shape(file: ConfigFile, name: str, weights: Weights) -> BackboneConfig:
    """The body's shape; no tensor's values are read.

    Raises:
        FormatError: there are other layers than the configuration says, or no tables.
    """
    prefix = body_prefix(weights)
    n_layers = weights.n_layers(prefix + "encoder.layer.")
    if file.sizes["n_layers"] != n_layers:
        raise FormatError(
            f"is {file.sizes['n_layers']}, but {weights.path.name} has {n_layers} layers",
            path=file.path,
            field=file.field("n_layers"),
        )
    tables = {}
    for size, table in _TABLES.items():
        shape = weights.shape(f"{prefix}embeddings.{table}_embeddings.weight")
        tables[size] = shape[0] if shape else 0
    return file.shape(name, tables)


def read_state(file: ConfigFile, config: BackboneConfig, weights: Weights) -> dict[str, Tensor]:
    """The body's parameters as float32 under the encoder's own names.

    Raises:
        FormatError: a tensor is missing, or has another shape than the configuration says.
    """
    prefix = body_prefix(weights)
    names = checkpoint_names(config.n_layers)
    shapes = {prefix + names[ours]: shape for ours, shape in expected_shapes(config).items()}
    task_types = prefix + _TASK_TYPES
    if file.task_types:  # ERNIE 3: every token has task type 0 unless told otherwise
        shapes[task_types] = (*weights.shape(task_types)[:1], config.hidden)
    tensors = weights.tensors(shapes)
    state = {ours: tensors[prefix + theirs] for ours, theirs in names.items()}
    if file.task_types:
        state["token_type_embeddings.weight"] = state["token_type_embeddings.weight"] + tensors[task_types][0]
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
