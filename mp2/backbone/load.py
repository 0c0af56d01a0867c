"""A backbone by name: embedded, from a local folder, or from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mp2.backbone.checkpoint import checkpoint_names, read_shape, read_state
from mp2.backbone.config import BackboneConfig
from mp2.backbone.config_file import read_config, write_config
from mp2.backbone.encoder import Encoder
from mp2.backbone.mlm_head import MlmHead, read_mlm_head
from mp2.backbone.tokenizer import Tokenizer
from mp2.backbone.tokenizer_settings import TOKENIZER_FILES
from mp2.backbone.weights import read_weights, tensors_sha256
from mp2.errors import FormatError, MissingDependencyError, UnknownNameError, UsageError
from mp2.files import write_tensors

_FILES = ("config.json", *TOKENIZER_FILES)  # of the hub's, beside the weights

EMBEDDED = {"mini": Path(__file__).parent / "mini"}
"""Backbones whose weights ship with the package."""

HUB_NAMES = {
    "cpt-large": "fnlp/cpt-large",
    "cpt-base": "fnlp/cpt-base",
    "bert-base-chinese": "google-bert/bert-base-chinese",
    "roberta-wwm-ext": "hfl/chinese-roberta-wwm-ext",
    "roberta-wwm-ext-large": "hfl/chinese-roberta-wwm-ext-large",
    "macbert-base": "hfl/chinese-macbert-base",
    "macbert-large": "hfl/chinese-macbert-large",
    "ernie-3.0-base": "nghuyong/ernie-3.0-base-zh",
}
"""Short names of hub checkpoints; any other hub id works too."""


@dataclass(frozen=True)
class Backbone:
    """A frozen encoder with its tokenizer; ``sha256`` covers the weights and the token type.

    ``revision`` is the commit of a hub checkpoint, None for a local one.
    """

    config: BackboneConfig
    encoder: Encoder
    tokenizer: Tokenizer
    sha256: str
    mlm_head: MlmHead | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """The name it was loaded by."""
        return self.config.name


def load_backbone(name: str | Path, *, revision: str | None = None) -> Backbone:
    """Load a backbone by short name, local folder or hub id; float32, evaluation mode, no gradients.

    Raises:
        UnknownNameError: neither a known name, nor a folder, nor a hub id.
        FormatError: the folder is not a readable checkpoint; the message names file and field.
        MissingDependencyError: the hub cannot be reached (offline); the message says what works instead.
    """
    folder, name_of_it, commit = _find(str(name), revision)
    file = read_config(folder)
    weights = read_weights(folder)
    config = read_shape(file, name_of_it, weights)
    state = read_state(file, config, weights)
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise FormatError(
            f"is {config.vocab_size}, but the vocabulary has token ids up to {tokenizer.vocab_size - 1}: "
            "vocabulary and weights do not belong together",
            path=file.path,
            field="vocab_size",
        )
    with torch.device("meta"):
        encoder = Encoder(config)
    encoder.load_state_dict(state, assign=True)
    head = read_mlm_head(file, config, weights, state["word_embeddings.weight"])
    return replace(freeze(config, encoder, tokenizer), mlm_head=head, revision=commit)


def backbone_config(name: str | Path, *, revision: str | None = None) -> BackboneConfig:
    """The shape of a backbone by short name, local folder or hub id, without reading its weights.

    Raises as ``load_backbone`` does.
    """
    folder, name_of_it, _ = _find(str(name), revision)
    return read_shape(read_config(folder), name_of_it, read_weights(folder))


def _find(name: str, revision: str | None) -> tuple[Path, str, str | None]:
    """A checkpoint's folder, what the backbone is called, and the commit of a hub checkpoint."""
    check_backbone_name(name)
    is_local = name in EMBEDDED or Path(name).exists()
    if is_local and revision is not None:
        raise UsageError(
            f"revision '{revision}' was given, and backbone '{name}' is not from the hub: drop --revision"
        )
    if name in EMBEDDED:
        return EMBEDDED[name], name, None
    if is_local and not Path(name).is_dir():
        raise FormatError("is a file, expected the checkpoint folder that it lies in", path=name)
    if is_local:
        return Path(name), folder_name(name), None
    folder = _download(HUB_NAMES.get(name, name), name, revision, [*EMBEDDED, *HUB_NAMES])
    return folder, name if name in HUB_NAMES else folder_name(name), folder.name


def check_backbone_name(name: str) -> None:
    """Raise ``UnknownNameError`` for what is no known name, nothing that is there, and no possible hub id."""
    hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not (name in EMBEDDED or name in HUB_NAMES or hub_id or Path(name).exists()):
        raise UnknownNameError(
            "backbone", name, [*EMBEDDED, *HUB_NAMES], "A local folder or a hub id (owner/name) works too."
        )


def folder_name(text: str) -> str:
    """A backbone's name from a path or hub id: its last part."""
    return Path(text).resolve().name if Path(text).is_dir() else text.rsplit("/", 1)[-1]


def freeze(config: BackboneConfig, encoder: Encoder, tokenizer: Tokenizer) -> Backbone:
    """Put the encoder into evaluation mode without gradients and name its weights by their hash."""
    encoder.eval().requires_grad_(False)
    return Backbone(config, encoder, tokenizer, weights_sha256(encoder))


def weights_sha256(encoder: Encoder) -> str:
    """Hash over all parameters, and over the token type where it is not 0."""
    token_type = encoder.config.token_type
    return tensors_sha256(encoder.state_dict(), f"token_type{token_type}" if token_type else "")


def random_backbone(config: BackboneConfig, vocab: Sequence[str], seed: int) -> Backbone:
    """A backbone with random weights (N(0, 0.02); biases and gains random too: nothing is trivial)."""
    generator = torch.Generator().manual_seed(seed)
    encoder = Encoder(config)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    return freeze(config, encoder, Tokenizer.from_vocab(vocab))


def save_backbone(backbone: Backbone, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write a checkpoint folder in BERT form: config.json, model.safetensors, and the tokenizer's files.

    ``dtype`` is that of the stored weights; they are read back as float32. A masked-language-model head is
    kept, under BERT's names.
    """
    folder, head = Path(folder), backbone.mlm_head
    folder.mkdir(parents=True, exist_ok=True)
    backbone.tokenizer.save(folder)
    names = checkpoint_names(backbone.config.n_layers)
    tensors = {names[ours]: tensor for ours, tensor in backbone.encoder.state_dict().items()}
    tensors |= {} if head is None else head.state()
    write_config(
        backbone.config,
        folder,
        architecture="BertForMaskedLM" if head is not None and head.transform is not None else "BertModel",
        tied_head=head is None or head.tied,
    )
    write_tensors(folder / "model.safetensors", {n: t.to(dtype) for n, t in tensors.items()})


def _download(repo: str, name: str, revision: str | None, known: Iterable[str]) -> Path:
    """Folder of a hub checkpoint in the local cache, named by its commit.

    Raises:
        UnknownNameError: the hub has no such checkpoint or revision; ``known`` are the names to choose from.
        MissingDependencyError: the hub cannot be reached (offline); the message says what works instead.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[*_FILES, "*.safetensors*"]))
        if not any(folder.glob("*.safetensors")):
            patterns = [*_FILES, "pytorch_model*.bin*"]
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
        return folder
    except HFValidationError as error:
        raise UnknownNameError(
            "backbone", name, known, "It is no folder here and no possible hub id either."
        ) from error
    except RevisionNotFoundError as error:
        raise UnknownNameError(
            "revision", str(revision), [], f"The hub has no such revision of {repo}."
        ) from error
    except RepositoryNotFoundError as error:
        raise UnknownNameError("backbone", name, known, f"The hub has no {repo}.") from error
    except (LocalEntryNotFoundError, EntryNotFoundError, OSError) as error:
        of = f" at revision {revision}" if revision else ""
        raise MissingDependencyError(
            f"backbone '{name}'{of} is not on this machine and the hub ({repo}) cannot be reached: "
            f"{type(error).__name__}. Pass a local checkpoint folder (config.json, vocab.txt, "
            "model.safetensors or pytorch_model.bin), or '--backbone mini', which ships with mp2."
        ) from error
