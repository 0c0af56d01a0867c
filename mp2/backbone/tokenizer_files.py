"""The tokenizer of a checkpoint folder, with the token ids that ``transformers.AutoTokenizer`` gives.

Nearly all checkpoints of the BERT family have a plain vocabulary: WordPiece, BERT's normaliser with up to
three switches, five special tokens. These are built here as ``transformers`` 5 builds its ``BertTokenizer``,
without its import (1 to 3 s). All others are loaded by ``transformers``, from copies of the few files that it
needs. What is refused: ``mp2.backbone.tokenizer_settings``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mp2.backbone.tokenizer_settings import (
    ADDED,
    BERT_CLASSES,
    FAST,
    SETTINGS,
    SPECIAL_MAP,
    SPECIAL_TOKENS,
    SWITCHES,
    TOKENIZER_FILES,
    VOCAB,
    check_distinct,
    check_special,
    declared_tokens,
    fast_vocab,
    read_settings,
)
from mp2.errors import FormatError, shown
from mp2.json_files import parse_json, parse_object
from mp2.text_files import read_text

_SPACE = "".join(map(chr, [*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029]))
_SPACE += "\u202f\u205f\u3000"
"""Unicode's white space, which the library ``tokenizers`` cuts from the end of a vocabulary's lines."""


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as the library has it, and the files (name -> text) that it can be read from again."""

    fast: Fast
    files: Mapping[str, str]
    source: Path | str  # for errors


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """Read a checkpoint folder's tokenizer; ``tokenizer.json`` goes before ``vocab.txt``.

    Raises:
        FormatError: neither is there, it is damaged, or a setting is not followed; the message names it.
    """
    found = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    if FAST not in found and VOCAB not in found:
        raise FormatError("no vocab.txt and no tokenizer.json, expected one of them", path=folder)
    if FAST in found and VOCAB in found:
        found.remove(VOCAB)
    texts = {name: read_text(folder / name, "the text of a tokenizer") for name in found}
    objects = {name: parse_object(texts[name], folder / name) for name in found if name != VOCAB}
    settings = read_settings(folder, objects.get(SETTINGS, {}))
    source = folder / (FAST if FAST in found else VOCAB)
    files = {source.name: texts[source.name]}
    if source.name == FAST:
        vocab = fast_vocab(objects[FAST], settings, source)
    else:
        vocab = vocab_of(texts[VOCAB])
    if settings:
        files[SETTINGS] = json.dumps(settings, ensure_ascii=False)
    declared = declared_tokens(folder, objects, settings)
    check_special(declared, vocab, source)
    if settings.get("tokenizer_class") in BERT_CLASSES and set(declared) <= set(SPECIAL_TOKENS.values()):
        switches: dict[str, Any] = {
            ours: settings.get(name, default) for name, (ours, default, _) in SWITCHES.items()
        }
        return TokenizerFiles(plain_tokenizer(vocab, **switches), files, source)
    files |= {name: texts[name] for name in (ADDED, SPECIAL_MAP) if name in found}
    return TokenizerFiles(_by_transformers(files, settings, declared, source), files, source)


def vocab_of(text: str) -> dict[str, int]:
    """Token -> id of a vocabulary with one token a line; of a repeated token the last line counts.

    As the library ``tokenizers`` reads it: an empty line has an id too, white space at the end is cut off.
    """
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return {line.rstrip(_SPACE): i for i, line in enumerate(lines)}


def plain_tokenizer(
    vocab: Mapping[str, int],
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    handle_chinese_chars: bool = True,
) -> Fast:
    """BERT's tokenizer over ``vocab`` (token -> id), as ``transformers.BertTokenizer`` makes it."""
    fast = Fast(models.WordPiece(dict(vocab), unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=handle_chinese_chars,
        strip_accents=strip_accents,
        lowercase=lowercase,
    )
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece()
    return fast


def _by_transformers(
    files: Mapping[str, str], settings: Mapping[str, Any], declared: Mapping[str, int | None], source: Path
) -> Fast:
    """The tokenizer that ``transformers`` makes of the files, in which [SEP] and the like are text."""
    with _one_line(settings, source), TemporaryDirectory(prefix="mp2-tokenizer-") as copy:
        for name, text in {**files, "config.json": '{"model_type": "bert"}'}.items():
            if (
                name == FAST
            ):  # neither does anything to ids without special tokens, and can make the library panic
                unused = dict.fromkeys(("post_processor", "truncation", "padding", "decoder"))
                text = json.dumps({**parse_json(text), **unused}, ensure_ascii=False)
            Path(copy, name).write_text(text, "utf-8")
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(copy, local_files_only=True, trust_remote_code=False)
        backend = getattr(theirs, "backend_tokenizer", None)
        if not isinstance(backend, Fast):
            raise ValueError(f"a {type(theirs).__name__} does not give offsets")
        state = parse_json(backend.to_str())
        if state["model"].get("type") != "WordPiece" or state["model"].get("unk_token") != "[UNK]":
            raise ValueError(f"a {type(theirs).__name__} of another kind")
        if not getattr(theirs, "split_special_tokens", False):
            for token in state["added_tokens"]:
                token["special"] = token["content"] in SPECIAL_TOKENS.values()
        fast = Fast.from_str(json.dumps(state))
        fast.encode("", add_special_tokens=False)
    for token, token_id in declared.items():
        got = fast.token_to_id(token)
        if token_id is not None and got != token_id:
            raise FormatError(
                f"token {token[:40]!r} is declared with id {token_id}, transformers gives it {got}",
                path=source,
            )
    check_distinct(fast.get_vocab(with_added_tokens=True), source)
    return fast


@contextmanager
def _one_line(settings: Mapping[str, Any], source: Path) -> Iterator[None]:
    """Whatever is raised, a panic of the library too, as one line; what it prints itself is not shown."""
    sys.stdout.flush()
    kept, quiet = (os.dup(1), os.dup(2)), os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())[:200]
        kind = settings.get("tokenizer_class")
        as_what = "" if kind is None else f" as {shown(kind)} (tokenizer_class)"
        raise FormatError(
            f"not a tokenizer that can be read{as_what}: {type(error).__name__}: {said}",
            path=source,
        ) from error
    finally:
        for number, stream in enumerate(kept, 1):
            os.dup2(stream, number)
            os.close(stream)
        os.close(quiet)
