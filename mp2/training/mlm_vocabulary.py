"""The vocabulary of a backbone's training folder: made once, and never of something else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mp2.backbone.tokenizer import Tokenizer
from mp2.errors import FormatError, UsageError
from mp2.files import write_json, write_text
from mp2.json_files import read_object
from mp2.training.corpus import build_vocab


def folder_tokenizer(
    files: Sequence[Path],
    digests: Sequence[tuple[str, int, str]],
    out: Path,
    size: int,
    *,
    begun: bool,
    say: Callable[[str], None],
) -> Tokenizer:
    """The vocabulary of the training folder ``out``; made of ``files`` where there is none.

    What a run that had not ``begun`` (no checkpoint) left there is made anew if it is of other text or size.
    ``vocab_source.json`` says of which text and size it was made. It is written first, so that a run stopped
    between the two leaves nothing that looks like another's.
    """
    vocab_file, source_file = out / "vocab.txt", out / "vocab_source.json"
    source = {"vocab_size": size, "files": [list(digest) for digest in digests]}
    if vocab_file.is_file():
        made_here = source_file.is_file()
        if begun or (made_here and _says(source_file, source)):
            return Tokenizer.from_folder(out)  # a checkpoint of another vocabulary is refused when it is read
        if not made_here or (out / "model.safetensors").is_file():
            raise UsageError(
                f"{vocab_file} is there already and was not made from this --corpus with --vocab-size "
                f"{size}; give another --out, or take that file away"
            )
        say("vocabulary: made anew, a run stopped before its first checkpoint left one of other text or size")
        vocab_file.unlink()
    write_json(source_file, source, indent=1)
    tokenizer = Tokenizer.from_vocab(build_vocab(files, size))
    write_text(vocab_file, "\n".join(tokenizer.tokens()) + "\n")
    return tokenizer


def _says(file: Path, values: dict[str, Any]) -> bool:
    try:
        return bool(read_object(file) == values)
    except FormatError:  # damaged
        return False
