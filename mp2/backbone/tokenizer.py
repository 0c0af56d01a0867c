"""Text -> token ids with character offsets, over the ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mp2.backbone.tokenizer_files import TokenizerFiles, plain_tokenizer, read_tokenizer, vocab_of
from mp2.backbone.tokenizer_settings import SPECIAL_TOKENS, TOKENIZER_FILES
from mp2.errors import FormatError
from mp2.files import write_text

__all__ = ["SPECIAL_TOKENS", "Pieces", "Tokenizer"]


class Pieces(NamedTuple):
    """Token ids of a text and, for each, the characters [start, end) of the text it stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Tokenizer:
    """A BERT word-piece tokenizer without special tokens (Chinese text: one character, one token)."""

    def __init__(self, read: TokenizerFiles) -> None:
        """Wrap what was read.

        Raises:
            FormatError: a special token is missing.
        """
        self._tokenizer, self._files = read.fast, read.files
        read.fast.no_padding()
        read.fast.no_truncation()
        read.fast.encode_special_tokens = True  # "[SEP]" in a text is text
        self._vocab: dict[str, int] = read.fast.get_vocab(with_added_tokens=True)
        for token in SPECIAL_TOKENS.values():
            if token not in self._vocab:
                raise FormatError(
                    f"the vocabulary has no token '{token}', expected a BERT vocabulary", path=read.source
                )
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = map(
            self._vocab.__getitem__, SPECIAL_TOKENS.values()
        )

    @classmethod
    def from_vocab(cls, vocab: Sequence[str], *, lowercase: bool = True) -> Tokenizer:
        """Make a tokenizer from the tokens in id order; of a repeated token the last one counts."""
        text = "\n".join(vocab) + "\n"
        files = {"vocab.txt": text}
        if not lowercase:
            files["tokenizer_config.json"] = '{"do_lower_case": false}\n'
        return cls(TokenizerFiles(plain_tokenizer(vocab_of(text), lowercase=lowercase), files, "vocabulary"))

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read a checkpoint folder's tokenizer; ids are those of ``transformers.AutoTokenizer``.

        Raises:
            FormatError: no vocabulary is there, it is damaged, or a setting of it is not followed.
        """
        return cls(read_tokenizer(folder))

    def save(self, folder: Path) -> None:
        """Write the files that it was read from (or would be); others of a tokenizer are taken away."""
        for name, text in self._files.items():
            write_text(folder / name, text)
        for name in set(TOKENIZER_FILES) - self._files.keys():
            (folder / name).unlink(missing_ok=True)

    def to_json(self) -> str:
        """Return it as a ``tokenizer.json`` of the library (without ``encode_special_tokens``)."""
        return str(self._tokenizer.to_str(pretty=True)) + "\n"

    @property
    def vocab_size(self) -> int:
        """Largest token id and one: the rows that an embedding table needs."""
        return max(self._vocab.values()) + 1

    def tokens(self) -> list[str]:
        """Tokens in id order; "" for an id that no text gets."""
        tokens = [""] * self.vocab_size
        for token, token_id in self._vocab.items():
            tokens[token_id] = token
        return tokens

    def encode(self, text: str) -> Pieces:
        """Tokens of ``text`` without special tokens; offsets count characters of ``text`` itself."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return Pieces(list(encoding.ids), list(encoding.offsets))

    def encode_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts at once (no offsets: the fast path for training corpora)."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
