"""Text -> token ids with character offsets, over the ``tokenizers`` library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer as _Tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mp2.errors import FormatError

SPECIAL_TOKENS = {
    "pad_id": "[PAD]",
    "unk_id": "[UNK]",
    "cls_id": "[CLS]",
    "sep_id": "[SEP]",
    "mask_id": "[MASK]",
}


class Pieces(NamedTuple):
    """Token ids of a text and, for each, the characters [start, end) of the text it stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Tokenizer:
    """A BERT word-piece tokenizer without special tokens (Chinese text: one character, one token)."""

    def __init__(
        self, tokenizer: _Tokenizer, source: str | Path = "vocabulary", *, lowercase: bool | None = None
    ) -> None:
        """Wrap ``tokenizer``; ``source`` names it in errors.

        ``lowercase`` tells that its vocabulary and this say all about it (None: they do not).

        Raises:
            FormatError: a special token is missing.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # "[SEP]" in a text is text
        self._tokenizer, self._lowercase = tokenizer, lowercase
        ids = {}
        for field, token in SPECIAL_TOKENS.items():
            token_id = tokenizer.token_to_id(token)
            if token_id is None:
                raise FormatError(
                    f"the vocabulary has no token '{token}', expected a BERT vocabulary", path=source
                )
            ids[field] = token_id
        self.pad_id: int = ids["pad_id"]
        self.unk_id: int = ids["unk_id"]
        self.cls_id: int = ids["cls_id"]
        self.sep_id: int = ids["sep_id"]
        self.mask_id: int = ids["mask_id"]

    @classmethod
    def from_vocab(
        cls, vocab: Sequence[str], *, lowercase: bool = True, source: str | Path = "vocabulary"
    ) -> Tokenizer:
        """Make a tokenizer from the tokens in id order."""
        ids = {token: i for i, token in enumerate(vocab)}
        if len(ids) != len(vocab):
            raise FormatError(f"{len(vocab) - len(ids)} tokens stand twice, expected each once", path=source)
        tokenizer = _Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return cls(tokenizer, source, lowercase=lowercase)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read ``tokenizer.json`` or ``vocab.txt`` from a checkpoint folder.

        Raises:
            FormatError: neither file is there, or it is damaged.
        """
        vocab_file, fast_file = folder / "vocab.txt", folder / "tokenizer.json"
        if vocab_file.is_file():
            settings_file = folder / "tokenizer_config.json"
            lowercase = True
            if settings_file.is_file():
                try:
                    lowercase = bool(json.loads(settings_file.read_text("utf-8")).get("do_lower_case", True))
                except (ValueError, AttributeError) as error:
                    raise FormatError(f"not a JSON object: {error}", path=settings_file) from error
            try:
                vocab = vocab_file.read_text("utf-8").rstrip("\n").split("\n")
            except UnicodeDecodeError as error:
                raise FormatError(
                    f"not UTF-8 text: {error}; expected one token a line", path=vocab_file
                ) from error
            return cls.from_vocab(
                [token.rstrip("\r") for token in vocab], lowercase=lowercase, source=vocab_file
            )
        if fast_file.is_file():
            try:
                return cls(_Tokenizer.from_file(str(fast_file)), fast_file)
            except FormatError:
                raise
            except Exception as error:  # the library raises plain Exception
                raise FormatError(f"not a tokenizer file: {error}", path=fast_file) from error
        raise FormatError("no vocab.txt and no tokenizer.json, expected one of them", path=folder)

    def save(self, folder: Path) -> None:
        """Write what ``from_folder`` reads back as the same tokenizer: vocab.txt, or tokenizer.json."""
        vocab_file, settings_file = folder / "vocab.txt", folder / "tokenizer_config.json"
        if self._lowercase is None:
            (folder / "tokenizer.json").write_text(self.to_json(), "utf-8")
            vocab_file.unlink(missing_ok=True)  # it would be read in its place
            return
        vocab_file.write_text("\n".join(self.tokens()) + "\n", "utf-8")
        if settings_file.exists() or not self._lowercase:
            settings_file.write_text(json.dumps({"do_lower_case": self._lowercase}) + "\n", "utf-8")

    def to_json(self) -> str:
        """Return it as a ``tokenizer.json`` of the library (without ``encode_special_tokens``)."""
        return str(self._tokenizer.to_str(pretty=True)) + "\n"

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def tokens(self) -> list[str]:
        """All tokens in id order."""
        return [str(self._tokenizer.id_to_token(i)) for i in range(self.vocab_size)]

    def encode(self, text: str) -> Pieces:
        """Tokens of ``text`` without special tokens; offsets count characters of ``text`` itself."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return Pieces(list(encoding.ids), list(encoding.offsets))

    def encode_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts at once (no offsets: the fast path for training corpora)."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
