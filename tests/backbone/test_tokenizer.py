"""The tokenizer against transformers' BertTokenizer, and its offsets against the text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_words import tiny_vocab
from transformers import BertTokenizer

from mp2.backbone import Tokenizer
from mp2.errors import FormatError

TEXTS = [
    "这个东西真的很好，不错。",
    "ABC abj 12\t天气",
    "猫é 3d“是？”",
    "",
    "  \n",
    "[MASK] [SEP] 主题\u3000选项",
    "a" * 101,
]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.from_vocab(tiny_vocab())


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizer:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(tiny_vocab()) + "\n", "utf-8")
    return BertTokenizer(str(path))


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("这个东西天气，。 abZ9é\t\u3000猫-"), max_size=30))
def test_ids_equal_transformers(ours: Tokenizer, theirs: BertTokenizer, text: str) -> None:
    assert ours.encode(text).ids == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", [t for t in TEXTS if "[" not in t])
def test_ids_of_awkward_texts_equal_transformers(ours: Tokenizer, theirs: BertTokenizer, text: str) -> None:
    assert ours.encode(text).ids == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_cut_the_tokens_out_of_the_text_itself(ours: Tokenizer, text: str) -> None:
    pieces = ours.encode(text)
    words = ours.tokens()
    assert len(pieces.ids) == len(pieces.offsets)
    for token_id, (start, end) in zip(*pieces, strict=True):
        if token_id != ours.unk_id:
            assert text[start:end].lower() in (words[token_id].removeprefix("##"), "é")


def test_special_tokens_cannot_be_written_into_a_text(
    ours: Tokenizer, theirs: BertTokenizer, tmp_path: Path
) -> None:
    theirs.save_pretrained(tmp_path)  # a tokenizer.json in which they are special
    fast = Tokenizer.from_folder(tmp_path)
    text = "[MASK][SEP]这[CLS][PAD]"
    assert not {ours.mask_id, ours.sep_id, ours.cls_id, ours.pad_id} & set(ours.encode(text).ids)
    assert fast.encode(text) == ours.encode(text)
    assert fast.encode_ids([text]) == [ours.encode(text).ids]


def test_many_texts_at_once_give_the_same_ids(ours: Tokenizer) -> None:
    assert ours.encode_ids(TEXTS) == [ours.encode(text).ids for text in TEXTS]


def test_case_is_kept_where_the_configuration_says_so(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*tiny_vocab(), "A"]) + "\n", "utf-8")
    assert Tokenizer.from_folder(tmp_path).encode("A").ids == [tiny_vocab().index("a")]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert Tokenizer.from_folder(tmp_path).encode("A").ids == [len(tiny_vocab())]


def test_windows_line_ends_do_not_matter(tmp_path: Path, ours: Tokenizer) -> None:
    (tmp_path / "vocab.txt").write_bytes("\r\n".join(tiny_vocab()).encode() + b"\r\n")
    assert Tokenizer.from_folder(tmp_path).tokens() == ours.tokens()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"vocab.txt": b"[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n"}, r"vocab\.txt: .*no token '\[MASK\]'"),
        ({"vocab.txt": b"\xff\xfe\x00"}, r"vocab\.txt: not UTF-8 text"),
        ({"tokenizer.json": b"{}"}, r"tokenizer\.json: field 'model\.type': is None, expected 'WordPiece'"),
        ({"tokenizer.json": b"{"}, r"tokenizer\.json: not JSON"),
        ({"vocab.txt": b"a\n", "tokenizer_config.json": b"{"}, r"tokenizer_config\.json: not JSON"),
        ({}, r"no vocab\.txt and no tokenizer\.json"),
    ],
)
def test_a_bad_vocabulary_names_the_file(tmp_path: Path, files: dict[str, bytes], expected: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=expected):
        Tokenizer.from_folder(tmp_path)
