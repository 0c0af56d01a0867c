"""A backbone by name: embedded, from a local folder, or from the Hugging Face hub."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from mp2.backbone.checkpoint import checkpoint_names, encoder_state, read_config, read_weights, write_config
from mp2.backbone.config import BackboneConfig
from mp2.backbone.encoder import Encoder
from mp2.backbone.tokenizer import Tokenizer
from mp2.errors import FormatError, MissingDependencyError, UnknownNameError

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

_FILES = ("config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Backbone:
    """A frozen encoder with its tokenizer; ``sha256`` covers the weights' names, shapes and bytes."""

    config: BackboneConfig
    encoder: Encoder
    tokenizer: Tokenizer
    sha256: str

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
    text = str(name)
    check_backbone_name(text)
    if text in EMBEDDED:
        folder = EMBEDDED[text]
    elif Path(text).is_dir():
        folder = Path(text)
    elif Path(text).is_file():
        raise FormatError("is a file, expected the checkpoint folder that it lies in", path=text)
    elif text in HUB_NAMES:
        folder = _download(HUB_NAMES[text], text, revision)
    else:
        folder = _download(text, text, revision)
    config = read_config(folder, text if text in EMBEDDED or text in HUB_NAMES else folder_name(text))
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise FormatError(
            f"is {config.vocab_size}, but the vocabulary has {tokenizer.vocab_size} tokens: "
            "vocabulary and weights do not belong together",
            path=folder / "config.json",
            field="vocab_size",
        )
    path, tensors = read_weights(folder)
    with torch.device("meta"):
        encoder = Encoder(config)
    encoder.load_state_dict(encoder_state(config, tensors, path), assign=True)
    return freeze(config, encoder, tokenizer)


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
    """Hash over all parameters: name, shape and float32 bytes, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().float().contiguous().cpu().numpy()).cast("B"))
    return digest.hexdigest()


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

    ``dtype`` is that of the stored weights; they are read back as float32.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(backbone.config, folder)
    backbone.tokenizer.save(folder)
    state = backbone.encoder.state_dict()
    names = checkpoint_names(backbone.config.n_layers)
    save_file(
        {names[ours]: tensor.to(dtype).contiguous() for ours, tensor in state.items()},
        folder / "model.safetensors",
    )


def _download(repo: str, name: str, revision: str | None) -> Path:
    """Folder of a hub checkpoint in the local cache; one snapshot, only the files that are read."""
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
            "backbone", name, [*EMBEDDED, *HUB_NAMES], "It is no folder here and no possible hub id either."
        ) from error
    except RevisionNotFoundError as error:
        raise UnknownNameError(
            "revision", str(revision), [], f"The hub has no such revision of {repo}."
        ) from error
    except RepositoryNotFoundError as error:
        raise UnknownNameError(
            "backbone", name, [*EMBEDDED, *HUB_NAMES], f"The hub has no {repo}."
        ) from error
    except (LocalEntryNotFoundError, EntryNotFoundError, OSError) as error:
        raise MissingDependencyError(
            f"backbone '{name}' is not on this machine and the hub ({repo}) cannot be reached: "
            f"{type(error).__name__}. Pass a local checkpoint folder (config.json, vocab.txt, "
            "model.safetensors or pytorch_model.bin), or '--backbone mini', which ships with mp2."
        ) from error
