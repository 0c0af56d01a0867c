"""Checkpoints from the Hugging Face hub: one snapshot, only the files that are read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mp2.backbone.tokenizer_settings import TOKENIZER_FILES
from mp2.errors import MissingDependencyError, UnknownNameError

_FILES = ("config.json", *TOKENIZER_FILES)


def download(repo: str, name: str, revision: str | None, known: Iterable[str]) -> Path:
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
