"""What a tokenizer's files say beside the vocabulary, and what of it is refused.

The rule: ids are those of ``transformers.AutoTokenizer``. A setting that it would read and not follow, or
that two files give differently, is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from mp2.errors import FormatError
from mp2.json_files import read_object

SPECIAL_TOKENS = {
    "pad_id": "[PAD]",
    "unk_id": "[UNK]",
    "cls_id": "[CLS]",
    "sep_id": "[SEP]",
    "mask_id": "[MASK]",
}
VOCAB, FAST, SETTINGS = "vocab.txt", "tokenizer.json", "tokenizer_config.json"
ADDED, SPECIAL_MAP = "added_tokens.json", "special_tokens_map.json"
TOKENIZER_FILES = (VOCAB, FAST, SETTINGS, ADDED, SPECIAL_MAP)
"""All files that a tokenizer is read from."""

BERT_CLASSES = (None, "BertTokenizer", "BertTokenizerFast")
SWITCHES = {  # tokenizer_config.json's name -> BertNormalizer's, the default, what else it may be
    "do_lower_case": ("lowercase", True, (True, False)),
    "strip_accents": ("strip_accents", None, (True, False, None)),
    "tokenize_chinese_chars": ("handle_chinese_chars", True, (True, False)),
}
_NOT_FOLLOWED: dict[
    str, tuple[Any, ...]
] = {  # settings of older tokenizers that transformers 5 reads and ignores -> their usual values
    "do_basic_tokenize": (True, None),
    "never_split": (None, [], {}),
    "clean_text": (True, None),
    "wordpieces_prefix": ("##", None),
}
_CODE = ("auto_map", "vocab", "gguf_file", "tokenizer_object")  # code of its own, other sources
_KEPT = (  # all else in tokenizer_config.json has nothing to do with token ids
    *SWITCHES,
    "tokenizer_class",
    "added_tokens_decoder",
    "additional_special_tokens",
    "extra_special_tokens",
    "split_special_tokens",
)
_NORMALIZERS = (
    "BertNormalizer",
    "Lowercase",
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Sequence",
    "Strip",
    "StripAccents",
)
_PRE_TOKENIZERS = ("BertPreTokenizer", "Sequence", "Whitespace", "WhitespaceSplit")


def read_settings(folder: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``tokenizer_config.json`` (and of ``config.json``: the class) decides on token ids."""
    path = folder / SETTINGS
    for name, usual in _NOT_FOLLOWED.items():
        if name in raw and raw[name] not in usual:
            _refuse(raw[name], f"{usual[0]!r}: transformers does not follow it", path, name)
    for name in _CODE:
        if raw.get(name) is not None:
            _refuse(raw[name], "nothing: a tokenizer's own code or source is not loaded", path, name)
    for name, (_, _, values) in SWITCHES.items():
        if name in raw and not any(raw[name] is value for value in values):
            _refuse(raw[name], "true or false" + (" or null" if None in values else ""), path, name)
    settings = {n: value for n, value in raw.items() if n in _KEPT or (_names_token(n) and value is not None)}
    config = folder / "config.json"
    if settings.get("tokenizer_class") is None:
        settings.pop("tokenizer_class", None)
        if config.exists():
            path, kind = config, read_object(config).get("tokenizer_class")
            if kind is not None:
                settings["tokenizer_class"] = kind
    kind = settings.get("tokenizer_class")
    if not isinstance(kind, str | None):
        _refuse(kind, "the name of a class", path, "tokenizer_class")
    return settings


def _names_token(setting: str) -> bool:
    return setting.endswith("_token") and not setting.startswith("add_")  # add_bos_token is a switch


def _refuse(got: object, expected: str, path: Path, field: str) -> NoReturn:
    raise FormatError(f"is {repr(got)[:80]}, expected {expected}", path=path, field=field)


def fast_vocab(raw: Mapping[str, Any], settings: Mapping[str, Any], path: Path) -> dict[str, int]:
    """The vocabulary in ``tokenizer.json``, all of which is what a BERT tokenizer does.

    ``BertTokenizer`` takes the vocabulary alone from it, and its switches from ``tokenizer_config.json``.
    """
    model = raw.get("model")
    if not isinstance(model, dict) or model.get("type", "WordPiece") != "WordPiece":
        kind = model.get("type") if isinstance(model, dict) else model
        _refuse(kind, "'WordPiece', not a tokenizer file of the BERT family", path, "model.type")
    vocab = model.get("vocab")
    if not isinstance(vocab, dict):
        _refuse(type(vocab).__name__, "token ids by token", path, "model.vocab")
    for token, token_id in vocab.items():
        if not isinstance(token_id, int) or isinstance(token_id, bool) or not 0 <= token_id < 2**31:
            _refuse(token_id, "a token id", path, f"model.vocab.{token[:40]}")
    check_distinct(vocab, path)
    usual = {"unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    for name, value in usual.items():
        if model.get(name, value) != value:
            _refuse(model[name], repr(value), path, f"model.{name}")
    normalizer, pre_tokenizer = raw.get("normalizer"), raw.get("pre_tokenizer")
    if settings.get("tokenizer_class") not in BERT_CLASSES:
        _check_parts(normalizer, "normalizers", _NORMALIZERS, path, "normalizer")
        _check_parts(pre_tokenizer, "pretokenizers", _PRE_TOKENIZERS, path, "pre_tokenizer")
        return vocab
    if not isinstance(normalizer, dict) or normalizer.get("type") != "BertNormalizer":
        _refuse(normalizer, "a BertNormalizer, which transformers takes all the same", path, "normalizer")
    if pre_tokenizer != {"type": "BertPreTokenizer"}:
        _refuse(
            pre_tokenizer, "a BertPreTokenizer, which transformers takes all the same", path, "pre_tokenizer"
        )
    if normalizer.get("clean_text", True) is not True:
        _refuse(normalizer["clean_text"], "true", path, "normalizer.clean_text")
    for name, (ours, default, _) in SWITCHES.items():
        if name not in settings and normalizer.get(ours, default) != default:
            _refuse(
                normalizer[ours],
                f"{default!r}, which transformers takes where tokenizer_config.json has no '{name}': "
                "write it there",
                path,
                f"normalizer.{ours}",
            )
    return vocab


def _check_parts(part: Any, many: str, known: tuple[str, ...], path: Path, field: str) -> None:
    if part is None:
        return
    kind = part.get("type") if isinstance(part, dict) else part
    if kind not in known:
        _refuse(kind, "one of " + ", ".join(known), path, field)
    parts = part.get(many) if kind == "Sequence" else []
    if not isinstance(parts, list):
        _refuse(parts, "a list", path, f"{field}.{many}")
    for inner in parts:
        if isinstance(inner, dict) and inner.get("type") == "Sequence":
            _refuse("Sequence", "no sequence within a sequence", path, field)
        _check_parts(inner, many, known, path, field)


def check_distinct(vocab: Mapping[str, int], path: Path) -> None:
    """Raise ``FormatError`` where two tokens have one id."""
    if len(set(vocab.values())) < len(vocab):
        seen: dict[int, str] = {}
        for token, token_id in vocab.items():
            other = seen.setdefault(token_id, token)
            if other != token:
                raise FormatError(
                    f"token id {token_id} is both {other[:40]!r} and {token[:40]!r}, expected one", path=path
                )


def declared_tokens(
    folder: Path, objects: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
) -> dict[str, int | None]:
    """Token -> id (None: not given) of all tokens that the files name beside the vocabulary."""
    declared: dict[str, int | None] = {}

    def add(value: object, token_id: object, file: str, field: str) -> None:
        token = value.get("content") if isinstance(value, dict) else value
        if not isinstance(token, str) or not token:
            _refuse(token, "a token", folder / file, field)
        if token_id is None and file not in (SETTINGS, SPECIAL_MAP):
            _refuse("nothing", "a token id", folder / file, field)
        if token_id is not None and (not isinstance(token_id, int) or isinstance(token_id, bool)):
            _refuse(token_id, "a token id", folder / file, field)
        if declared.get(token, token_id) not in (token_id, None) and token_id is not None:
            raise FormatError(
                f"token {token[:40]!r} has id {token_id}, another file says {declared[token]}",
                path=folder / file,
                field=field,
            )
        if declared.get(token) is None:
            declared[token] = token_id

    for file in (SETTINGS, SPECIAL_MAP):
        values: Mapping[str, Any] = settings if file == SETTINGS else objects.get(file, {})
        for name, value in values.items():
            special = {ours[:-3] + "_token": token for ours, token in SPECIAL_TOKENS.items()}
            if _names_token(name) and value is not None:
                token = value.get("content") if isinstance(value, dict) else value
                if name in special and token != special[name]:
                    _refuse(token, repr(special[name]), folder / file, name)
                add(value, None, file, name)
            elif name in ("additional_special_tokens", "extra_special_tokens") and value is not None:
                if not isinstance(value, list):
                    _refuse(type(value).__name__, "a list of tokens", folder / file, name)
                for token in value:
                    add(token, None, file, name)
    decoder = settings.get("added_tokens_decoder")
    if decoder is not None:
        if not isinstance(decoder, dict):
            _refuse(type(decoder).__name__, "tokens by id", folder / SETTINGS, "added_tokens_decoder")
        for key, value in decoder.items():
            if not key.isascii() or not key.isdigit() or len(key) > 10:
                _refuse(key, "a token id", folder / SETTINGS, "added_tokens_decoder")
            add(value, int(key), SETTINGS, "added_tokens_decoder")
    for token, token_id in objects.get(ADDED, {}).items():
        add(token, token_id, ADDED, token[:40])
    added = objects.get(FAST, {}).get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        _refuse(type(added).__name__, "a list of tokens", folder / FAST, "added_tokens")
    for token in added:
        add(token, token.get("id"), FAST, "added_tokens")
    return declared


def check_special(declared: Mapping[str, int | None], vocab: Mapping[str, int], source: Path) -> None:
    """Raise ``FormatError`` unless the special tokens are in the vocabulary, with the ids declared."""
    for token in SPECIAL_TOKENS.values():
        if token not in vocab:
            raise FormatError(
                f"the vocabulary has no token '{token}', expected a BERT vocabulary", path=source
            )
        if declared.get(token) not in (None, vocab[token]):
            raise FormatError(
                f"token '{token}' has id {vocab[token]}, and is declared with {declared[token]}", path=source
            )
